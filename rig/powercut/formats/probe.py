"""Which format a file is of, by its first bytes, and its last; and what QEMU's tools can say of it.

Sources: the first fields of each format's header (docs/interop/qcow2.txt, qed_spec.txt, parallels.txt and block/*.c of
QEMU 7.2; the VHDX and VHD specifications).
"""

from __future__ import annotations

_TAIL = 512
_MAGIC = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"conectix", "vpc"),
)
HEAD = 128

_CHECK = ("check",)
_HEAL = ("check", "-r", "all")
CHECKS = {"qcow2": _CHECK, "vdi": _CHECK, "vmdk": _CHECK, "qed": _HEAL, "vhdx": _HEAL, "parallels": _HEAL}


def check_of(format: str, head: bytes) -> tuple[str, ...] | None:
    """What `qemu-img` is asked to do to check an image that begins with `head`; None: it cannot check the format.

    Formats that QEMU heals when it opens them for writing are healed, and so is a qcow2 image with its dirty bit set
    (incompatible feature 0), whose refcounts QEMU then rebuilds."""
    dirty = format == "qcow2" and len(head) >= 80 and head[7] >= 3 and head[79] & 1
    return _HEAL if dirty else CHECKS.get(format)


def probe(head: bytes, tail: bytes) -> str | None:
    """The format of a file that begins with `head` (`HEAD` bytes) and ends with `tail` (512); None: of none known."""
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    return "vpc" if tail[-_TAIL:].startswith(b"conectix") else None
