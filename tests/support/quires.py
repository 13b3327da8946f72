"""What the tests of Quire share: a trivial model of a set."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.layout import BLOCK


@dataclass
class Model:
    """A set as a dictionary of byte strings: what `quire.sets.Set` promises, without a disk."""

    heads: dict[str, bytearray] = field(default_factory=dict)
    snapshots: dict[str, bytes] = field(default_factory=dict)

    def write(self, head: str, offset: int, data: bytes) -> None:
        self.heads[head][offset : offset + len(data)] = data

    def zero(self, head: str, offset: int, length: int) -> None:
        self.heads[head][offset : offset + length] = bytes(length)

    def discard(self, head: str, offset: int, length: int) -> None:
        disk, end = self.heads[head], offset + length
        first = -(-offset // BLOCK) * BLOCK
        last = end if end == len(disk) else end // BLOCK * BLOCK
        if first < last:
            disk[first:last] = bytes(last - first)

    def snapshot(self, head: str, name: str) -> None:
        self.snapshots[name] = bytes(self.heads[head])

    def clone(self, snapshot: str, head: str) -> None:
        self.heads[head] = bytearray(self.snapshots[snapshot])

    def revert(self, head: str, snapshot: str) -> None:
        self.heads[head] = bytearray(self.snapshots[snapshot])

    def rename(self, old: str, new: str) -> None:
        for names in (self.heads, self.snapshots):
            if old in names:
                names[new] = names.pop(old)  # type: ignore[index]

    def delete(self, name: str) -> None:
        self.heads.pop(name, None)
        self.snapshots.pop(name, None)

    def resize(self, head: str, size: int) -> None:
        self.heads[head] = self.heads[head][:size].ljust(size, b"\0")
