"""The command line. Exit codes: 0 HOLDS or clean, 1 BROKEN or damaged, 2 usage or environment, 3 UNKNOWN.

A command is a file in `powercut.commands` and a line in its table; only the one that is run is imported.
"""

from __future__ import annotations

import importlib
import keyword
from typing import Any

import click

from powercut import __version__
from powercut.commands import COMMANDS
from powercut.errors import PowercutError


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
