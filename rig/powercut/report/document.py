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
    partial = f"{path}.partial"
    try:
        with open(partial, "wb") as out:
            out.write(text)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
