"""Programs that a killed rig had started: none is left over."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.qemu import needs_qemu

pytestmark = [needs_qemu, pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")]

NODES = [{"driver": "null-co", "node-name": "disk", "size": 65536}]
STARTERS = {  # the module that starts it, and how
    "qemu-storage-daemon": ("daemon", f"with it.Daemon({NODES}): time.sleep(60)"),
    "qemu-storage-daemon with QMP": ("control", "kept = it.Control(); time.sleep(60)"),
    "checker": ("external", "it.External('sleep {}', 0).run('60')"),
}


def program(name: str, before: str = "") -> str:
    module, start = STARTERS[name]
    folder = "explore" if module == "external" else "guest"
    return f"import time\nfrom powercut.{folder} import {module} as it\n{before}\n{start}"


@contextmanager
def rig(text: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A process that runs `text`, and the pid of the program that this one started, once it runs."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", text], env=environment) as parent:
        deadline = time.monotonic() + 30
        while not (child := running_child(parent.pid)):
            assert parent.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            yield parent, child
        finally:
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
            parent.kill()


def running_child(pid: int) -> int:
    """The child of a process that has become the program it was to be: 0 if there is none yet."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):
            if Path(f"/proc/{child}/comm").read_text().strip() in ("qemu-storage-da", "sleep"):
                return int(child)
    return 0


def ended(pid: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while Path(f"/proc/{pid}").exists():
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("name", STARTERS)
def test_a_killed_rig_takes_its_programs_with_it(name: str) -> None:
    with rig(program(name)) as (parent, child):
        parent.kill()
        assert ended(child, 10)


def test_control_an_untied_program_is_left_over(planted) -> None:
    with rig(program("checker", "it.with_parent = list")) as (parent, child):
        parent.kill()
        parent.wait()
        left = not ended(child, 0.2)
        planted("a program that outlives the rig", left)
        assert left
