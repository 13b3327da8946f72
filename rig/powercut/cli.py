"""The command line. Exit codes: 0 HOLDS or clean, 1 BROKEN or damaged, 2 usage or environment, 3 UNKNOWN.

With `--bisect` they are those of `git bisect run`: 0 good, 1 bad, 125 for everything that says neither.

A command is a file in `powercut.commands` and a line in its table; only the one that is run is imported.
"""

from __future__ import annotations

import importlib
import keyword
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from powercut import __version__
from powercut.commands import COMMANDS
from powercut.errors import PowercutError

_UNJUDGED = 125  # to `git bisect run`: skip this commit


class _Group(click.Group):
    """Finds commands by the table, and turns the rig's own errors into one sentence and exit code 2."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        attribute = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command = getattr(importlib.import_module(f"powercut.commands.{attribute}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def main(self, args: Sequence[str] | None = None, *more: Any, **keywords: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        if "--bisect" not in words:
            return super().main(args, *more, **keywords)
        # A mistake on the command line is 2, a bug of ours 1, and to git bisect all of these are bad.
        code: object = _UNJUDGED
        try:
            with self.make_context("powercut", words) as ctx:
                self.invoke(ctx)
        except (SystemExit, click.exceptions.Exit) as end:
            code = end.code if isinstance(end, SystemExit) else end.exit_code
        except click.ClickException as error:
            error.show()
        except Exception:
            traceback.print_exc()
        sys.exit(code if code in (0, 1) else _UNJUDGED)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PowercutError as error:
            click.echo(f"powercut: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("powercut: interrupted; nothing was concluded", err=True)
            ctx.exit(3)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def main() -> None:
    """Pull the plug on a disk image at every possible instant, and show what survives."""


if __name__ == "__main__":
    main()
