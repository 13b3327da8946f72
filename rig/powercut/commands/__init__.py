"""The commands, one file each, named after it; and the options that several of them share.

A command's file imports nothing but click at its top, so that `--help` costs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

JSON = click.option("--json", "json_path", metavar="FILE", help="Write the result as JSON (- is standard output).")
SAVE = click.option("--save", type=click.Path(path_type=Path), metavar="DIR", help="Where findings are kept.")
JOBS = click.option("--jobs", type=click.IntRange(1), help="Processes to use.  [default: all cores]")

QEMU = click.option(
    "--qemu", "qemus", multiple=True, metavar="PATH",
    help="Use the programs in this folder, or beside this program. Give it twice to compare, in one table.",
)  # fmt: skip
BISECT = click.option(  # what it does is up to `powercut.cli`
    "--bisect", is_flag=True, help="Exit as `git bisect run` wants it: 0 good, 1 bad, 125 not to be judged."
)

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
    "shrink",
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


def compared(qemus: tuple[str, ...], work: Callable[[str], Any], json_path: str | None) -> NoReturn:
    """Have `work` done with each QEMU (it returns a `powercut.compare.Worked`), print one table, and end."""
    from powercut import compare
    from powercut.report import document

    sides = compare.run(qemus, work)
    if json_path != "-":
        click.echo(compare.text(sides))
    document.write(compare.document(sides), json_path)
    sys.exit(compare.exit_code(sides))
