"""`powercut doctor`."""

from __future__ import annotations

import click

from powercut.commands import JSON


@click.command()
@JSON
def doctor(json_path: str | None) -> None:
    """Show what this machine has, and what is missing for what."""
    from powercut.doctor import examine
    from powercut.report import document

    findings = examine()
    if json_path != "-":
        for item in findings:
            colour = {"ok": "green", "missing": "red", "limited": "yellow"}[item.state]
            click.echo(f"{click.style(f'{item.state:8}', fg=colour)} {item.name:24} {item.detail}")
            if item.state != "ok":
                click.echo(f"{'':9}{'':24} for {item.needed_for}; {item.mend}")
    items = [
        {"name": i.name, "state": i.state, "detail": i.detail, "needed_for": i.needed_for, "mend": i.mend}
        for i in findings
    ]
    document.write({"schema": "powercut.doctor/1", "findings": items}, json_path)
