"""Ctrl-C while a program is being recorded."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptions_are_its_own() -> Iterator[None]:
    """Ctrl-C reaches the program as well: what it does until it ends is recorded, and we wait for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
