"""A small trace with everything in it, and what a reader may learn from a trace."""

from __future__ import annotations

from pathlib import Path

from powercut.trace import SECTOR, Flag, Kind, Trace, TraceWriter

META = {"recorder": "test", "format": "raw", "umlaut": "ä"}
Content = tuple[object, ...]


def small(path: Path) -> Path:
    """A trace with every kind of record, and writes at odd places."""
    with TraceWriter(path, META) as writer:
        image = writer.file("image", 16 * SECTOR, "image")
        guest = writer.file("guest", 8 * SECTOR, "guest")
        writer.base(image, 2 * SECTOR, b"b" * SECTOR)
        first = writer.issue(Kind.WRITE, image, SECTOR, 2 * SECTOR, data=b"1" * SECTOR + b"2" * SECTOR)
        asked = writer.issue(Kind.WRITE, guest, 0, SECTOR, ref=1)
        odd = writer.issue(Kind.WRITE, image, 700, 600, data=bytes(range(200)) * 3, flags=Flag.FUA)
        writer.complete(odd)
        writer.complete(first, 5)
        writer.issue(Kind.ZERO, image, 0, 4096, flags=Flag.MAY_UNMAP)
        writer.issue(Kind.DISCARD, image, 4096, 512)
        writer.complete(writer.issue(Kind.FLUSH, image, flags=Flag.LIED))
        writer.complete(asked)
        for kind in (Kind.TRUNCATE, Kind.CREATE, Kind.LINK, Kind.RENAME, Kind.UNLINK, Kind.SYNC_DIR):
            writer.issue(kind, image, length=kind * 10, data=b'{"name": "x"}')
        writer.mark("done", epoch=7)
        writer.complete(writer.issue(Kind.WRITE, image, 3, 5, data=b"tiny!"))
    return path


def content(trace: Trace) -> Content:
    """Everything a reader of a trace may learn from it."""
    images = {info.id for info in trace.files if info.role != "guest"}
    writes = [bytes(trace.payload(e)) for e in trace.events if e["kind"] == Kind.WRITE and e["file"] in images]
    files = [(f.id, f.name, f.size, f.role) for f in trace.files]
    bases = [trace.rows[row : row + length // SECTOR].tobytes() for _, _, length, row in trace.bases.tolist()]
    return (trace.meta, files, trace.events.tolist(), trace.bases.tolist(), bases, writes, trace.length, trace.hash)


def loaded(path: Path) -> Trace:
    trace = Trace(path)
    trace.verify()
    return trace
