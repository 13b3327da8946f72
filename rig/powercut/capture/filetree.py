"""The files under some directories, by name and by inode: as they were before a program ran, and as it changes them."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from powercut.capture.recorded import Key
from powercut.errors import InputError

_FICLONE = 0x40049409
_STEP = 64 << 20


@dataclass(slots=True, eq=False)
class Node:
    """A file, a directory (`entries` is not None), or something else that has a name (`other`)."""

    path: str  # the first name it had, absolute
    key: Key
    size: int = 0
    other: bool = False
    entries: dict[str, Node] | None = None
    before: list[tuple[Node, str]] = field(default_factory=list)  # where it was before the program ran
    copy: Path | None = None  # what it held then
    size_before: int = 0
    largest: int = 0
    shrank: bool = False
    id: int | None = None  # in the trace
    touched: bool = False
    beside: bool = False  # not touched, and in the trace all the same

    def touch(self) -> None:
        """It goes into the trace, and so do the directories that led to it."""
        if not self.touched:
            self.touched = True
            for parent, _ in self.before:
                parent.touch()

    def keep(self) -> None:
        """It goes into the trace though nobody changed it, and so do the directories that lead to it."""
        if not self.beside:
            self.beside = True
            for parent, _ in self.before:
                parent.keep()

    def resized(self, size: int) -> None:
        self.shrank |= size < self.size
        self.size = size
        self.largest = max(self.largest, size)


class Tree:
    """What lies under `roots` (canonical paths, none within another), without what is in `excluded`."""

    def __init__(self, roots: Iterable[str], excluded: Iterable[str]) -> None:
        self.excluded = frozenset(excluded)
        self.live: dict[Key, Node] = {}  # files and directories by inode, as they are now
        self.initial: list[Node] = []  # all there was before
        self.roots = {root: self._read(root, os.stat(root)) for root in roots}

    def _read(self, path: str, status: os.stat_result) -> Node:
        key = (status.st_dev, status.st_ino)
        if key in self.live:
            return self.live[key]
        node = Node(path, key)
        self.initial.append(node)
        if stat.S_ISDIR(status.st_mode):
            self.live[key] = node
            node.entries = {}
            for entry in self.list(path):
                child = self._read(entry.path, entry.stat(follow_symlinks=False))
                node.entries[entry.name] = child
                child.before.append((node, entry.name))
        elif stat.S_ISREG(status.st_mode):
            self.live[key] = node
            node.size = node.size_before = node.largest = status.st_size
        else:
            node.other = True
        return node

    def list(self, path: str) -> list[os.DirEntry[str]]:
        """What the directory at `path` holds now."""
        try:
            with os.scandir(path) as entries:
                return sorted((e for e in entries if e.path not in self.excluded), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None

    def files(self) -> Iterator[Node]:
        return (node for node in self.live.values() if node.entries is None)

    def save(self, folder: Path, limit: int) -> None:
        """Copy every file into `folder`. Raises InputError if they take more than `limit` bytes."""
        files = list(self.files())
        allocated = 0
        for node in files:
            allocated += os.stat(node.path).st_blocks * 512
        if allocated > limit:
            raise InputError(
                f"{', '.join(self.roots)}: the files there take {allocated >> 20:,} MiB, and a copy is kept of each: "
                f"more than {limit >> 20:,} MiB; name a narrower directory with --dir"
            )
        for number, node in enumerate(files):
            node.copy = folder / str(number)
            try:
                copy_sparse(node.path, node.copy)
            except OSError as error:
                raise InputError(f"{node.path}: cannot be copied: {error.strerror}") from None

    def keep_untouched(self, most: int) -> tuple[str, ...]:
        """Let what nobody changed into the trace too, the smallest first, up to `most` bytes. Returns the names of the
        files that are left out."""
        left_out = []
        for directory in self.initial:
            if directory.entries is not None:
                directory.keep()
        untouched = [node for node in self.initial if node.copy is not None and not node.touched]
        for node in sorted(untouched, key=lambda node: (os.stat(node.copy or "").st_blocks, node.path)):
            most -= os.stat(node.copy or "").st_blocks * 512
            if most < 0:
                left_out.append(self.name(node.path))
            else:
                node.keep()
        return tuple(left_out)

    def parent(self, path: str) -> Node | None:
        """The directory that the entry at `path` is in, or None if it lies outside."""
        for root, node in self.roots.items():
            inner = path.removeprefix(root if root == "/" else root + "/")
            if inner == path:
                continue
            for part in inner.split("/")[:-1]:
                child = (node.entries or {}).get(part)
                if child is None or child.entries is None:
                    return None
                node = child
            return node
        return None

    def name(self, path: str) -> str:
        """How `path` is called in a trace: within its root, the roots told apart if there are several."""
        for root in self.roots:
            if path == root or path.startswith(root.rstrip("/") + "/"):
                inner = os.path.relpath(path, root)
                if len(self.roots) == 1:
                    return inner
                return os.path.normpath(os.path.join(os.path.relpath(root, os.path.commonpath(self.roots)), inner))
        return path


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """The ranges of a file that are not holes."""
    place, size = 0, os.fstat(fd).st_size
    while place < size:
        try:
            begin = os.lseek(fd, place, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # only a hole is left
            raise
        place = os.lseek(fd, begin, os.SEEK_HOLE)
        yield begin, place


def copy_sparse(source: str | Path, target: Path) -> None:
    """Copy a file: as a clone where the file system can do that, else its data without its holes."""
    with open(source, "rb", buffering=0) as old, open(target, "wb", buffering=0) as new:
        try:
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
            return
        except OSError:
            os.ftruncate(new.fileno(), os.fstat(old.fileno()).st_size)
        for begin, end in extents(old.fileno()):
            while begin < end:
                try:
                    done = os.copy_file_range(old.fileno(), new.fileno(), min(end - begin, _STEP), begin, begin)
                except OSError as error:
                    if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                        raise
                    done = os.pwrite(new.fileno(), os.pread(old.fileno(), min(end - begin, 1 << 20), begin), begin)
                if not done:
                    return
                begin += done
