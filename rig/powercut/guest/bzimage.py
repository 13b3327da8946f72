"""The uncompressed kernel inside a bzImage, where that is compressed with LZ4: a guest starts a tenth sooner from it.

Sources: Linux, Documentation/x86/boot.rst, fields setup_sects, payload_offset, payload_length; LZ4's
doc/lz4_Frame_format.md, "Legacy frame", and doc/lz4_Block_format.md. Numbers are little-endian.
"""

from __future__ import annotations

import struct

_SETUP_SECTS, _PAYLOAD = 0x1F1, 0x248  # offsets: one byte; two numbers of four bytes
_LEGACY = bytes.fromhex("02214c18")
_ELF = b"\x7fELF"


def unpacked(image: bytes) -> bytes | None:
    """The ELF file in a bzImage; None if it is compressed in another way."""
    setup_sectors = image[_SETUP_SECTS] or 4
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    begin = (setup_sectors + 1) * 512 + offset
    payload = image[begin : begin + length]
    if payload[:4] != _LEGACY:
        return None
    out, at = bytearray(), 4
    while at + 4 <= len(payload):
        (size,) = struct.unpack_from("<I", payload, at)
        if at + 4 + size > len(payload):  # what follows the last block is the kernel's own size
            break
        out += _block(payload[at + 4 : at + 4 + size])
        at += 4 + size
    return bytes(out) if out.startswith(_ELF) else None


def _block(source: bytes) -> bytearray:
    """One block: runs of literals, each followed by a copy of what was put out `distance` bytes before."""
    out = bytearray()
    at, end = 0, len(source)
    while at < end:
        token = source[at]
        count, at = _count(source, at + 1, token >> 4)
        out += source[at : at + count]
        at += count
        if at >= end:
            break
        distance = source[at] | source[at + 1] << 8
        count, at = _count(source, at + 2, token & 15)
        count += 4
        start = len(out) - distance
        if distance >= count:
            out += out[start : start + count]
        else:  # it overlaps itself
            piece = out[start:]
            out += (piece * (count // distance + 1))[:count]
    return out


def _count(source: bytes, at: int, count: int) -> tuple[int, int]:
    """A count that goes on in further bytes while it is at its limit. Returns it, and where the next thing is."""
    if count == 15:
        while True:
            more = source[at]
            count, at = count + more, at + 1
            if more != 255:
                break
    return count, at
