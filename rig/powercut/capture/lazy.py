"""The bytes of lazy writes, which the recorder left where the program wrote them (recorder_lazy.h).

What a range held at some moment is what the first undo record after that moment says of it, and where none does, what
the file holds at the end. A checksum, taken when the bytes were written, says whether that is so: bytes that something
unseen changed are never taken for the program's.
"""

from __future__ import annotations

import ctypes
import os
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from powercut.capture.recorded import Call, Key, LostBytesError, Undo
from powercut.errors import InputError

_NO_END = 1 << 63
Checksum = Callable[[bytes], int]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A range that one undo record tells of, or, without one, the file itself."""

    begin: int
    end: int
    undo: Undo | None


class _Later:
    """Who knows what each byte of a file held, going back in time: at first the file itself."""

    def __init__(self) -> None:
        self._ends = [_NO_END]
        self._undos: list[Undo | None] = [None]

    def overlay(self, undo: Undo) -> None:
        begin, end = undo.offset, undo.offset + undo.length
        self._cut(begin)
        self._cut(end)
        first, last = bisect_right(self._ends, begin), bisect_left(self._ends, end) + 1
        self._ends[first:last], self._undos[first:last] = [end], [undo]

    def _cut(self, place: int) -> None:
        at = bisect_left(self._ends, place)
        if self._ends[at] != place and place:
            self._ends.insert(at, place)
            self._undos.insert(at, self._undos[at])

    def pieces(self, begin: int, end: int) -> list[_Piece]:
        found, at = [], bisect_right(self._ends, begin)
        while begin < end:
            stop = min(end, self._ends[at])
            found.append(_Piece(begin, stop, self._undos[at]))
            begin, at = stop, at + 1
        return found


class Files:
    """The files at the end, by inode. `roots`: where they may lie."""

    def __init__(self, roots: Iterable[str]) -> None:
        self._paths: dict[Key, str] = {}
        self._open: tuple[Key, int] | None = None
        waiting = list(roots)
        while waiting:
            path = waiting.pop()
            with suppress(OSError):  # gone, or not ours to read: its bytes will be missed if they are needed
                status = os.lstat(path)
                self._paths[status.st_dev, status.st_ino] = path
                if stat.S_ISDIR(status.st_mode):
                    waiting += [os.path.join(path, name) for name in os.listdir(path)]

    def read(self, key: Key, begin: int, length: int) -> bytes:
        """What the file holds there: less at its end, nothing if it is gone."""
        try:
            if self._open is None or self._open[0] != key:
                self.close()
                self._open = key, os.open(self._paths[key], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            return os.pread(self._open[1], length, begin)
        except (OSError, KeyError):
            return b""

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None


@dataclass(slots=True)
class Lazy:
    """The bytes of one write, read when they are asked for."""

    key: Key
    pieces: list[_Piece]
    checksum: int
    files: Files
    check: Checksum

    def found(self) -> bytes:
        """What is there, up to where the file ended."""
        parts: list[bytes | memoryview] = []
        for piece in self.pieces:
            if piece.undo is None:
                part: bytes | memoryview = self.files.read(self.key, piece.begin, piece.end - piece.begin)
            else:
                part = piece.undo.data[piece.begin - piece.undo.offset : piece.end - piece.undo.offset]
            parts.append(part)
            if len(part) < piece.end - piece.begin:
                break
        return b"".join(parts)

    def read(self) -> bytes:
        """What was written. Raises LostBytesError."""
        data = self.found()
        if self.check(data) != self.checksum:
            raise LostBytesError
        return data


def checksum_of(library: Path) -> Checksum:
    """The recorder's own checksum. Raises InputError."""
    try:
        function = ctypes.CDLL(str(library)).powercut_checksum
    except (OSError, AttributeError) as error:
        raise InputError(f"{library}: not the recorder: {error}") from None
    function.restype, function.argtypes = ctypes.c_uint64, (ctypes.c_char_p, ctypes.c_size_t)
    return lambda data: int(function(data, len(data)))


def find(calls: list[Call], undos: list[Undo], files: Files, check: Checksum, stopped: bool) -> None:
    """Tell every lazy call among `calls`, which are in the order of their positions, where its bytes are.

    One that never returned did what is found of it, and no more: the kernel heard no more. Not so if it was the
    recorder that `stopped`.
    """
    later: dict[Key, _Later] = {}
    waiting = sorted(undos, key=lambda undo: undo.position)
    for call in reversed(calls):
        if call.checksum is None:
            continue
        while waiting and waiting[-1].position > call.position:
            undo = waiting.pop()
            later.setdefault(undo.key, _Later()).overlay(undo)
        begin = call.offset
        pieces = later.setdefault(call.key, _Later()).pieces(begin, begin + call.length)
        lazy = Lazy(call.key, pieces, call.checksum, files, check)
        if call.result is None and not stopped:
            call.data = memoryview(lazy.found())
            call.length = len(call.data)
        else:
            call.lazy = lazy
