"""What a virtual machine is made of, as QEMU's command line: the machine, its kernel, its disks."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from powercut.errors import EnvironmentFault, InputError
from powercut.guest.kernel import Kernel

DEVICES: Final = ("virtio-blk", "virtio-scsi", "ide", "nvme")
CANNOT_MIGRATE: Final = ("nvme",)  # a restored machine gets these plugged in
# Lean: without these a start takes half as long again. A panic ends in a reset at once.
_KERNEL_LINE = (
    "console=ttyS0 quiet mitigations=off nokaslr no_timer_check tsc=reliable 8250.nr_uarts=1 cryptomgr.notests panic=-1"
)


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk of the guest's. `node` is its block node in the form of QMP's blockdev-add, without node-name (any
    driver: an image file, or an NBD server); `size` is what the guest sees, in bytes. `write_cache` off: the guest
    is told that what was written is on the disk (writethrough). `errors`: what a failed request does (werror)."""

    node: dict[str, Any]
    size: int
    device: str = "virtio-blk"
    write_cache: bool = True
    errors: str = "report"

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise InputError(f"device {self.device!r} is not one of {', '.join(DEVICES)}")


@dataclass(frozen=True, slots=True)
class Hardware:
    """The machine without its disks. `memory` in MiB; `cpu` None: QEMU's own choice. `kernel` None: the first disk
    boots by itself. `serial` is the name of a file for the first serial line, in the machine's folder."""

    accelerator: str
    kernel: Kernel | None
    qemu: str = "qemu-system-x86_64"
    cpu: str | None = None
    memory: int = 96
    serial: str = "serial"
    extra: tuple[str, ...] = field(default=())

    def arguments(self, *, memory_file: Path | None = None, shared: bool = False) -> list[str]:
        """The command line as far as it does not speak of disks. `memory_file` holds the guest's memory; what
        happens in it stays there only if it is `shared`."""
        program = shutil.which(self.qemu)
        if program is None:
            raise EnvironmentFault(f"{self.qemu} was not found: install QEMU (qemu-system-x86), or run `make setup`")
        machine = "pc,usb=off,hpet=off" if self.kernel is not None else "pc"
        words = [program, "-accel", self.accelerator, "-m", str(self.memory), "-nodefaults", "-display", "none"]
        if memory_file is not None:
            machine += ",memory-backend=ram"
            share = "on" if shared else "off"
            memory = f"memory-backend-file,id=ram,size={self.memory}M,mem-path={memory_file},share={share}"
            words += ["-object", memory]
        words += ["-M", machine, "-serial", f"file:{self.serial}", *self.extra]
        cpu = self.cpu or ("host" if self.accelerator == "kvm" else None)
        if cpu is not None:
            words += ["-cpu", cpu]
        if self.kernel is None:
            return [*words, "-vga", "std"]
        words += ["-kernel", str(self.kernel.image), "-initrd", str(self.kernel.initramfs), "-append", _KERNEL_LINE]
        return [*words, "-device", "virtio-serial-pci"]


def device(disk: Disk, number: int, drive: str) -> dict[str, Any]:
    """The device of `disk` over block node `drive`, in the form of QMP's device_add."""
    driver = {"virtio-blk": "virtio-blk-pci", "virtio-scsi": "scsi-hd", "ide": "ide-hd", "nvme": "nvme"}[disk.device]
    made: dict[str, Any] = {"driver": driver, "id": f"disk{number}", "serial": f"powercut{number}", "drive": drive}
    if disk.device != "nvme":
        made |= {"write-cache": "on" if disk.write_cache else "off", "werror": disk.errors, "rerror": disk.errors}
    return made


def controllers(disks: list[Disk]) -> list[str]:
    """What must be there before disks can be plugged in."""
    return ["-device", "virtio-scsi-pci,id=scsi"] if any(disk.device == "virtio-scsi" for disk in disks) else []


def attached(disks: list[Disk], nodes: list[list[dict[str, Any]]]) -> list[str]:
    """The command line of `disks`; of each, the first of its `nodes` is opened last, and is what the device uses.
    The controllers they need stand before."""
    words = []
    for number, (disk, below) in enumerate(zip(disks, nodes, strict=True)):
        for node in reversed(below):
            words += ["-blockdev", json.dumps(node)]
        words += ["-device", json.dumps(device(disk, number, below[0]["node-name"]))]
    return words
