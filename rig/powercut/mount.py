"""A crash state as a real directory: any program opens its files, and each is decided as the program looks at it.

The directory is a FUSE file system (mfusepy, libfuse) without any cache: every look, size and read of the program
comes to the store that is served at the time, and so do its writes. It is mounted once, and serves one state after
the other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from powercut.errors import EnvironmentFault, NotServed
from quire.store import File, Store

PUNCH_HOLE, KEEP_SIZE, ZERO_RANGE = 2, 1, 16  # linux/falloc.h
_PATIENCE = 10.0  # seconds that mounting may take
_STEP = 1 << 20
LOOKING = frozenset({"getattr", "readdir", "read"})  # calls that change nothing
Result = TypeVar("Result")


class Tree(Store, Protocol):
    """What can be served: a store that can do what file systems can (`powercut.crash.store.SetStore`)."""

    def kind(self, name: str) -> str | None: ...

    def move(self, old: str, other: Any, new: str) -> None: ...

    def link(self, old: str, other: Any, new: str) -> None: ...

    def mkdir(self, name: str) -> None: ...

    def rmdir(self, name: str) -> None: ...


class Served:
    """What the program sees: FUSE's calls, answered from `root`. Only one thread calls."""

    def __init__(self, root: Tree) -> None:
        self._root = root
        self._stores: dict[str, Tree] = {"": root}
        self._open: dict[int, File] = {}
        self._next = 1

    def _at(self, path: str) -> tuple[Tree, str]:
        """The directory that the last name of `path` is in, and that name."""
        folder, _, name = path.strip("/").rpartition("/")
        if folder not in self._stores:
            above, part = self._at(folder)
            self._stores[folder] = above.at(part)  # type: ignore[assignment]
        return self._stores[folder], name

    def _directory(self, path: str) -> Tree:
        if not path.strip("/"):
            return self._root
        store, name = self._at(path)
        return store.at(name)  # type: ignore[return-value]

    def getattr(self, path: str, fh: int | None) -> tuple[str, int]:
        """The kind, and the size."""
        if fh is not None and fh in self._open:
            return "file", self._open[fh].size()
        if not path.strip("/"):
            return "directory", 0
        store, name = self._at(path)
        kind = store.kind(name)
        if kind is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if kind == "directory":
            return kind, 0
        file = store.open(name, write=False)
        try:
            return kind, file.size()
        finally:
            file.close()

    def readdir(self, path: str) -> list[str]:
        return self._directory(path).names()

    def _opened(self, file: File) -> int:
        self._next += 1
        self._open[self._next] = file
        return self._next

    def open(self, path: str, flags: int) -> int:
        store, name = self._at(path)
        file = store.open(name, write=True)  # who only reads may sync all the same
        if flags & os.O_TRUNC:  # libfuse leaves it to us
            file.truncate(0)
        return self._opened(file)

    def create(self, path: str) -> int:
        store, name = self._at(path)
        return self._opened(store.create(name))

    def read(self, fh: int, offset: int, length: int) -> bytes:
        return self._open[fh].read(offset, length)

    def write(self, fh: int, offset: int, data: bytes) -> int:
        self._open[fh].write(offset, data)
        return len(data)

    def truncate(self, path: str, length: int, fh: int | None) -> None:
        if fh is not None and fh in self._open:
            self._open[fh].truncate(length)
            return
        store, name = self._at(path)
        file = store.open(name, write=True)
        file.truncate(length)
        file.close()

    def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        file, kind = self._open[fh], mode & ~KEEP_SIZE
        if kind == PUNCH_HOLE:
            file.punch(offset, length)
        elif kind == ZERO_RANGE:
            end = min(offset + length, file.size()) if mode & KEEP_SIZE else offset + length
            for place in range(offset, end, _STEP):
                file.write(place, bytes(min(_STEP, end - place)))
        elif kind:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        elif not mode & KEEP_SIZE:
            file.allocate(offset, length)

    def sync(self, fh: int) -> None:
        self._open[fh].sync()

    def sync_dir(self, path: str) -> None:
        self._directory(path).sync_dir()

    def unlink(self, path: str) -> None:
        store, name = self._at(path)
        store.unlink(name)

    def rename(self, old: str, new: str) -> None:
        store, name = self._at(old)
        other, to = self._at(new)
        store.move(name, other, to)
        self._forget(old)
        self._forget(new)

    def link(self, new: str, old: str) -> None:
        store, name = self._at(old)
        other, to = self._at(new)
        store.link(name, other, to)

    def mkdir(self, path: str) -> None:
        store, name = self._at(path)
        store.mkdir(name)

    def rmdir(self, path: str) -> None:
        store, name = self._at(path)
        store.rmdir(name)
        self._forget(path)

    def _forget(self, path: str) -> None:
        """What lies at `path` and below is looked up anew."""
        gone = path.strip("/")
        self._stores = {at: s for at, s in self._stores.items() if at != gone and not at.startswith(f"{gone}/")}

    def refuse(self, what: str) -> None:
        """Raises NotServed."""
        raise NotServed(f"a program made {what}, which is not served in a crash state")


def _operations(mount: Mount) -> Any:
    """The adapter from mfusepy's calls."""
    import mfusepy

    def do(name: str, *words: Any) -> Any:
        return mount.do(name, *words)

    class Adapter(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def access(self, path: str, amode: int) -> int:
            return 0

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            kind, size = do("getattr", path, fh)
            mode = stat.S_IFDIR | 0o755 if kind == "directory" else stat.S_IFREG | 0o644
            return {"st_mode": mode, "st_nlink": 1, "st_size": size, "st_uid": os.geteuid(), "st_gid": os.getegid()}

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *do("readdir", path)]

        def open(self, path: str, flags: int) -> int:
            return int(do("open", path, flags & (os.O_ACCMODE | os.O_TRUNC)))

        def create(self, path: str, mode: int, fi: Any = None) -> int:
            return int(do("create", path))

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            return bytes(do("read", fh, offset, size))

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
            return int(do("write", fh, offset, data))

        def truncate(self, path: str, length: int, fh: int | None = None) -> int:
            do("truncate", path, length, fh)
            return 0

        def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
            do("fallocate", fh, mode, offset, size)
            return 0

        def fsync(self, path: str, datasync: int, fh: int) -> int:
            do("sync", fh)
            return 0

        def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
            do("sync_dir", path)
            return 0

        def flush(self, path: str, fh: int) -> int:
            return 0

        def unlink(self, path: str) -> int:
            do("unlink", path)
            return 0

        def rename(self, old: str, new: str) -> int:
            do("rename", old, new)
            return 0

        def link(self, target: str, source: str) -> int:
            do("link", target, source)
            return 0

        def mkdir(self, path: str, mode: int) -> int:
            do("mkdir", path)
            return 0

        def rmdir(self, path: str) -> int:
            do("rmdir", path)
            return 0

        def symlink(self, target: str, source: str) -> int:
            do("refuse", "a symbolic link")
            return 0

        def mknod(self, path: str, mode: int, dev: int) -> int:
            do("refuse", "a device, socket or named pipe")
            return 0

        def chmod(self, path: str, mode: int) -> int:
            return 0

        def chown(self, path: str, uid: int, gid: int) -> int:
            return 0

        def utimens(self, path: str, times: Any = None) -> int:
            return 0

        def statfs(self, path: str) -> dict[str, int]:
            free = 1 << 30
            return {
                "f_bsize": 4096,
                "f_frsize": 4096,
                "f_blocks": free,
                "f_bfree": free,
                "f_bavail": free,
                "f_namemax": 255,
            }

    return Adapter()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits: nothing is left mounted by it. Threads that are begun here never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


Calls = Callable[..., Any]  # (name of a method of Served, arguments) -> its result


class Mount:
    """A mounted directory, at `path` while the context is entered. Raises EnvironmentFault where there is no FUSE."""

    def __init__(self) -> None:
        self.path = ""
        self._calls: Calls | None = None
        self._fault: BaseException | None = None

    def __enter__(self) -> Self:
        try:
            import mfusepy
        except (ImportError, OSError) as error:
            raise EnvironmentFault(
                f"a checker of several files needs FUSE: {error}: install libfuse3, and powercut with the extra fuse"
            ) from None
        if not os.path.exists("/dev/fuse"):
            raise EnvironmentFault("a checker of several files needs FUSE, and /dev/fuse is not there")
        with _uninterrupted():
            self._begin(mfusepy)
        return self

    def _begin(self, mfusepy: Any) -> None:
        self.path = tempfile.mkdtemp(prefix="powercut-state-")
        device = os.stat(self.path).st_dev
        signals = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, args=(mfusepy,), daemon=True)
        self._thread.start()
        begin = time.monotonic()
        while os.stat(self.path).st_dev == device:
            if not self._thread.is_alive() or time.monotonic() - begin > _PATIENCE:
                os.rmdir(self.path)
                raise EnvironmentFault(f"FUSE cannot be mounted here ({self._fault or 'it did not answer'})")
            time.sleep(0.002)
        os.fchdir(here)  # libfuse went to /, and took signals
        os.close(here)
        if threading.current_thread() is threading.main_thread():
            for number, handler in signals.items():
                signal.signal(number, handler)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _uninterrupted():
            helper = ["umount", "-l"] if os.geteuid() == 0 else [shutil.which("fusermount3") or "fusermount", "-uz"]
            subprocess.run([*helper, self.path], capture_output=True, check=False)
            self._thread.join(_PATIENCE)
            with contextlib.suppress(OSError):
                os.rmdir(self.path)

    def _serve(self, mfusepy: Any) -> None:
        options = {
            "fsname": "powercut",
            "direct_io": True,
            "hard_remove": True,
            "attr_timeout": 0,
            "entry_timeout": 0,
            "negative_timeout": 0,
        }
        try:
            mfusepy.FUSE(_operations(self), self.path, foreground=True, nothreads=True, **options)
        except Exception as error:
            self._fault = error

    def do(self, name: str, *words: Any) -> Any:
        """Answer a call of the kernel's. What is not an OSError is kept for whoever serves, and is EIO here."""
        if self._calls is None:
            if name == "getattr" and words[0] == "/":
                return "directory", 0
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        try:
            return self._calls(name, *words)
        except OSError:
            raise
        except BaseException as error:
            self._fault = self._fault or error
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from None

    @contextlib.contextmanager
    def serving(self, calls: Calls) -> Iterator[str]:
        """For a while the directory answers from `calls`. Raises what these raised, if it is not an OSError."""
        self._fault, self._calls = None, calls
        try:
            yield self.path
        finally:
            self._calls = None
        if self._fault is not None:
            raise self._fault
