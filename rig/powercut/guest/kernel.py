"""The guest's kernel and initramfs: made once, kept in the user's cache, installed nowhere.

The kernel is the distribution's cloud kernel: its package is downloaded with apt-get and only what the guest needs is
taken out of it. The initramfs is a cpio archive (format "newc") of the agent (agent.c), built here, and of the
modules it loads. QEMU's microvm is not used: in prototypes it hung in one of two starts.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from powercut import compiled
from powercut.errors import EnvironmentFault
from powercut.guest import bzimage

META_PACKAGE = "linux-image-cloud-amd64"
AGENT_FLAGS = ("-O2", "-static", "-s", "-w")
# What the guest loads; what these depend on is found in them. NVMe and ext4 are built into Debian's cloud kernel.
MODULES = ("virtio_pci", "virtio_console", "virtio_blk", "virtio_scsi", "sd_mod", "ata_piix", "button", "evdev")
_PATIENCE = 300.0  # seconds that a download may take
_NODES = (("dev/console", 5, 1), ("dev/null", 1, 3))  # character devices that PID 1 needs before devtmpfs is there
_FOLDERS = ("dev", "proc", "sys", "mnt", "modules")


class Kernel(NamedTuple):
    """`name` is the package's, with its version."""

    name: str
    image: Path
    initramfs: Path


def kernel() -> Kernel:
    """The guest's kernel and initramfs, made if they are not there. Raises EnvironmentFault."""
    home = kept() or _fetch(compiled.cache() / "guest")
    agent = compiled.build("agent", "", [Path(__file__).parent / "agent.c"], AGENT_FLAGS)
    modules = sorted((home / "modules").glob("*.ko"))
    digest = hashlib.sha256(agent.name.encode() + b"".join(module.name.encode() for module in modules))
    initramfs = home / f"initramfs-{digest.hexdigest()[:16]}.cpio"
    if not initramfs.exists():
        partial = initramfs.with_suffix(f".{os.getpid()}")
        with open(partial, "wb") as out:
            _write_cpio(out, agent, modules)
        partial.replace(initramfs)
    plain = home / "vmlinux"
    image = plain if plain.exists() else home / "vmlinuz"
    return Kernel(home.name.removeprefix("kernel-"), image, initramfs)


def kept() -> Path | None:
    """The folder of the newest kernel in the cache, if there is one."""
    found = list((compiled.cache() / "guest").glob("kernel-*/vmlinuz"))
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def _run(command: list[str], where: str | None = None) -> str:
    """The output of a program. Raises EnvironmentFault with what it said last."""
    if shutil.which(command[0]) is None:
        raise EnvironmentFault(f"{command[0]} was not found: the guest's kernel is taken from a Debian package with it")
    try:
        done = subprocess.run(
            command, cwd=where, capture_output=True, text=True, timeout=_PATIENCE, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"{' '.join(command)}: no end after {_PATIENCE:.0f} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise EnvironmentFault(f"the guest's kernel cannot be had: {' '.join(command)}: {said[-1]}")
    return done.stdout


def _fetch(folder: Path) -> Path:
    """Download the package and keep what is needed of it in a folder below `folder`."""
    depends = _run(["apt-cache", "depends", "--no-suggests", META_PACKAGE])
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise EnvironmentFault(f"the guest's kernel cannot be had: apt knows no {META_PACKAGE} (run apt-get update?)")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".kernel-", dir=folder) as scratch:
            _run(["apt-get", "download", found[1]], scratch)
            package = next(Path(scratch).glob("*.deb"))
            made = Path(scratch) / "made"
            _take(package, made)
            home = folder / f"kernel-{package.stem.removesuffix('_amd64').removeprefix('linux-image-')}"
            with suppress(OSError):  # somebody else was faster
                made.rename(home)
            return home
    except OSError as error:
        raise EnvironmentFault(f"{folder}: the guest's kernel cannot be kept there: {error.strerror}") from None


def _take(package: Path, to: Path) -> None:
    """Take the kernel and the modules out of the package, those first that others depend on."""
    (to / "modules").mkdir(parents=True)
    modules: dict[str, bytes] = {}
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as unpacking:
        assert unpacking.stdout is not None
        with tarfile.open(fileobj=unpacking.stdout, mode="r|") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                content = archive.extractfile(member) if member.isfile() else None
                if content is None:
                    continue
                if name.name.startswith("vmlinuz-"):
                    image = content.read()
                    (to / "vmlinuz").write_bytes(image)
                    plain = bzimage.unpacked(image)
                    if plain is not None:
                        (to / "vmlinux").write_bytes(plain)
                elif name.suffix == ".ko":
                    modules[name.stem.replace("-", "_")] = content.read()
    for number, module in enumerate(dict.fromkeys(_in_order(modules, MODULES))):
        (to / "modules" / f"{number:02}-{module}.ko").write_bytes(modules[module])


def _in_order(modules: dict[str, bytes], wanted: tuple[str, ...]) -> Iterator[str]:
    """Names of modules, each after those it depends on; what the kernel has built in is not among `modules`."""
    for name in wanted:
        if name not in modules:
            continue
        depends = re.search(rb"\0depends=([^\0]*)\0", modules[name])
        yield from _in_order(modules, tuple(depends[1].decode().split(",")) if depends else ())
        yield name


def _write_cpio(out: IO[bytes], agent: Path, modules: list[Path]) -> None:
    def entry(name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        # magic, then ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor,
        # namesize, check: eight hexadecimal digits each (Linux, Documentation/driver-api/early-userspace)
        numbers = (0, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0)
        head = b"070701" + b"".join(b"%08x" % number for number in numbers) + name.encode() + b"\0"
        out.write(head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4))

    for folder in _FOLDERS:
        entry(folder, stat.S_IFDIR | 0o755)
    for name, major, minor in _NODES:
        entry(name, stat.S_IFCHR | 0o600, device=(major, minor))
    entry("init", stat.S_IFREG | 0o755, agent.read_bytes())
    for module in modules:
        entry(f"modules/{module.name}", stat.S_IFREG | 0o644, module.read_bytes())
    entry("TRAILER!!!", 0)
