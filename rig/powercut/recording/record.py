"""From a scenario to a trace: a real QEMU's format driver writes an image, and everything it asks for is recorded.

our client -> qemu-storage-daemon (the format driver) -> recording NBD server, or blklogwrites
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from powercut import __version__, formats, stamp
from powercut.capture.logwrites import Log, import_log
from powercut.capture.nbd import RecordingExport
from powercut.errors import EnvironmentFault, InputError
from powercut.guest.daemon import create_image, version
from powercut.guest.manage import Managed
from powercut.guest.past import Change, Past
from powercut.guest.workload import Operation, Verb, Workload
from powercut.recording.operations import operations
from powercut.scenario import Scenario, parse_size
from powercut.trace import SECTOR, Kind, TraceWriter
from quire.nbd import Server


def record(scenario: Scenario, out: Path, progress: Callable[[int, int], None] = lambda done, of: None) -> None:
    """Record `scenario` into the trace file `out`. Raises InputError, EnvironmentFault."""
    work = operations(scenario)
    size = parse_size(scenario.size)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="powercut-")))
        image, base = scratch / "image", scratch / "base"
        if scenario.backing is not None:
            _stamped_file(base, parse_size(scenario.backing))
        # beside a name in its header, QEMU takes no server for an image's backing file
        named = base if scenario.backing is not None and not _commits(work) else None
        create_image(image, scenario.format, size, scenario.options, named)
        most = max([size, *(operation.length for operation in work if operation.verb is Verb.RESIZE)])
        host = -(-formats.find(scenario.format).host_size(most) // SECTOR) * SECTOR
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


def _node(scenario: Scenario, scratch: Path, below: dict[str, Any]) -> dict[str, Any]:
    """The block node of the image, the one `below` being its file."""
    node: dict[str, Any] = {"driver": scenario.format, "file": below, "discard": "unmap"}
    if scenario.backing is not None:
        node["backing"] = {"driver": "raw", "file": {"driver": "file", "filename": str(scratch / "base")}}
    return node


@contextmanager
def _served(path: Path, writer: TraceWriter, file: int, scenario: Scenario) -> Iterator[dict[str, Any]]:
    """The block node of the file at `path`, behind a server that records it as `file` of the trace."""
    export = RecordingExport(path, writer, file, frozenset(scenario.record.lie))
    with Server(export, socket := f"{path}.sock"):
        yield {"driver": "nbd", "discard": "unmap", "server": {"type": "unix", "path": socket}}


def _drive(
    scenario: Scenario,
    work: list[Operation],
    node: dict[str, Any],
    writer: TraceWriter | None,
    guest: int,
    progress: Callable[[int, int], None],
) -> None:
    """Run the workload through QEMU, close the image in an orderly way, and end QEMU."""
    sizes = [operation.length for operation in work if operation.verb is Verb.RESIZE]
    past: Past | None = None
    if any(operation.verb in (Verb.RESIZE, Verb.APPLY) for operation in work):
        size, below = parse_size(scenario.size), parse_size(scenario.backing or "0")
        past = Past(max(size, *sizes, 0), size, min(size, below))

    def counted(begin: int, end: int) -> Iterator[Operation]:
        for done in range(begin, end):
            progress(done, len(work))
            yield work[done]

    with Managed(node) as managed:
        workload = Workload(managed.client, writer, guest, scenario.workload.depth)
        begin = 0
        for end in [*(i for i, operation in enumerate(work) if operation.verb is not None), len(work)]:
            workload.run(counted(begin, end))
            if workload.errors:
                number, error = workload.errors[0]
                raise EnvironmentFault(f"operation {number} failed while it was recorded: {os.strerror(error)}")
            if past is not None:
                for number in range(begin, end):
                    past.done(number + 1, work[number])
            if end < len(work):
                changes = past.changes(end + 1, work[end]) if past is not None else []
                with _in_flight(writer, guest, changes):
                    managed.manage(work[end])
                workload.managed(managed.client)
            begin = end + 1


@contextmanager
def _in_flight(writer: TraceWriter | None, guest: int, changes: list[Change]) -> Iterator[None]:
    """Mark `changes` of the guest's disk as issued now and completed when the context is left."""
    if writer is None:
        yield
        return
    issued = [
        writer.issue(change.kind, guest, change.offset, change.length, ref=change.ref)
        for change in changes
    ]  # fmt: skip
    yield
    for position in issued:
        writer.complete(position)


def _record_nbd(
    scenario: Scenario,
    work: list[Operation],
    writer: TraceWriter,
    scratch: Path,
    files: tuple[int, int],
    progress: Callable[[int, int], None],
) -> None:
    image, guest = files
    with ExitStack() as stack:
        below = stack.enter_context(_served(scratch / "image", writer, image, scenario))
        node = _node(scenario, scratch, below)
        if _commits(work):
            node["backing"]["file"] = stack.enter_context(_served(scratch / "base", writer, image + 1, scenario))
        _drive(scenario, work, node, writer, guest, progress)


def _commits(work: list[Operation]) -> bool:
    """Whether the backing file is written to: then it is recorded too."""
    return any(operation.verb is Verb.COMMIT for operation in work)


def _record_log(
    scenario: Scenario,
    work: list[Operation],
    writer: TraceWriter,
    scratch: Path,
    size: int,
    progress: Callable[[int, int], None],
) -> None:
    log = scratch / "log"
    log.touch()
    below: dict[str, Any] = {
        "driver": "blklogwrites",
        "discard": "unmap",
        "file": {"driver": "file", "filename": str(scratch / "image"), "discard": "unmap"},
        "log": {"driver": "file", "filename": str(log)},
    }
    node = _node(scenario, scratch, below)
    if scenario.record.no_flush:
        for each in (node, below, below["file"], below["log"]):
            each["cache"] = {"no-flush": True}
    _drive(scenario, work, node, None, -1, progress)
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
