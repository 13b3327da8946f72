"""A scenario: one frozen description of what is recorded, how it is explored, and what must come out.

A TOML file, one per scenario; docs/scenarios.md lists the keys. Unknown keys and bad values are refused with
the line they stand on.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from powercut.errors import InputError

_SIZE = re.compile(r"([0-9]+)([kKmMgGtT]?)")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
Positive = Annotated[int, Meta(ge=1)]


class Workload(Struct, frozen=True, forbid_unknown_fields=True, rename={"extra": "with"}):
    """Either `operations` drawn from `seed`, or a `history` written down: "write 64k 4k", "zero 0 1M",
    "zero 0 1M unmap", "discard 0 1M", "flush" (offset, then length)."""

    operations: Positive = 1000
    seed: int = 7
    extra: tuple[Literal["zero", "discard"], ...] = ()
    depth: Positive = 4
    history: tuple[str, ...] = ()


class Recording(Struct, frozen=True, forbid_unknown_fields=True):
    """`via` is what records: our NBD server under the format, or QEMU's blklogwrites driver. `lie`: what the server
    does not do, or late, and acknowledges (`powercut.capture.nbd`). `no_flush`: cache.no-flush=on on every node
    (blklogwrites only)."""

    via: Literal["nbd", "blklogwrites"] = "nbd"
    lie: tuple[Literal["flush", "order"], ...] = ()
    no_flush: bool = False


class Exploration(Struct, frozen=True, forbid_unknown_fields=True):
    """How crash states are explored. `atom`, `order`, `torn`: see `powercut.crash.options`. `budget`: at most so many
    checks. `checker`: a command that judges, with crashes inside what it writes `recovery_depth` deep. `lying_flushes`:
    so many of the last flushes did nothing. `media`: kinds of media faults, `faults` of each, drawn with `seed`."""

    atom: Literal[512, 4096, "write"] = 512
    order: Literal["any", "issue"] = "any"
    torn: Literal["old-or-new", "zeros", "garbage"] = "old-or-new"
    directory: Literal["posix", "ordered"] = "posix"
    sizes: bool = True
    budget: Positive | None = None
    rules: tuple[Literal["opens", "structure", "acknowledged"], ...] = ("opens", "structure", "acknowledged")
    checker: str | None = None
    recovery_depth: Annotated[int, Meta(ge=0)] = 1
    lying_flushes: Annotated[int, Meta(ge=0)] = 0
    media: tuple[Literal["flip", "zero", "read-error", "lost-write", "misdirected-write"], ...] = ()
    faults: Positive = 20
    seed: int = 1


class Loop(Struct, frozen=True, forbid_unknown_fields=True):
    """A real guest, started, put to work and ended, again and again. `loops` is how often, `quick` how often in a gate
    that is to be quick. `ending`: a name in `powercut.endings`. `moment`: the ending begins after so many answers of
    the guest's disk, else at a moment drawn for each loop. `fresh`: a new image for each loop, else it is used again.
    `cpu`, `memory` (MiB): the guest's. `filesystem`: the guest writes files into it. `host`: images lie on a new file
    system of that kind, where root may mount. `disk`: an image that boots by itself, without our agent; each guest
    has an overlay on it, and is ended `after` so many seconds."""

    ending: str = "quit"
    loops: Positive = 100
    quick: Positive | None = None
    start: Literal["restore", "plug", "boot"] = "restore"
    device: Literal["virtio-blk", "virtio-scsi", "ide", "nvme"] = "virtio-blk"
    cache: Literal["writeback", "none", "writethrough", "directsync", "unsafe"] = "writeback"
    aio: Literal["threads", "native", "io_uring"] = "threads"
    discard: bool = True
    disks: Annotated[int, Meta(ge=1, le=4)] = 1
    fresh: bool = False
    moment: Positive | None = None
    cpu: str | None = None
    memory: Annotated[int, Meta(ge=64)] = 96
    filesystem: Literal["ext4"] | None = None
    host: Literal["ext4", "xfs", "btrfs"] | None = None
    disk: str | None = None
    after: Annotated[float, Meta(gt=0)] | None = None


class Errors(Struct, frozen=True, forbid_unknown_fields=True):
    """Errors below the format, one in each run (`powercut errors`). `below` is what fails: blkdebug, a storage server,
    or a file system that is full. `event`: at which event of blkdebug's (none: every one that is raised); `nth`: which
    one of that name, which request, or which page (none: every one); `error`: what happens (none: all that may, without
    "gone"); `lasting`: once, or for good. `werror`: the disk is a virtual machine's, and that is what it does about
    errors (none: there is no machine)."""

    below: Literal["blkdebug", "server", "full"] = "blkdebug"
    event: str | None = None
    nth: Positive | None = None
    error: tuple[Literal["EIO", "ENOSPC", "stall", "hangup", "unanswered", "gone", "full"], ...] = ()
    lasting: tuple[Literal["once", "good"], ...] = ("once", "good")
    werror: Literal["report", "stop", "enospc", "ignore"] | None = None


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """Our model of the qcow2 driver, served over NBD, in place of QEMU's; `loops` times the guest writes, a snapshot is
    taken with `state` bytes of a machine's state, and everything is closed. `defects`: those planted in it. `guest`:
    our own client, or a real machine."""

    era: Literal["today", "April 2009"] = "today"
    defects: tuple[str, ...] = ()
    loops: Positive = 10
    state: str = "484k"
    guest: Literal["client", "machine"] = "client"


class Program(Struct, frozen=True, forbid_unknown_fields=True):
    """Programs in place of a guest: `before` are commands that make files in an empty directory, `command` is recorded
    there, and all files are explored (see `powercut.explore.sets`). `image` is the file that {} stands for in a
    checker."""

    command: str
    before: tuple[str, ...] = ()
    image: str | None = None


class Quire(Struct, frozen=True, forbid_unknown_fields=True):
    """A set of our own format, on a recorded store: `workload.history` has its own lines (`powercut.formats.quire`).
    `records`: how commits are written, P (two syncs) or C (one); `slots`: of the journal."""

    records: Literal["P", "C"] = "C"
    slots: Annotated[int, Meta(ge=4)] = 4


Rule = Literal[
    "opens",
    "structure",
    "acknowledged",
    "content",
    "atomic-tree",
    "immutable",
    "no-leak",
    "detects",
    "checker",
    "repairs",
    "alive",
]


class Scenario(Struct, frozen=True, forbid_unknown_fields=True):
    """See the module. `rule` and `qemu` go with expect = "BROKEN": the rule that must be among the broken ones, and
    the QEMU versions (prefixes) for which that is known; for others nothing is expected. `trace`: a recording that
    is shipped beside the scenario, explored as it is, so that no QEMU is needed. `loop`: nothing is recorded; a real
    guest is started and ended, and CLEAN is expected: no loop failed. `errors`: no crash, but errors while
    the guest writes. `quire`: our own format, and no QEMU."""

    about: str
    expect: Literal["HOLDS", "BROKEN", "CLEAN"]
    format: str = "qcow2"
    size: str = "256M"
    options: dict[str, str] = {}
    backing: str | None = None
    workload: Workload = Workload()
    record: Recording = Recording()
    explore: Exploration = Exploration()
    loop: Loop | None = None
    model: Model | None = None
    errors: Errors | None = None
    quire: Quire | None = None
    program: Program | None = None
    rule: Rule | None = None
    qemu: tuple[str, ...] = ()
    trace: str | None = None
    name: str = ""


def parse_size(text: str) -> int:
    """Bytes from "512", "64k", "1M", "20G". Raises InputError."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r} is not a size such as 4096, 64k or 256M")
    return int(match[1]) * _UNITS[match[2].lower()]


def size_text(size: int) -> str:
    """ "2M", "66k" or "512": the shortest way to write a size in a scenario."""
    for unit, letter in ((1 << 20, "M"), (1 << 10, "k")):
        if size and size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


def from_options(options: dict[str, Any]) -> Scenario:
    """The scenario that command line options describe. Raises InputError."""
    try:
        return msgspec.convert(options, Scenario)
    except msgspec.ValidationError as error:
        raise InputError(str(error)) from None


def load(path: Path) -> Scenario:
    """Read a scenario; its name is the file's. Raises InputError naming file, line and key."""
    try:
        text = path.read_text()
        scenario = msgspec.convert(tomllib.loads(text), Scenario)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        where = re.search(r"\(at line (\d+)", str(error))
        raise InputError(f"{path}{f':{where[1]}' if where else ''}: {error}") from None
    except msgspec.ValidationError as error:
        raise InputError(f"{path}{_line(text, str(error))}: {error}") from None
    for key, value in (("size", scenario.size), ("backing", scenario.backing)):
        try:
            size = parse_size(value) if value is not None else 512
        except InputError as error:
            raise InputError(f"{path}{_line(text, f'at `$.{key}`')}: {key}: {error}") from None
        if size == 0 or size % 512:
            line = _line(text, f"at `$.{key}`")
            raise InputError(f"{path}{line}: {key}: {value!r} is not a positive multiple of 512 bytes")
    if scenario.expect != "BROKEN" and (scenario.rule or scenario.qemu):
        raise InputError(f'{path}{_line(text, "at `$.expect`")}: rule and qemu go with expect = "BROKEN"')
    if scenario.record.no_flush and scenario.record.via != "blklogwrites":
        raise InputError(f"{path}{_line(text, 'at `$.record.no_flush`')}: no_flush does nothing over nbd")
    return msgspec.structs.replace(scenario, name=path.stem)


def _line(text: str, error: str) -> str:
    """ ":12" if the key that a msgspec error speaks of stands on line 12."""
    import tomlkit  # only errors pay for it

    where = re.search(r"at `\$\.?([^`]*)`", error)
    steps: list[Any] = [int(s) if s.isdigit() else s for s in re.findall(r"[\w-]+", where[1])] if where else []
    field = re.search(r"unknown field `([^`]*)`", error)
    if field:
        steps.append(field[1])
    if not steps:
        return ""
    # A value that occurs nowhere else is put in its place: the line it is then found on is the line of the key.
    document: Any = tomlkit.parse(text)
    here = document
    try:
        for step in steps[:-1]:
            here = here[step]
        here[steps[-1]] = "\x00here"
        return f":{tomlkit.dumps(document).split('u0000here')[0].count(chr(10)) + 1}"
    except (KeyError, IndexError, TypeError):
        return ""
