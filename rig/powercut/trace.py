"""The trace: what a program did to its files, in the order in which it was seen. Written once, never changed.

A trace file is a row of 512 bytes that says what it is, a row of zeros, and then records, one after the
other, only ever appended. A recorder may die at any moment: every whole record in the file counts. An event
with bytes is written at once, before the recorded program hears that its request is done; records without bytes
(completions, flushes, marks) may wait for the next one that has some, so that a death can cost the last few of
them, never their order. Until the recording is closed in an orderly way the file ends within a record.

All numbers are little-endian. A record is a header of 64 bytes (`RECORD`) at a multiple of 64, followed, if
`stored` is not 0, by a payload. The payload of a write begins in the next row of 512 bytes, at the same
place within the row as the write has within its sector: thus every sector that a write covers is one row of
the file, and a reader can gather a disk's content as `rows[numbers]` from a memory map without copying
anything else. `digest` is the xxh3-64 of the payload, `crc` the CRC-32 of the header behind it.

A record's *position* is its ordinal number. An event is `issued` at the position of its own record and
`completed` at the position of the COMPLETE record that refers to it (`ref`); without one it was still in
flight when the recording ended. Positions, not times, say what happened before what.

    META      payload: JSON object about the whole recording (recorder, scope, format, workload, versions)
    FILE      a file: `file` its id, `length` its size, payload: JSON object with name and role
    BASE      bytes a file held before the recording began; what is not mentioned was zero
    COMPLETE  the event at position `ref` completed with `result` (0, or an errno)
    others    an event, see `Kind`

A file whose role is "guest" is the disk as a guest sees it. Its events are marks: they say what was asked of
the hypervisor and when that was answered, `ref` is the operation's number, and its writes carry no bytes
because stamps (`powercut.stamp`) make them known.

Version 1. A reader refuses any other version.
"""

from __future__ import annotations

import contextlib
import enum
import json
import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from powercut.errors import EnvironmentFault, InputError

SECTOR = 512
MAGIC = b"POWERCUT-TRACE\r\n"
VERSION = 1
MAX_SIZE = 1 << 50  # bytes: no file of a trace is larger, no event ends later
NEVER = np.iinfo(np.int64).max  # `completed` of an event that was in flight when the recording ended

RECORD = np.dtype(
    [
        ("crc", "<u4"),
        ("kind", "u1"),
        ("flags", "u1"),
        ("file", "<u2"),
        ("offset", "<u8"),
        ("length", "<u8"),
        ("ref", "<u8"),
        ("stored", "<u8"),
        ("digest", "<u8"),
        ("time", "<u8"),  # nanoseconds since the recording began; for people, never for the search
        ("result", "<i4"),
        ("zero", "<u4"),
    ]
)
assert RECORD.itemsize == 64
_RELEASE = 64 << 20
_UNFINISHED = (
    b"\xff"  # follows the last record while recording goes on: whoever dies leaves a trace whose end is missing
)
_WAITING = 64  # records without payload that may wait to be written
_HEADER = struct.Struct("<BBHQQQQQQiI")  # RECORD without its crc

EVENT = np.dtype(
    [
        ("kind", "u1"),
        ("flags", "u1"),
        ("file", "<u2"),
        ("result", "<i4"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("issued", "<i8"),
        ("completed", "<i8"),
        ("row", "<i8"),  # the row that holds the payload's first byte
        ("ref", "<i8"),
    ]
)
_COMPLETION = np.dtype([("ref", "<i8"), ("position", "<i8"), ("result", "<i8")])
_PAYLOAD = np.dtype([("begin", "<i8"), ("stored", "<i8"), ("digest", "<u8")])
_MANY = 1 << 16  # records


class Kind(enum.IntEnum):
    """What an event did. A rename within one directory is one change of it."""

    WRITE = 1
    ZERO = 2
    DISCARD = 3
    FLUSH = 4
    TRUNCATE = 5
    CREATE = 6
    LINK = 7
    RENAME = 8
    UNLINK = 9
    SYNC_DIR = 10
    MARK = 11  # a free label and payload (JSON)
    # records that are not events
    COMPLETE = 64
    FILE = 65
    BASE = 66
    META = 67


_EVENTS = frozenset(int(kind) for kind in Kind if kind < Kind.COMPLETE)
_CONTENTS = frozenset((int(Kind.WRITE), int(Kind.ZERO), int(Kind.DISCARD), int(Kind.FLUSH)))


class Flag(enum.IntFlag):
    FUA = 1
    MAY_UNMAP = 2
    LIED = 4  # the recorder acknowledged this flush and did nothing: it counts for nobody but the guest


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of the trace: `role` is "image", "backing" or "guest"; `size` in bytes when recording began (0: a
    guest's disk of which it is not known)."""

    id: int
    name: str
    size: int
    role: str


def _stored_position(end: int, offset: int) -> int:
    """Where the payload of a write at `offset` goes if its record ends at `end`."""
    return -(-end // SECTOR) * SECTOR + offset % SECTOR


class TraceWriter:
    """Appends records to a new trace file. Safe to use from several threads; their order is the order of calls.

    Raises EnvironmentFault if the file cannot be written (a full disk), and from then on: what was whole before
    stays readable.
    """

    def __init__(self, path: str | os.PathLike[str], meta: dict[str, Any]) -> None:
        self.path = os.fspath(path)
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._lock = threading.Lock()
        self._start = time.monotonic_ns()
        self._end = 0
        self._waiting: list[Any] = []  # records without payload that are not written yet
        self._fault: str | None = None  # why recording stopped
        self._position = 0
        self._files = 0
        self._put([MAGIC + struct.pack("<II", VERSION, SECTOR) + bytes(SECTOR - len(MAGIC) - 8), bytes(SECTOR)])
        self._record(Kind.META, payload=json.dumps(meta).encode())

    def _put(self, parts: list[Any]) -> None:
        parts = [*parts, _UNFINISHED]
        total = sum(len(part) for part in parts)
        try:
            written = os.pwritev(self._fd, parts, self._end)
            if written != total:  # a full disk takes a part
                rest = memoryview(b"".join(parts))[written:]
                while rest:
                    rest = rest[os.pwrite(self._fd, rest, self._end + total - len(rest)) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end + len(_UNFINISHED))
            self._fault = f"{self.path}: recording stopped at byte {self._end}: {error.strerror}"
            raise EnvironmentFault(self._fault) from None
        self._end += total - len(_UNFINISHED)

    def _record(
        self,
        kind: Kind,
        file: int = 0,
        offset: int = 0,
        length: int = 0,
        ref: int = 0,
        flags: int = 0,
        result: int = 0,
        payload: Any = None,
    ) -> tuple[int, int]:
        """Append a record. Returns its position, and where its payload begins."""
        stored = 0 if payload is None else len(payload)
        digest = xxhash.xxh3_64_intdigest(payload) if stored else 0
        with self._lock:
            if self._fault is not None:  # a position was lost: whatever came after it would have a wrong one
                raise EnvironmentFault(self._fault)
            now = time.monotonic_ns() - self._start
            body = _HEADER.pack(kind, flags, file, offset, length, ref, stored, digest, now, result, 0)
            self._waiting.append(zlib.crc32(body).to_bytes(4, "little") + body)
            self._position += 1
            begin = 0
            if stored:
                after = self._end + len(self._waiting) * RECORD.itemsize
                begin = _stored_position(after, offset)
                self._waiting += [bytes(begin - after), payload, bytes(-(begin + stored) % RECORD.itemsize)]
            if stored or len(self._waiting) >= _WAITING:
                self._write_waiting()
            return self._position - 1, begin

    def _write_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._put(waiting)

    def file(self, name: str, size: int, role: str) -> int:
        """Declare a file and return its id."""
        about = json.dumps({"name": name, "role": role}).encode()
        self._record(Kind.FILE, file=self._files, length=size, payload=about)
        self._files += 1
        return self._files - 1

    def base(self, file: int, offset: int, data: Any) -> None:
        """Say what `file` held at `offset` before the recording began."""
        self._record(Kind.BASE, file=file, offset=offset, length=len(data), payload=data)

    def base_file(self, file: int, path: str | os.PathLike[str]) -> None:
        """Take the whole of `path`, holes left out, as what `file` held before the recording began."""
        with open(path, "rb") as source:
            size = source.seek(0, os.SEEK_END)
            place = 0
            while place < size:
                try:
                    place = os.lseek(source.fileno(), place, os.SEEK_DATA)
                    stop = os.lseek(source.fileno(), place, os.SEEK_HOLE)
                except OSError:
                    break  # ENXIO: only a hole is left
                while place < stop:
                    data = os.pread(source.fileno(), min(stop - place, 1 << 20), place)
                    if not data:
                        return
                    if data.count(0) != len(data):
                        self.base(file, place, data + bytes(-len(data) % SECTOR))  # a reader takes whole sectors
                    place += len(data)

    def issue(
        self,
        kind: Kind,
        file: int,
        offset: int = 0,
        length: int = 0,
        *,
        data: Any = None,
        flags: int = 0,
        ref: int = 0,
    ) -> int:
        """Record that an event was issued, and return its position."""
        return self._record(kind, file, offset, length, ref, flags, payload=data)[0]

    def issue_stored(
        self, kind: Kind, file: int, offset: int, length: int, data: Any, flags: int = 0
    ) -> tuple[int, int]:
        """The same for an event with bytes; and where in the trace file they begin."""
        return self._record(kind, file, offset, length, flags=flags, payload=data)

    def read(self, place: int, length: int) -> bytes:
        """`length` bytes at byte `place` of the trace file: a payload, or a part of it."""
        return os.pread(self._fd, length, place)

    def complete(self, position: int, result: int = 0) -> None:
        """Record that the event issued at `position` completed with `result` (0, or an errno)."""
        self._record(Kind.COMPLETE, ref=position, result=result)

    def mark(self, label: str, **payload: Any) -> None:
        """Record a free mark."""
        self._record(Kind.MARK, payload=json.dumps({"label": label, **payload}).encode())

    def close(self, *, complete: bool = True) -> None:
        """Write what waits. A recording that is not `complete` is left as one whose end is missing."""
        with self._lock:
            if self._fd >= 0:
                try:
                    if self._fault is None:
                        self._write_waiting()
                        if complete:
                            os.ftruncate(self._fd, self._end)
                finally:
                    os.close(self._fd)
                    self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(complete=kind is None)


def _tuples(rows: NDArray[Any]) -> Iterator[tuple[int, ...]]:
    for begin in range(0, len(rows), _MANY):
        yield from rows[begin : begin + _MANY].tolist()


class _Rows:
    """Rows of an array that grows, as tuples while they are few: a tuple takes ten times the memory."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.new: list[tuple[int, ...]] = []
        self._dtype = dtype
        self._parts = [np.zeros(0, dtype=dtype)]

    def fold(self) -> None:
        self._parts.append(np.array(self.new, dtype=self._dtype))
        self.new.clear()

    def whole(self) -> NDArray[Any]:
        self.fold()
        return np.concatenate(self._parts)


class Trace:
    """A trace file, memory mapped.

    `events` (dtype EVENT) are in the order of issue; `rows` is the file as sectors, row 0 being zeros;
    `length` is the number of positions; `truncated` says in one sentence why the end is missing, or is None.
    Raises InputError for a file that is not a trace, has another version, or is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        try:
            with open(self.path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                head = file.read(2 * SECTOR)
                if head[: len(MAGIC)] != MAGIC:
                    raise InputError(f"{self.path}: not a powercut trace: begins with {head[:16]!r}")
                version, sector = struct.unpack_from("<II", head, len(MAGIC)) if len(head) > 24 else (0, 0)
                if len(head) < 2 * SECTOR:
                    raise InputError(f"{self.path}: a trace cut off within its first {2 * SECTOR} bytes")
                if version != VERSION or sector != SECTOR:
                    raise InputError(f"{self.path}: trace version {version}, this powercut reads version {VERSION}")
                if any(head[SECTOR:]):
                    raise InputError(f"{self.path}: damaged: bytes {SECTOR} to {2 * SECTOR} are not all zeros")
                self._map = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}") from None
        whole = np.frombuffer(self._map, dtype=np.uint8)
        self.rows: NDArray[np.uint8] = whole[SECTOR : size // SECTOR * SECTOR].reshape(-1, SECTOR)
        self.meta: dict[str, Any] = {}
        self.files: list[FileInfo] = []
        self.truncated: str | None = None
        self._walk(size)

    def _walk(self, size: int) -> None:
        """Read every record's header, in order, up to the last whole record."""
        mapped, unpack, crc32 = self._map, _HEADER.unpack_from, zlib.crc32
        issues, completions, payloads = _Rows(EVENT), _Rows(_COMPLETION), _Rows(_PAYLOAD)
        bases: list[tuple[int, int, int, int]] = []
        digests = xxhash.xxh3_128()
        place, position = 2 * SECTOR, 0
        released = place
        while place < size:
            if place - released > _RELEASE:
                self.release()
                released = place
            if position % _MANY == 0:
                for rows in (issues, completions, payloads):
                    rows.fold()
            if place + RECORD.itemsize > size:
                self.truncated = f"{self.path}: ends within the record at byte {place}; read up to there"
                break
            header = mapped[place : place + RECORD.itemsize]
            if int.from_bytes(header[:4], "little") != crc32(header[4:]):
                if not np.frombuffer(mapped, dtype=np.uint8)[place:size].any():
                    self.truncated = f"{self.path}: only zeros from byte {place} on; read up to there"
                    break
                raise InputError(f"{self.path}: damaged record at byte {place} (header checksum does not match)")
            kind, flags, file, offset, length, ref, stored, digest, _, result, _ = unpack(header, 4)
            begin = after = place + RECORD.itemsize
            row = 0
            if offset + length > MAX_SIZE or ref > NEVER:
                what = f"offset {offset}, length {length}, ref {ref}"
                raise InputError(f"{self.path}: the record at byte {place} makes no sense: {what}")
            if stored:
                begin = _stored_position(after, offset)
                after = begin + stored + -(begin + stored) % RECORD.itemsize
                row = begin // SECTOR - 1
                if after > size:
                    self.truncated = (
                        f"{self.path}: ends within the payload of the record at byte {place}; read up to there"
                    )
                    break
                payloads.new.append((begin, stored, digest))
            if kind in _EVENTS:
                if kind in _CONTENTS:
                    self._check_file(place, kind, file, length, stored)
                issues.new.append((kind, flags, file, result, offset, length, position, NEVER, row, ref))
            elif kind == Kind.COMPLETE:
                completions.new.append((ref, position, result))
            elif kind == Kind.FILE:
                about = self._json(place, begin, stored, digest)
                name, role = about.get("name"), about.get("role")
                if file != len(self.files) or not isinstance(name, str) or not isinstance(role, str):
                    raise InputError(f"{self.path}: the record at byte {place} declares file {file} as {about}")
                self.files.append(FileInfo(file, name, length, role))
            elif kind == Kind.META:
                self.meta = self._json(place, begin, stored, digest)
            elif kind == Kind.BASE:
                self._check_file(place, kind, file, length, stored)
                bases.append((file, offset, length, row))
            else:
                raise InputError(f"{self.path}: unknown record kind {kind} at byte {place}")
            digests.update(header)
            place, position = after, position + 1
        self.length = position
        self.hash = digests.hexdigest()
        self.events = issues.whole()
        self._payloads = payloads.whole()
        self.bases = np.array(bases, dtype=np.int64).reshape(-1, 4)
        done = completions.whole()
        if len(done):
            refs, positions, results = done["ref"], done["position"], done["result"]
            index = np.searchsorted(self.events["issued"], refs)
            known = index < len(self.events)
            if not known.all() or (self.events["issued"][index] != refs).any() or (refs >= positions).any():
                raise InputError(f"{self.path}: a completion refers to an event that was not issued before it")
            if len(np.unique(refs)) != len(refs):
                raise InputError(f"{self.path}: an event was completed twice")
            self.events["completed"][index] = positions
            self.events["result"][index] = results

    def _check_file(self, place: int, kind: int, file: int, length: int, stored: int) -> None:
        """Whether an event speaks of a declared file, and its bytes are there."""
        if file >= len(self.files):
            raise InputError(f"{self.path}: the record at byte {place} speaks of file {file}, which was not declared")
        if kind in (Kind.WRITE, Kind.BASE) and stored != (0 if self.files[file].role == "guest" else length):
            raise InputError(f"{self.path}: the record at byte {place} has {stored} bytes for a range of {length}")

    def _json(self, place: int, begin: int, stored: int, digest: int) -> dict[str, Any]:
        """The payload of a record that says something about the trace itself."""
        payload = bytes(self._map[begin : begin + stored])
        about = None
        with contextlib.suppress(ValueError, RecursionError):
            if xxhash.xxh3_64_intdigest(payload) == digest:
                about = json.loads(payload)
        if not isinstance(about, dict):
            raise InputError(f"{self.path}: damaged payload of the record at byte {place}")
        return about

    def verify(self) -> None:
        """Compare every payload with its digest. Raises InputError naming the first that differs."""
        view = memoryview(self._map)
        read = 0
        for begin, stored, digest in _tuples(self._payloads):
            if xxhash.xxh3_64_intdigest(view[begin : begin + stored]) != digest:
                raise InputError(
                    f"{self.path}: damaged payload at byte {begin} ({stored} bytes): digest does not match"
                )
            read += stored
            if read >= _RELEASE:
                self.release()
                read = 0
        self.release()

    def release(self) -> None:
        """Give back the memory of what was read so far; it stays in the system's cache. Call it now and then."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def payload(self, event: np.void) -> memoryview:
        """The bytes of a write event."""
        begin = (int(event["row"]) + 1) * SECTOR + int(event["offset"]) % SECTOR
        return memoryview(self._map)[begin : begin + int(event["length"])]

    def about(self, event: np.void) -> dict[str, Any]:
        """What a mark or a change of names says of itself; nothing for an event without payload."""
        row = int(event["row"])
        if not row:
            return {}
        begin = (row + 1) * SECTOR + int(event["offset"]) % SECTOR
        at = np.searchsorted(self._payloads["begin"], begin)
        _, stored, digest = self._payloads[at].tolist()
        return self._json(begin, begin, stored, digest)

    def file(self, role: str) -> FileInfo | None:
        """The file that plays `role`, or None."""
        return next((info for info in self.files if info.role == role), None)
