"""Three ways to a guest whose agent answers and has its disks open: boot, restore from a template, and plug.

A template is the guest's memory, in a file, and the state of its devices, kept in the user's cache for each
combination of QEMU, kernel and devices. It is made with nothing but null disks of the right size. A restored machine
gets the real image before it goes on: the image is opened as in any other start (QEMU would open what stands on the
command line of an incoming migration inactive first, and then once more) and put in the place of the null disk below a
raw node. Disks that cannot migrate are plugged in.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from powercut import compiled
from powercut.errors import EnvironmentFault
from powercut.guest.hardware import CANNOT_MIGRATE, Disk, Hardware, attached, controllers, device
from powercut.guest.machine import Machine

BOOT_PATIENCE = 60.0  # seconds until a booting guest must answer
_TEMPLATES = 8  # kept at most, but for those in use; most take some 60 MB
_UNFINISHED = 3600.0  # seconds, after which nobody is still making a template
_IGNORE_SHARED = [{"capability": "x-ignore-shared", "state": True}]


def boot(hardware: Hardware, disks: list[Disk], folder: Path, environment: Mapping[str, str] | None = None) -> Machine:
    """Start a machine from its power button. Raises EnvironmentFault, Unanswered."""
    nodes = [[{**disk.node, "node-name": f"disk{number}"}] for number, disk in enumerate(disks)]
    command = [*hardware.arguments(), *controllers(disks), *attached(disks, nodes)]
    machine = Machine(command, folder, with_agent=hardware.kernel is not None, environment=environment)
    if hardware.kernel is None:
        return machine
    return _ready(machine, len(disks), BOOT_PATIENCE)


def restore(
    hardware: Hardware, disks: list[Disk], folder: Path, environment: Mapping[str, str] | None = None
) -> Machine:
    """Start a machine from a template, which is made if it is not there. Raises EnvironmentFault, Unanswered."""
    staying = [disk for disk in disks if disk.device not in CANNOT_MIGRATE]
    if staying and len(staying) < len(disks):
        raise EnvironmentFault("NVMe disks beside others cannot be restored: use --start plug or boot")
    return _from_template(hardware, disks, staying, folder, environment)


def plug(hardware: Hardware, disks: list[Disk], folder: Path, environment: Mapping[str, str] | None = None) -> Machine:
    """Start a machine from a template without disks, and plug them in: nothing lies between a device and its image."""
    if any(disk.device == "ide" for disk in disks):
        raise EnvironmentFault("IDE disks cannot be plugged in: use --start restore or boot")
    return _from_template(hardware, disks, [], folder, environment)


def _from_template(
    hardware: Hardware, disks: list[Disk], staying: list[Disk], folder: Path, environment: Mapping[str, str] | None
) -> Machine:
    """Restore a machine with null disks in the place of those that are `staying`, and plug in the others."""
    control = controllers(disks)
    with _template(hardware, [*control, *_null_disks(staying)], len(staying)) as template:
        command = [*hardware.arguments(memory_file=template / "memory"), *control, *_null_disks(staying)]
        machine = Machine([*command, "-incoming", "defer"], folder, environment=environment)
        try:
            _load(machine, template)
        except BaseException:
            machine.close()
            raise
    try:
        for number, disk in enumerate(disks):
            machine.add_node(disk.node, f"disk{number}")
            if disk in staying:
                machine.ask("blockdev-reopen", options=[_top(number, f"disk{number}")])
                machine.ask("blockdev-del", node_name=f"null{number}")
        machine.ask("cont")
        for number, disk in enumerate(disks):
            if disk not in staying:
                machine.ask("device_add", **device(disk, number, f"disk{number}"))
    except BaseException:
        machine.close()
        raise
    return _ready(machine, len(disks), BOOT_PATIENCE)


def _load(machine: Machine, template: Path) -> None:
    machine.ask("migrate-set-capabilities", capabilities=_IGNORE_SHARED)
    machine.ask("migrate-incoming", uri=f"exec:cat {template / 'state'}")
    deadline = time.monotonic() + BOOT_PATIENCE
    while machine.ask("query-status")["status"] == "inmigrate":
        if time.monotonic() > deadline:
            raise EnvironmentFault(f"QEMU did not take the template within {BOOT_PATIENCE:g} s: {machine.said}")
        time.sleep(0.002)


def _ready(machine: Machine, disks: int, patience: float) -> Machine:
    try:
        machine.agent.hello(patience)
        for number in range(disks):
            machine.agent.open(number)
    except BaseException:
        machine.close()
        raise
    return machine


def _top(number: int, below: str) -> dict[str, Any]:
    return {"driver": "raw", "node-name": f"top{number}", "file": below, "discard": "unmap"}


def _null_disks(disks: list[Disk]) -> list[str]:
    nodes = [
        [
            _top(number, f"null{number}"),
            {"driver": "null-co", "node-name": f"null{number}", "size": disk.size, "read-zeroes": True},
        ]
        for number, disk in enumerate(disks)
    ]
    return attached(disks, nodes)


@contextmanager
def _template(hardware: Hardware, disks: list[str], count: int) -> Iterator[Path]:
    """The folder of the template for this hardware and the words of the command line that speak of so many disks. It
    stays as long as the context lasts."""
    command = [*hardware.arguments(memory_file=Path("memory")), *disks]
    program = os.stat(command[0])
    what = [*command, str(program.st_size), str(program.st_mtime_ns)]
    key = hashlib.sha256("\0".join(what).encode()).hexdigest()[:20]
    home = compiled.cache() / "guest" / f"template-{key}"
    with ExitStack() as held:
        try:
            home.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(open(home.with_suffix(".lock"), "wb"))
            fcntl.flock(lock, fcntl.LOCK_SH)
            while not home.is_dir():
                fcntl.flock(lock, fcntl.LOCK_EX)  # one makes it, the others wait for it
                if not home.is_dir():
                    _make_template(hardware, disks, count, home)
                fcntl.flock(lock, fcntl.LOCK_SH)
            os.utime(home)
        except OSError as error:
            raise EnvironmentFault(f"{home}: a template cannot be kept there: {error.strerror}") from None
        yield home


def _make_template(hardware: Hardware, disks: list[str], count: int, home: Path) -> None:
    _forget_old(home.parent)
    with tempfile.TemporaryDirectory(prefix=".template-", dir=home.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        arguments = hardware.arguments(memory_file=made / "memory", shared=True)
        with Machine([*arguments, *disks], Path(scratch)) as machine:
            machine.agent.hello(BOOT_PATIENCE)
            for number in range(count):  # an open one need not be looked for each time
                machine.agent.open(number)
            machine.ask("stop")
            machine.ask("migrate-set-capabilities", capabilities=_IGNORE_SHARED)
            machine.ask("migrate", uri=f"exec:cat > {made / 'state'}")
            deadline = time.monotonic() + BOOT_PATIENCE
            while (status := machine.ask("query-migrate").get("status")) != "completed":
                if status == "failed" or time.monotonic() > deadline:
                    raise EnvironmentFault(f"QEMU made no template: {status}: {machine.said}")
                time.sleep(0.01)
            machine.ask("quit")
            machine.wait_end()
        made.rename(home)


def _forget_old(folder: Path) -> None:
    """Remove the templates used longest ago that nobody uses now, and what a rig that was killed left unfinished."""
    kept = sorted(folder.glob("template-*/"), key=lambda path: path.stat().st_mtime)
    for old in kept[: max(0, len(kept) + 1 - _TEMPLATES)]:
        with open(old.with_suffix(".lock"), "wb") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    for unfinished in folder.glob(".template-*/"):
        if time.time() - unfinished.stat().st_mtime > _UNFINISHED:
            shutil.rmtree(unfinished, ignore_errors=True)


STARTS = {"boot": boot, "restore": restore, "plug": plug}
