"""Stamps: made and decoded alike, and nothing that is partly something else passes for one."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from powercut import stamp

EDGES = [0, 1, 2, 0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
words = st.integers(0, (1 << 64) - 1) | st.sampled_from(EDGES)
numbers = st.integers(0, (1 << 62) - 1)


def of(data: bytes) -> stamp.Stamps:
    return stamp.decode(np.frombuffer(data, dtype=np.uint8).reshape(-1, stamp.SECTOR))


def digests(triples: list[tuple[int, int, int]]) -> list[int]:
    columns = np.array(triples, dtype=np.uint64).T
    return [int(value) for value in stamp.digest(*columns)]


@given(triples=st.lists(st.tuples(words, words, words), min_size=1, max_size=40))
def test_the_digest_is_xxh3(triples):
    """The witness is the xxhash package, which shares nothing with the arithmetic here."""
    assert digests(triples) == [xxhash.xxh3_64_intdigest(struct.pack("<QQQ", *triple)) for triple in triples]


def test_the_digest_at_every_combination_of_edges():
    triples = [(a, b, c) for a in EDGES for b in EDGES for c in EDGES]
    assert digests(triples) == [xxhash.xxh3_64_intdigest(struct.pack("<QQQ", *triple)) for triple in triples]


@given(op=numbers, epoch=numbers, sector=numbers, count=st.integers(1, 9))
def test_what_was_made_is_decoded(op, epoch, sector, count):
    data = stamp.make(op, epoch, sector, count)
    assert len(data) == count * stamp.SECTOR
    stamps = of(data)
    assert stamps.op.tolist() == [op] * count
    assert stamps.epoch.tolist() == [epoch] * count
    assert stamps.sector.tolist() == list(range(sector, sector + count))


def test_a_stamp_is_laid_out_as_its_description_says():
    """Bytes put together by hand from the module's first paragraph."""
    triple = struct.pack("<QQQ", 7, 3, 41)
    assert stamp.make(7, 3, 41, 1) == (triple + struct.pack("<Q", xxhash.xxh3_64_intdigest(triple))) * 16


def test_zeros_were_never_written():
    assert of(bytes(2 * stamp.SECTOR)).op.tolist() == [stamp.ZERO] * 2


@given(data=st.binary(min_size=stamp.SECTOR, max_size=stamp.SECTOR))
def test_other_bytes_are_garbage(data):
    assert of(data).op.tolist() == [stamp.GARBAGE if any(data) else stamp.ZERO]


def test_a_uniform_sector_without_a_digest_is_garbage():
    assert of(struct.pack("<QQQQ", 7, 3, 41, 0) * 16).op.tolist() == [stamp.GARBAGE]


@pytest.mark.parametrize("where", [0, 17, 32, 100, 256, 480, 511])
@pytest.mark.parametrize("other", [b"\0", b"\xff", stamp.make(8, 3, 41, 1), stamp.make(7, 3, 42, 1)])
def test_a_partly_overwritten_sector_is_garbage(where, other):
    whole = stamp.make(7, 3, 41, 1)
    source = other * (stamp.SECTOR // len(other))
    after = whole[:where] + source[where:]
    before = source[:where] + whole[where:]
    assert of(after).op[0] == (stamp.GARBAGE if where else of(source).op[0])
    assert of(before).op[0] == (stamp.GARBAGE if where else 7)


def test_a_misdirected_sector_says_where_it_belongs():
    """Sector 41 read at the place of sector 5: valid, and the number tells."""
    data = bytes(5 * stamp.SECTOR) + stamp.make(7, 3, 41, 1)
    stamps = of(data)
    assert stamps.op.tolist() == [stamp.ZERO] * 5 + [7]
    assert stamps.sector[5] == 41 != 5


@pytest.mark.parametrize("repeated", [False, True])
def test_control_every_flipped_bit_is_seen(repeated):
    """One bit flipped in the sector, or in all sixteen copies alike: both are garbage."""
    whole = np.frombuffer(stamp.make(123456, 789, 1 << 30, 1), dtype=np.uint8)
    flipped = np.tile(whole, (256 if repeated else 4096, 1))
    for bit in range(len(flipped)):
        places = np.arange(bit // 8, stamp.SECTOR, 32) if repeated else bit // 8
        flipped[bit, places] ^= 1 << bit % 8
    assert (stamp.decode(flipped).op == stamp.GARBAGE).all()
    assert stamp.decode(whole.reshape(1, -1)).op[0] == 123456


@pytest.mark.parametrize("op", [1 << 63, (1 << 64) - 7, (1 << 64) - 2, (1 << 64) - 1])
def test_an_operation_beyond_63_bits_is_no_operation(op):
    """Its digest is right, and as a signed number it would be negative, or even ZERO."""
    assert of(stamp.make(op, 1, 1, 1)).op[0] == stamp.GARBAGE
