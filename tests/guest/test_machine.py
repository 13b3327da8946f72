"""Real guests: each device and each start, and nothing left behind however it ends."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from powercut import stamp
from powercut.errors import Crashed, EnvironmentFault, InputError, Unanswered
from powercut.guest import accelerator, start
from powercut.guest.agent import Gone
from powercut.guest.hardware import Disk
from powercut.guest.hosting import hosted
from powercut.guest.ledger import Keeps, Ledger, read
from powercut.guest.machine import Machine
from powercut.guest.workload import Operation
from powercut.guest.writing import Writing
from powercut.scratch import scratch, sweep
from powercut.trace import Kind
from quire.nbd import Server
from quire.nbd_protocol import Data
from support.guests import SIZE, disk, hardware

pytestmark = pytest.mark.guest


@pytest.mark.parametrize(
    ("device", "way"),
    [("virtio-blk", "restore"), ("virtio-scsi", "restore"), ("ide", "restore"), ("nvme", "restore"), ("ide", "boot")],
)
def test_what_a_guest_wrote_is_in_the_image(device: str, way: str) -> None:
    with scratch() as folder:
        one = disk(folder, device=device)
        with start.STARTS[way](hardware(), [one], folder) as machine:
            for number in range(1, 33):
                machine.agent.write(number, 0, number << 16, 4096, number, 5)
            machine.agent.flush(33, 0)
            answers = [machine.agent.wait() for _ in range(33)]
            assert sorted(answer.tag for answer in answers) == list(range(1, 34))
            assert not any(answer.error for answer in answers)
            machine.ask("quit")
            assert machine.wait_end() == 0
            with pytest.raises(Gone):
                machine.agent.hello()
        raw = folder / "raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", folder / "image.qcow2", raw], check=True, timeout=60)
        content = np.fromfile(raw, dtype=np.uint8).reshape(-1, 512)
        for number in range(1, 33):
            first = (number << 16) // 512
            assert content[first : first + 8].tobytes() == stamp.make(number, 5, first, 8)
        assert not content[: (1 << 16) // 512].any()


def test_a_guest_that_stands_still_is_told_within_the_deadline() -> None:
    with scratch() as folder, start.restore(hardware(), [disk(folder)], folder) as machine:
        machine.ask("stop")
        with pytest.raises(Unanswered, match=r"no answer for 0\.3 s"):
            machine.agent.hello(0.3)
        with pytest.raises(Unanswered, match="no event SHUTDOWN"):
            machine.wait_event("SHUTDOWN", 0.1)
        with pytest.raises(EnvironmentFault, match="QEMU: device_del: Device 'nothing' not found"):
            machine.ask("device_del", id="nothing")


def test_a_crash_of_qemu_is_told_apart_from_an_end() -> None:
    with scratch() as folder, start.restore(hardware(), [disk(folder)], folder) as machine:
        machine.send(signal.SIGSEGV)
        with pytest.raises(Crashed, match="SIGSEGV"):
            machine.ask("query-status")


def test_a_start_that_fails_says_what_qemu_said() -> None:
    with scratch() as folder:
        missing = Disk({"driver": "qcow2", "file": {"driver": "file", "filename": "/nonexistent/image"}}, SIZE)
        for way in start.STARTS.values():
            with pytest.raises(EnvironmentFault, match="/nonexistent/image"):
                way(hardware(), [missing], folder)
        with pytest.raises(EnvironmentFault, match="no-such-accelerator"):
            Machine(["qemu-system-x86_64", "-accel", "no-such-accelerator"], folder, with_agent=False)
    with pytest.raises(InputError, match="floppy"):
        Disk({}, 512, "floppy")


def test_a_rig_that_is_killed_leaves_nothing_for_long() -> None:
    hardware()
    program = (
        "import sys, time; from support.guests import *; from powercut.guest import start; from powercut.scratch "
        "import scratch\nwith scratch() as f, start.restore(hardware(), [disk(f)], f) as m:\n"
        "    print(m.pid, f, flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as rig:
        assert rig.stdout is not None
        pid, folder = rig.stdout.readline().split()
        assert Path(folder).is_dir()
        assert Path(folder) not in sweep(), "its owner lives"
        rig.kill()
    deadline = time.monotonic() + 10
    while _lives(int(pid)) and time.monotonic() < deadline:
        sweep()
        time.sleep(0.01)
    sweep()
    assert not _lives(int(pid))
    assert not Path(folder).exists()


def test_what_a_killed_rig_had_mounted_is_unmounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / "powercut-guest-killed"
    folder.mkdir()
    (folder / "lock").touch()
    with hosted("ext4", folder) as (place, name):
        if name != "ext4":
            pytest.skip(name)
        assert place.is_mount()
        assert sweep() == [folder]
        assert not place.exists()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Forgetful:
    """A disk that acknowledges everything, and forgets every write to one of its sectors."""

    block_size = 512

    def __init__(self, forgotten: int) -> None:
        self.size = SIZE
        self.data = bytearray(SIZE)
        self.forgotten = forgotten

    def read(self, offset: int, length: int) -> Data:
        return memoryview(self.data)[offset : offset + length]

    def write(self, offset: int, data: Data, fua: bool) -> None:
        if not offset <= self.forgotten < offset + len(data):
            self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int, may_unmap: bool, fua: bool) -> None:
        self.data[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None: ...

    def flush(self) -> None: ...


@pytest.mark.parametrize("forgotten", [-1, 5 << 16])
def test_a_server_that_forgets_a_write_is_found_out(forgotten: int, planted: Callable[[str, bool], None]) -> None:
    machine = hardware()
    with scratch() as folder, Server(Forgetful(forgotten), folder / "sock") as server:
        node = {"driver": "nbd", "server": {"type": "unix", "path": str(folder / "sock")}}
        ledger = Ledger(SIZE // 512)
        steps = [(0, Operation(Kind.WRITE, number << 16, 4096)) for number in range(10)]
        with start.restore(machine, [Disk(node, SIZE)], folder) as running:
            Writing(running.agent, [ledger], steps, 4, 1).run()
            running.ask("quit")
            running.wait_end()
        (folder / "raw").write_bytes(server.export.data)  # type: ignore[attr-defined]
        problems = ledger.judge(read(folder / "raw", SIZE // 512), Keeps.COMPLETED)
    if forgotten >= 0:
        planted("guest: a server that forgets a write", bool(problems))
    assert [problem.where for problem in problems] == (list(range(5 * 128, 5 * 128 + 8)) if forgotten >= 0 else [])


def test_templates_that_nobody_uses_make_room(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"template-{number}").mkdir()
        os.utime(tmp_path / f"template-{number}", (number, number))
    unfinished = tmp_path / ".template-killed"
    unfinished.mkdir()
    os.utime(unfinished, (0, 0))
    with open(tmp_path / "template-1.lock", "wb") as used:
        fcntl.flock(used, fcntl.LOCK_SH)
        start._forget_old(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert left == ["template-1", *(f"template-{number}" for number in range(3, 10))]


def test_an_accelerator_that_hangs_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = hardware()
    assert machine.kernel is not None
    monkeypatch.setattr(accelerator, "_PATIENCE", 0.01)  # no guest is as fast as that
    monkeypatch.setattr(accelerator, "_kept", lambda qemu: tmp_path / "answer.json")
    monkeypatch.setattr(accelerator, "DEVICE", "/dev/null")  # a device that opens
    found = accelerator.choose(machine.qemu, machine.kernel)
    assert found.name == "tcg"
    assert "of no use" in found.why
    assert accelerator.known(machine.qemu) == found, "the answer is kept"
