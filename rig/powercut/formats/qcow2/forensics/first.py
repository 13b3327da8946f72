"""What lies at offset 0, where the header belongs.

In 2009 it was an L2 table or a snapshot's L1 table, because cluster 0 had been freed and handed out again, and then
the driver patched the snapshot count and offset of the header, bytes 60 to 71, into what lay there. Other things
write there too: a partitioning tool, a copy of another image, a guest's data.

Source of magic numbers: each format's own documentation, as libblkid and libmagic have collected them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from powercut import stamp
from powercut.disk import Disk
from powercut.formats.probe import probe
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.entries import U64
from powercut.formats.qcow2.forensics.anatomy import Anatomy
from powercut.formats.qcow2.forensics.guest import partitions
from powercut.formats.qcow2.forensics.homes import homes_of_first
from powercut.formats.qcow2.forensics.notes import Note, guest_range, lost
from powercut.formats.qcow2.forensics.patched import is_patched, restore_l1, restore_l2
from powercut.formats.qcow2.forensics.scan import plausible, reach

# Beside the image formats that `powercut.formats.probe` knows.
_MAGICS = (
    (0, b"LUKS\xba\xbe", "a LUKS header"),
    (0, b"XFSB", "an XFS file system"),
    (1080, b"\x53\xef", "an ext file system"),
    (3, b"NTFS    ", "an NTFS boot sector"),
    (54, b"FAT1", "a FAT boot sector"),
    (82, b"FAT32", "a FAT boot sector"),
    (512, b"LABELONE", "an LVM physical volume"),
    (4086, b"SWAPSPACE2", "a Linux swap area"),
    (0, b"\x7fELF", "an ELF file"),
    (0, b"PK\x03\x04", "a ZIP file"),
    (0, b"\x1f\x8b", "a gzip file"),
    (0, b"\xfd7zXZ\0", "an xz file"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file"),
    (0, b"hsqs", "a SquashFS"),
)


@dataclass
class First:
    """`kind` for programs, `text` for people. With a table there: what it was before bytes 60 to 71 were patched,
    and the L1 entries (layer, index) that should point to it."""

    kind: str
    text: str
    table: U64 | None = None
    homes: list[tuple[int, int]] = field(default_factory=list)
    sure: bool = True
    notes: list[Note] = field(default_factory=list)

    @property
    def entries(self) -> int:
        return 0 if self.table is None else int(np.count_nonzero(self.table))


def look(disk: Disk, anatomy: Anatomy | None) -> First:
    if anatomy is not None and anatomy.intact:
        return _under_header(disk, anatomy)
    if not disk.size:
        return First("nothing", "nothing: the file is empty")
    start = disk.read(0, 4096).tobytes()
    if not any(start):
        cluster = anatomy.header.cluster_size if anatomy else 4096
        zeros = len(start) if disk.read(0, cluster).any() else min(cluster, disk.size)
        return First("zeros", f"zeros, {zeros:,} bytes of them")
    image_format = probe(start, b"")
    if image_format == "qcow2":
        return First("qcow2-header", "a qcow2 header that makes no sense")
    if image_format is not None:
        return First("other-format", f"a {image_format} header")
    for offset, magic, name in _MAGICS:
        if start[offset : offset + len(magic)] == magic:
            return First("other-format", name)
    if start[512:520] == b"EFI PART":
        return First("partition-table", "a GPT partition table behind a protective MBR")
    if (rows := partitions(start)) is not None and start[510:512] == b"\x55\xaa":
        used = sum(used for used, _ in rows)
        text = f"an MBR partition table, {used} of 4 partitions in use" if rows and used else "a boot sector"
        return First("partition-table" if rows and used else "boot-sector", text)
    if int(stamp.decode(np.frombuffer(start[: stamp.SECTOR], dtype=np.uint8)).op[0]) >= 0:
        return First("guest-data", "guest data: a sector that this program's workload stamped")
    if anatomy is not None and (table := _table(disk, anatomy)) is not None:
        return table
    counts = np.frombuffer(start, dtype=">u2")
    if counts.max() < 256 and np.count_nonzero(counts[:256]) and not (start.isascii() and start[:64].isalnum()):
        used = int(np.count_nonzero(counts))
        return First("refcount-block", f"a refcount block: {used} of its first {len(counts)} refcounts are not zero")
    return First("data", f"something else, perhaps guest data: it begins with {start[:8].hex()}")


def _under_header(disk: Disk, anatomy: Anatomy) -> First:
    """The header is there. If an L1 entry points to offset 0 all the same, it was put back over an L2 table."""
    homes, sure = homes_of_first(anatomy, None)
    if not homes or not sure:
        return First("header", "the header")
    words = disk.read(0, anatomy.header.cluster_size).view(q.BE64).astype(np.uint64)
    covered = -(-anatomy.header.header_length // 8)
    words[:covered] = 0
    if not words.any() or not plausible(words, reach(disk.size)).all():
        return First("header", "the header")
    text = f"the header, and under it an L2 table that lost its first {covered} entries"
    start = homes[0][1] * anatomy.coverage
    gone = guest_range(start, start + covered * anatomy.header.cluster_size)
    return First(
        "header-over-table", text, words, homes, True, [lost("L2 entries", f"{gone}: the header lies on them")]
    )


def _table(disk: Disk, anatomy: Anatomy) -> First | None:
    """An L2 table, or the L1 table of a snapshot."""
    words = disk.read(0, anatomy.header.cluster_size).view(q.BE64).astype(np.uint64)
    saved = anatomy.saved
    patched = is_patched(anatomy, words)
    trusted = np.delete(words, [7, 8]) if patched else words
    also = f"; bytes 60 to 71 hold the snapshot count {len(saved)} and offset {saved[0].where:#x}" if patched else ""
    for number, one in enumerate(saved):
        if one.l1_table_offset == 0:
            own = anatomy.saved_l1[number]
            anatomy.saved_l1[number], notes = (
                restore_l1(anatomy, number, own) if patched and len(own) > 8 else (own, [])
            )
            text = f"the L1 table of {one.called}: {np.count_nonzero(words)} entries{also}"
            return First("l1-table", text, notes=notes)
    if anatomy.l1.any() and anatomy.header.l1_table_offset == 0:
        return First("l1-table", f"the active L1 table: {np.count_nonzero(words)} entries{also}")
    per = anatomy.header.l2_entry_size // 8
    if not trusted.any() or not plausible(trusted[::per], reach(disk.size)).all():
        return None
    homes, sure = homes_of_first(anatomy, words)
    used = np.flatnonzero(words[::per])
    text = f"an L2 table: {len(used)} entries"
    if homes:
        index = homes[0][1]
        start = index * anatomy.coverage
        cluster = anatomy.header.cluster_size
        mapped = guest_range(start + int(used[0]) * cluster, start + (int(used[-1]) + 1) * cluster)
        told = "which map" if sure else "which map, by guess,"
        text += f", {told} {mapped} (L1 entry {index})"
    repairs: list[Note] = []
    if patched and per == 1:
        words, repairs = restore_l2(anatomy, words, homes)
    return First("l2-table", text + also, words, homes, sure, repairs)
