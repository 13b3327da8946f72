"""The trace file: what was written is read, what is damaged is refused, and a death loses only what was not whole."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powercut.errors import InputError
from powercut.report import tracetext
from powercut.trace import MAX_SIZE, NEVER, RECORD, SECTOR, Flag, Kind, Trace, TraceWriter
from support.traces import META, content, loaded, small

# ---- what was written is read


def test_every_kind_of_record_comes_back(tmp_path):
    trace = loaded(small(tmp_path / "t"))
    events = trace.events
    assert trace.meta == META
    assert [(f.id, f.name, f.size, f.role) for f in trace.files] == [
        (0, "image", 16 * SECTOR, "image"),
        (1, "guest", 8 * SECTOR, "guest"),
    ]
    assert set(events["kind"].tolist()) == {int(kind) for kind in Kind if kind < Kind.COMPLETE}
    assert trace.truncated is None
    assert trace.length == 4 + len(events) + 5  # META, two FILE, BASE; five COMPLETE
    assert trace.file("guest") == trace.files[1]
    assert trace.file("backing") is None
    assert (events["flags"][events["kind"] == Kind.ZERO] == Flag.MAY_UNMAP).all()
    assert (events["flags"][events["kind"] == Kind.FLUSH] == Flag.LIED).all()
    assert tracetext.document(trace)["files"][0]["events"]["write"] == 3
    assert len(list(tracetext.lines(trace))) == len(events)


def test_positions_say_what_happened_before_what(tmp_path):
    first, asked, odd, *rest = loaded(small(tmp_path / "t")).events
    assert [first["issued"], asked["issued"], odd["issued"]] == [4, 5, 6]
    assert [odd["completed"], first["completed"]] == [7, 8], "the later one was answered first"
    assert [first["result"], odd["result"], asked["ref"]] == [5, 0, 1]
    assert first["issued"] < odd["issued"] < odd["completed"] < first["completed"]
    zero = rest[0]
    assert (zero["kind"], zero["completed"], zero["result"]) == (Kind.ZERO, NEVER, 0)


def test_row_0_is_zeros(tmp_path):
    assert not loaded(small(tmp_path / "t")).rows[0].any()


@given(
    writes=st.lists(
        st.tuples(st.integers(0, 5000), st.binary(min_size=1, max_size=3000)) | st.tuples(st.just(-1), st.just(b"")),
        min_size=1,
        max_size=12,
    )
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_sector_a_write_covers_is_a_row(tmp_path, writes):
    """Wherever a write begins and ends, and whatever records lie around it."""
    with TraceWriter(tmp_path / "t", {}) as writer:
        file = writer.file("image", 16 * SECTOR, "image")
        for offset, data in writes:
            if offset < 0:
                writer.issue(Kind.FLUSH, file)
            else:
                writer.issue(Kind.WRITE, file, offset, len(data), data=data)
    trace = loaded(tmp_path / "t")
    assert len(trace.events) == len(writes)
    for event, (offset, data) in zip(trace.events, writes, strict=True):
        if offset < 0:
            continue
        assert bytes(trace.payload(event)) == data
        skipped = -offset % SECTOR  # the rest of the sector in which the write begins
        for i, start in enumerate(range(skipped, len(data) - SECTOR + 1, SECTOR)):
            assert trace.rows[event["row"] + (skipped > 0) + i].tobytes() == data[start:][:SECTOR]


def test_a_base_file_leaves_its_holes_out(tmp_path):
    """16 GiB, three pieces of data, the last ending within a sector: little is stored, and all of it is right."""
    size = (16 << 30) + 100
    pieces = {0: b"head" * 300, 5 << 30: os.urandom(70000), size - 50: b"t" * 50}
    with open(tmp_path / "base", "wb") as out:
        for place, data in pieces.items():
            out.seek(place)
            out.write(data)
    with TraceWriter(tmp_path / "t", {}) as writer:
        writer.base_file(writer.file("image", size, "image"), tmp_path / "base")
    trace = loaded(tmp_path / "t")
    assert os.path.getsize(tmp_path / "t") < 1 << 20
    found = {}
    for _, offset, length, row in trace.bases.tolist():
        assert offset % SECTOR == length % SECTOR == 0
        found |= {offset // SECTOR + i: trace.rows[row + i].tobytes() for i in range(length // SECTOR)}
    with open(tmp_path / "base", "rb") as source:
        for place, data in pieces.items():
            for sector in range(place // SECTOR, -(-(place + len(data)) // SECTOR)):
                source.seek(sector * SECTOR)
                assert found.pop(sector) == source.read(SECTOR).ljust(SECTOR, b"\0")
    assert not any(map(any, found.values()))


@pytest.mark.parametrize("size", [0, 1 << 30])
def test_a_base_file_that_is_empty_or_one_hole(tmp_path, size):
    (tmp_path / "base").touch()
    os.truncate(tmp_path / "base", size)
    with TraceWriter(tmp_path / "t", {}) as writer:
        writer.base_file(writer.file("image", size, "image"), tmp_path / "base")
    assert len(loaded(tmp_path / "t").bases) == 0


def test_a_large_trace_is_opened_with_little_memory(tmp_path):
    """Two gigabytes of payload, as a hole in the trace: opened in a process that may not have them."""
    path = tmp_path / "t"
    with TraceWriter(path, {}) as writer:
        file = writer.file("image", 4 << 30, "image")
        writer.complete(writer.issue(Kind.WRITE, file, 0, SECTOR, data=b"x" * SECTOR))
        end = writer._end
    stored = 2 << 30
    body = struct.pack("<BBHQQQQQQiI", Kind.WRITE, 0, 0, 0, stored, 0, stored, 0, 0, 0, 0)
    with open(path, "r+b") as out:
        out.seek(end)
        out.write(struct.pack("<I", zlib.crc32(body)) + body)
        out.truncate(-(-(end + 64) // SECTOR) * SECTOR + stored)
    code = (
        "import resource, sys; from powercut.trace import Trace; before = resource.getrusage(resource.RUSAGE_SELF);"
        "t = Trace(sys.argv[1]); assert len(t.events) == 2 and t.truncated is None;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 20_000, "KiB"


# ---- cut off


def test_cut_anywhere_it_loads_up_to_the_last_whole_record(tmp_path):
    whole = small(tmp_path / "t").read_bytes()
    full = loaded(tmp_path / "t")
    cut = tmp_path / "cut"
    seen, between = set(), 0
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        if length < 2 * SECTOR:
            with pytest.raises(InputError):
                Trace(cut)
            continue
        trace = loaded(cut)
        between += trace.truncated is None
        assert trace.length < full.length
        assert len(trace.events) <= len(full.events)
        assert (trace.events["offset"] == full.events["offset"][: len(trace.events)]).all()
        if trace.truncated:
            assert str(cut) in trace.truncated
        seen.add(trace.length)
    assert seen == set(range(full.length)), "every record, and no part of one"
    assert between == full.length, "only an end between two records says nothing"


def test_zeros_at_the_end_are_a_missing_end(tmp_path):
    """What a filesystem may leave behind where the machine died: the size, and no bytes. Also a gigabyte of them."""
    path = small(tmp_path / "t")
    full, size = content(loaded(path)), path.stat().st_size
    for more in (64, 100, 4096, 1 << 30):
        os.truncate(path, size + more)
        trace = loaded(path)
        assert content(trace) == full
        assert trace.truncated is not None
        assert "zeros" in trace.truncated


# ---- damaged


def test_each_changed_byte_is_refused_or_is_padding(tmp_path, planted):
    """Every byte of a small trace in turn: an InputError, or the content of the intact one."""
    whole = bytearray(small(tmp_path / "t").read_bytes())
    full = content(loaded(tmp_path / "t"))
    bad = tmp_path / "bad"
    refused = same = 0
    for place in range(len(whole)):
        whole[place] ^= 0x41
        bad.write_bytes(whole)
        whole[place] ^= 0x41
        try:
            trace = loaded(bad)
        except InputError:
            refused += 1
        else:
            assert content(trace) == full, f"byte {place}"
            assert trace.truncated is None
            same += 1
    stored = sum(p[1] for p in loaded(tmp_path / "t")._payloads)
    assert refused >= 24 + SECTOR + 64 * loaded(tmp_path / "t").length + stored
    planted(f"changed bytes of a trace ({refused} that matter)", refused + same == len(whole))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a powercut trace"),
        (b"\x7fELF" + bytes(4096), "not a powercut trace"),
        (bytes(4096), "not a powercut trace"),
        (b"POWERCUT-TRACE\r\n", "cut off"),
        (b"POWERCUT-TRACE\r\n" + struct.pack("<II", 2, 512) + bytes(1000), "version 2"),
        (b"POWERCUT-TRACE\r\n" + struct.pack("<II", 1, 4096) + bytes(1000), "version"),
        (b"POWERCUT-TRACE\n" + bytes(1010), "not a powercut trace"),
    ],
)
def test_other_files_are_refused(tmp_path, data, says):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(InputError, match=says):
        Trace(tmp_path / "t")


def test_directories_and_missing_files_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=str(path)):
            Trace(path)
        with pytest.raises(InputError, match=str(path)):
            TraceWriter(path / "t" if path != tmp_path else path, {})


FIELDS = [name for name in RECORD.names or () if name != "crc"]


def header_places(trace: bytes) -> list[int]:
    places, place = [], 2 * SECTOR
    while place < len(trace):
        places.append(place)
        offset, stored = struct.unpack_from("<Q", trace, place + 8)[0], struct.unpack_from("<Q", trace, place + 32)[0]
        place += 64
        if stored:
            place = -(-place // SECTOR) * SECTOR + offset % SECTOR + stored
            place += -place % 64
    return places


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    return small(tmp_path_factory.mktemp("trace") / "t").read_bytes()


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=400)
def test_forged_headers_are_refused_or_understood(tmp_path, intact, data):
    """A header with other values and a right checksum: InputError, or a trace that can be shown. Little memory."""
    forged = bytearray(intact)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(header_places(intact)))
        field = data.draw(st.sampled_from(FIELDS))
        dtype = np.dtype(RECORD.fields[field][0])
        bits = dtype.itemsize * 8
        value = data.draw(
            st.integers(0, (1 << bits) - 1)
            | st.integers(0, min(80, (1 << bits) - 1))
            | st.sampled_from([1 << i for i in range(bits)] + [(1 << i) - 1 for i in range(bits + 1)])
        )
        at = place + RECORD.fields[field][1]
        forged[at : at + dtype.itemsize] = value.to_bytes(dtype.itemsize, "little")
        forged[place : place + 4] = zlib.crc32(forged[place + 4 : place + 64]).to_bytes(4, "little")
    path = tmp_path / "forged"
    path.write_bytes(forged)
    try:
        trace = loaded(path)
    except InputError:
        return
    tracetext.summary(trace)
    json.dumps(tracetext.document(trace))
    assert len(list(tracetext.lines(trace))) == len(trace.events)
    for event in trace.events:
        assert event["offset"] + event["length"] <= MAX_SIZE
        assert event["issued"] < event["completed"]


def test_after_forging_little_memory_was_used():
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20, "KiB"


@pytest.mark.parametrize("payload", [b"[]", b"1", b"{", b"\xff", b"[" * 100000, b"{}", b'{"name": 1, "role": "image"}'])
@pytest.mark.parametrize("kind", [Kind.META, Kind.FILE])
def test_what_a_trace_says_of_itself_must_make_sense(tmp_path, kind, payload):
    """Digests that are right do not make it so. (An empty object is a legal META.)"""
    with TraceWriter(tmp_path / "t", {}) as writer:
        writer._record(kind, payload=payload)
    if kind is Kind.META and payload.startswith(b"{") and payload != b"{":
        assert Trace(tmp_path / "t").meta == json.loads(payload)
        return
    with pytest.raises(InputError, match=str(tmp_path / "t")):
        Trace(tmp_path / "t")


def bad_events(writer: TraceWriter, case: str) -> None:
    image = writer.file("image", 4096, "image")
    issued = writer.issue(Kind.WRITE, image, 0, SECTOR, data=bytes(SECTOR))
    match case:
        case "none":
            writer.complete(issued)
        case "twice":
            writer.complete(issued)
            writer.complete(issued)
        case "never issued":
            writer.complete(issued + 7)
        case "not an event":
            writer.complete(0)
        case "too early":
            writer.complete(issued + 2)
            writer.issue(Kind.FLUSH, image)
        case "no such file":
            writer.issue(Kind.FLUSH, 3)
        case "fewer bytes":
            writer.issue(Kind.WRITE, image, 0, 2 * SECTOR, data=bytes(SECTOR))
        case "no bytes":
            writer.issue(Kind.WRITE, image, 0, SECTOR)
        case "far away":
            writer.issue(Kind.ZERO, image, 1 << 62, 1 << 62)
        case "second file 0":
            writer._files = 0
            writer.file("other", 0, "image")


@pytest.mark.parametrize(
    "case",
    [
        "twice",
        "never issued",
        "not an event",
        "too early",
        "no such file",
        "fewer bytes",
        "no bytes",
        "far away",
        "second file 0",
        "none",
    ],
)
def test_events_that_make_no_sense_are_refused(tmp_path, case):
    """The last case is the control: the same trace without the fault is read."""
    with TraceWriter(tmp_path / "t", {}) as writer:
        bad_events(writer, case)
    if case == "none":
        assert len(loaded(tmp_path / "t").events) == 1
    else:
        with pytest.raises(InputError, match=str(tmp_path / "t")):
            Trace(tmp_path / "t")
