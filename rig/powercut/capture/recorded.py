"""What the recorder shares with us: the control file it needs, and the log it leaves (see recorder_log.h).

A log is a folder: `control`, `chunk.N` (records of 64 bytes, each with a payload) and `data` (larger payloads).
"""

from __future__ import annotations

import enum
import errno
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from powercut.errors import InputError

_MAGIC = 0x70776372636F7264
_RECORD = struct.Struct("<QIIQQQQqQ")  # magic, size, op and flags, position, dev, ino, offset, length, extra
_CONTROL = struct.Struct("<8Q")  # locks ready, position, chunks, end of data, processes, failed, refused, slots
_SLOT = struct.Struct("<3Q")  # key, changes, end of what is lazy
_ROOTS, _LAZY, _ROOTS_SIZE, _LAZY_SIZE = 8192, 16384, 8192, 8 << 16
_FREE, _GONE = 0, 1
_WORD = (1 << 64) - 1
assert _RECORD.size == 64


class Op(enum.IntEnum):
    WRITE = 1
    ZERO = 2
    PUNCH = 3
    FLUSH = 4
    TRUNCATE = 5
    OPEN = 6
    LINK = 7
    RENAME = 8
    UNLINK = 9
    SYNC = 10
    ALLOCATE = 11
    MKDIR = 12
    SYMLINK = 13
    RANGE = 14
    NOTE = 15
    EXIT = 16
    SAVED = 17  # what a range held before it was changed
    BYTES = 18  # of the lazy write at the position `offset`


_NAMES = frozenset({Op.OPEN, Op.LINK, Op.RENAME, Op.UNLINK, Op.MKDIR, Op.SYMLINK})


class Mode(enum.IntFlag):
    FUA = 1
    SPILLED = 2  # the payload is in the file `data`, at `extra`
    KEEP_SIZE = 4
    CREATED = 8
    TRUNCATED = 16
    UNNAMED = 32
    EXCHANGE = 64
    LAZY = 128  # `extra` is the checksum of bytes that were left in the file


Key = tuple[int, int]  # device, inode


class LostBytesError(Exception):
    """What a program wrote is not where it was written any more."""


class LazyBytes(Protocol):
    def read(self) -> bytes:
        """What was written. Raises LostBytesError."""


@dataclass(slots=True)
class Call:
    """One call the program made. `result` is what it returned, or minus an errno; None: it never returned."""

    op: Op
    flags: int
    position: int
    key: Key
    offset: int
    length: int
    data: memoryview
    ended: int = 0  # position of the return
    result: int | None = None
    end_key: Key = (0, 0)  # the file that it opened, or named
    end_offset: int = 0
    end_path: str = ""
    checksum: int | None = None  # of the bytes of a lazy write
    lazy: LazyBytes | None = None  # those bytes, once they are found

    @property
    def changes_names(self) -> bool:
        return self.op in _NAMES

    @property
    def names(self) -> list[str]:
        return [os.fsdecode(name) for name in bytes(self.data).split(b"\0")[:2]]


@dataclass(frozen=True, slots=True)
class Undo:
    """What a range of a file held at `position`. `data` ends where the file ended."""

    position: int
    key: Key
    offset: int
    length: int
    data: memoryview


def make_control(folder: Path, roots: Iterable[str], keys: Iterable[Key]) -> None:
    """Make a log folder for a recorder that watches `roots`, where the files `keys` are already."""
    text = b"".join(os.fsencode(root) + b"\0" for root in roots) + b"\0"
    if len(text) > _ROOTS_SIZE:
        raise InputError(f"the names of the directories to watch take {len(text)} bytes, more than {_ROOTS_SIZE}")
    hashed = {_hash(*key) for key in keys}
    slots = 1 << max(16, (4 * len(hashed)).bit_length())
    table = [_FREE] * slots
    for key in hashed:
        place = key >> 32
        while table[place % slots]:
            place += 1
        table[place % slots] = key
    packed = bytearray(slots * _SLOT.size)
    for place, key in enumerate(table):
        if key:
            _SLOT.pack_into(packed, place * _SLOT.size, key, 0, 0)
    with open(folder / "control", "wb") as out:
        out.write(_CONTROL.pack(0, 0, 0, 0, 0, 0, 0, slots).ljust(_ROOTS, b"\0"))
        out.write(text.ljust(_LAZY - _ROOTS, b"\0") + bytes(_LAZY_SIZE))
        out.write(packed)
    (folder / "data").touch()


def _hash(device: int, inode: int) -> int:
    key = (inode * 0x9E3779B97F4A7C15 & _WORD) ^ (device * 0xC2B2AE3D27D4EB4F & _WORD)
    return key if key > _GONE else key + 2


def processes(folder: Path) -> int:
    """How many times a program started with the recorder in it."""
    return int(_CONTROL.unpack((folder / "control").read_bytes()[: _CONTROL.size])[4])


def _map(path: Path) -> memoryview:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return memoryview(mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)) if size else memoryview(b"")


def why_stopped(folder: Path) -> str | None:
    """Why the recorder stopped before the program did, in words; None: it did not."""
    failed = _CONTROL.unpack((folder / "control").read_bytes()[: _CONTROL.size])[5]
    if failed == errno.ENFILE:
        return "recording stopped: the program made more files than the recorder can follow"
    return f"recording stopped: {os.strerror(failed)}" if failed else None


def read(folder: Path) -> tuple[list[Call], list[Undo]]:
    """The calls in the log, in the order of their positions, up to where the recorder stopped; and its undo records."""
    spilled = _map(folder / "data")
    calls: dict[int, Call] = {}
    undos: list[Undo] = []
    ends: list[tuple[int, int, Key, int, int, str]] = []
    copied: list[tuple[int, memoryview]] = []
    for path in folder.glob("chunk.*"):
        chunk = _map(path)
        place, end = 64, min(len(chunk), int.from_bytes(chunk[:8], "little"))
        while place + 64 <= end:
            magic, size, both, position, device, inode, offset, length, extra = _RECORD.unpack_from(chunk, place)
            if magic ^ position != _MAGIC:
                place += 64  # its writer died before it was whole
                continue
            payload = chunk[place + 64 : place + size]
            place += -(-size // 64) * 64
            op, flags = both & 0xFFFF, both >> 16
            if flags & Mode.SPILLED:
                payload = spilled[extra : extra + length]
            if op == Op.EXIT:
                name = os.fsdecode(bytes(payload[:-1])) if payload else ""
                ends.append((extra, position, (device, inode), offset, length, name))
            elif op == Op.SAVED:
                undos.append(Undo(position, (device, inode), offset, length, payload))
            elif op == Op.BYTES:
                copied.append((offset, payload))
            else:
                checksum = extra if flags & Mode.LAZY else None
                calls[position] = Call(Op(op), flags, position, (device, inode), offset, length, payload)
                calls[position].checksum = checksum
    for entered, payload in copied:
        calls[entered].data, calls[entered].checksum = payload, None
    for entered, position, key, offset, result, name in ends:
        call = calls[entered]
        call.ended, call.result = position, result
        call.end_key, call.end_offset, call.end_path = key, offset, name
    return sorted(calls.values(), key=lambda call: call.position), undos
