"""What a guest may rely on, whatever keeps its disk: one suite over every format.

A disk begins as zeros. A read returns what was last written there. Zeroed sectors are zeros. A discarded sector is
as it was or zeros, and stays what it was first seen to be. All of it outlives closing and opening. A snapshot
is the disk at that moment, whatever comes later; applied, it is the disk. What is closed has nothing wrong with it.
"""

from __future__ import annotations

from hypothesis import strategies as st

from formats.subjects import Subject

SECTOR = 512
SECTORS = 1100  # of the disk: a little more than half a mebibyte, and not a whole number of anybody's clusters
SIZE = SECTORS * SECTOR
NAMES = ("a", "b")

Step = tuple[str, int, int, str]  # what, first sector, sectors, the name of a snapshot

REQUESTS = ("write", "write", "write", "zero", "discard", "flush", "reopen")
SNAPSHOTS = ("take", "apply", "drop")


def histories(snapshots: bool, most: int = 25) -> st.SearchStrategy[list[Step]]:
    kinds = st.sampled_from(REQUESTS + SNAPSHOTS if snapshots else REQUESTS)
    lengths = st.one_of(st.integers(1, 20), st.integers(1, 400))
    return st.lists(st.tuples(kinds, st.integers(0, SECTORS - 1), lengths, st.sampled_from(NAMES)), max_size=most)


def conforms(subject: Subject, steps: list[Step]) -> None:
    """Do the steps, and compare with a byte string. Raises AssertionError at the first thing that is wrong."""
    disk = bytearray(SIZE)
    taken: dict[str, bytes] = {}
    try:
        assert subject.read(0, SIZE) == disk, "a new disk is not zeros"
        for number, step in enumerate(steps):
            _step(subject, disk, taken, number, step)
        assert subject.read(0, SIZE) == disk, "at the end"
        subject.reopen()
        assert subject.read(0, SIZE) == disk, "after reopening at the end"
        for name, content in taken.items():
            subject.apply(name)
            assert subject.read(0, SIZE) == content, f"snapshot {name}"
    except BaseException:
        subject.close()
        raise
    assert subject.close() == ""


def _step(subject: Subject, disk: bytearray, taken: dict[str, bytes], number: int, step: Step) -> None:
    what, first, sectors, name = step
    offset = first * SECTOR
    length = min(sectors * SECTOR, SIZE - offset)
    if what == "write":
        data = b"".join(f"{number} {offset + at}".encode().ljust(SECTOR, b".") for at in range(0, length, SECTOR))
        subject.write(offset, data)
        disk[offset : offset + length] = data
    elif what == "zero":
        subject.zero(offset, length)
        disk[offset : offset + length] = bytes(length)
    elif what == "discard":
        subject.discard(offset, length)
        seen = subject.read(offset, length)
        for at in range(0, length, SECTOR):
            old = disk[offset + at : offset + at + SECTOR]
            assert seen[at : at + SECTOR] in (old, bytes(SECTOR)), (
                f"step {number}: discarded, and neither old nor zeros"
            )
        disk[offset : offset + length] = seen
    elif what == "flush":
        subject.flush()
    elif what == "reopen":
        subject.reopen()
        assert subject.read(0, SIZE) == disk, f"step {number}: after reopening"
    elif what == "take" and name not in taken:
        subject.take(name)
        taken[name] = bytes(disk)
    elif what == "apply" and name in taken:
        subject.apply(name)
        disk[:] = taken[name]
        assert subject.read(0, SIZE) == disk, f"step {number}: applied"
    elif what == "drop" and name in taken:
        subject.drop(name)
        del taken[name]
    assert subject.read(offset, length) == disk[offset : offset + length], f"step {number}: {what}"
