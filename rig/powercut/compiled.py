"""Programs in C, compiled on this machine when they are first used, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from powercut.errors import EnvironmentFault

_PATIENCE = 120.0  # seconds that a compiler may take


def cache() -> Path:
    """The folder of what is kept from one run to the next; it need not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "powercut"


def build(name: str, suffix: str, sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    """What `cc` makes of the first of `sources`, which may include the others. `name` is for people.

    Raises EnvironmentFault.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise EnvironmentFault(f"cc was not found, and the {name} is built with it: install gcc")
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=30).stdout
    digest = hashlib.sha256(version + " ".join([*flags, *libraries]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    built = cache() / f"{name}-{digest.hexdigest()[:20]}{suffix}"
    if not built.exists():
        try:
            built.parent.mkdir(parents=True, exist_ok=True)
            partial = built.with_name(f"{built.name}.{os.getpid()}")
            command = [compiler, *flags, "-o", str(partial), str(sources[0]), *libraries]
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
            if done.returncode:
                raise EnvironmentFault(f"the {name} does not compile here: {done.stderr.strip().splitlines()[:1]}")
            partial.replace(built)
        except OSError as error:
            raise EnvironmentFault(f"{built.parent}: the {name} cannot be kept there: {error.strerror}") from None
    return built
