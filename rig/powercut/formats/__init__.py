"""What is under test: one small file per format behind one protocol, and a table from name to class."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from powercut.crash.contents import Contents, Tokens
from powercut.crash.disk import Deciding
from powercut.crash.explore import Report
from powercut.crash.promise import Promise
from powercut.disk import Disk
from powercut.errors import InputError


@dataclass(frozen=True, slots=True)
class Recording:
    """What a judge looks at while a trace goes by: the image's contents, its backing file's (or None), what the
    guest was promised (None: the trace does not say), and what rows mean as stamps."""

    image: Contents
    backing: Contents | None
    promise: Promise | None
    tokens: Tokens


class Format(Protocol):
    """A disk image format under test. `judge` is called for every crash state that the search distinguishes, and
    reports whatever rule it breaks; an instance follows one trace through its epochs."""

    def __init__(self, recording: Recording) -> None: ...

    @staticmethod
    def host_size(size: int) -> int:
        """How many bytes an image of a disk of `size` bytes may come to need on a device that cannot grow."""

    @staticmethod
    def roles(disk: Disk) -> Callable[[int], str]:
        """Names what a byte of the image is for ("L1 table", "guest data at sector 8"), as this state has it."""

    def judge(self, disk: Deciding, report: Report, enough: Callable[[str], bool]) -> None: ...


_TABLE = {
    "qcow2": "powercut.formats.qcow2.judge:Qcow2",
    "raw": "powercut.formats.raw:Raw",
}
NAMES = tuple(_TABLE)


def find(name: str) -> Any:
    """The class for the format called `name`. Raises InputError."""
    if name not in _TABLE:
        raise InputError(f"format {name!r} is not one of {', '.join(NAMES)}")
    module, _, attribute = _TABLE[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
