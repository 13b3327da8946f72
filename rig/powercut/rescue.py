"""`powercut rescue IMAGE --out NEW`: what is left of a damaged qcow2 image, as a new image."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, replace
from typing import Any

from powercut.disk import ImageDisk
from powercut.errors import InputError
from powercut.formats.qcow2 import layout as q
from powercut.formats.qcow2.forensics import first, rebuild
from powercut.formats.qcow2.forensics.anatomy import Anatomy, header_document
from powercut.formats.qcow2.forensics.dissect import dissect
from powercut.formats.qcow2.forensics.headers import backing_name
from powercut.formats.qcow2.forensics.notes import Certainty, Note, guessed, recovered
from powercut.report.text import progress

SCHEMA = "powercut.rescue/1"


@dataclass(frozen=True, slots=True)
class Known:
    """What the user knows of the lost header. A backing file's name is nowhere else; a size is a guess without it."""

    size: int | None = None
    backing: str | None = None
    backing_format: str | None = None


@dataclass(frozen=True, slots=True)
class Rescue:
    """`exit_code`: 0 all was recovered or guessed, 1 something is lost."""

    exit_code: int
    text: str
    document: dict[str, Any]


def rescue(image: str, out: str, known: Known) -> Rescue:
    """Write what is left of `image` to the new file `out`, which is complete or absent. Raises InputError."""
    if os.path.exists(out):
        same = os.path.samefile(image, out) if os.path.exists(image) else False
        raise InputError(f"{out}: {'is the damaged image itself' if same else 'exists'}; a rescue writes a new file")
    disk = ImageDisk(image)
    with progress("looking for tables") as show:
        anatomy = dissect(image, disk, show)
    if anatomy is None:
        raise InputError(f"{image}: no table of a qcow2 image was found in its {disk.size:,} bytes")
    if anatomy.header.data_file:
        raise InputError(f"{image}: the guest's data is in another file, which cannot be rescued from here")
    settled = _settle(anatomy, known)
    notes = anatomy.notes + settled
    at_zero = first.look(disk, anatomy)
    partial = f"{out}.partial"
    try:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    except OSError as error:
        raise InputError(f"{partial}: cannot be written: {error.strerror}") from None
    try:
        with progress("copying") as show:
            notes += rebuild.rebuild(anatomy, at_zero, image, partial, show)
        os.rename(partial, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
    exit_code = int(any(note.certainty is Certainty.LOST for note in notes))
    return Rescue(exit_code, _text(image, out, at_zero, notes), _document(image, out, at_zero, anatomy, notes))


def _settle(anatomy: Anatomy, known: Known) -> list[Note]:
    """Put what the user knows into the header, and what was left of a backing file's name."""
    header, notes = anatomy.header, []
    if known.size is not None:
        if known.size < 0 or known.size > q.MAX_L1_BYTES // 8 * anatomy.coverage:
            raise InputError(f"--size {known.size}: an image with clusters of {header.cluster_size} cannot have it")
        anatomy.resize(known.size)
        anatomy.notes = [note for note in anatomy.notes if note.what != "size"]
        notes.append(recovered("size", f"{known.size:,} bytes, as given"))
    if known.backing is not None:
        name = known.backing.encode()
        form = known.backing_format.encode() if known.backing_format else None
        anatomy.header = replace(anatomy.header, backing_file=name, backing_format=form)
        notes.append(recovered("backing file", f"{known.backing}, as given"))
    elif not anatomy.intact and header.backing_file is None:
        left = backing_name(anatomy.disk)
        if left is not None:
            anatomy.header = replace(anatomy.header, backing_file=left)
            notes.append(guessed("backing file", f"{left.decode('latin-1')}: the name is left in the first cluster"))
        else:
            text = "none: its name would have been in the header; what is not stored here reads as zeros (--backing)"
            notes.append(guessed("backing file", text))
    return notes


def _text(image: str, out: str, at_zero: first.First, notes: list[Note]) -> str:
    lines = [f"{image}: at offset 0 lies {at_zero.text}"]
    for certainty in Certainty:
        lines += [f"  {certainty:9}  {note.what}: {note.text}" for note in notes if note.certainty is certainty]
    lines.append(f"{out}: written; {image} is as it was")
    return "\n".join(lines)


def _document(image: str, out: str, at_zero: first.First, anatomy: Anatomy, notes: list[Note]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "image": image,
        "out": out,
        "offset_zero": {"kind": at_zero.kind, "text": at_zero.text},
        "header": header_document(anatomy),
        **{str(c): [{"what": n.what, "text": n.text} for n in notes if n.certainty is c] for c in Certainty},
    }
