"""From a scenario to a trace: a real QEMU's format driver writes an image, and everything it asks for is recorded.

our client -> qemu-storage-daemon (the format driver) -> recording NBD server, or blklogwrites
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from powercut import __version__, formats, stamp
from powercut.capture.logwrites import Log, import_log
from powercut.capture.nbd import RecordingExport
from powercut.errors import EnvironmentFault, InputError
from powercut.guest.daemon import Daemon, create_image, version
from powercut.guest.workload import KINDS, Operation, Workload, draw
from powercut.scenario import Scenario, parse_size
from powercut.trace import SECTOR, Kind, TraceWriter
from quire.nbd import Server


def operations(scenario: Scenario) -> list[Operation]:
    """The operations of a scenario's workload. Raises InputError for a history that makes no sense, and for a scenario
    that cannot be recorded."""
    size = parse_size(scenario.size)
    for name, text in (("size", scenario.size), ("backing", scenario.backing)):
        if text is not None and (parse_size(text) % SECTOR or not parse_size(text)):
            raise InputError(f"{name} {text}: not a positive multiple of {SECTOR} bytes")
    if scenario.workload.history:
        work = [_parse(line, size) for line in scenario.workload.history]
    else:
        work = list(draw(scenario.workload.seed, scenario.workload.operations, size, scenario.workload.extra))
    if scenario.record.via == "blklogwrites":
        _check_log(scenario, work)
    elif scenario.record.no_flush:
        raise InputError("no_flush does nothing over nbd")
    return work


def _check_log(scenario: Scenario, work: list[Operation]) -> None:
    if scenario.workload.extra or any(operation.kind not in (Kind.WRITE, Kind.FLUSH) for operation in work):
        raise InputError(
            "via blklogwrites only writes and flushes can be judged: zeroes and discards bear no stamps, and a reopen "
            "begins a new log"
        )
    if scenario.backing is not None or scenario.record.lie:
        raise InputError("via blklogwrites neither a backing file nor a lie can be recorded")


def _parse(line: str, size: int) -> Operation:
    words = line.split()
    kind = KINDS.get(words[0]) if words else None
    unmap = words[-1:] == ["unmap"]
    places = words[1 : len(words) - unmap]
    bare = kind in (Kind.FLUSH, Kind.MARK)
    if kind is None or len(places) != (0 if bare else 2) or (unmap and kind is not Kind.ZERO):
        raise InputError(
            f"history: {line!r} is not one of: write|zero|discard OFFSET LENGTH, zero ... unmap, flush, reopen"
        )
    offset, length = [parse_size(word) for word in places] or [0, 0]
    if (offset | length) % SECTOR or offset + length > size or (length == 0) != bare:
        raise InputError(f"history: {line!r} is not a range of whole sectors within {size} bytes")
    return Operation(kind, offset, length, unmap)


def record(scenario: Scenario, out: Path, progress: Callable[[int, int], None] = lambda done, of: None) -> None:
    """Record `scenario` into the trace file `out`. Raises InputError, EnvironmentFault."""
    work = operations(scenario)
    size = parse_size(scenario.size)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="powercut-")))
        image, base = scratch / "image", scratch / "base"
        if scenario.backing is not None:
            _stamped_file(base, parse_size(scenario.backing))
        create_image(image, scenario.format, size, scenario.options, base if scenario.backing is not None else None)
        host = -(-formats.find(scenario.format).host_size(size) // SECTOR) * SECTOR
        if image.stat().st_size < host:
            os.truncate(image, host)
        writer = stack.enter_context(TraceWriter(out, _meta(scenario, host)))
        files = _declare(writer, scenario, image, base, size)
        if scenario.record.via == "nbd":
            _record_nbd(scenario, work, writer, scratch, files, progress)
        else:
            _record_log(scenario, work, writer, scratch, size, progress)


def _meta(scenario: Scenario, host: int) -> dict[str, Any]:
    workload = scenario.workload
    return {
        "powercut": __version__,
        "qemu": version(),
        "recorder": scenario.record.via,
        "scope": "overlap" if scenario.record.via == "nbd" else "completion-order",
        "format": scenario.format,
        "options": scenario.options,
        "size": parse_size(scenario.size),
        "workload": {"history": list(workload.history)}
        if workload.history
        else {"operations": workload.operations, "seed": workload.seed, "with": list(workload.extra)},
        "depth": workload.depth,
        "lie": list(scenario.record.lie),
        "no_flush": scenario.record.no_flush,
    }


def _declare(writer: TraceWriter, scenario: Scenario, image: Path, base: Path, size: int) -> tuple[int, int]:
    """Declare the files of the trace, with what they hold. Returns the ids of the image and the guest's disk."""
    of_image = writer.file("image", image.stat().st_size, "image")
    writer.base_file(of_image, image)
    if scenario.backing is not None:
        of_base = writer.file("base", base.stat().st_size, "backing")
        writer.base_file(of_base, base)
    if scenario.record.via != "nbd":
        return of_image, -1  # the guest's side is told from stamps when the log is read
    guest = writer.file("guest", size, "guest")
    if scenario.backing is not None:
        covered = min(size, base.stat().st_size)
        writer.complete(writer.issue(Kind.WRITE, guest, 0, covered, ref=0))
        writer.complete(writer.issue(Kind.FLUSH, guest))
    return of_image, guest


def _stamped_file(path: Path, size: int) -> None:
    """A file full of stamps of operation 0: what the disk held before the workload."""
    with open(path, "wb") as out:
        for sector in range(0, size // SECTOR, 2048):
            out.write(stamp.make(0, 0, sector, min(2048, size // SECTOR - sector)))


def _format_nodes(scenario: Scenario, scratch: Path, below: str) -> list[dict[str, Any]]:
    """The block nodes from the format up to the one called "disk", on top of node `below`."""
    disk: dict[str, Any] = {"driver": scenario.format, "node-name": "disk", "file": below, "discard": "unmap"}
    nodes = [disk]
    if scenario.backing is not None:
        disk["backing"] = "base"
        base_file = {"driver": "file", "filename": str(scratch / "base"), "read-only": True}
        nodes.insert(0, {"driver": "raw", "node-name": "base", "read-only": True, "file": base_file})
    return nodes


def _drive(
    scenario: Scenario,
    work: list[Operation],
    nodes: list[dict[str, Any]],
    writer: TraceWriter | None,
    guest: int,
    progress: Callable[[int, int], None],
) -> None:
    """Run the workload through QEMU and end QEMU in an orderly way, between reopens and at the end."""

    def counted(begin: int, end: int) -> Iterator[Operation]:
        for done in range(begin, end):
            progress(done, len(work))
            yield work[done]

    workload: Workload | None = None
    begin = 0
    for end in [*(i for i, operation in enumerate(work) if operation.kind is Kind.MARK), len(work)]:
        with Daemon(nodes) as daemon:
            client = daemon.connect()
            try:
                if workload is None:
                    workload = Workload(client, writer, guest, scenario.workload.depth)
                else:
                    workload.reopened(client)
                workload.run(counted(begin, end))
            finally:
                client.close()
        if workload.errors:
            number, error = workload.errors[0]
            raise EnvironmentFault(f"operation {number} failed while it was recorded: {os.strerror(error)}")
        begin = end + 1


def _record_nbd(
    scenario: Scenario,
    work: list[Operation],
    writer: TraceWriter,
    scratch: Path,
    files: tuple[int, int],
    progress: Callable[[int, int], None],
) -> None:
    image, guest = files
    export = RecordingExport(scratch / "image", writer, image, frozenset(scenario.record.lie))
    socket = str(scratch / "image.sock")
    below = {"driver": "nbd", "node-name": "image", "discard": "unmap", "server": {"type": "unix", "path": socket}}
    with Server(export, socket):
        _drive(scenario, work, [below, *_format_nodes(scenario, scratch, "image")], writer, guest, progress)


def _record_log(
    scenario: Scenario,
    work: list[Operation],
    writer: TraceWriter,
    scratch: Path,
    size: int,
    progress: Callable[[int, int], None],
) -> None:
    image, log = scratch / "image", scratch / "log"
    log.touch()
    below: list[dict[str, Any]] = [
        {"driver": "file", "node-name": "file", "filename": str(image), "discard": "unmap"},
        {"driver": "file", "node-name": "log", "filename": str(log)},
        {"driver": "blklogwrites", "node-name": "image", "file": "file", "log": "log", "discard": "unmap"},
    ]
    nodes = [*below, *_format_nodes(scenario, scratch, "image")]
    if scenario.record.no_flush:
        for node in nodes:
            node["cache"] = {"no-flush": True}
    _drive(scenario, work, nodes, None, -1, progress)
    import_log(Log(log), writer, 0, size)


def import_trace(log: str, base: str, out: Path, format: str) -> int:
    """Make a trace of a dm-log-writes file and the image as it was when logging began. Returns the number of events.

    Raises InputError.
    """
    if not os.path.isfile(base):
        raise InputError(f"{base}: {'not a regular file' if os.path.exists(base) else 'No such file or directory'}")
    opened = Log(log)
    highest = max((entry.offset + entry.length for entry in opened), default=0)
    partial = out.with_name(out.name + ".partial")
    try:
        meta = {
            "powercut": __version__,
            "recorder": "dm-log-writes",
            "scope": "completion-order",
            "format": format,
            "truncated": opened.truncated,
        }
        with TraceWriter(partial, meta) as writer:
            image = writer.file(os.path.basename(base), max(os.path.getsize(base), highest), "image")
            writer.base_file(image, base)
            count = import_log(opened, writer, image, 0)
        shutil.move(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return count
