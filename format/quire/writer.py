"""One writer: the lock of a set, and who holds it."""

from __future__ import annotations

import os
import socket
import sys

from quire.errors import Busy, Damaged, opening
from quire.store import File, Store

LOCK = "lock"
_MOST = 512


def take(store: Store) -> File:
    """Take the lock for as long as the file is open, and write into it who we are. Raises Busy, which says who is."""
    try:
        with opening(LOCK):
            file = store.open(LOCK, write=True)
    except Damaged:
        file = store.create(LOCK)
    try:
        if not file.lock():
            holder = file.read(0, _MOST).decode(errors="replace").strip("\0\n")
            raise Busy(store.path, f"somebody else writes to it: {_printable(holder) or 'who does not say'}")
        text = f"pid {os.getpid()} on {socket.gethostname()}: {os.path.basename(sys.argv[0]) or 'python'}\n".encode()
        file.truncate(0)
        file.write(0, text[:_MOST])
    except BaseException:
        file.close()
        raise
    return file


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
