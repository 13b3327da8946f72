"""The two files of the manifest: the newer good copy counts, and they are replaced one after the other."""

from __future__ import annotations

import dataclasses

from quire.errors import Damaged, Foreign, ReadOnly, opening
from quire.layout import MANIFEST, MANIFEST_MAGIC, MAX_MANIFEST, PREFIX, PREFIX_STRUCT, Prefix, checksum
from quire.manifest import Manifest
from quire.rows import decode, encode
from quire.store import File, Store

FILES = ("manifest-0", "manifest-1")


class Copies:
    """The two files. `manifest` is what counts; `save` replaces it. With `write`, a bad copy is rewritten first.

    Raises Damaged if no copy is good, Foreign if there is none."""

    def __init__(self, store: Store, *, write: bool) -> None:
        self._store = store
        self._stopped = None if write else "opened for reading"
        self._files: list[File] = []
        self.mended: list[str] = []  # files that were bad or older, and are rewritten
        try:
            self._open(write)
        except BaseException:
            self.close()
            raise

    def _open(self, write: bool) -> None:
        there = set(self._store.names()) & set(FILES)
        if not there:
            raise Foreign(self._store.path, "not a quire: it has no manifest")
        raws: list[bytes | None] = []
        for name in FILES:
            if name not in there:
                if not write:
                    raws.append(None)
                    continue
                file = self._store.create(name)
                self._store.sync_dir()
            else:
                with opening(name):
                    file = self._store.open(name, write=write)
            self._files.append(file)
            if write:
                file.sync()
                file.drop_cache()
            raws.append(_good(file))
        good = [raw for raw in raws if raw is not None]
        if not good:
            raise Damaged(self._store.path, "the manifest is bad or missing in both copies")
        best = max(good, key=_generation)
        if any(_generation(raw) == _generation(best) and raw != best for raw in good):
            raise Damaged(FILES[1], "two good manifests of one generation that differ")
        self.manifest = decode(best, FILES[raws.index(best)])
        if write:
            for file, raw in zip(self._files, raws, strict=True):
                if raw != best:
                    file.write(0, best)
                    file.sync()
                    self.mended.append(file.name)

    def save(self, manifest: Manifest) -> None:
        """Make a manifest the one that counts: it is durable in both copies when this returns. Raises OSError; then
        nothing may be saved any more, unless the disk was full before anything was written."""
        if self._stopped:
            raise ReadOnly(self._store.path, self._stopped)
        manifest = dataclasses.replace(manifest, generation=self.manifest.generation + 1)
        raw = encode(manifest)
        for file in self._files:
            file.allocate(0, len(raw))
        try:
            for file in self._files:
                file.write(0, raw)
                file.sync()
        except BaseException as error:
            self._stopped = f"an error stopped all writing until it is opened again: {error}"
            raise
        self.manifest = manifest

    @property
    def stopped(self) -> bool:
        """Whether an error stopped all writing."""
        return self._stopped is not None

    def close(self) -> None:
        for file in self._files:
            file.close()


def create(store: Store, manifest: Manifest) -> None:
    """Write both copies for the first time."""
    raw = encode(dataclasses.replace(manifest, generation=1))
    for name in FILES:
        file = store.create(name)
        try:
            file.write(0, raw)
            file.sync()
        finally:
            file.close()


def _generation(raw: bytes) -> int:
    return int(PREFIX_STRUCT.unpack_from(raw)[6])


def _good(file: File) -> bytes | None:
    """The manifest in a file if its length, magic and checksum are right."""
    first = file.read(0, PREFIX.itemsize)
    if len(first) < PREFIX.itemsize:
        return None
    prefix = Prefix._make(PREFIX_STRUCT.unpack(first))
    smallest = PREFIX.itemsize + MANIFEST.itemsize
    if prefix.magic != MANIFEST_MAGIC or not smallest <= prefix.number <= min(MAX_MANIFEST, file.size()):
        return None
    raw = file.read(0, prefix.number)
    good = len(raw) == prefix.number and prefix.checksum == checksum(memoryview(raw)[8:]) and not prefix.zero
    return raw if good else None
