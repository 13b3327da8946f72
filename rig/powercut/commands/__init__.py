"""The commands, one file each, named after it; and the options that several of them share.

A command's file imports nothing but click at its top, so that `--help` costs nothing.
"""

from __future__ import annotations

from pathlib import Path

import click

JSON = click.option("--json", "json_path", metavar="FILE", help="Write the result as JSON (- is standard output).")
SAVE = click.option("--save", type=click.Path(path_type=Path), metavar="DIR", help="Where findings are kept.")
JOBS = click.option("--jobs", type=click.IntRange(1), help="Processes to use.  [default: all cores]")

# In the order in which `--help` lists them.
COMMANDS = (
    "doctor",
    "record",
    "import",
    "capture",
    "show",
    "explore",
    "replay",
    "bundle",
    "check",
    "rescue",
    "gate",
    "fuzz",
    "races",
    "loop",
    "defects",
    "errors",
)


def named_values(pairs: tuple[str, ...]) -> dict[str, str]:
    """The NAME=VALUE words of --option. Raises click.BadParameter."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE", param_hint="--option")
        options[name] = value
    return options
