"""The only module that touches the filesystem: a small protocol, and the real one.

A *store* is one directory of regular files; a set of leaves lives in one. Everything the format does to a disk goes
through these few methods, so that a store that records, one that fails at the n-th call, or one that shows a crash
state can stand in for the real one.

What may be relied on after a crash, and what may not, on every filesystem (measured on ext4, XFS and btrfs):

    File.sync      writes, punches, truncates and allocations of this file that returned before the call, and its
                   size, are durable once it returns. Before that each sector is old or new by itself.
    Store.sync_dir creations, renames and unlinks in this directory that returned before the call are durable.
                   Before that each may be lost by itself: a file that was synced can be without its name, and one that
                   was unlinked can be back. So no name is ever used a second time, and strangers are tolerated.
    a failed sync  says nothing about what is durable, and the page cache may lie from then on: never repeat it.

Errors are OSError, with the file's name where there is one. Methods may be called from several threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # linux/falloc.h
_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class File(Protocol):
    """An open file. Offsets and lengths are bytes."""

    name: str

    def size(self) -> int:
        """How long the file is."""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`; fewer only where the file ends."""

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of `data` at `offset`. If it raises, any part may have been written."""

    def truncate(self, size: int) -> None:
        """Make the file `size` bytes long; what is added reads as zeros."""

    def allocate(self, offset: int, length: int) -> None:
        """Reserve space for a range, so that writing to it cannot meet ENOSPC; what is added reads as zeros."""

    def punch(self, offset: int, length: int) -> None:
        """Make a range read as zeros and give its space back where the filesystem can."""

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The (offset, length) within a range that may hold something else than a hole. Holes mean nothing to the
        format; this only spares reading them."""

    def sync(self) -> None:
        """fdatasync."""

    def drop_cache(self) -> None:
        """Ask the system to forget what it caches of this file, so that what is read next comes from the disk. Call
        it after `sync`, or it keeps what is dirty."""

    def lock(self) -> bool:
        """Take the exclusive lock of this file for as long as it is open; False if another holds it."""

    def close(self) -> None: ...


class Store(Protocol):
    """One directory. Names are single path components. `path` names it in messages."""

    path: str

    def names(self) -> list[str]:
        """All names in the directory, sorted, strangers included."""

    def create(self, name: str) -> File:
        """Create an empty file and open it for writing. Raises FileExistsError if the name is taken."""

    def open(self, name: str, *, write: bool) -> File:
        """Open a regular file. Raises FileNotFoundError, or OSError for a link, a FIFO, a device, a directory."""

    def rename(self, old: str, new: str) -> None:
        """Rename within the directory, in one step; `new` must not exist."""

    def unlink(self, name: str) -> None: ...

    def chmod(self, name: str, mode: int) -> None: ...

    def sync_dir(self) -> None:
        """fsync of the directory."""

    def at(self, relative: str) -> Store:
        """The store of another directory, named relative to this one."""

    def close(self) -> None: ...


class RealFile:
    """A file of the operating system. See `File`."""

    def __init__(self, fd: int, name: str) -> None:
        self._fd = fd
        self.name = name

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        if len(data) == length or not data:
            return data
        parts = [data]
        got = len(data)
        while got < length:
            data = os.pread(self._fd, length - got, offset + got)
            if not data:
                break
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def write(self, offset: int, data: Buffer) -> None:
        written = os.pwrite(self._fd, data, offset)
        if written < len(data):  # a full disk takes a part, and says why at the next call
            rest = memoryview(data).cast("B")
            while written < len(rest):
                written += os.pwrite(self._fd, rest[written:], offset + written)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def allocate(self, offset: int, length: int) -> None:
        os.posix_fallocate(self._fd, offset, length)

    def punch(self, offset: int, length: int) -> None:
        if _libc.fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number), self.name)
        end = min(offset + length, self.size())
        for place in range(offset, end, 1 << 20):
            self.write(place, bytes(min(1 << 20, end - place)))

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        end = min(offset + length, self.size())
        while offset < end:
            try:
                begin = os.lseek(self._fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            if begin >= end:
                return
            offset = min(os.lseek(self._fd, begin, os.SEEK_HOLE), end)
            yield begin, offset - begin

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def drop_cache(self) -> None:
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def lock(self) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class RealStore:
    """A directory of the operating system. See `Store`. Raises OSError if `path` is not a directory."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def names(self) -> list[str]:
        # Opened anew: on btrfs a directory that is open shows only what was in it when it was opened or rewound.
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            return sorted(os.listdir(fd))
        finally:
            os.close(fd)

    def create(self, name: str) -> RealFile:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return RealFile(os.open(self._component(name), flags, 0o644, dir_fd=self._fd), name)

    def open(self, name: str, *, write: bool) -> RealFile:
        # O_NONBLOCK: opening a FIFO must not wait for its other end.
        flags = (os.O_RDWR if write else os.O_RDONLY) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(self._component(name), flags, dir_fd=self._fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", name)
        return RealFile(fd, name)

    def rename(self, old: str, new: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.stat(self._component(new), dir_fd=self._fd, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        os.rename(self._component(old), new, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def unlink(self, name: str) -> None:
        os.unlink(self._component(name), dir_fd=self._fd)

    def chmod(self, name: str, mode: int) -> None:
        fd = os.open(self._component(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            os.fchmod(fd, mode)
        finally:
            os.close(fd)

    def sync_dir(self) -> None:
        os.fsync(self._fd)

    def at(self, relative: str) -> RealStore:
        return RealStore(os.path.join(self.path, relative))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @staticmethod
    def _component(name: str) -> str:
        if not name or "/" in name or "\0" in name or name in (".", ".."):
            raise OSError(errno.EINVAL, "not a file name", name)
        return name
