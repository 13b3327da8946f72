"""Recording a program with strace: several times slower than the recorder of our own, and it needs no compiler.

strace tells each call when it is made and again when it has returned, of all threads and processes, in one order. What
it does not tell is followed here: which file a descriptor is of, and where in it the next write goes.

Calls whose bytes strace does not show (io_uring, copy_file_range ...) are made to fail with ENOSYS, which programs
answer with plain writes.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from powercut.capture.filetree import Node, Tree
from powercut.capture.interrupted import interruptions_are_its_own
from powercut.capture.recorded import Call, Key, Mode, Op
from powercut.errors import EnvironmentFault, InputError

_REFUSED = "io_uring_setup,io_setup,copy_file_range,sendfile,splice,openat2"
_TRACED = (
    "open,openat,creat,close,dup,dup2,dup3,fcntl,lseek,read,readv,write,writev,pwrite64,pwritev,pwritev2,ftruncate,"
    "truncate,fallocate,fsync,fdatasync,sync,syncfs,sync_file_range,rename,renameat,renameat2,link,linkat,symlink,"
    "symlinkat,unlink,unlinkat,mkdir,mkdirat,rmdir,mmap,chdir,fchdir,clone,clone3,fork,vfork," + _REFUSED
)
_LONGEST = 1 << 28  # bytes of one write that are shown
_LINE = re.compile(rb"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)", re.DOTALL)
_RESULT = re.compile(rb"\) += (-?\d+|\?)(?:<([^>]*)>)?(?: (\w+))?[^=]*$")
_WRITES = ("write", "writev", "pwrite64", "pwritev", "pwritev2")
_SYNCED = ("O_SYNC", "O_DSYNC", "RWF_SYNC", "RWF_DSYNC")


def available() -> bool:
    return shutil.which("strace") is not None


def run(
    command: Sequence[str], folder: Path, tree: Tree, cwd: str | None, quiet: bool
) -> tuple[int, float, list[Call]]:
    """Run `command`: its exit status, the seconds that it ran, and its calls. Raises InputError, EnvironmentFault."""
    log = folder / "strace"
    words = ["strace", "-f", "-qq", "-y", "-xx", "-s", str(_LONGEST), "-o", str(log)]
    words += ["-e", f"trace={_TRACED}", "-e", f"inject={_REFUSED}:error=ENOSYS", "-e", "signal=none", "--", *command]
    begin = time.monotonic()
    with interruptions_are_its_own():
        done = subprocess.run(words, check=False, cwd=cwd, stdout=subprocess.DEVNULL if quiet else None)
    seconds = time.monotonic() - begin
    if not log.exists() or not log.stat().st_size:
        raise EnvironmentFault(f"strace cannot trace {command[0]} here (ptrace may be forbidden)")
    with open(log, "rb") as lines:
        calls = _Follower(tree, cwd or os.getcwd()).follow(lines)
    return done.returncode, seconds, calls


@dataclass(slots=True)
class _Open:
    """An open file description. `key`: the file it is of, if that is recorded."""

    key: Key | None
    append: bool = False
    fua: bool = False
    writes: bool = True
    place: int = 0


@dataclass(slots=True)
class _Process:
    cwd: list[str]
    open: dict[int, _Open] = field(default_factory=dict)


@dataclass(slots=True)
class _Made:
    """A call that was made: its name, its arguments as far as they were told, and its position."""

    name: str
    text: bytes
    position: int


def _string(word: bytes) -> bytes:
    """The bytes of a string as strace writes it with -xx."""
    if word.endswith(b"..."):
        raise InputError(f"the program wrote more than {_LONGEST >> 20} MiB at once, more than strace shows")
    return bytes.fromhex(word[1:-1].replace(b"\\x", b"").decode())


def _words(text: bytes) -> list[bytes]:
    """Arguments, at their commas. Strings hold no commas: every byte is in hexadecimal."""
    found, depth, begin = [], 0, 0
    for match in re.finditer(rb"[\[\](){},]", text):
        sign = match[0]
        if sign in b"[({":
            depth += 1
        elif sign in b"])}":
            depth -= 1
        elif depth == 0:
            found.append(text[begin : match.start()].strip())
            begin = match.end()
    return [*found, text[begin:].strip()]


def _fd(word: bytes) -> int:
    return int(word.split(b"<")[0]) if not word.startswith(b"AT_FDCWD") else -1


def _number(word: bytes) -> int:
    return int(word, 0)


class _Follower:
    """Follows descriptors, positions and names through the log."""

    def __init__(self, tree: Tree, cwd: str) -> None:
        self._cwd = cwd
        self._tree = tree
        self._keys: dict[str, Key] = {}
        for root, node in tree.roots.items():
            self._enter(root, node)
        self._device = next(iter(tree.roots.values())).key[0]
        self._sizes: dict[Key, int] = {key: node.size for key, node in tree.live.items()}
        self._made = 0
        self._position = 0
        self._processes: dict[int, _Process] = {}
        self._forking: list[tuple[int, bool]] = []  # who is making a process, and whether it shares descriptors
        self.calls: list[Call] = []

    def _enter(self, path: str, node: Node) -> None:
        self._keys[path] = node.key
        for name, child in (node.entries or {}).items():
            if not child.other:
                self._enter(os.path.join(path, name), child)

    def follow(self, lines: Iterator[bytes]) -> list[Call]:
        """The calls of the log."""
        waiting: dict[int, _Made] = {}
        for line in lines:
            match = _LINE.match(line.rstrip(b"\n"))
            if match is None:
                continue
            pid, rest = int(match[1]), match[4]
            process = self._process(pid)
            if match[2]:
                made = waiting.pop(pid, None)
                if made is None:
                    continue
                made.text += rest
            else:
                self._position += 1
                made = _Made(match[3].decode(), rest, self._position)
            if made.text.endswith(b"<unfinished ...>"):
                made.text = made.text[: -len(b"<unfinished ...>")]
                waiting[pid] = made
                if made.name in ("clone", "clone3", "fork", "vfork"):
                    self._forking.append((pid, b"CLONE_FILES" in made.text))
                continue
            result = _RESULT.search(made.text)
            if result is None:
                continue
            if result[1] == b"?":  # the process was killed in it
                waiting[pid] = made
                continue
            self._position += 1
            returned = int(result[1])
            if returned < 0 and result[3]:
                returned = -getattr(errno, result[3].decode(), errno.EIO)
            self._done(process, made, _words(made.text[: result.start()]), returned, pid)
        for pid, made in waiting.items():
            if made.name in _WRITES:
                self._write(self._processes[pid], made, _words(made.text.partition(b") ")[0]), None)
        return self.calls

    def _process(self, pid: int) -> _Process:
        if pid not in self._processes:
            if not self._processes:
                self._processes[pid] = _Process([self._cwd])
            else:  # it was made by a call that has not returned yet
                parent, shares = self._forking[-1] if self._forking else (next(iter(self._processes)), False)
                self._fork(parent, pid, shares)
        return self._processes[pid]

    def _fork(self, parent: int, child: int, shares: bool) -> None:
        above = self._processes[parent]
        self._processes[child] = _Process(
            above.cwd if shares else list(above.cwd), above.open if shares else dict(above.open)
        )

    # Calls

    def _done(self, process: _Process, made: _Made, words: list[bytes], result: int, pid: int) -> None:
        name = made.name
        if name in ("clone", "clone3", "fork", "vfork"):
            self._forking = [each for each in self._forking if each[0] != pid]
            if result > 0 and result not in self._processes:
                self._fork(pid, result, b"CLONE_FILES" in made.text)
        elif name in _WRITES:
            self._write(process, made, words, result)
        elif name in ("open", "openat", "creat"):
            self._opened(process, made, words, result)
        elif name in _NAMING:
            self._renamed(process, made, words, result)
        elif name in _REFUSED.split(","):
            self._call(made, Op.NOTE, (0, 0), result, data=f"{name}\0\0".encode())
        elif result >= 0:
            self._quiet(process, made, words, result)

    def _quiet(self, process: _Process, made: _Made, words: list[bytes], result: int) -> None:
        """Calls on descriptors that name nothing and write nothing."""
        name, fds = made.name, process.open
        if name == "chdir":
            process.cwd[0] = self._path(process, b"AT_FDCWD", words[0])
            return
        if name == "fchdir":
            process.cwd[0] = _told(words[0])
            return
        if name == "sync":
            self._call(made, Op.SYNC, (0, 0), result)
            return
        if name == "truncate":
            self._sized(made, self._keys.get(self._path(process, b"AT_FDCWD", words[0])), words, result)
            return
        fd = _fd(words[4] if name == "mmap" else words[0])
        file = fds.get(fd)
        if name == "close":
            fds.pop(fd, None)
        elif name in ("dup", "dup2", "dup3") or (name == "fcntl" and words[1].startswith(b"F_DUPFD")):
            fds.pop(result, None)
            if file is not None:
                fds[result] = file
        elif file is None or file.key is None:
            return
        elif name == "lseek":
            file.place = result
        elif name in ("read", "readv"):
            file.place += result
        elif name == "fcntl" and words[1] == b"F_SETFL":
            file.append = b"O_APPEND" in words[2]
        elif name in ("fsync", "fdatasync"):
            self._call(made, Op.FLUSH, file.key, result)
        elif name == "syncfs":
            self._call(made, Op.SYNC, file.key, result)
        elif name == "sync_file_range":
            self._call(made, Op.RANGE, file.key, result, offset=_number(words[1]), length=_number(words[2]))
        elif name == "ftruncate":
            self._sized(made, file.key, words, result)
        elif name == "fallocate":
            self._allocated(made, file.key, words, result)
        elif name == "mmap" and b"MAP_SHARED" in words[3] and b"PROT_WRITE" in words[2]:
            self._call(made, Op.NOTE, file.key, result, data=b"mmap\0\0")

    def _call(
        self,
        made: _Made,
        op: Op,
        key: Key,
        result: int | None,
        *,
        flags: int = 0,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
        end_key: Key = (0, 0),
        end_path: str = "",
    ) -> None:
        ended = 0 if result is None else self._position
        call = Call(op, flags, made.position, key, offset, length, memoryview(data), ended, result)
        call.end_key, call.end_offset, call.end_path = end_key, offset, end_path
        self.calls.append(call)

    def _write(self, process: _Process, made: _Made, words: list[bytes], result: int | None) -> None:
        file = process.open.get(_fd(words[0]))
        if file is None and any(_told(words[0]).startswith(f"{root}/") for root in self._tree.roots):
            raise InputError(
                f"{_told(words[0])} was open before the program began: strace does not tell where it is written to"
            )
        if file is None or file.key is None or not file.writes:
            return
        if made.name in ("write", "pwrite64"):
            data = _string(words[1])
        else:
            data = b"".join(_string(part) for part in re.findall(rb'iov_base=("[^"]*"(?:\.\.\.)?)', words[1]))
        how = words[4] if made.name == "pwritev2" else b""
        at = _number(words[3]) if made.name in ("pwrite64", "pwritev", "pwritev2") else -1
        size = self._sizes.get(file.key, 0)
        append = file.append or b"RWF_APPEND" in how
        offset = size if append else file.place if at < 0 else at
        fua = file.fua or any(word.encode() in how for word in _SYNCED)
        done = max(0, result or 0)
        if at < 0:
            file.place = offset + done
        if done:
            self._sizes[file.key] = max(size, offset + done)
        self._call(
            made, Op.WRITE, file.key, result, flags=Mode.FUA if fua else 0, offset=offset, length=len(data), data=data
        )

    def _sized(self, made: _Made, key: Key | None, words: list[bytes], result: int) -> None:
        if key is not None:
            self._sizes[key] = _number(words[1])
            self._call(made, Op.TRUNCATE, key, result, length=_number(words[1]))

    def _allocated(self, made: _Made, key: Key, words: list[bytes], result: int) -> None:
        mode, offset, length = words[1], _number(words[2]), _number(words[3])
        if b"COLLAPSE" in mode or b"INSERT" in mode:
            raise InputError("the program inserted or collapsed a range of a file, which cannot be recorded")
        kept = b"KEEP_SIZE" in mode
        op = Op.PUNCH if b"PUNCH" in mode else Op.ZERO if b"ZERO" in mode else Op.ALLOCATE
        if not kept:
            self._sizes[key] = max(self._sizes.get(key, 0), offset + length)
        self._call(made, op, key, result, flags=Mode.KEEP_SIZE if kept else 0, offset=offset, length=length)

    # Names

    def _path(self, process: _Process, directory: bytes, word: bytes) -> str:
        """The canonical path of an entry."""
        name = os.fsdecode(_string(word))
        below = _told(directory) if b"<" in directory else process.cwd[0]
        path = os.path.join(below, name)
        return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path.rstrip("/")))

    def _inside(self, path: str) -> bool:
        if any(path == hidden or path.startswith(f"{hidden}/") for hidden in self._tree.excluded):
            return False
        return any(path == root or path.startswith(root.rstrip("/") + "/") for root in self._tree.roots)

    def _new(self, path: str) -> Key:
        self._made += 1
        key = self._keys[path] = (self._device, -self._made)
        self._sizes[key] = 0
        return key

    def _opened(self, process: _Process, made: _Made, words: list[bytes], result: int) -> None:
        if made.name == "openat":
            directory, word, how = words[0], words[1], words[2]
        else:
            directory, word = b"AT_FDCWD", words[0]
            how = b"O_CREAT|O_WRONLY|O_TRUNC" if made.name == "creat" else words[1]
        if result < 0:
            return
        flags = how.decode().split("|")
        path = self._path(process, directory, word)
        key = self._keys.get(path)
        if key is None and os.path.islink(path):
            path = os.path.realpath(path)
            key = self._keys.get(path)
        names = os.fsencode(path) + b"\0\0"
        if self._inside(path):
            if "O_TMPFILE" in flags:
                key = self._new(f"{path}/{result} without a name")
                self._call(made, Op.OPEN, (0, 0), result, flags=Mode.CREATED | Mode.UNNAMED, data=names, end_key=key)
            elif key is None and "O_CREAT" in flags:
                key = self._new(path)
                self._call(made, Op.OPEN, (0, 0), result, flags=Mode.CREATED, data=names, end_key=key, end_path=path)
            elif key is not None and "O_TRUNC" in flags:
                self._sizes[key] = 0
                self._call(made, Op.OPEN, key, result, flags=Mode.TRUNCATED, data=names, end_key=key, end_path=path)
        fua = any(word in flags for word in _SYNCED)
        process.open[result] = _Open(key, "O_APPEND" in flags, fua, "O_RDONLY" not in flags)

    def _renamed(self, process: _Process, made: _Made, words: list[bytes], result: int) -> None:
        op, first, second = _NAMING[made.name]
        one = self._path(process, words[first - 1] if made.name.endswith(("at", "at2")) else b"", words[first])
        other = ""
        if second is not None:
            other = self._path(process, words[second - 1] if made.name.endswith(("at", "at2")) else b"", words[second])
        if not (self._inside(one) or (other and self._inside(other))) or result < 0:
            return
        key = self._keys.get(one, (0, 0))
        if op is Op.LINK and (through := re.fullmatch(r"/proc/self/fd/(\d+)", os.fsdecode(_string(words[first])))):
            file = process.open.get(int(through[1]))
            key = file.key if file is not None and file.key is not None else key
        end_key, flags = key, 0
        if op is Op.MKDIR:
            end_key = self._new(one)
        elif op is Op.UNLINK:
            self._keys.pop(one, None)
        elif op is Op.LINK:
            self._keys[other] = key
        elif op is Op.RENAME:
            flags = Mode.EXCHANGE if b"RENAME_EXCHANGE" in words[-1] else 0
            self._move(one, other, bool(flags))
        names = os.fsencode(one) + b"\0" + os.fsencode(other) + b"\0"
        self._call(made, op, key, result, flags=flags, data=names, end_key=end_key)

    def _move(self, one: str, other: str, exchanged: bool) -> None:
        def take(path: str) -> dict[str, Key]:
            below = {p: k for p, k in self._keys.items() if p == path or p.startswith(f"{path}/")}
            for each in below:
                del self._keys[each]
            return below

        moved, replaced = take(one), take(other)
        self._keys |= {other + path[len(one) :]: key for path, key in moved.items()}
        if exchanged:
            self._keys |= {one + path[len(other) :]: key for path, key in replaced.items()}


# What it does, and which arguments are its paths. Those of `...at` calls follow their directories.
_NAMING: dict[str, tuple[Op, int, int | None]] = {
    "rename": (Op.RENAME, 0, 1),
    "renameat": (Op.RENAME, 1, 3),
    "renameat2": (Op.RENAME, 1, 3),
    "link": (Op.LINK, 0, 1),
    "linkat": (Op.LINK, 1, 3),
    "symlink": (Op.SYMLINK, 1, None),
    "symlinkat": (Op.SYMLINK, 2, None),
    "unlink": (Op.UNLINK, 0, None),
    "unlinkat": (Op.UNLINK, 1, None),
    "rmdir": (Op.UNLINK, 0, None),
    "mkdir": (Op.MKDIR, 0, None),
    "mkdirat": (Op.MKDIR, 1, None),
}


def _told(word: bytes) -> str:
    """The path that strace tells with a descriptor, "" if none."""
    _, open, rest = word.partition(b"<")
    path = rest.rstrip(b">").replace(b"\\x", b"") if open else b""
    try:
        return os.fsdecode(bytes.fromhex(path.decode()))
    except ValueError:
        return ""
