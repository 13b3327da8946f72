"""Snapshot tables found by their structure, read in full, and written anew.

Source: QEMU's docs/interop/qcow2.txt, section "Snapshots". Nothing in a table says how many entries it has, or
that it is the current one: each entry must make sense by itself, and the refcounts tell what is in use.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import numpy as np

from powercut.disk import Disk
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import U64
from powercut.formats.qcow2.header import Header


@dataclass(frozen=True)
class Saved:
    """One snapshot, with all that its entry says."""

    where: int  # byte offset of the entry
    l1_table_offset: int
    l1_size: int
    id: bytes
    name: bytes
    date: tuple[int, int]
    vm_clock: int
    vm_state_size_32: int
    extra: bytes

    @property
    def end(self) -> int:
        length = q.SNAPSHOT.itemsize + len(self.extra) + len(self.id) + len(self.name)
        return self.where + -(-length // 8) * 8

    @property
    def vm_state_size(self) -> int:
        return int.from_bytes(self.extra[:8], "big") if len(self.extra) >= 8 else self.vm_state_size_32

    @property
    def disk_size(self) -> int | None:
        return int.from_bytes(self.extra[8:16], "big") if len(self.extra) >= 16 else None

    @property
    def called(self) -> str:
        return f"snapshot {self.id.decode('latin-1')!r} ({self.name.decode('utf-8', 'replace')!r})"

    def vm_state_index(self, coverage: int) -> int:
        """The index of the first L1 entry behind the disk, where the VM state is. `coverage`: bytes that each maps.
        An old entry does not tell the size of the disk; but the L1 table is not longer than it must be."""
        if self.disk_size is not None:
            return -(-self.disk_size // coverage)
        return self.l1_size - -(-self.vm_state_size // coverage)

    def packed(self, l1_table_offset: int, l1_size: int, disk_size: int) -> bytes:
        """The entry for a new table, with the extra data that version 3 wants."""
        extra = self.extra
        if len(extra) < q.SNAPSHOT_EXTRA.itemsize:
            extra = struct.pack(">QQ", self.vm_state_size, disk_size if self.disk_size is None else self.disk_size)
        fixed = struct.pack(
            ">QIHHIIQII", l1_table_offset, l1_size, len(self.id), len(self.name), *self.date, self.vm_clock,
            self.vm_state_size_32, len(extra),
        )  # fmt: skip
        entry = fixed + extra + self.id + self.name
        return entry.ljust(-(-len(entry) // 8) * 8, b"\0")


def parse(disk: Disk, offset: int) -> Saved | None:
    """The entry at `offset`; None if what is there is none."""
    if offset + q.SNAPSHOT.itemsize > disk.size:
        return None
    row = np.frombuffer(disk.read(offset, q.SNAPSHOT.itemsize).tobytes(), q.SNAPSHOT)[0]
    extra_size, id_size, name_size = int(row["extra_size"]), int(row["id_size"]), int(row["name_size"])
    if not 1 <= id_size < 128 or extra_size > q.MAX_SNAPSHOT_EXTRA or row["date_nanoseconds"] >= 10**9:
        return None
    rest = disk.read(offset + q.SNAPSHOT.itemsize, extra_size + id_size + name_size).tobytes()
    identity = rest[extra_size : extra_size + id_size]
    if not identity.isascii() or not identity.decode().isprintable():
        return None
    return Saved(
        offset,
        int(row["l1_table_offset"]),
        int(row["l1_size"]),
        identity,
        rest[extra_size + id_size :],
        (int(row["date_seconds"]), int(row["date_nanoseconds"])),
        int(row["vm_clock"]),
        int(row["vm_state_size"]),
        rest[:extra_size],
    )


def credible(found: Saved, header: Header, size: int) -> bool:
    """Whether the entry makes sense beside others in a file of `size` bytes, when nothing else vouches for it."""
    if found.l1_table_offset % header.cluster_size or not 1 <= found.l1_size <= q.MAX_L1_BYTES // 8:
        return False
    try:
        name = found.name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return found.l1_table_offset < size and name.isprintable()


def table_at(disk: Disk, offset: int, header: Header, most: int = q.MAX_SNAPSHOTS) -> list[Saved]:
    """The entries of a table at `offset`, up to the first that makes no sense; each ID comes once."""
    out: list[Saved] = []
    known: set[bytes] = set()
    while len(out) < most:
        found = parse(disk, offset)
        if found is None or found.id in known or not credible(found, header, disk.size):
            break
        known.add(found.id)
        out.append(found)
        offset = found.end
    return out


def entries(disk: Disk, saved: Saved) -> U64:
    """The snapshot's L1 table, as far as the file reaches."""
    length = max(0, min(saved.l1_size * 8, disk.size - saved.l1_table_offset))
    raw = disk.read(saved.l1_table_offset, length - length % 8)
    words = np.zeros(saved.l1_size, dtype=np.uint64)
    words[: len(raw) // 8] = raw.view(q.BE64)
    return words


def moved(saved: Saved, offset: int) -> Saved:
    return replace(saved, l1_table_offset=offset)
