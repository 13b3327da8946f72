"""On real recordings: the search over sets against the plain search, and faults of order planted into honest traces."""

from __future__ import annotations

from pathlib import Path

import pytest

from powercut.explore import run
from powercut.recording.record import record
from powercut.scenario import from_options
from powercut.trace import Kind, Trace
from powercut.verdict import Verdict
from support.orders import image_events, needed, rewritten, steps_of, swapped
from support.qemu import needs_qemu

pytestmark = needs_qemu


def made(
    folder: Path, name: str, *, cluster: str = "64k", lie: bool = False, extra: bool = False, depth: int = 1
) -> Path:
    trace = folder / f"{name}.trace"
    about = {
        "about": "",
        "expect": "HOLDS",
        "size": "4M",
        "options": {"cluster_size": cluster},
        "workload": {"operations": 60, "seed": 7, "depth": depth, "with": ["zero", "discard"] if extra else []},
        "record": {"lie": ["flush"] if lie else []},
    }
    record(from_options(about), trace)
    return trace


def explored(trace: Path, *, sets: bool = True, budget: int | None = None) -> run.Outcome:
    return run.explore_trace(run.Plan(str(trace), "qcow2", sets=sets), jobs=1, budget=budget)


# ---- sets and plain


@pytest.mark.parametrize("extra", [False, True], ids=["writes", "zero,discard"])
@pytest.mark.parametrize("lie", [False, True], ids=["honest", "lying"])
@pytest.mark.parametrize("cluster", ["4k", "64k"])
def test_sets_and_the_plain_search_say_the_same(tmp_path, figure, cluster, lie, extra):
    trace = made(tmp_path, "t", cluster=cluster, lie=lie, extra=extra, depth=4)
    sets, plain = explored(trace), explored(trace, sets=False, budget=3000)
    name = f"qcow2 {cluster} {'lying' if lie else 'honest'}{' zero,discard' if extra else ''}, checks by sets / plain"
    more = "" if plain.coverage.exhausted or plain.verdict is Verdict.BROKEN else " (budget spent)"
    figure(name, f"{sets.coverage.checks:,} / {plain.coverage.checks:,}{more}, {sets.verdict} / {plain.verdict}")
    assert (sets.coverage.epochs, sets.coverage.log2_states) == (plain.coverage.epochs, plain.coverage.log2_states)
    if plain.verdict is Verdict.UNKNOWN:
        assert sets.verdict is not Verdict.UNKNOWN
        return
    assert sets.verdict is plain.verdict
    broken = {finding.rule for finding in plain.findings}
    assert broken <= {finding.rule for finding in sets.findings}
    if plain.coverage.exhausted:
        assert broken == {finding.rule for finding in sets.findings}
    if lie:
        assert sets.verdict is Verdict.BROKEN


# ---- faults of order


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """Small clusters and one request at a time: metadata is updated all the time, and each flush is there for one
    reason."""
    trace = made(tmp_path_factory.mktemp("honest"), "honest", cluster="4k")
    return Trace(trace)


def test_control_a_copy_is_the_same_trace(tmp_path, honest):
    """Copied without a fault it still holds, event by event the same."""
    copy = rewritten(honest, tmp_path / "t", steps_of(honest))
    assert (Trace(copy).events[["kind", "offset", "length", "completed"]]
            == honest.events[["kind", "offset", "length", "completed"]]).all()  # fmt: skip
    outcome, before = explored(copy), explored(Path(honest.path))
    assert outcome.verdict is Verdict.HOLDS
    assert outcome.coverage == before.coverage


def idle(trace: Trace) -> list[int]:
    """The image's flushes with no write since the flush before them."""
    events, flushes, writes = trace.events, image_events(trace, Kind.FLUSH), image_events(trace, Kind.WRITE)
    since = [-1, *events["issued"][flushes].tolist()]
    done = events["completed"][writes]
    return [
        f for f, low in zip(flushes, since, strict=False) if not ((low < done) & (done < events["issued"][f])).any()
    ]


@pytest.mark.parametrize("how", ["dropped", "lied about"])
def test_each_flush_in_turn(tmp_path, honest, planted, figure, how):
    """A flush is harmless to lose only if another one covers the same writes before anybody relies on them.

    The last one within a flush of the guest, with new writes under it, is relied on at once: each of these must be
    found. One that has nothing new to cover (QEMU sends some twice, and some when it ends) must not be. The others
    order metadata. Losing one that puts refcounts before the L2 entries which count on them breaks the structure. When
    a new L2 table is made, there are three harmless ones: refcounts, table and L1 entry each get a flush; the first
    is made good by the second, the second orders a table that is still empty on a file that is still zeros, and what
    the third orders nobody has been promised yet.
    """
    steps, flushes = steps_of(honest), image_events(honest, Kind.FLUSH)
    must = needed(honest)
    assert len(must) >= 3, "the workload gives the test something to find"
    found = []
    for flush in flushes:
        lied = frozenset({flush}) if how == "lied about" else frozenset()
        kept = steps if lied else [step for step in steps if step[1] != flush]
        outcome = explored(rewritten(honest, tmp_path / "t", kept, lied))
        if outcome.verdict is Verdict.BROKEN:
            found.append(flush)
        if flush in must:
            planted(f"flush {flush} {how}", outcome.verdict is Verdict.BROKEN)
    figure(f"one flush {how}: found broken", f"{len(found)}/{len(flushes)}, of those that must be {len(must)}")
    assert set(must) <= set(found)
    assert not set(idle(honest)) & set(found), "control: what covers nothing can be left out"
    assert idle(honest)


@pytest.mark.parametrize("how", ["dropped", "lied about"])
def test_all_flushes_at_once(tmp_path, honest, planted, how):
    steps, flushes = steps_of(honest), frozenset(image_events(honest, Kind.FLUSH))
    kept = steps if how == "lied about" else [step for step in steps if step[1] not in flushes]
    lied = flushes if how == "lied about" else frozenset()
    outcome = explored(rewritten(honest, tmp_path / "t", kept, lied))
    planted(f"all flushes {how}", outcome.verdict is Verdict.BROKEN)
    assert outcome.verdict is Verdict.BROKEN


def test_writes_swapped_across_a_flush(tmp_path, honest, planted, figure):
    """The last write before a flush goes to where the first one after it was, and that one to its place.

    Whether that is a fault depends on what the two are. The earlier one arriving late breaks what the flush promised
    wherever it is relied on; two refcount updates of clusters that nothing points to yet may change places freely.
    """
    flushes, must = image_events(honest, Kind.FLUSH), set(needed(honest))
    tried = found = 0
    late_found, late = 0, 0
    for flush in flushes:
        steps = swapped(honest, flush)
        if steps is None:
            continue
        outcome = explored(rewritten(honest, tmp_path / "t", steps))
        tried += 1
        found += outcome.verdict is Verdict.BROKEN
        if flush in must:
            late += 1
            late_found += outcome.verdict is Verdict.BROKEN
    figure("two writes swapped across a flush: found broken", f"{found}/{tried}; of guest flushes {late_found}/{late}")
    planted("writes swapped across a flush, somewhere", found > 0)
    assert tried >= 5
    assert late_found == late >= 3, "a write that came after the flush the guest waited for"
