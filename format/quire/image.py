"""One disk: what a program reads and writes, at any alignment and from any thread.

An image follows its head from leaf to leaf: taking a snapshot gives it a new leaf while it stays open. It is an
`quire.nbd_protocol.Export`, so a server can be given one as it is. Errors are OSErrors (see `quire.errors`).

The order of requests is that of a disk: a request that returned before another began comes first; what runs at the
same time may come in any order, sector by sector.
"""

from __future__ import annotations

from quire.errors import Unusable
from quire.layout import BLOCK, SECTOR
from quire.leaf import Leaf
from quire.store import Buffer

_PIECE = 4 << 30  # bytes zeroed while others wait


class Image:
    """See the module. Made by `quire.sets.Set.image`, closed by `close`. Offsets and lengths are bytes."""

    block_size = SECTOR
    multi_conn = True

    def __init__(self, name: str, leaf: Leaf, *, writable: bool, shared: bool = False) -> None:
        self.name = name
        self.leaf = leaf
        self.read_only = not writable
        self.closed = False
        self._lock = leaf.lock
        self._shared = shared  # the leaf is others' too

    @property
    def size(self) -> int:
        """How large the disk is, in bytes."""
        return self.leaf.size

    def read(self, offset: int, length: int) -> bytes | bytearray:
        """`length` bytes at `offset`. Raises Unusable if they are not all on the disk."""
        leaf = self.leaf
        if offset < 0 or length <= 0 or offset + length > leaf.size:
            if not length and 0 <= offset <= leaf.size:
                return b""
            raise self._beyond(offset, length)
        return leaf.read(offset, length)

    def write(self, offset: int, data: Buffer, fua: bool = False) -> None:
        """Write `data` at `offset`; with `fua` it is durable when this returns. If it raises, any part of it may have
        been written."""
        length = len(data)
        if self._some(offset, length):
            first, last = offset // BLOCK, (offset + length - 1) // BLOCK
            with self._lock:
                while self.leaf.unproven(first, last):
                    self._prove()
                self.leaf.write(offset, data)
            self._settle(fua)

    def zero(self, offset: int, length: int, may_unmap: bool = True, fua: bool = False) -> None:
        """Make a range read as zeros. `may_unmap`: give its space back."""
        end = offset + length
        if self._some(offset, length):
            while offset < end:  # pieces end at multiples of _PIECE, which no block straddles
                stop = min(end, (offset // _PIECE + 1) * _PIECE)
                with self._lock:
                    first, last = offset // BLOCK, (stop - 1) // BLOCK  # only the edges' homes are written
                    while self.leaf.unproven(first, first) or self.leaf.unproven(last, last):
                        self._prove()
                    self.leaf.zero(offset, stop - offset, punch=may_unmap)
                offset = stop
            self._settle(fua)

    def discard(self, offset: int, length: int) -> None:
        """Make the whole blocks within a range zeros, and give their space back."""
        end = offset + length
        if self._some(offset, length):
            while offset < end:
                stop = min(end, (offset // _PIECE + 1) * _PIECE)
                with self._lock:
                    self.leaf.zero(offset, stop - offset, punch=True, edges=False)
                offset = stop
            self._settle(False)

    def flush(self) -> None:
        """Return when everything that returned before is durable. After an error the image is read-only."""
        self.leaf.flush()

    def close(self) -> None:
        """Flush, say in the leaf that nothing is unfinished, and let go of it."""
        if not self.closed:
            self.closed = True
            if not self._shared:
                self.leaf.close()

    def follow(self, leaf: Leaf) -> None:
        """Go on in a new leaf. The caller holds both locks, and what the old leaf holds is durable."""
        self.leaf.stop("it is a snapshot now")
        leaf.lock, leaf.commit_lock = self.leaf.lock, self.leaf.commit_lock
        self.leaf = leaf

    def _some(self, offset: int, length: int) -> bool:
        """Whether there is anything to do. Raises Unusable for a range that is not on the disk."""
        if offset < 0 or length < 0 or offset + length > self.leaf.size:
            raise self._beyond(offset, length)
        self.leaf.admit()
        return length > 0

    def _prove(self) -> None:
        """Prove the tail. The caller holds the lock once; others run meanwhile, and may leave another tail."""
        self._lock.release()
        try:
            self.leaf.prove()
        finally:
            self._lock.acquire()

    def _settle(self, fua: bool) -> None:
        if fua or self.leaf.crowded:
            self.leaf.flush()

    def _beyond(self, offset: int, length: int) -> Unusable:
        return Unusable(self.name, f"{length} bytes at {offset} are not all on a disk of {self.leaf.size}")


assert _PIECE % BLOCK == 0
