"""Which accelerator really works: a device that opens proves nothing, a guest that booted does.

`/dev/kvm` may open and hang every guest: a KVM without hardware virtualization below it does. So a probe guest is
booted under it; the answer is kept in the user's cache for this QEMU, kernel and processor.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from powercut import compiled
from powercut.errors import Crashed, EnvironmentFault, Unanswered
from powercut.guest.hardware import Hardware
from powercut.guest.kernel import Kernel
from powercut.guest.machine import Machine
from powercut.scratch import scratch

_PATIENCE = 10.0  # seconds until the probe guest must have answered; a real one takes one or two
DEVICE = "/dev/kvm"


class Accelerator(NamedTuple):
    """`name` is "kvm" or "tcg"; `why` says in words why it is not kvm."""

    name: str
    why: str = ""


def known(qemu: str) -> Accelerator | None:
    """What was found out before, or what needs no probe."""
    if not os.path.exists(DEVICE):
        return Accelerator("tcg", f"no {DEVICE}")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return Accelerator("tcg", f"this user may not open {DEVICE}")
    with suppress(OSError, ValueError, TypeError):
        return Accelerator(*json.loads(_kept(qemu).read_text()))
    return None


def choose(qemu: str, kernel: Kernel) -> Accelerator:
    """KVM where a probe guest booted under it, else TCG."""
    accelerator = known(qemu)
    if accelerator is None:
        accelerator = _probe(qemu, kernel)
        with suppress(OSError):
            partial = _kept(qemu).with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(accelerator))
            partial.replace(_kept(qemu))
    return accelerator


def _kept(qemu: str) -> Path:
    """The file that keeps the answer."""
    program = shutil.which(qemu) or qemu
    with suppress(OSError):
        status = os.stat(program)
        program += f" {status.st_size} {status.st_mtime_ns}"
    processor = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
    digest = hashlib.sha256(f"{program}\0{platform.release()}\0{processor}".encode()).hexdigest()
    return compiled.cache() / "guest" / f"accelerator-{digest[:20]}.json"


def _probe(qemu: str, kernel: Kernel) -> Accelerator:
    hardware = Hardware("kvm", kernel, qemu)
    try:
        with scratch() as folder, Machine(hardware.arguments(), folder) as machine:
            machine.agent.hello(_PATIENCE)
    except (Unanswered, Crashed, EnvironmentFault) as error:
        return Accelerator("tcg", f"{DEVICE} is there, but of no use to a probe guest: {error}")
    return Accelerator("kvm")
