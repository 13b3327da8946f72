"""The journal: a chain of records in slots, each in two copies. Encoding, appending, and finding the chain again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from quire.errors import Damaged
from quire.layout import (
    DATA,
    DROPPED,
    ENTRY,
    MAX_CHECKED,
    MAX_ENTRIES,
    PAGE,
    PREFIX,
    RECORD_MAGIC,
    ZERO,
    C,
    Geometry,
    M,
    P,
    Prefix,
    R,
    page,
    read_page,
)
from quire.store import File

Run = tuple[int, int, int]  # start, length, state
_READ = 1 << 20


class Record(NamedTuple):
    """A record, decoded. `checks` go with the entries of a C."""

    number: int
    kind: int
    entries: list[Run]
    checks: list[int]
    checksum: int


class Journal:
    """The chain's end, and how it goes on. `last` is the number of the tail, `checksum` and `kind` are the tail's.

    Every record up to `last` is synced, except while its writer has not said so with `synced`.
    """

    def __init__(self, file: File, place: Geometry, owner: bytes) -> None:
        self._file = file
        self._place = place
        self._owner = owner
        self.last = self.checksum = self.kind = 0
        self._known = 0  # every record up to this one is synced

    def write(self, kind: int, entries: Sequence[Run] = (), checks: Sequence[int] = ()) -> None:
        """Write the next record to both copies. What was written since `synced` makes one batch: it is synced
        together, and a crash leaves a prefix of it."""
        payload = np.array(list(entries), ENTRY).tobytes() + np.array(list(checks), "<u8").tobytes()
        raw = page(
            RECORD_MAGIC,
            self._owner,
            payload,
            number=self.last + 1,
            generation=self._known + 1,
            previous=self.checksum,
            kind=kind,
            count=len(entries),
        )
        for copy in (0, 1):
            self._file.write(self._place.slot(self.last + 1, copy), raw)
        self.last += 1
        self.checksum = int.from_bytes(raw[:8], "little")
        self.kind = kind

    def synced(self) -> None:
        """The file was synced after the last `write`."""
        self._known = self.last

    def load(self, checkpoint: int, previous: int) -> tuple[list[Record], list[tuple[int, bytes]], bool]:
        """The chain behind `checkpoint`, copies of it to repair, and whether nothing good lies beyond it.

        Raises Damaged if a record is missing that is known to have been synced."""
        copies = [self._slots(copy) for copy in (0, 1)]
        chain: list[Record] = []
        repairs = []
        number, expected = checkpoint + 1, previous
        while True:
            both = [slots.get(number) for slots in copies]
            found = next((one for one in both if one and one[0].previous == expected), None)
            if found is None:
                break
            chain.append(self._decode(*found))
            repairs += [(self._place.slot(number, copy), found[1]) for copy in (0, 1) if both[copy] != found]
            number, expected = number + 1, chain[-1].checksum
        self.last = self._known = number - 1
        self.checksum = expected
        self.kind = chain[-1].kind if chain else 0
        beyond = [prefix for slots in copies for prefix, _ in slots.values() if prefix.number >= number]
        lost = [prefix for prefix in beyond if prefix.generation > number]
        if lost or number == 1:
            seen = f": record {lost[0].number} was written after it" if lost else ""
            offset = self._place.slot(number, 0)
            raise Damaged(self._file.name, f"record {number} is bad or missing in both copies{seen}", offset)
        return chain, repairs, not beyond

    def highest(self) -> int:
        """The highest number of any good record, 0 if there is none; nothing else is checked."""
        return max((number for copy in (0, 1) for number in self._slots(copy)), default=0)

    def _slots(self, copy: int) -> dict[int, tuple[Prefix, bytes]]:
        """Number -> page, of every good record in one copy."""
        place = self._place
        found: dict[int, tuple[Prefix, bytes]] = {}
        begin, length = place.slot(0, copy), place.slots * PAGE
        for start, size in list(self._file.data_ranges(begin, length)):
            start, end = start // PAGE * PAGE, start + size
            for offset in range(start, end, _READ):
                raw = self._file.read(offset, -(-min(_READ, end - offset) // PAGE) * PAGE)
                for at in range(0, len(raw), PAGE):
                    one = raw[at : at + PAGE]
                    prefix = read_page(one, RECORD_MAGIC, self._owner)
                    if prefix and prefix.number and place.slot(prefix.number, copy) == offset + at:
                        found[prefix.number] = prefix, one
        return found

    def _decode(self, prefix: Prefix, raw: bytes) -> Record:
        """A good record. Raises Damaged if what it says cannot be."""
        room = MAX_CHECKED if prefix.kind == C else MAX_ENTRIES
        allowed = {P: (DATA, ZERO), C: (DATA, ZERO), M: (), R: (DROPPED,)}.get(prefix.kind)
        if allowed is None or prefix.entries > (room if allowed else 0):
            raise self._impossible(prefix, f"kind {prefix.kind} with {prefix.entries} entries")
        entries = np.frombuffer(raw, ENTRY, prefix.entries, PREFIX.itemsize).tolist()
        end = 0
        for start, length, state in entries:
            if start < end or not length or start + length > self._place.blocks or state not in allowed:
                raise self._impossible(prefix, f"entry ({start}, {length}, {state})")
            end = start + length
        checks = []
        if prefix.kind == C:
            checks = np.frombuffer(
                raw, "<u8", prefix.entries, PREFIX.itemsize + prefix.entries * ENTRY.itemsize
            ).tolist()
        return Record(prefix.number, prefix.kind, entries, checks, prefix.checksum)

    def _impossible(self, prefix: Prefix, what: str) -> Damaged:
        return Damaged(self._file.name, f"record {prefix.number}: {what}", self._place.slot(prefix.number, 0))
