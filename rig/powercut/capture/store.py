"""Recording what a program does to a store (`quire.store`), as a trace of several files.

Every call that changes something is an event, issued before the store is asked and completed when it has answered, so
calls from several threads overlap in the trace as they did. Directories are named by their path from the first one.
"""

from __future__ import annotations

import json
import posixpath
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

from powercut.trace import SECTOR, Kind, TraceWriter
from quire.store import Buffer, File, Store

_STEP = 1 << 20


class Over(Protocol):
    """Takes part in recording over a crash state, whose content is not copied: what the trace calls `id` is `file`,
    or the directory `store`. `grain` is the size in bytes of the pieces at whose edges the state is copied."""

    grain: int

    def file(self, id: int, file: File) -> None: ...

    def directory(self, id: int, store: Store) -> None: ...

    def which(self, store: Store) -> Hashable:
        """What tells the directory `store` from others, whatever its path is now."""


class _Shared:
    """What all directories and files of one recording share."""

    def __init__(self, writer: TraceWriter, over: Over | None) -> None:
        self.writer = writer
        self.over = over
        self.lock = threading.Lock()
        self.ids: dict[tuple[int, str], int] = {}  # directory and name -> file
        self.directories: dict[Hashable, int] = {}  # by path, over a crash state by what `over` says
        self.based: set[tuple[int, int]] = set()  # file, piece: what was there is in the trace

    def do(self, kind: Kind, file: int, action: Callable[[], None], **event: object) -> None:
        """Record an event around `action`."""
        position = self.writer.issue(kind, file, **event)  # type: ignore[arg-type]
        try:
            action()
        except OSError as error:
            self.writer.complete(position, error.errno or 5)
            raise
        self.writer.complete(position)


class RecordingStore:
    """`inner`, recorded by `writer`. `over` is given when `inner` is a crash state; else all that `inner` holds now
    goes into the trace."""

    def __init__(self, inner: Store, writer: TraceWriter, over: Over | None = None) -> None:
        self._inner = inner
        self._begin(_Shared(writer, over), ".")
        if over is None:
            entries = []
            for name in inner.names():
                with_content = inner.open(name, write=False)
                entries.append([self._id, name, self._adopt(name, with_content)])
                with_content.close()
            writer.mark("tree", entries=entries)

    def _begin(self, shared: _Shared, path: str) -> None:
        self._shared = shared
        self.path = path
        which = path if shared.over is None else shared.over.which(self._inner)
        if which not in shared.directories:
            shared.directories[which] = shared.writer.file(path, 0, "directory")
            if shared.over is not None:
                shared.over.directory(shared.directories[which], self._inner)
        self._id = shared.directories[which]

    def _adopt(self, name: str, file: File) -> int:
        """Make a file that was there before known to the trace."""
        shared = self._shared
        known = shared.ids.get((self._id, name))
        if known is not None:
            return known
        size = file.size()
        id = shared.ids[self._id, name] = shared.writer.file(posixpath.normpath(f"{self.path}/{name}"), size, "file")
        if shared.over is not None:
            shared.over.file(id, file)
            return id
        for begin, length in file.data_ranges(0, size):
            for place in range(begin - begin % SECTOR, begin + length, _STEP):
                data = file.read(place, min(_STEP, begin + length - place))
                if data.count(0) != len(data):
                    shared.writer.base(id, place, data + bytes(-len(data) % SECTOR))
        return id

    def _known(self, name: str) -> int:
        if (self._id, name) not in self._shared.ids:
            file = self._inner.open(name, write=False)
            try:
                self._adopt(name, file)
            finally:
                file.close()
        return self._shared.ids[self._id, name]

    def _change(self, kind: Kind, action: Callable[[], None], **about: object) -> None:
        self._shared.do(kind, self._id, action, data=json.dumps(about).encode())

    def names(self) -> list[str]:
        return self._inner.names()

    def create(self, name: str) -> RecordingFile:
        with self._shared.lock:
            made: list[File] = []
            id = self._shared.writer.file(posixpath.normpath(f"{self.path}/{name}"), 0, "file")
            self._change(Kind.CREATE, lambda: made.append(self._inner.create(name)), name=name, file=id)
            self._shared.ids[self._id, name] = id
            return RecordingFile(made[0], self._shared, id, fresh=True)

    def open(self, name: str, *, write: bool) -> File:
        file = self._inner.open(name, write=write)
        if not write:
            return file
        with self._shared.lock:
            return RecordingFile(file, self._shared, self._adopt(name, file))

    def rename(self, old: str, new: str) -> None:
        with self._shared.lock:
            id = self._known(old)
            self._change(Kind.RENAME, lambda: self._inner.rename(old, new), name=old, to=new, file=id)
            self._shared.ids[self._id, new] = self._shared.ids.pop((self._id, old))

    # What `powercut.crash.store.SetStore` can do besides, if `inner` is one

    def move(self, old: str, other: RecordingStore, new: str) -> None:
        """See `SetStore.move`."""
        inner: Any = self._inner
        directory = self.at(old)._id if self.kind(old) == "directory" else None
        with self._shared.lock:
            ids = self._shared.ids
            id = self._known(old) if directory is None else directory
            about = {"name": old, "to": new, "file": id} | ({"directory": other._id} if other._id != self._id else {})
            self._change(Kind.RENAME, lambda: inner.move(old, other._inner, new), **about)
            ids.pop((other._id, new), None)
            if directory is None:
                ids[other._id, new] = ids.pop((self._id, old))

    def link(self, old: str, other: RecordingStore, new: str) -> None:
        """See `SetStore.link`."""
        inner: Any = self._inner
        with self._shared.lock:
            id = self._known(old)
            other._change(Kind.LINK, lambda: inner.link(old, other._inner, new), name=new, file=id)
            self._shared.ids[other._id, new] = id

    def mkdir(self, name: str) -> None:
        """See `SetStore.mkdir`."""
        inner: Any = self._inner
        with self._shared.lock:
            id = self._shared.writer.file(posixpath.normpath(f"{self.path}/{name}"), 0, "directory")
            self._change(Kind.CREATE, lambda: inner.mkdir(name), name=name, file=id)
            over = self._shared.over
            assert over is not None
            self._shared.directories[over.which(inner.at(name))] = id

    def rmdir(self, name: str) -> None:
        """See `SetStore.rmdir`."""
        inner: Any = self._inner
        id = self.at(name)._id if self.kind(name) == "directory" else None
        with self._shared.lock:
            self._change(Kind.UNLINK, lambda: inner.rmdir(name), name=name, file=id)

    def kind(self, name: str) -> str | None:
        """See `SetStore.kind`."""
        inner: Any = self._inner
        found: str | None = inner.kind(name)
        return found

    def unlink(self, name: str) -> None:
        with self._shared.lock:
            self._change(Kind.UNLINK, lambda: self._inner.unlink(name), name=name, file=self._known(name))
            del self._shared.ids[self._id, name]

    def chmod(self, name: str, mode: int) -> None:
        self._inner.chmod(name, mode)

    def sync_dir(self) -> None:
        self._shared.do(Kind.SYNC_DIR, self._id, self._inner.sync_dir)

    def at(self, relative: str) -> RecordingStore:
        other = object.__new__(RecordingStore)
        other._inner = self._inner.at(relative)
        with self._shared.lock:
            other._begin(self._shared, posixpath.normpath(posixpath.join(self.path, relative)))
        return other

    def close(self) -> None:
        self._inner.close()


class RecordingFile:
    """An open file of a `RecordingStore`. `fresh`: it was created in this recording."""

    def __init__(self, inner: File, shared: _Shared, id: int, *, fresh: bool = False) -> None:
        self._inner = inner
        self._shared = shared
        self._id = id
        self._fresh = fresh
        self.name = inner.name

    def size(self) -> int:
        return self._inner.size()

    def read(self, offset: int, length: int) -> bytes:
        return self._inner.read(offset, length)

    def write(self, offset: int, data: Buffer) -> None:
        if not len(data):
            return
        self._edges(offset, offset + len(data))
        self._do(Kind.WRITE, lambda: self._inner.write(offset, data), offset=offset, length=len(data), data=bytes(data))

    def truncate(self, size: int) -> None:
        self._edges(size, size)
        self._do(Kind.TRUNCATE, lambda: self._inner.truncate(size), length=size)

    def allocate(self, offset: int, length: int) -> None:
        if offset + length > self._inner.size():
            self._do(Kind.TRUNCATE, lambda: self._inner.allocate(offset, length), length=offset + length)
        else:
            self._inner.allocate(offset, length)

    def punch(self, offset: int, length: int) -> None:
        end = min(offset + length, self._inner.size())
        if end <= offset:
            return
        self._edges(offset, end)
        self._do(Kind.DISCARD, lambda: self._inner.punch(offset, length), offset=offset, length=end - offset)

    def data_ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        return self._inner.data_ranges(offset, length)

    def sync(self) -> None:
        self._do(Kind.FLUSH, self._inner.sync)

    def drop_cache(self) -> None:
        self._inner.drop_cache()

    def lock(self) -> bool:
        return self._inner.lock()

    def close(self) -> None:
        self._inner.close()

    def _do(self, kind: Kind, action: Callable[[], None], **event: object) -> None:
        self._shared.do(kind, self._id, action, **event)

    def _edges(self, begin: int, end: int) -> None:
        """Before a piece is changed in part for the first time: what the crash state holds there."""
        over = self._shared.over
        if over is None or self._fresh:
            return
        for place in {begin, end}:
            piece = place // over.grain
            if place % over.grain and (self._id, piece) not in self._shared.based:
                self._shared.based.add((self._id, piece))
                there = self._inner.read(piece * over.grain, over.grain)
                if any(there):
                    self._shared.writer.base(self._id, piece * over.grain, there + bytes(-len(there) % SECTOR))
