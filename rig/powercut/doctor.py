"""What this machine has for Powercut: each thing found, limited or missing, what needs it, and how to mend it.

`examine` only looks: it installs nothing, prints nothing, and leaves nothing behind but what a probe guest told of the
accelerator, which the cache keeps. A program counts as there
when it answered, not when a file of its name lies on the path; one that does not answer in time is `LIMITED`.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from powercut import compiled
from powercut.errors import EnvironmentFault
from powercut.guest import accelerator, kernel

QEMU = "qemu-system-x86_64"
DEADLINE = 10.0  # seconds that a program may take to state its version
LITTLE_SPACE = 2 << 30  # a gate keeps its traces and images below this
LITTLE_MEMORY = 1 << 30


class State(enum.StrEnum):
    OK = "ok"
    LIMITED = "limited"  # there, but not all of it, or not known to work
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked for. `mend` is empty where there is nothing to mend."""

    name: str
    state: State
    detail: str  # a version, an amount, or what was seen instead
    needed_for: str
    mend: str = ""


PACKAGES = {  # import name -> (distribution, what needs it)
    "numpy": ("numpy", "everything: traces and crash states are arrays"),
    "xxhash": ("xxhash", "everything: digests in traces"),
    "click": ("click", "the command line"),
    "msgspec": ("msgspec", "reading scenarios"),
    "tomlkit": ("tomlkit", "line numbers in errors about scenarios"),
    "rich": ("rich", "tables and progress"),
    "scipy": ("scipy", "what a number of loops proves"),
    "mfusepy": ("mfusepy", "checkers of several files, with libfuse3"),
    "qemu.qmp": ("qemu.qmp", "talking to virtual machines"),
}

PROGRAMS = {  # name -> (what needs it, Debian package, whether Powercut does without)
    "qemu-img": ("making images, and a second opinion on each verdict", "qemu-utils", False),
    "qemu-io": ("writing to images through QEMU", "qemu-utils", False),
    "qemu-storage-daemon": ("recording what QEMU's drivers write", "qemu-system-common", False),
    "qemu-system-x86_64": ("recording under a running guest", "qemu-system-x86", False),
    "cc": ("building the programs that run in guests", "gcc libc6-dev", False),
    "strace": ("seeing the system calls of a program under test", "strace", True),
}

DRIVERS = {  # QEMU block driver -> (what needs it, its node over the null devices "a" and "b")
    "qcow2": ("recording qcow2 images", "file=a"),
    "nbd": ("recording over NBD", "server.type=unix,server.path=/nonexistent/powercut"),
    "blklogwrites": ("recording below a format, as a file of writes", "file=a,log=b"),
    "blkdebug": ("injecting errors below a format", "image=a"),
}


def examine() -> list[Finding]:
    """Everything, in the order in which it matters."""
    return [
        _python(),
        *(_package(name) for name in PACKAGES),
        *(_program(name) for name in PROGRAMS),
        *(_driver(name) for name in DRIVERS),
        _kernel(),
        _kvm(),
        _scratch(),
        _unix_socket(),
        _space(),
        _memory(),
        _cores(),
    ]


def _python() -> Finding:
    state = State.OK if sys.version_info >= (3, 11) else State.MISSING
    mend = "" if state is State.OK else "install Python 3.11 or newer"
    return Finding("python", state, f"{platform.python_version()} ({sys.executable})", "everything", mend)


def _package(name: str) -> Finding:
    distribution, needed_for = PACKAGES[name]
    try:
        importlib.import_module(name)
        return Finding(name, State.OK, importlib.metadata.version(distribution), needed_for)
    except Exception as error:  # a broken binary package may raise anything on import
        state = State.MISSING if isinstance(error, ModuleNotFoundError) else State.LIMITED
        return Finding(name, state, f"{type(error).__name__}: {error}", needed_for, f"pip install {distribution}")


def _ask(*command: str) -> tuple[int, str]:
    """Exit code and all output of `command`. Raises OSError and subprocess.TimeoutExpired."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=DEADLINE,
        check=False,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout.strip()


def _program(name: str) -> Finding:
    needed_for, package, optional = PROGRAMS[name]
    needed_for += " (optional)" if optional else ""
    mend = f"make setup, or by hand: apt-get install {package}"
    if shutil.which(name) is None:
        return Finding(name, State.MISSING, "not on PATH", needed_for, mend)
    try:
        code, output = _ask(name, "--version")
    except subprocess.TimeoutExpired:
        return Finding(name, State.LIMITED, f"did not state its version in {DEADLINE:g} s", needed_for, mend)
    except OSError as error:
        return Finding(name, State.LIMITED, f"does not run: {error.strerror}", needed_for, mend)
    first = output.partition("\n")[0]
    if code:
        return Finding(name, State.LIMITED, f"--version ended with code {code}: {first}", needed_for, mend)
    version = re.search(r"\d+(?:\.\d+)+", first)
    return Finding(name, State.OK, version[0] if version else first, needed_for)


def _driver(name: str) -> Finding:
    """Ask the daemon to open a node, rather than for a list: a listed driver may be forbidden in this build."""
    needed_for, options = DRIVERS[name]
    title, mend = f"driver {name}", "install a qemu-storage-daemon that was built with this driver"
    null = "driver=null-co,size=1048576,read-zeroes=on,node-name="
    nodes = [null + "end", null + "a", null + "b", f"driver={name},node-name=probe,{options}"]
    nodes += [null + "end"]  # a second node of that name: an error, so the daemon ends
    try:
        _, output = _ask("qemu-storage-daemon", *(word for node in nodes for word in ("--blockdev", node)))
    except (OSError, subprocess.TimeoutExpired):
        return Finding(title, State.MISSING, "qemu-storage-daemon gave no answer", needed_for, mend)
    if "does not accept value" in output or "nknown driver" in output or "whitelist" in output:
        return Finding(title, State.MISSING, output.partition("\n")[0], needed_for, mend)
    expected = {"qcow2": "not in qcow2 format", "nbd": "Failed to connect"}.get(name, "node-name='end'")
    if expected in output:
        return Finding(title, State.OK, "opens", needed_for)
    return Finding(title, State.LIMITED, f"unexpected answer: {output.partition(chr(10))[0]!r}", needed_for, mend)


def _kernel() -> Finding:
    """Whether the guests' kernel is in the cache: nothing is downloaded here."""
    home, needed_for = kernel.kept(), "real guests"
    if home is None:
        return Finding("guest kernel", State.MISSING, f"none in {compiled.cache()}", needed_for, "make setup")
    return Finding("guest kernel", State.OK, home.name.removeprefix("kernel-"), needed_for)


def _kvm() -> Finding:
    """The device may open and still hang every guest: only a guest that booted under it is a proof."""
    needed_for = "guests at full speed; without it they are emulated"
    found = accelerator.known(QEMU)
    if found is None and kernel.kept() is not None and shutil.which(QEMU):
        with contextlib.suppress(EnvironmentFault):
            found = accelerator.choose(QEMU, kernel.kernel())
    if found is None:
        return Finding("kvm", State.LIMITED, f"{accelerator.DEVICE} is there, not probed yet", needed_for, "make setup")
    if found.name == "kvm":
        return Finding("kvm", State.OK, "a probe guest booted under it", needed_for)
    state = State.LIMITED if os.path.exists(accelerator.DEVICE) else State.MISSING
    return Finding("kvm", state, found.why, needed_for, "a machine with virtualization turned on, and rights to use it")


def _scratch() -> Finding:
    """Whether the directory for temporary files takes sparse files: images are mostly holes."""
    name, needed_for, mend = "scratch", "traces and images", "set TMPDIR to a directory on a local file system"
    try:
        where = tempfile.gettempdir()
        with tempfile.TemporaryFile(prefix="powercut-") as file:
            file.truncate(64 << 20)
            file.write(b"x")
            file.flush()
            used = os.fstat(file.fileno()).st_blocks * 512
    except OSError as error:
        return Finding(name, State.MISSING, f"no directory for temporary files: {error.strerror}", needed_for, mend)
    if used > 32 << 20:
        return Finding(name, State.LIMITED, f"{where}: holes of a file take up space", needed_for, mend)
    return Finding(name, State.OK, where, needed_for)


def _unix_socket() -> Finding:
    name, needed_for, mend = "unix sockets", "recording over NBD, and QMP", "set TMPDIR to a short path, as /tmp"
    try:
        with tempfile.TemporaryDirectory(prefix="powercut-") as folder:
            path = os.path.join(folder, "socket")
            with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
                server.bind(path)
                server.listen(1)
                client.settimeout(DEADLINE)
                client.connect(path)
    except OSError as error:  # a path of more than 107 bytes is an OSError, too
        return Finding(name, State.MISSING, str(error), needed_for, mend)
    return Finding(name, State.OK, "connect", needed_for)


def _space() -> Finding:
    name, needed_for, mend = "free space", "traces and images", "free some, or set TMPDIR elsewhere"
    try:
        free = shutil.disk_usage(tempfile.gettempdir()).free
    except OSError as error:
        return Finding(name, State.MISSING, str(error), needed_for, mend)
    enough = free >= LITTLE_SPACE
    return Finding(name, State.OK if enough else State.LIMITED, _gib(free), needed_for, "" if enough else mend)


def _memory() -> Finding:
    amount = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        # a container may be allowed less than the machine has
        amount = min(amount, int(Path("/sys/fs/cgroup/memory.max").read_text("utf-8")))
    enough = amount >= LITTLE_MEMORY
    mend = "" if enough else "more memory, or fewer workers"
    return Finding("memory", State.OK if enough else State.LIMITED, _gib(amount), "searching many states", mend)


def _cores() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("cores", State.OK, str(count), "as many workers search at once")


def _gib(amount: int) -> str:
    return f"{amount / (1 << 30):.1f} GiB"
