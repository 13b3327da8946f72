"""In from other formats and out to them: raw by ourselves, every other one through `qemu-img` and our NBD server."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quire.errors import Unusable
from quire.extents import extents
from quire.image import Image
from quire.layout import SECTOR
from quire.nbd import Server
from quire.seal import Progress, quiet
from quire.sets import Set
from quire.store import RealFile

_STEP = 1 << 20
_PERCENT = re.compile(r"\(?(\d+(?:\.\d+)?)/100%")


def about(path: Path, format: str | None) -> tuple[str, int]:
    """The format of a file and the size in bytes of the disk in it. A file that is not said to be of a format is
    probed by `qemu-img`, or taken for raw where there is none. Raises Unusable."""
    if not path.is_file() and not path.is_block_device():
        raise Unusable(str(path), "not a file" if path.exists() else "is not there")
    if format == "raw" or (format is None and shutil.which("qemu-img") is None):
        with open(path, "rb") as file:
            return "raw", file.seek(0, os.SEEK_END)
    known: dict[str, Any] = json.loads(_qemu_img("info", "--output=json", *_of(format), str(path)))
    return str(known["format"]), int(known["virtual-size"])


def import_disk(target: Set, head: str, path: Path, format: str | None, progress: Progress = quiet) -> int:
    """Make `head` of `target` hold the disk in `path`, zeros behind it, and flush. Returns the bytes of that disk.

    A head that is smaller is resized first. After an error the head holds a part of it. Raises Unusable, and OSError
    from the disk."""
    format, size = about(path, format)
    if size <= 0:
        raise Unusable(str(path), "holds a disk of no size")
    wanted = -(-size // SECTOR) * SECTOR
    if target.manifest.leaves[target.manifest.name(head).leaf].size < wanted:
        target.resize(head, wanted)
    image = target.image(head, write=True)
    try:
        if format == "raw":
            _read_raw(image, path, size, progress)
        else:
            with _served(image) as uri:
                _qemu_img(
                    "convert", "-p", "-n", "-f", format, "-O", "raw", str(path), uri, progress=progress, size=size
                )
        if image.size > wanted:
            image.zero(wanted, image.size - wanted)
        image.flush()
    finally:
        image.close()
    return size


def export_disk(image: Image, path: Path, format: str, progress: Progress = quiet) -> None:
    """Write what `image` holds to `path`, which must not exist, in `format`. It appears when it is complete and synced.

    Raises Unusable, and OSError from the disk."""
    if path.exists():
        raise Unusable(str(path), "is there already")
    made = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if format == "raw":
            _write_raw(image, made, progress)
        else:
            with _served(image) as uri:
                _qemu_img(
                    "convert", "-p", "-f", "raw", "-O", format, uri, str(made), progress=progress, size=image.size
                )
        _sync(made)
        os.rename(made, path)
        _sync(path.absolute().parent)
    finally:
        with suppress(FileNotFoundError):
            made.unlink()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read_raw(image: Image, path: Path, size: int, progress: Progress) -> None:
    file = RealFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path))
    try:
        place = 0
        for begin, length in file.data_ranges(0, size):
            if begin > place:
                image.zero(place, begin - place)
            for offset in range(begin, begin + length, _STEP):
                data = file.read(offset, min(_STEP, begin + length - offset))
                if data.count(0) == len(data):
                    image.zero(offset, len(data))
                else:
                    image.write(offset, data)
                progress(offset + len(data), size)
            place = begin + length
        end = -(-size // SECTOR) * SECTOR
        if end > place:
            image.zero(place, end - place)
    finally:
        file.close()


def _write_raw(image: Image, path: Path, progress: Progress) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        os.ftruncate(fd, image.size)
        file = RealFile(fd, str(path))
        for extent in extents(image.leaf):
            if extent.owner is not None:
                for offset in range(extent.offset, extent.end, _STEP):
                    data = image.read(offset, min(_STEP, extent.end - offset))
                    if data.count(0) != len(data):
                        file.write(offset, data)
                    progress(offset, image.size)
    finally:
        os.close(fd)


@contextmanager
def _served(image: Image) -> Any:
    """The NBD address of `image` for the while."""
    with tempfile.TemporaryDirectory(prefix="quire-") as scratch, Server(image, f"{scratch}/disk"):
        yield f"nbd+unix:///?socket={scratch}/disk"


def _of(format: str | None) -> list[str]:
    return ["-f", format] if format else []


def _qemu_img(*words: str, progress: Progress = quiet, size: int = 0) -> str:
    """Run `qemu-img`, and return what it printed. Raises Unusable with what it complained of."""
    try:
        running = subprocess.Popen(
            ["qemu-img", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise Unusable("qemu-img", f"is needed for every format but raw, and cannot be run: {error.strerror}") from None
    try:
        assert running.stdout is not None
        assert running.stderr is not None
        said = ""
        while piece := running.stdout.read(1) if size else running.stdout.read():
            said += piece
            # qemu-img ends each line of progress with a carriage return, which reading text makes a newline
            if piece == "\n" and (found := _PERCENT.search(said)):
                progress(int(size * float(found[1]) / 100), size)
                said = ""
        complaint = running.stderr.read().strip()
    except BaseException:
        running.kill()
        raise
    finally:
        running.wait()
    if running.returncode:
        raise Unusable("qemu-img", complaint.removeprefix("qemu-img: ") or f"ended with {running.returncode}")
    return said
