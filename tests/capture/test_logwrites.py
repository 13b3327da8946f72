"""dm-log-writes files: logs put together by hand from the documented format, and logs that QEMU wrote."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from powercut import stamp
from powercut.capture.logwrites import Log, import_log
from powercut.cli import main
from powercut.errors import InputError
from powercut.explore import run
from powercut.guest.daemon import Daemon, create_image
from powercut.guest.workload import Workload, draw
from powercut.recording.record import import_trace
from powercut.trace import SECTOR, Flag, Kind, Trace, TraceWriter
from powercut.verdict import Verdict
from support.qemu import needs_qemu

MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK, METADATA = 1, 2, 4, 8, 16


def superblock(entries: int, size: int = SECTOR) -> bytes:
    return struct.pack("<QQQI", MAGIC, 1, entries, size).ljust(size, b"\0")


def entry(sector: int, data: bytes = b"", flags: int = 0, size: int = SECTOR, *, count: int | None = None) -> bytes:
    """One entry and its data; a discard says by `count` how much, a mark carries its label as data."""
    if flags & MARK:
        head = struct.pack("<QQQQ", sector, 0, flags, len(data))
        data = data.ljust(-(-len(data) // size) * size, b"\0")
    else:
        head = struct.pack("<QQQQ", sector, len(data) // size if count is None else count, flags, 0)
    return head.ljust(size, b"\0") + data


def imported(tmp_path: Path, log: bytes, guest_size: int = 0) -> Trace:
    (tmp_path / "log").write_bytes(log)
    opened = Log(tmp_path / "log")
    with TraceWriter(tmp_path / "t", {"scope": "completion-order"}) as writer:
        import_log(opened, writer, writer.file("image", 1 << 20, "image"), guest_size)
    trace = Trace(tmp_path / "t")
    trace.verify()
    return trace


def told(trace: Trace, role: str = "image") -> list[tuple[int, ...]]:
    info = trace.file(role)
    if info is None:
        return []
    mine = trace.events[trace.events["file"] == info.id]
    return [(int(e["kind"]), int(e["offset"]), int(e["length"]), int(e["flags"])) for e in mine]


@pytest.mark.parametrize("size", [512, 1024, 4096, 65536])
def test_every_kind_of_entry(tmp_path, size):
    log = superblock(7, size) + b"".join(
        (
            entry(3, b"a" * 2 * size, size=size),
            entry(0, b"b" * size, FUA, size),
            entry(0, b"", FLUSH, size),
            entry(9, b"c" * size, FLUSH | FUA | METADATA, size),
            entry(0, b"a mark of no interest", MARK, size),
            entry(5, b"", DISCARD, size, count=4),
            entry(6, b"d" * size, size=size),
        )
    )
    trace = imported(tmp_path, log)
    assert told(trace) == [
        (Kind.WRITE, 3 * size, 2 * size, 0),
        (Kind.WRITE, 0, size, Flag.FUA),
        (Kind.FLUSH, 0, 0, 0),
        (Kind.FLUSH, 0, 0, 0),  # a write with the flag flushes what came before it
        (Kind.WRITE, 9 * size, size, Flag.FUA),
        (Kind.DISCARD, 5 * size, 4 * size, 0),
        (Kind.WRITE, 6 * size, size, 0),
    ]
    assert bytes(trace.payload(trace.events[0])) == b"a" * 2 * size
    assert (trace.events["completed"] == trace.events["issued"] + 1).all(), "one after the other: nothing overlaps"
    assert trace.file("guest") is None, "no stamps: nothing is known of a guest"


@pytest.mark.parametrize("head", [bytes(SECTOR), superblock(0), superblock(1), superblock(99)])
def test_entries_are_found_whatever_the_superblock_counts(tmp_path, head):
    """A killed QEMU leaves the count of the last flush, 0 before the first, or no superblock at all."""
    trace = imported(tmp_path, head + entry(1, b"a" * SECTOR) + entry(2, b"b" * SECTOR) + bytes(3 * SECTOR))
    assert [place for _, place, _, _ in told(trace)] == [SECTOR, 2 * SECTOR]


def test_a_torn_last_entry_leaves_the_verdict_unknown_at_best(tmp_path):
    """Cut anywhere within the last entry's data; whole, and cut between entries, it holds (the control)."""
    (tmp_path / "base").write_bytes(bytes(1 << 20))
    first = superblock(1) + entry(1, stamp.make(1, 0, 1, 1)) + entry(0, b"", FLUSH)
    log = first + entry(8, stamp.make(2, 1, 8, 4))
    verdicts = {}
    for length in (len(first), len(log) - 4 * SECTOR, len(log) - 700, len(log) - 1, len(log)):
        (tmp_path / "log").write_bytes(log[:length])
        import_trace(str(tmp_path / "log"), str(tmp_path / "base"), tmp_path / "t", "raw")
        outcome = run.explore_trace(run.Plan(str(tmp_path / "t"), "raw"), jobs=1)
        verdicts[length - len(log)] = outcome.verdict
        assert (outcome.verdict is Verdict.UNKNOWN) == any("ends within" in reason for reason in outcome.reasons)
    assert list(verdicts.values()) == [Verdict.HOLDS] + 3 * [Verdict.UNKNOWN] + [Verdict.HOLDS]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "only 0 bytes"),
        (b"x" * 100, "only 100 bytes"),
        (b"x" * 4096, "magic"),
        (struct.pack("<QQQI", MAGIC, 2, 0, 512).ljust(4096, b"\0"), "version 2"),
        (struct.pack("<QQQI", MAGIC, 1, 0, 0).ljust(4096, b"\0"), "sector size 0"),
        (struct.pack("<QQQI", MAGIC, 1, 0, 1000).ljust(4096, b"\0"), "sector size 1000"),
        (struct.pack("<QQQI", MAGIC, 1, 0, 1 << 30).ljust(4096, b"\0"), "sector size"),
        (superblock(1) + b"\xff" * 4096, "makes no sense"),
        (superblock(1) + entry(1 << 50, b"", DISCARD, count=1), "makes no sense"),
        (superblock(1) + entry(0, b"", DISCARD, count=1 << 45), "makes no sense"),
        (superblock(1) + entry(0, b"", 32), "makes no sense"),
    ],
)
def test_other_files_are_refused(tmp_path, data, says):
    (tmp_path / "log").write_bytes(data)
    with pytest.raises(InputError, match=says) as caught:
        list(Log(tmp_path / "log"))
    assert str(tmp_path / "log") in str(caught.value)


def test_the_guests_side_is_told_from_stamps(tmp_path):
    """Operations 1 and 2, a flush that was acknowledged, then 3: the first stamp of epoch 1 proves that flush."""
    log = superblock(0) + b"".join(
        (
            entry(100, stamp.make(1, 0, 4, 2)),
            entry(300, stamp.make(2, 0, 8, 1) + bytes(SECTOR) + b"m" * SECTOR),
            entry(0, b"", FLUSH),
            entry(200, b"m" * SECTOR),
            entry(102, stamp.make(3, 1, 0, 1)),
            entry(101, stamp.make(4, 1, 5, 1)),
        )
    )
    trace = imported(tmp_path, log, 1 << 16)
    guest = trace.file("guest")
    assert guest is not None
    assert guest.size == 1 << 16
    assert told(trace, "guest") == [
        (Kind.WRITE, 4 * SECTOR, 2 * SECTOR, 0),
        (Kind.WRITE, 8 * SECTOR, SECTOR, 0),
        (Kind.FLUSH, 0, 0, 0),
        (Kind.WRITE, 0, SECTOR, 0),
        (Kind.WRITE, 5 * SECTOR, SECTOR, 0),
    ]
    events = trace.events
    first, second, flush, third, fourth = events[events["file"] == guest.id]
    assert [e["ref"] for e in (first, second, third, fourth)] == [1, 2, 3, 4]
    assert first["completed"] < flush["issued"]
    assert second["completed"] < flush["issued"]
    assert third["completed"] == fourth["completed"] == max(events["completed"]), "nothing proves that these were done"
    metadata = events[(events["file"] == 0) & (events["offset"] == 200 * SECTOR)][0]
    assert metadata["completed"] < flush["issued"], "before the first stamp of epoch 1 there is no proof"


def test_an_operation_in_several_pieces_is_one(tmp_path):
    """A driver may split a request: the mark stands before the first piece, and spans them all."""
    whole = stamp.make(1, 0, 4, 4)
    trace = imported(tmp_path, superblock(0) + entry(7, whole[2 * SECTOR :]) + entry(90, whole[: 2 * SECTOR]))
    assert told(trace, "guest") == [(Kind.WRITE, 4 * SECTOR, 4 * SECTOR, 0)]
    assert trace.events["file"].tolist()[0] == trace.files[1].id


# ---- logs that QEMU wrote


def qemu_log(folder: Path, operations: int = 120, no_flush: bool = False) -> tuple[Path, Path]:
    """A log of QEMU's own, with the image as it was before."""
    image, before, log = folder / "image", folder / "before", folder / "log"
    create_image(image, "qcow2", 16 << 20, {"cluster_size": "4k"})
    before.write_bytes(image.read_bytes())
    log.touch()
    nodes = [
        {"driver": "file", "node-name": "file", "filename": str(image)},
        {"driver": "file", "node-name": "log", "filename": str(log)},
        {"driver": "blklogwrites", "node-name": "image", "file": "file", "log": "log"},
        {"driver": "qcow2", "node-name": "disk", "file": "image"},
    ]
    for node in nodes if no_flush else ():
        node["cache"] = {"no-flush": True}
    with Daemon(nodes) as daemon, daemon.connect() as client:
        Workload(client, None, -1, 4).run(draw(3, operations, 16 << 20))
    return before, log


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    return qemu_log(tmp_path_factory.mktemp("qemu"))


def explored(tmp_path: Path, before: Path, log: Path) -> tuple[int, str]:
    out = tmp_path / "t.trace"
    runner = CliRunner()
    done = runner.invoke(main, ["import", str(log), "--base", str(before), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "in the order of completion" in done.output
    done = runner.invoke(main, ["explore", str(out), "--jobs", "1", "--save", str(tmp_path / "found")])
    return done.exit_code, done.output


@needs_qemu
def test_a_real_log_holds(tmp_path, real):
    code, output = explored(tmp_path, *real)
    assert code == 0, output
    assert output.startswith("HOLDS")
    assert "completion-order" in output


@needs_qemu
@pytest.mark.parametrize(("size", "holds"), [(0, True), (16 << 20, True), ((16 << 20) - 4096, False)])
def test_control_the_size_of_the_disk_is_judged_where_it_is_known(tmp_path, real, planted, size, holds):
    """No log tells the size: 0. A recording of our own knows it, and another one is a breach."""
    before, log = real
    with TraceWriter(tmp_path / "t", {"scope": "completion-order"}) as writer:
        image = writer.file("image", before.stat().st_size + (16 << 20), "image")
        writer.base_file(image, before)
        import_log(Log(log), writer, image, size)
    outcome = run.explore_trace(run.Plan(str(tmp_path / "t"), "qcow2"), jobs=1)
    assert (outcome.verdict is Verdict.HOLDS) == holds, outcome
    assert all((finding.rule, finding.kind) == ("acknowledged", "size") for finding in outcome.findings)
    if not holds:
        planted("a disk of another size than was acknowledged", outcome.verdict is Verdict.BROKEN)


@needs_qemu
def test_control_a_real_log_without_flushes_is_broken(tmp_path, planted):
    code, output = explored(tmp_path, *qemu_log(tmp_path, no_flush=True))
    planted("cache.no-flush=on, by an imported log", code == 1)
    assert code == 1, output


@needs_qemu
def test_control_a_base_that_is_not_the_one_before_is_not_called_sound(tmp_path, real):
    """All zeros where a qcow2 header should be."""
    (tmp_path / "before").write_bytes(bytes(1 << 20))
    code, output = explored(tmp_path, tmp_path / "before", real[1])
    assert code == 1, output


@needs_qemu
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_mutated_real_logs_are_refused_or_read(tmp_path, real, seed):
    """Entry headers with other numbers, bytes changed anywhere, ends cut off: never another exception."""
    rnd = random.Random(seed)
    log = bytearray(real[1].read_bytes()[: 400 << 10])
    places = []
    place = SECTOR
    while place + 32 <= len(log):
        places.append(place)
        _, count, flags, _ = struct.unpack_from("<QQQQ", log, place)
        place += SECTOR + (0 if flags & DISCARD else count * SECTOR)
    for _ in range(rnd.randrange(1, 4)):
        where = rnd.choice([*places[:-1], 0]) + 8 * rnd.randrange(4)
        value = rnd.choice((0, 1, rnd.randrange(64), 1 << rnd.randrange(64), rnd.getrandbits(64), (1 << 64) - 1))
        log[where : where + 8] = value.to_bytes(8, "little")
    if rnd.random() < 0.3:
        log[rnd.randrange(len(log))] ^= 1 << rnd.randrange(8)
    (tmp_path / "log").write_bytes(log[: rnd.randrange(len(log)) if rnd.random() < 0.3 else None])
    (tmp_path / "t").unlink(missing_ok=True)
    try:
        import_trace(str(tmp_path / "log"), str(real[0]), tmp_path / "t", "qcow2")
    except InputError:
        assert not (tmp_path / "t").exists(), "an import that failed leaves nothing behind"
        return
    outcome = run.explore_trace(run.Plan(str(tmp_path / "t"), "qcow2"), jobs=1, budget=40)
    assert outcome.verdict in Verdict
