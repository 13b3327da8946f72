"""What QEMU's own tools say of an image that is closed, in a line each."""

from __future__ import annotations

import subprocess
from pathlib import Path

from powercut.guest.daemon import tool
from powercut.trace import SECTOR

_PATIENCE = 60.0  # seconds a tool may take
_TELLING = ("ERROR", "Leaked", "No errors")


def _run(*command: str) -> tuple[int, list[str]]:
    done = subprocess.run([tool(command[0]), *command[1:]], capture_output=True, text=True, timeout=_PATIENCE)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def opinion(image: Path, format: str, sector: int) -> list[str]:
    """As COMMAND: WORDS, what `qemu-img check` says of the image, and with what a guest sector begins (-1: none).
    Raises EnvironmentFault if there are no tools."""
    said = []
    if format != "raw":
        code, lines = _run("qemu-img", "check", "-f", format, str(image))
        first = next((line for line in lines if line.startswith(_TELLING)), " ".join(lines))
        said.append(f"qemu-img check: {first} (exit status {code})")
    if sector >= 0:
        read = f"read -v {sector * SECTOR} 16"
        _, lines = _run("qemu-io", "-r", "-f", format, "-c", read, str(image))
        said.append(f"qemu-io -c '{read}': {lines[0] if lines else 'nothing'}")
    return said
