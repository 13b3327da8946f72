"""The ways in which a running guest ends: one small file each, found by this table.

A file has `end(running)`, which returns when the machine has ended; `KEEPS`, what must be in the image then; and, where
it is not the default, `LEAKS`: whether clusters that nobody refers to are legal afterwards; `HEADER`: whether the
header's fixed part may change; `AGENT`: whether the guest must run our agent; `RECORDED`: whether what QEMU asks of
the image is recorded, and every crash state explored, in place of what is looked at otherwise; `DIRECT`: whether the
image's node must be the device's own, with nothing above it.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from powercut.errors import InputError
from powercut.guest.images import Image
from powercut.guest.ledger import Keeps, Ledger
from powercut.guest.machine import Machine
from powercut.guest.writing import Writing

ENDINGS: Final = (
    "quit",
    "sigterm",
    "sigkill",
    "powerdown",
    "reset-quit",
    "guest-poweroff",
    "guest-panic",
    "savevm-quit",
    "snapshot-save-quit",
    "loadvm-quit",
    "hot-unplug",
    "commit-quit",
    "mirror-quit",
    "stream-quit",
    "power-cut",
)


@dataclass(frozen=True, slots=True)
class Running:
    """A machine in the middle of its work. Block node `disk0` is the first of `images`, and so on; an ending that puts
    another image on top puts it here, too, those that must be sound besides into `others`, and what snapshots must
    hold into `snapshots`. `writing` is None where nothing is written to disks themselves. `number` is the loop's;
    `random` is its own."""

    machine: Machine
    images: list[Image]
    writing: Writing | None
    random: random.Random
    number: int = 0
    others: list[Image] = field(default_factory=list)
    snapshots: dict[str, list[Ledger]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ending:
    """See the module."""

    name: str
    end: Callable[[Running], None]
    keeps: Keeps
    leaks: bool
    header: bool
    agent: bool
    recorded: bool
    direct: bool


def find(name: str) -> Ending:
    """The ending of that name. Raises InputError."""
    if name not in ENDINGS:
        raise InputError(f"no ending {name!r}; there are {', '.join(ENDINGS)}")
    module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
    traits = (getattr(module, trait, False) for trait in ("LEAKS", "HEADER", "AGENT", "RECORDED", "DIRECT"))
    return Ending(name, module.end, module.KEEPS, *traits)
