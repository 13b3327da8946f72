"""Small images made by hand, from the specification alone: no QEMU, every place known."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

COPIED = 1 << 63
SLOTS = 6  # of each L2 table, that are in use


@dataclass
class Handmade:
    """A consistent image: `tables` L2 tables with some entries each, and a few free clusters at the end."""

    cluster_bits: int = 9
    refcount_order: int = 4
    extended: bool = False
    dirty: bool = False
    snapshot: bool = False  # an internal snapshot that shares the first L2 table
    tables: int = 2
    free: int = 3
    image: bytearray = field(init=False)

    def __post_init__(self) -> None:
        c = self.cluster
        first_l2 = 4
        extra = first_l2 + self.tables  # snapshot table and the snapshot's L1 table, when there are any
        self.first_data = extra + (2 if self.snapshot else 0)
        self.clusters = self.first_data + self.tables * SLOTS + self.free
        self.image = bytearray(self.clusters * c)
        self.l1, self.reftable, self.refblock = 3 * c, c, 2 * c
        self.l2 = [(first_l2 + t) * c for t in range(self.tables)]
        refs = [0] * self.clusters
        for cluster in (0, 1, 2, 3):
            refs[cluster] = 1
        for t, at in enumerate(self.l2):
            shared = self.snapshot and t == 0
            refs[at // c] = 2 if shared else 1
            self.word(self.l1 + 8 * t, at | (0 if shared else COPIED))
            for slot in range(SLOTS):
                data = self.first_data + t * SLOTS + slot
                refs[data] = 2 if shared else 1
                self.word(self.slot(t, slot), data * c | (0 if shared else COPIED))
                if self.extended:
                    self.word(self.slot(t, slot) + 8, 0x0000_00F0_0000_000F)
        if self.snapshot:
            refs[extra] = refs[extra + 1] = 1
            entry = struct.pack(">QIHHIIQII", (extra + 1) * c, self.tables, 1, 1, 0, 0, 0, 0, 16)
            entry += struct.pack(">QQ", 0, self.size) + b"1s"
            self.image[extra * c : extra * c + len(entry)] = entry
            self.word((extra + 1) * c, self.l2[0])
        self.word(self.reftable, self.refblock)
        for cluster, count in enumerate(refs):
            self.refcount(cluster, count)
        incompatible = (16 if self.extended else 0) | (1 if self.dirty else 0)
        self.image[:112] = (
            struct.pack(">4sIQIIQIIQQII", b"QFI\xfb", 3, 0, 0, self.cluster_bits, self.size, 0, self.tables, self.l1,
                        self.reftable, 1, int(self.snapshot))
            + struct.pack(">QQQQII8x", extra * c if self.snapshot else 0, incompatible, 0, 0, self.refcount_order, 112)
        )  # fmt: skip

    @property
    def cluster(self) -> int:
        return 1 << self.cluster_bits

    @property
    def entry_size(self) -> int:
        return 16 if self.extended else 8

    @property
    def size(self) -> int:
        return self.tables * (self.cluster // self.entry_size) * self.cluster

    def slot(self, table: int, slot: int) -> int:
        return self.l2[table] + slot * self.entry_size

    def word(self, offset: int, value: int) -> None:
        struct.pack_into(">Q", self.image, offset, value)

    def at(self, offset: int) -> int:
        return int(struct.unpack_from(">Q", self.image, offset)[0])

    def refcount(self, cluster: int, count: int) -> None:
        set_refcount(self.image, self.refblock, self.refcount_order, cluster, count)


def set_refcount(block: bytearray, base: int, order: int, cluster: int, count: int) -> None:
    """The refcount of `cluster`, in a block that starts at `base`."""
    bits = 1 << order
    count &= (1 << bits) - 1
    if bits >= 8:
        at = base + cluster * bits // 8
        block[at : at + bits // 8] = count.to_bytes(bits // 8, "big")
    else:
        at, shift = base + cluster * bits // 8, cluster * bits % 8
        block[at] = block[at] & ~(((1 << bits) - 1) << shift) | count << shift
