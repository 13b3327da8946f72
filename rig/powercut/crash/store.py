"""A crash state as a store: a program that was written for `quire.store` opens it like a directory.

What the program changes is kept in memory over the state; `powercut.capture.store` around it records that, so that a
crash inside a recovery can be explored in its turn. The state is decided as it is looked at.
"""

from __future__ import annotations

import errno
import itertools
import os
import posixpath
from collections.abc import Iterator, Mapping

from powercut.crash.fileset import Node, State
from powercut.crash.search import Search
from powercut.disk import Bytes
from powercut.trace import SECTOR

Buffer = bytes | bytearray | memoryview
_MADE = -1  # the level of directories that the program made, of which no state knows


class Nothing:
    """The state of directories that are empty."""

    def __init__(self) -> None:
        self.search = Search()

    def lookup(self, directory: Node, name: str) -> Node | None:
        return None

    def entries(self, directory: Node) -> list[str]:
        return []

    def size(self, node: Node) -> int:
        raise LookupError(node)

    def read(self, node: Node, offset: int, length: int) -> Bytes:
        raise LookupError(node)

    def names(self, directory: Node) -> set[str]:
        return set()

    def is_directory(self, node: Node) -> bool:
        return False


class _Live:
    """A file as the program left it: what the state has, and pages over it."""

    def __init__(self, state: State, node: Node | None) -> None:
        self._state = state
        self.node = node
        self.size = 0 if node is None else state.size(node)
        self._kept = self.size if node is not None else 0  # what lies below counts up to here
        self._pages: dict[int, bytearray] = {}
        self.locked: object | None = None

    def read(self, offset: int, length: int) -> bytes:
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        own = [page for page in range(first, last) if page in self._pages] if self._pages else []
        if not own:
            return self._below(offset, length)
        parts: list[bytes | bytearray] = []
        next = first
        for page in own:  # what is covered is not looked at below: that would decide it
            if next < page:
                parts.append(self._below(next * SECTOR, (page - next) * SECTOR))
            parts.append(self._pages[page])
            next = page + 1
        if next < last:
            parts.append(self._below(next * SECTOR, (last - next) * SECTOR))
        return b"".join(parts)[offset - first * SECTOR :][:length]

    def _below(self, offset: int, length: int) -> bytes:
        there = min(length, self._kept - offset)
        if there <= 0 or self.node is None:
            return bytes(length)
        return self._state.read(self.node, offset, there).tobytes() + bytes(length - there)

    def write(self, offset: int, data: Buffer) -> None:
        place, view = offset, memoryview(data).cast("B")
        while view:
            number, inner = divmod(place, SECTOR)
            count = min(len(view), SECTOR - inner)
            page = self._pages.get(number)
            if page is None:
                whole = count == SECTOR
                page = self._pages[number] = bytearray(SECTOR if whole else self._below(number * SECTOR, SECTOR))
            page[inner : inner + count] = view[:count]
            place, view = place + count, view[count:]
        self.size = max(self.size, offset + len(data))

    def truncate(self, size: int) -> None:
        if size < self.size:
            self._kept = min(self._kept, size)
            for number in [n for n in self._pages if (n + 1) * SECTOR > size]:
                keep = size - number * SECTOR
                if keep <= 0:
                    del self._pages[number]
                else:
                    self._pages[number][keep:] = bytes(SECTOR - keep)
        self.size = size


class SetFile:
    """An open file of a `SetStore`. See `quire.store.File`. `node` is what it was before the program ran, if it was."""

    def __init__(self, live: _Live, name: str, write: bool) -> None:
        self._live = live
        self.name = name
        self.node = live.node
        self._write = write

    def size(self) -> int:
        return self._live.size

    def read(self, offset: int, length: int) -> bytes:
        return self._live.read(offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        self._writable()
        self._live.write(offset, data)

    def truncate(self, size: int) -> None:
        self._writable()
        self._live.truncate(size)

    def allocate(self, offset: int, length: int) -> None:
        self._writable()
        self._live.truncate(max(self._live.size, offset + length))

    def punch(self, offset: int, length: int) -> None:
        self._writable()
        end = min(offset + length, self._live.size)
        if end > offset:
            self._live.write(offset, bytes(end - offset))

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        end = min(offset + length, self._live.size)
        if end > offset:
            yield offset, end - offset  # a hole is worth nothing here: every filesystem may fill it

    def sync(self) -> None:
        """Nothing: what counts is the recording."""

    def drop_cache(self) -> None:
        """Nothing: there is none."""

    def lock(self) -> bool:
        if self._live.locked in (None, self):
            self._live.locked = self
            return True
        return False

    def close(self) -> None:
        if self._live.locked is self:
            self._live.locked = None

    def _writable(self) -> None:
        if not self._write:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self.name)


class SetStore:
    """One directory of `state`. See `quire.store.Store`. `directories` are all there are, by their path within the
    recording; `node` is the one at `path`, if that is another than its path says."""

    def __init__(
        self, state: State, directories: Mapping[str, Node], path: str = ".", node: Node | None = None
    ) -> None:
        self.path = path
        self.node = directories[path] if node is None else node
        self._state = state
        self._directories = directories
        self._changed: dict[tuple[Node, str], _Live | Node | None] = {}  # a file; a directory; nothing
        self._files: dict[Node, _Live] = {}
        self._numbers = itertools.count()  # of directories that are made

    def names(self) -> list[str]:
        return [name for name in sorted(self._possible()) if self.kind(name) is not None]

    def kind(self, name: str) -> str | None:
        """ "file" or "directory"; None: there is nothing of this name."""
        if self._directory(name) is not None:
            return "directory"
        return None if self._find(name) is None else "file"

    def _directory(self, name: str) -> Node | None:
        if (self.node, name) in self._changed:
            there = self._changed[self.node, name]
            return there if isinstance(there, Node) else None
        node = self._state.lookup(self.node, name)
        return node if node is not None and self._state.is_directory(node) else None

    def _possible(self) -> set[str]:
        return self._state.names(self.node) | {name for node, name in self._changed if node == self.node}

    def create(self, name: str) -> SetFile:
        if self._find(name) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        live = self._changed[self.node, name] = _Live(self._state, None)
        return SetFile(live, name, True)

    def open(self, name: str, *, write: bool) -> SetFile:
        return SetFile(self._there(name), name, write)

    def rename(self, old: str, new: str) -> None:
        live = self._there(old)
        if self._find(new) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        self._changed[self.node, old], self._changed[self.node, new] = None, live

    def move(self, old: str, other: SetStore, new: str) -> None:
        """Rename into the directory `other`, in one step, as rename(2) does: a file that has the name `new` loses it,
        and so does a directory that is empty."""
        directory, there = self._directory(old), other._directory(new)
        if directory is None:
            moved: _Live | Node = self._there(old)
            other._find(new)
        else:
            moved = directory
            if there is not None and there != directory:
                other._empty(new)
            elif there is None and other._find(new) is not None:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), new)
        self._changed[self.node, old] = None
        other._changed[other.node, new] = moved

    def link(self, old: str, other: SetStore, new: str) -> None:
        """Give a file another name, in the directory `other`."""
        live = self._there(old)
        if other.kind(new) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        other._changed[other.node, new] = live

    def mkdir(self, name: str) -> None:
        """Make an empty directory."""
        if self.kind(name) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        self._changed[self.node, name] = Node(_MADE, next(self._numbers))

    def rmdir(self, name: str) -> None:
        """Remove an empty directory."""
        self._empty(name)
        self._changed[self.node, name] = None

    def _empty(self, name: str) -> None:
        """Raise OSError if there is no such directory, or something in it."""
        if self._directory(name) is None:
            self._there(name)
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
        if self.at(name).names():
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), name)

    def unlink(self, name: str) -> None:
        self._there(name)
        self._changed[self.node, name] = None

    def chmod(self, name: str, mode: int) -> None:
        self._there(name)

    def sync_dir(self) -> None:
        """Nothing: what counts is the recording."""

    def at(self, relative: str) -> SetStore:
        path = posixpath.normpath(posixpath.join(self.path, relative))
        node = self._directory(relative) if "/" not in relative and relative not in (".", "..") else None
        if node is None and path not in self._directories:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        other = SetStore(self._state, self._directories, path, node)
        other._changed, other._files, other._numbers = self._changed, self._files, self._numbers
        return other

    def close(self) -> None:
        """Nothing to give back."""

    def _find(self, name: str) -> _Live | None:
        if not name or "/" in name or "\0" in name or name in (".", ".."):
            raise OSError(errno.EINVAL, "not a file name", name)
        if (self.node, name) in self._changed:
            there = self._changed[self.node, name]
            if isinstance(there, Node):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
            return there
        node = self._state.lookup(self.node, name)
        if node is None:
            return None
        if self._state.is_directory(node):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        if node not in self._files:
            self._files[node] = _Live(self._state, node)
        return self._files[node]

    def _there(self, name: str) -> _Live:
        live = self._find(name)
        if live is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return live


def in_memory(*directories: str) -> SetStore:
    """An empty store that keeps everything in memory: the directory ".", and beside it `directories`."""
    paths = [".", *(path for path in directories if path != ".")]
    return SetStore(Nothing(), {path: Node(0, number) for number, path in enumerate(paths)})
