"""A bundle: a finding and its trace in one zip archive, for somebody who has neither. `powercut replay` reads it."""

from __future__ import annotations

import os
import shutil
import zipfile
import zlib
from pathlib import Path

from powercut.crash import finding as findings
from powercut.crash import setfinding
from powercut.errors import InputError
from powercut.trace import Trace

_FINDING, _TRACE = "finding.json", "finding.trace"


def write(finding_path: str, out: str, trace_path: str | None = None) -> None:
    """Bundle the finding in `finding_path` with its trace. Raises InputError; `out` is then not written."""
    finding = setfinding.load(finding_path) if setfinding.is_one(finding_path) else findings.load(finding_path)
    trace = Trace(trace_path or finding.trace)
    findings.same_trace(finding, trace)
    if os.path.exists(out) and not os.path.isfile(out):
        raise InputError(f"{out}: not a regular file")
    partial = f"{out}.partial"
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(_FINDING, finding.of_trace(_TRACE).encode())
            archive.write(trace.path, _TRACE)
        os.replace(partial, out)
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        Path(partial).unlink(missing_ok=True)


def unpack(path: str, folder: str) -> str:
    """The path of the finding in the bundle at `path`, unpacked into `folder`. Raises InputError."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in (_FINDING, _TRACE):
                with archive.open(name) as source, open(Path(folder) / name, "wb") as target:
                    shutil.copyfileobj(source, target)
    except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a bundle: {error}") from None
    return str(Path(folder) / _FINDING)
