"""LZ4 blocks taken apart by hand."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from powercut.guest import bzimage


def packed(data: bytes) -> bytes:
    """An LZ4 block, packed in the plainest way that uses copies: runs of one byte become a literal and a copy."""
    out, at = bytearray(), 0
    while at < len(data):
        literal = data[at : at + 20]
        at += len(literal)
        run = 0
        while at + run < len(data) and data[at + run] == literal[-1] and run < 600:
            run += 1
        if at + run == len(data) or run < 4:
            run = 0
        if run:
            out += _sequence(literal, run)
            at += run
        elif at < len(data):  # a copy is at least 4 bytes long: none fits, so the literal goes on
            literal += data[at:]
            at = len(data)
            out += _sequence(literal, 0)
        else:
            out += _sequence(literal, 0)
    return bytes(out)


def _sequence(literal: bytes, run: int) -> bytes:
    def more(count: int) -> bytes:
        return b"" if count < 15 else b"\xff" * ((count - 15) // 255) + bytes([(count - 15) % 255])

    copy = max(run - 4, 0)
    token = min(len(literal), 15) << 4 | min(copy, 15)
    return bytes([token]) + more(len(literal)) + literal + (b"\x01\x00" + more(copy) if run else b"")


def image(blocks: list[bytes], magic: bytes = bytes.fromhex("02214c18")) -> bytes:
    payload = magic + b"".join(struct.pack("<I", len(block)) + block for block in blocks) + struct.pack("<I", 1 << 30)
    head = bytearray(1024)
    head[0x1F1] = 1
    struct.pack_into("<II", head, 0x248, 0, len(payload))
    return bytes(head) + payload


@given(st.lists(st.tuples(st.binary(min_size=20, max_size=400), st.integers(0, 500)), min_size=1, max_size=5))
def test_what_was_packed_comes_out(pieces: list[tuple[bytes, int]]) -> None:
    data = b"\x7fELF" + b"".join(piece + piece[-1:] * run for piece, run in pieces) + b"the end"
    half = len(data) // 2
    assert bzimage.unpacked(image([packed(data[:half]), packed(data[half:])])) == data


def test_what_is_packed_in_another_way_is_left() -> None:
    assert bzimage.unpacked(image([b""], magic=b"\x1f\x8b\x08\0")) is None
    assert bzimage.unpacked(image([packed(b"no kernel" * 9)])) is None
