"""A disk whose bytes may hold several contents, and all the plain disks it may turn out to be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from powercut.disk import Bytes, Span, Variants


class PlainDisk:
    """Bytes in memory. Counts what is read, to see that nothing is read for the asking of a broken header."""

    def __init__(self, image: bytes | bytearray) -> None:
        self.bytes = np.frombuffer(bytes(image), dtype=np.uint8)
        self.size = len(image)
        self.total = 0

    def read(self, offset: int, length: int) -> Bytes:
        self.total += length
        inside = self.bytes[offset : offset + length]
        if len(inside) == length:
            return inside
        out = np.zeros(length, dtype=np.uint8)
        out[: len(inside)] = inside
        return out

    def variants(self, offset: int, length: int) -> Variants:
        return Variants(self.read(offset, length))


class SpanDisk(PlainDisk):
    """`choices`: places (offset, other contents) that vary independently and do not overlap.

    `read` gives the first content there, decided: a test that reads such a place by `read` must say so itself.
    """

    def __init__(self, image: bytes | bytearray, choices: list[tuple[int, list[bytes]]]) -> None:
        super().__init__(image)
        self.image = bytes(image)
        self.choices = sorted(choices)

    def variants(self, offset: int, length: int) -> Variants:
        spans = []
        for at, others in self.choices:
            start, stop = max(at, offset), min(at + len(others[0]), offset + length)
            if start >= stop:
                continue
            first = self.image[start:stop]
            parts = dict.fromkeys(other[start - at : stop - at] for other in others)
            parts.pop(first, None)
            if parts:
                rows = np.array([np.frombuffer(part, dtype=np.uint8) for part in parts])
                spans.append(Span(start - offset, stop - offset, rows))
        return Variants(self.read(offset, length), tuple(spans))

    def states(self) -> Iterator[PlainDisk]:
        """Every disk this may be."""
        options = [[self.image[at : at + len(others[0])], *others] for at, others in self.choices]
        for state in itertools.product(*options):
            out = bytearray(self.image)
            for (at, _), content in zip(self.choices, state, strict=True):
                out[at : at + len(content)] = content
            yield PlainDisk(out)
