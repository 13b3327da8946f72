"""What pages say that QEMU's own tools print, they print."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from powercut.guest.daemon import version
from support.qemu import needs_qemu

DOCS = Path(__file__).parents[1] / "docs"


def scripts(page: str) -> list[list[str]]:
    """The blocks of a page that show commands, each as its lines."""
    blocks: list[list[str]] = [[]]
    for line in page.splitlines():
        if line.startswith("    "):
            blocks[-1].append(line[4:])
        elif line.strip() and blocks[-1]:
            blocks.append([])
    return [block for block in blocks if any(line.startswith("$ qemu") for line in block)]


@needs_qemu
@pytest.mark.parametrize("name", ["races.md", "fuzz.md"])
def test_the_commands_of_a_page_print_what_it_says(name, tmp_path):
    if not version().startswith("7.2"):
        pytest.skip(f"the page speaks of QEMU 7.2, not {version()}")
    blocks = scripts((DOCS / name).read_text())
    assert blocks
    for block in blocks:
        said = ""
        for line in block:
            if line.startswith("$ "):
                command = ["bash", "-c", line[2:]]
                environment = {**os.environ, "LC_ALL": "C"}
                done = subprocess.run(
                    command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment
                )
                said = done.stdout + done.stderr
            else:
                assert line in said, (block, said)
