"""Recording any program: it runs with the recorder in it, and what it did to its files becomes a trace.

The files are copied before, the recorder (recorder.c) logs every call, the log becomes a trace, and the trace is
replayed and compared with what the program left behind: a capture that missed something is refused.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from powercut import __version__, compiled
from powercut.capture import lazy, recorded, strace
from powercut.capture.filetree import Node, Tree
from powercut.capture.interrupted import interruptions_are_its_own
from powercut.capture.replayed import compare
from powercut.capture.translate import MAX_FILES, Translation, find_image
from powercut.errors import EnvironmentFault, InputError
from powercut.scratch import scratch
from powercut.trace import Trace, TraceWriter

SOURCES = ("recorder.c", "recorder_log.h", "recorder_lazy.h")
FLAGS = ("-O2", "-w", "-shared", "-fPIC", "-fvisibility=hidden")
LIMIT = 8 << 30  # bytes of files of which a copy is kept
BESIDE = 256 << 20  # bytes of files that do not change which go into the trace, for checkers to find
_PATIENCE = 10.0  # seconds that what the program left running may take to end
_PT_INTERP = 3


@dataclass(slots=True)
class Captured:
    """What came of it. `status` is the program's exit status, minus a signal's number if that ended it."""

    status: int
    events: int
    files: int
    seconds: float  # that the program ran
    refused: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def build() -> Path:
    """The recorder, compiled if it is not yet. Raises EnvironmentFault."""
    folder = Path(__file__).parent
    library = compiled.build("recorder", ".so", [folder / name for name in SOURCES], FLAGS, ("-ldl", "-pthread"))
    if {" ", ":"} & set(str(library)):
        raise EnvironmentFault(f"{library}: LD_PRELOAD takes no path with a space or a colon: set XDG_CACHE_HOME")
    return library


def check_program(name: str) -> str:
    """The path of a program that a library can be preloaded into. Raises InputError."""
    path = shutil.which(name)
    if path is None:
        raise InputError(f"{name}: no such program")
    status = os.stat(path)
    foreign = status.st_mode & stat.S_ISUID and status.st_uid != os.geteuid()
    if foreign or (status.st_mode & stat.S_ISGID and status.st_gid != os.getegid()):
        raise InputError(f"{path}: setuid or setgid: nothing can be preloaded into it, so it cannot be recorded")
    with suppress(OSError), open(path, "rb") as file:
        head = file.read(64)
        if head[:2] == b"#!":
            words = (head + file.read(256)).splitlines()[0][2:].split()
            if words and os.fsdecode(words[0]) != name:
                check_program(os.fsdecode(words[0]))
        elif head[:5] == b"\x7fELF\x02":
            table, size, count = *struct.unpack_from("<Q", head, 32), *struct.unpack_from("<HH", head, 54)
            file.seek(table)
            headers = file.read(size * count)
            if _PT_INTERP not in [struct.unpack_from("<I", headers, i * size)[0] for i in range(count)]:
                raise InputError(f"{path}: statically linked: nothing can be preloaded into it; it cannot be recorded")
        elif head[:4] == b"\x7fELF":
            raise InputError(f"{path}: not a program of 64 bits: the recorder cannot be preloaded into it")
    return path


def roots_of(directories: Sequence[str]) -> list[str]:
    """Canonical paths, without those that lie within another."""
    roots: list[str] = []
    for directory in directories:
        if not os.path.isdir(directory):
            raise InputError(f"--dir {directory}: not a directory")
        roots.append(os.path.realpath(directory))
    held = [one for one in roots if any(one != other and os.path.commonpath((one, other)) == other for other in roots)]
    return [root for root in dict.fromkeys(roots) if root not in held]


def capture(
    command: Sequence[str],
    directories: Sequence[str],
    out: Path,
    *,
    image: str | None = None,
    format: str | None = None,
    limit: int = LIMIT,
    recorder: str | None = None,
    cwd: str | None = None,
    quiet: bool = False,
) -> Captured:
    """Run `command` and write the trace of what it did to files under `directories` to `out`. `recorder` is "preload"
    or "strace"; None: strace only where there is no compiler. `cwd`: where the command runs;
    `quiet`: what it says on standard output is not shown.

    Raises InputError, and `out` is then left as it was; EnvironmentFault if the disk became full: `out` then holds what
    was recorded until then, and says so.
    """
    roots = roots_of(directories)
    if recorder is None:
        recorder = "strace" if shutil.which("cc") is None and strace.available() else "preload"
    if recorder == "strace" and shutil.which(command[0]) is None:
        raise InputError(f"{command[0]}: no such program")
    if out.exists() and not out.is_file():
        raise InputError(f"{out}: not a regular file")
    library = None
    if recorder == "preload":
        check_program(command[0])
        library = build()
    out = Path(os.path.realpath(out))
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch(".powercut-capture-", out.parent))
        except OSError as error:
            raise InputError(f"{out}: cannot be written: {error.strerror}") from None
        partial, log, copies = folder / "trace", folder / "log", folder / "before"
        log.mkdir()
        copies.mkdir()
        tree = Tree(roots, {str(out), str(folder)})
        tree.save(copies, limit)
        stopped = None
        if library is None:
            status, seconds, calls = strace.run(command, log, tree, cwd, quiet)
        else:
            recorded.make_control(log, roots, tree.live)
            status, seconds = _run(command, library, log, cwd, quiet)
            stopped = recorded.why_stopped(log)
            calls, undos = recorded.read(log)
            if any(call.checksum is not None for call in calls):
                moved = (call.names[1] for call in calls if call.op is recorded.Op.RENAME)  # perhaps out of the roots
                files = lazy.Files([*roots, *moved])
                lazy.find(calls, undos, files, lazy.checksum_of(library), stopped is not None)
        if stopped:  # what a call did that has not returned since cannot be told from the files as they are now
            calls = [call for call in calls if call.result is not None or not call.changes_names]
        translation = Translation(tree, calls)
        if translation.problems and not stopped:
            raise InputError(translation.problems[0])
        subject = find_image(tree, image, lambda node: node.touched) if image is not None else None
        result = Captured(status, 0, 0, seconds, dict(translation.refused))
        left_out = tree.keep_untouched(BESIDE)
        result.warnings += _doubts(translation)
        if left_out:
            few = ", ".join(left_out[:3]) + (" ..." if len(left_out) > 3 else "")
            result.warnings.append(
                f"{len(left_out)} files that did not change are left out of the trace ({few}): more than "
                f"{BESIDE >> 20} MiB; a checker will miss them"
            )
        meta = {
            "powercut": __version__,
            "recorder": recorder,
            "scope": "overlap",
            "command": list(command),
            "exit_status": status,
            "refused": result.refused,
            "past": {tree.name(node.path): sorted(ways) for node, ways in translation.past.items()},
            "format": format,
            "left_out": left_out,
            "truncated": stopped,
        }
        if subject is not None:
            meta |= _about_image(translation, subject)
        meta = {key: value for key, value in meta.items() if value not in (None, {}, [], ())}
        try:
            with TraceWriter(partial, meta) as writer:
                if sum(node.touched or node.beside for node in {*tree.initial, *translation.known}) > MAX_FILES:
                    raise InputError(f"there are more than {MAX_FILES} files: name a narrower directory with --dir")
                result.events = translation.write(writer, subject, stopped is not None)
        except EnvironmentFault as error:  # a full disk; what was whole before stays
            stopped = str(error).replace(str(partial), str(out))
        trace = Trace(partial)
        if not stopped:
            compare(tree, trace, folder, translation.past)
        result.files = len(trace.files)
        os.replace(partial, out)
        if stopped:
            raise EnvironmentFault(f"{stopped}; {out} holds what came before")
    return result


def _doubts(translation: Translation) -> list[str]:
    name = translation.tree.name
    return [
        f"{name(node.path)} was changed in ways that cannot be recorded ({', '.join(sorted(ways))}); at the end it "
        "holds what was recorded, but what it held in between is not known"
        for node, ways in translation.past.items()
    ]


def _about_image(translation: Translation, image: Node) -> dict[str, Any]:
    """What exploration must know of a file that it treats as a device, whose size does not change."""
    about: dict[str, Any] = {"image": {"before": image.size_before, "after": image.size, "declared": image.largest}}
    name = translation.tree.name(image.path)
    if image in translation.past:
        about["truncated"] = f"{name} was also changed in ways that cannot be recorded"
    elif image.shrank:
        about["truncated"] = f"{name} became shorter while it was recorded, and exploration keeps a file's size fixed"
    return about


def _run(command: Sequence[str], library: Path, log: Path, cwd: str | None, quiet: bool) -> tuple[int, float]:
    """Run the program with the recorder in it, until it and all it started have ended."""
    preload = " ".join(part for part in (str(library), os.environ.get("LD_PRELOAD", "")) if part)
    environment = {**os.environ, "LD_PRELOAD": preload, "POWERCUT_CAPTURE": str(log)}
    begin = time.monotonic()
    try:
        with interruptions_are_its_own():
            stdout = subprocess.DEVNULL if quiet else None
            status = subprocess.run(command, env=environment, cwd=cwd, stdout=stdout, check=False).returncode
    except OSError as error:
        raise InputError(f"{command[0]}: {error.strerror}") from None
    seconds = time.monotonic() - begin
    if recorded.processes(log) == 0:
        raise InputError(f"{command[0]}: the recorder was not loaded into it (set-user-id, or not linked with glibc?)")
    while left := _still_running(log):
        if time.monotonic() - begin - seconds > _PATIENCE:
            raise InputError(
                f"{command[0]} ended, and left process {left[0]} running: a capture ends when all have ended"
            )
        time.sleep(0.05)
    return status, seconds


def _still_running(log: Path) -> list[int]:
    """Processes that have the recorder's log mapped."""
    needle, found = os.fsencode(log / "control"), []
    for process in os.listdir("/proc"):
        if process.isdigit():
            with suppress(OSError), open(f"/proc/{process}/maps", "rb") as maps:
                if needle in maps.read():
                    found.append(int(process))
    return found
