"""JSON documents. Each names its schema and version in `schema`; docs/json.md describes them."""

from __future__ import annotations

import os
import sys
from typing import Any

import msgspec

from powercut.errors import InputError


def write(document: dict[str, Any], path: str | None) -> None:
    """Write `document` to `path`, to standard output if that is "-", or nowhere if it is None. A file is complete
    or absent."""
    if path is None:
        return
    text = msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
    if path == "-":
        sys.stdout.flush()
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        return
    # A pipe or /dev/null is written to; replaced by a file it would be gone for everybody.
    special = os.path.exists(path) and not os.path.isfile(path)
    place = path if special else f"{path}.partial"
    try:
        with open(place, "wb") as out:
            out.write(text)
        if not special:
            os.replace(place, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
