"""Errors at a chosen moment, by QEMU's blkdebug driver under the format (docs/devel/blkdebug.txt).

A format driver names what it is about to do ("l2_update"), and the block layer names every write and flush
("pwritev", "flush_to_disk"). A rule of blkdebug's is armed by such an event and fails the next request; rules that
count states make it the n-th event of that name. blkdebug tells nobody what it counted, so `Counter` asks it by
reading: there is a rule for each count, which fails the read of a sector of its own.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from powercut.faults import NODE, Armed, unharmed
from powercut.guest.control import Control, Guest
from powercut.guest.daemon import create_image
from powercut.trace import SECTOR

ERRNOS: Final = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC}
# BlkdebugEvent (qapi/block-core.json, QEMU 7.2), without "none"
EVENTS: Final = (
    "l1_update", "l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table",
    "l1_shrink_write_table", "l1_shrink_free_l2_clusters", "l2_load", "l2_update", "l2_update_compressed",
    "l2_alloc_cow_read", "l2_alloc_write", "read_aio", "read_backing_aio", "read_compressed", "write_aio",
    "write_compressed", "vmstate_load", "vmstate_save", "cow_read", "cow_write", "reftable_load", "reftable_grow",
    "reftable_update", "refblock_load", "refblock_update", "refblock_update_part", "refblock_alloc",
    "refblock_alloc_hookup", "refblock_alloc_write", "refblock_alloc_write_blocks", "refblock_alloc_write_table",
    "refblock_alloc_switch_table", "cluster_alloc", "cluster_alloc_bytes", "cluster_alloc_space", "cluster_free",
    "cor_write", "empty_image_prepare", "pwritev_rmw_head", "pwritev_rmw_after_head", "pwritev_rmw_tail",
    "pwritev_rmw_after_tail", "pwritev", "pwritev_zero", "pwritev_done", "flush_to_os", "flush_to_disk",
)  # fmt: skip
AT_MOST: Final = (3, 24, 192, 1536)  # events that are counted: QEMU takes its time to read many rules
_ASKED = "read_aio"  # what the driver "raw" raises below itself when it is read
_PROBE = "probe"


@dataclass(frozen=True, slots=True)
class Injection:
    """Event number `nth` (from 1) of this name makes the next request fail with `error` (a key of ERRNOS), and the
    same event does so again, `times` times in all; None: from then on every request fails. A full disk (ENOSPC) lets
    everything pass that needs no space."""

    event: str
    nth: int = 1
    error: str = "EIO"
    times: int | None = 1

    def __str__(self) -> str:
        lasting = {1: "once", None: "for good"}.get(self.times, f"{self.times} times")
        return f"{self.error} {lasting} at {self.event} {self.nth}"

    @property
    def lasting(self) -> str:
        return "good" if self.times is None else "once"

    @property
    def table(self) -> dict[str, Any]:
        return {"event": self.event, "nth": self.nth}

    def earlier(self) -> Iterator[Injection]:
        yield from (replace(self, nth=nth) for nth in range(self.nth, 0, -1))

    @contextmanager
    def armed(self, template: Path, out: Path) -> Iterator[Armed]:
        with unharmed(template, out) as plain:
            yield Armed(node(plain.node, self.rules()))

    def rules(self) -> dict[str, Any]:
        """Options of a blkdebug node."""
        after = self.nth + (self.times or 1)
        what: dict[str, Any] = {"event": self.event, "errno": ERRNOS[self.error], "once": self.times is not None}
        kinds: list[str | None] = [None]
        if self.error == "ENOSPC":
            lasting: list[str | None] = ["write", "write-zeroes"]
            single = {"pwritev_zero": "write-zeroes", "flush_to_os": "flush", "flush_to_disk": "flush"}
            kinds = lasting if self.times is None else [single.get(self.event, "write")]
        fail = [
            {**what, "state": state, **({"iotype": kind} if kind else {})}
            for state in range(self.nth, after)
            for kind in kinds
        ]
        return {"inject-error": fail, "set-state": _count(self.event, after)}


def _count(event: str, below: int) -> list[dict[str, Any]]:
    """Rules by which the state, at first 1, grows by 1 with each event, up to `below`."""
    return [{"event": event, "state": state, "new_state": state + 1} for state in range(1, below)]


def node(file: dict[str, Any], rules: dict[str, Any]) -> dict[str, Any]:
    """A blkdebug node over the node `file`."""
    return {"driver": "blkdebug", "image": file, **rules}


def counting(event: str, most: int) -> dict[str, Any]:
    """Rules that count an event, up to `most`, for a `Counter` to read."""
    tell = [
        {"event": _ASKED, "state": state, "iotype": "read", "sector": state, "once": True, "errno": errno.EIO}
        for state in range(1, most + 2)
    ]
    return {"inject-error": tell, "set-state": _count(event, most + 2)}


class Counter:
    """Reads what a node made of `counting` rules has counted, beside a format that uses it; a context manager.

    The reader is the backing file of an empty overlay (`overlay`, made by the first who needs it): only such a reader
    lets the format resize the file."""

    def __init__(self, control: Control, overlay: Path, event: str) -> None:
        if not overlay.exists():
            create_image(overlay, "qcow2", 1 << 30, {})
        self._control, self._event = control, event
        backing = {"driver": "raw", "file": NODE, "read-only": True}
        file = {"driver": "file", "filename": str(overlay)}
        probe = {"driver": "qcow2", "node-name": _PROBE, "read-only": True, "file": file, "backing": backing}
        control.ask("blockdev-add", **probe)
        self._client: Guest = control.export(_PROBE)

    def read(self, most: int) -> int | None:
        """How many events came; None: more than `most`."""
        for number in range(most + 1):
            state = 1 + (2 * number if self._event == _ASKED else number)  # asking raises the event, too
            try:
                self._client.read(state * SECTOR, SECTOR)
            except OSError:
                return number
        return None

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.withdraw(self._client, _PROBE)
        self._control.when_free("blockdev-del", node_name=_PROBE)
