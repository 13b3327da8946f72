"""Results as text for people."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def count(number: int, what: str) -> str:
    """ "1 epoch", "1,000 epochs"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def states(log2: float) -> str:
    """How many crash states, as a power of two."""
    return f"2^{log2:,.0f}" if log2 == int(log2) else f"2^{log2:,.1f}"


@contextmanager
def progress(title: str | Callable[[], str]) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error once the work has taken two seconds; nothing where that is not a terminal. A `title`
    that changes is asked for each time."""
    if not sys.stderr.isatty():
        yield lambda done, of: None
        return
    from rich.console import Console  # only a terminal pays for it
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    begin = time.monotonic()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title if isinstance(title, str) else title(), total=None)
    started = False

    def show(done: int, of: int) -> None:
        nonlocal started
        if not started and time.monotonic() - begin > 2:
            bar.start()
            started = True
        if started:
            bar.update(task, completed=done, total=of, description=title if isinstance(title, str) else title())

    try:
        yield show
    finally:
        if started:
            bar.stop()


def verdict_word(word: str) -> str:
    """A verdict in its colour."""
    import click

    colour = {"HOLDS": "green", "CLEAN": "green", "BROKEN": "red", "UNKNOWN": "yellow"}[word]
    return click.style(word, fg=colour, bold=True)
