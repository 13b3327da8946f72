"""Quire against a dictionary of byte strings: whatever is done in whatever order, it reads the same, now and after a
crash."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from powercut.crash.model import epochs
from powercut.crash.store import in_memory
from powercut.formats.quire.history import SECTOR, Line, Session, content, opened, parse, repeatable
from powercut.stores import explore_store
from powercut.trace import Trace
from powercut.verdict import Verdict
from quire.errors import Damaged
from quire.layout import BLOCK
from support.mutants import MUTANTS, plant
from support.quires import MEMORY, RECORDS, SIZE, SLOTS, Model, recorded

_LAST = 2  # epochs explored of each history, from its end
_CHECKS = 300  # for each of them
_PLACES = [0, 512, 1024, 3584, 4096, 4608, 8192, 12288, 15872]  # blocks' edges, and what lies beside them


def explored(history: Sequence[str], records: str) -> None:
    """A sample where an epoch is too wide: no verdict then, but nothing may be broken."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        trace, judge = recorded(Path(folder), history, RECORDS[records], range(2))
        last = epochs(Trace(trace))[-_LAST:]
        outcome = explore_store(trace, judge, depth=0, positions=last, budget=_CHECKS * len(last))
        assert outcome.verdict is not Verdict.BROKEN, "\n".join([*history, *map(str, outcome.findings)])


class Alive(RuleBasedStateMachine):
    """A set that is used, killed and opened again, beside its model. Names are drawn by number, so that fewer of them
    are simpler."""

    records = "C"

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.model.heads["main"] = bytearray(SIZE)
        self.lines: list[str] = []
        self.may: dict[str, list[bytes]] = {}  # what each head held since it was durable: a killed writer may leave it
        self.durable("main")
        self._ids = repeatable()
        self._ids.__enter__()
        self.session = Session(in_memory(), RECORDS[self.records])
        self.session.create(SIZE, SLOTS)

    def teardown(self) -> None:
        self._ids.__exit__(None, None, None)

    def do(self, line: str) -> Line:
        self.lines.append(line)
        done = parse(self.lines)[-1]
        self.session.perform(done)
        return done

    def durable(self, head: str) -> None:
        self.may[head] = [bytes(self.model.heads[head])]

    def changed(self, head: str) -> None:
        self.may[head].append(bytes(self.model.heads[head]))

    def head(self, number: int) -> str:
        return sorted(self.model.heads)[number % len(self.model.heads)]

    def snapshot(self, number: int) -> str:
        return sorted(self.model.snapshots)[number % len(self.model.snapshots)]

    def place(self, number: int, offset: int, count: int) -> tuple[str, int, int]:
        """A head, and an offset and a length within it, in bytes."""
        head = self.head(number)
        size = len(self.model.heads[head])
        offset = min(offset, size - SECTOR)
        return head, offset, min(count * SECTOR, size - offset)

    def new(self) -> str:
        return f"n{len(self.lines)}"

    def wrote(self, line: Line) -> None:
        (head,), (offset, length) = line.names, line.numbers
        sectors = range(offset // SECTOR, (offset + length) // SECTOR)
        self.model.write(head, offset, b"".join(content(line.stamp, sector) for sector in sectors))
        self.changed(head)

    heads = st.integers(0, 3)
    places = st.sampled_from(_PLACES)
    counts = st.integers(1, 9)

    @rule(number=heads, offset=places, count=counts, fua=st.booleans())
    def write(self, number, offset, count, fua):
        head, offset, length = self.place(number, offset, count)
        self.wrote(self.do(f"write {head} {offset} {length}{' fua' * fua}"))

    @rule(number=heads, offset=places, count=counts)
    def race(self, number, offset, count):
        head, offset, length = self.place(number, offset, count)
        line = self.do(f"race {head} {offset} {length}")
        self.durable(head)
        self.wrote(line)

    @rule(number=heads, offset=places, count=counts)
    def zero(self, number, offset, count):
        head, offset, length = self.place(number, offset, count)
        self.do(f"zero {head} {offset} {length}")
        self.model.zero(head, offset, length)
        self.changed(head)

    @rule(number=heads, block=st.integers(0, 3), count=st.integers(1, 2))
    def discard(self, number, block, count):
        head = self.head(number)
        offset = min(block, (len(self.model.heads[head]) - 1) // BLOCK) * BLOCK
        length = min(count * BLOCK, len(self.model.heads[head]) - offset)
        self.do(f"discard {head} {offset} {length}")
        self.model.discard(head, offset, length)
        self.changed(head)

    @rule(number=heads)
    def flush(self, number):
        head = self.head(number)
        self.do(f"flush {head}")
        self.durable(head)

    @rule()
    def reopen(self):
        self.do("reopen")
        for head in self.model.heads:
            self.durable(head)

    @rule(number=heads)
    def kill(self, number):
        self.do(f"kill {self.head(number)}")
        for head, disk in self.model.heads.items():
            image = opened(self.session.quire, head)
            found = bytes(image.read(0, image.size))
            assert len(found) == len(disk)
            for at in range(0, len(found), SECTOR):
                legal = {version[at : at + SECTOR] for version in self.may[head]}
                assert found[at : at + SECTOR] in legal, f"{head}, byte {at}, after a kill"
            disk[:] = found
            self.durable(head)

    @rule(number=heads)
    def freeze(self, number):
        head, name = self.head(number), self.new()
        self.do(f"snapshot {head} {name}")
        self.model.snapshot(head, name)
        self.durable(head)

    @rule(number=heads, sectors=st.integers(1, 48))
    def resize(self, number, sectors):
        head = self.head(number)
        self.do(f"resize {head} {sectors * SECTOR}")
        self.model.resize(head, sectors * SECTOR)
        self.durable(head)

    has_snapshots = precondition(lambda self: self.model.snapshots)

    @has_snapshots
    @rule(number=heads)
    def clone(self, number):
        snapshot, head = self.snapshot(number), self.new()
        self.do(f"clone {snapshot} {head}")
        self.model.clone(snapshot, head)
        self.durable(head)

    @has_snapshots
    @rule(number=heads, source=heads)
    def revert(self, number, source):
        head, snapshot = self.head(number), self.snapshot(source)
        self.do(f"revert {head} {snapshot}")
        self.model.revert(head, snapshot)
        self.durable(head)

    @has_snapshots
    @rule(number=heads)
    def seal(self, number):
        self.do(f"seal {self.snapshot(number)}")

    @has_snapshots
    @rule(number=heads)
    def rename(self, number):
        old, name = self.snapshot(number), self.new()
        self.do(f"rename {old} {name}")
        self.model.rename(old, name)

    @has_snapshots
    @rule(number=heads)
    def delete_snapshot(self, number):
        name = self.snapshot(number)
        self.do(f"delete {name}")
        self.model.delete(name)

    @precondition(lambda self: len(self.model.heads) > 1)
    @rule(number=heads)
    def delete_head(self, number):
        name = self.head(number)
        self.do(f"delete {name}")
        self.model.delete(name)
        del self.may[name]

    @invariant()
    def reads_as_the_model(self):
        quire, model = self.session.quire, self.model
        names = {name: value.writable for name, value in quire.manifest.names.items()}
        assert names == {**dict.fromkeys(model.heads, True), **dict.fromkeys(model.snapshots, False)}
        for name, wanted in [*model.heads.items(), *model.snapshots.items()]:
            image = opened(quire, name)
            assert bytes(image.read(0, image.size)) == wanted, (name, *self.lines)
            if name in model.snapshots:
                image.close()


class Crashed(Alive):
    """The same, and when all is done a crash near its end may leave no state that breaks a promise."""

    def teardown(self) -> None:
        super().teardown()
        explored(self.lines, self.records)


class P(Crashed):
    """The same with P records alone."""

    records = "P"


@pytest.mark.parametrize("machine", [Crashed, P])
def test_histories_of_all_operations(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=12))


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Crashed, P])
def test_many_histories_of_all_operations(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=400, stateful_step_count=16))


@pytest.mark.parametrize(
    ("mutant", "machine", "steps"),
    [("a discarded block shows the parent again", Alive, 8), ("a record is not synced", Crashed, 3)],
)
def test_a_fault_is_found_and_made_small(monkeypatch, planted, figure, mutant, machine, steps):
    """A machine that cannot fail proves nothing. Where a run is cheap it is made smaller."""
    plant(next(each for each in MUTANTS if each.name == mutant), monkeypatch)
    lines: list[str] = []

    class Watched(machine):  # type: ignore[misc,valid-type]
        def teardown(self) -> None:
            lines[:] = self.lines  # the last to run is the smallest that fails
            super().teardown()

    limits = settings(
        max_examples=1000,
        stateful_step_count=steps,
        phases=(Phase.generate, Phase.shrink) if machine is Alive else (Phase.generate,),
        report_multiple_bugs=False,
        derandomize=True,  # from some first findings shrinking takes minutes
        database=None,
        print_blob=False,
    )
    with pytest.raises((AssertionError, Damaged)):
        run_state_machine_as_test(Watched, settings=limits)
    planted(f"quire, histories of all operations: {mutant}", bool(lines))
    figure(f"quire, {mutant}", "; ".join(lines))
    assert 0 < len(lines) <= steps
