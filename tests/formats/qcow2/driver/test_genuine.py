"""The model beside QEMU: the genuine images of April 2009, and the installed one as reader and writer."""

from __future__ import annotations

import lzma
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from powercut.formats.qcow2.check import check
from powercut.formats.qcow2.driver import snapshots
from powercut.formats.qcow2.driver.create import create
from powercut.formats.qcow2.driver.host import Ask, MemoryFile, run
from powercut.formats.qcow2.driver.opening import open_image
from powercut.formats.qcow2.driver.practice import Era, Practice
from powercut.trace import Kind
from support.qemu import needs_qemu

EVIDENCE = Path(__file__).resolve().parents[5] / "shared" / "evidence" / "qemu-2009"
needs_evidence = pytest.mark.skipif(
    not EVIDENCE.is_dir(), reason="the genuine images of 2009 are not there (../shared)"
)
MIB = 1 << 20
OF_2009 = Practice(Era.APRIL_2009, frozenset({"l2-free-unswapped"}))


def genuine(name: str) -> bytes:
    return lzma.decompress((EVIDENCE / f"{name}.qcow2.xz").read_bytes())


class Noting(MemoryFile):
    """Notes the writes."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.written: list[str] = []

    def finish(self, ask: Ask, begun: object) -> bytes:
        if ask.kind == Kind.WRITE:
            self.written.append(f"{len(self.written)} {ask.offset:#x} {ask.length} {ask.data[:24].hex()}")
        return super().finish(ask, begun)


@needs_evidence
def test_the_destroying_write_of_2009_is_repeated_byte_for_byte(planted: Callable[[str, bool], None]) -> None:
    listed = (EVIDENCE / "host-writes.txt").read_text().splitlines()[1:]
    file = Noting(genuine("header-refcount-0"))
    image = run(open_image(OF_2009), file)
    run(image.write(4 * MIB, bytes([212]) * 4096), file)
    assert file.written == listed
    after = genuine("l2-over-header")
    planted("2009: the L2 table over the header", file.content[:4096] == after[:4096])
    assert file.content[:4096] == after[:4096]
    assert file.content == after


@needs_evidence
def test_what_came_before_it_is_repeated_too() -> None:
    """The genuine image was made so: 1 MiB of 161, 64 KiB of 178 at 4 MiB, a snapshot, 64 KiB of 195."""
    file = MemoryFile(create(8 * MIB, cluster_bits=12, version=2))
    for defects, clean in ((OF_2009.defects, False), (frozenset[str](), True)):
        file = MemoryFile(create(8 * MIB, cluster_bits=12, version=2))
        practice = Practice(Era.APRIL_2009, defects)
        image = run(open_image(practice), file)
        run(image.write(0, bytes([161]) * MIB), file)
        run(image.write(4 * MIB, bytes([178]) * 65536), file)
        run(snapshots.create(image, "s1"), file)
        run(image.write(0, bytes([195]) * 65536), file)
        run(image.close(), file)
        result = check(file)
        if clean:
            assert result.exit_code == 0
        else:
            expected = check(MemoryFile(genuine("header-refcount-0")))
            assert result.leaks == expected.leaks == 16
            assert [p.key for p in result.problems] == [p.key for p in expected.problems]


def qemu(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=60)


@needs_qemu
@pytest.mark.parametrize(("bits", "version", "lazy"), [(9, 2, False), (12, 3, True), (16, 3, False), (21, 3, False)])
def test_qemu_reads_what_the_model_writes(tmp_path: Path, bits: int, version: int, lazy: bool) -> None:
    size = 3 * MIB + 512
    file = MemoryFile(create(size, cluster_bits=bits, version=version, lazy=lazy))
    image, held = run(open_image(), file), bytearray(size)
    for number, (offset, length) in enumerate([(0, 70000 // 512 * 512), (MIB - 512, 300 * 512), (size - 512, 512)], 1):
        run(image.write(offset, bytes([number]) * length), file)
        held[offset : offset + length] = bytes([number]) * length
        run(snapshots.create(image, f"s{number}"), file)
        run(image.zero(offset, 512), file)
        held[offset : offset + 512] = bytes(512)
    run(snapshots.delete(image, "s2"), file)
    run(image.close(), file)
    path, raw = tmp_path / "image", tmp_path / "raw"
    path.write_bytes(file.content)
    checked = qemu("qemu-img", "check", path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw).returncode == 0
    assert raw.read_bytes() == held
    for name in ("s1", "s3"):
        assert qemu("qemu-img", "convert", "-l", name, "-f", "qcow2", "-O", "raw", path, raw).returncode == 0
        assert raw.read_bytes() == run(_at(name), MemoryFile(file.content))


async def _at(name: str) -> bytes:
    image = await open_image()
    await snapshots.apply(image, name)
    return await image.read(0, image.size)


@needs_qemu
@pytest.mark.parametrize(
    "options", ["cluster_size=4k", "compat=0.10", "lazy_refcounts=on,cluster_size=512", "refcount_bits=64"]
)
def test_the_model_reads_and_goes_on_with_what_qemu_writes(tmp_path: Path, options: str) -> None:
    path, raw, packed = tmp_path / "image", tmp_path / "raw", tmp_path / "packed"
    assert qemu("qemu-img", "create", "-f", "qcow2", "-o", options, path, "2M").returncode == 0
    commands = ["write -P 1 0 300k", "write -P 2 1M 4k", "discard 64k 64k", "write -z 128k 64k"]
    assert qemu("qemu-io", *(word for each in commands for word in ("-c", each)), path).returncode == 0
    assert qemu("qemu-img", "snapshot", "-c", "old", path).returncode == 0
    assert qemu("qemu-io", "-c", "write -P 3 4k 5k", path).returncode == 0
    assert qemu("qemu-img", "convert", "-O", "raw", path, raw).returncode == 0
    assert qemu("qemu-img", "convert", "-c", "-O", "qcow2", "-o", options, raw, packed).returncode == 0
    for written in (path, packed):
        file, held = MemoryFile(written.read_bytes()), bytearray(raw.read_bytes())
        image = run(open_image(), file)
        assert run(image.read(0, 2 * MIB), file) == held
        run(image.write(1536, b"z" * 102400), file)
        held[1536 : 1536 + 102400] = b"z" * 102400
        if written is path:
            run(snapshots.delete(image, "old"), file)
        run(image.close(), file)
        assert check(file, trust_dirty=True).exit_code == 0
        again = tmp_path / "again"
        again.write_bytes(file.content)
        assert qemu("qemu-img", "check", again).returncode == 0
        assert qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", again, raw.with_suffix(".2")).returncode == 0
        assert raw.with_suffix(".2").read_bytes() == held


def test_the_loops_of_the_thread_end_as_they_did(planted: Callable[[str, bool], None]) -> None:
    """`savevm x; quit` on an image of 1 MiB with clusters of 4 KiB, measured with QEMU of April 2009: the sizes of the
    file after each loop, what qemu-img check counts, and the first bytes where the header was. The state of the
    machine had 121, 121 and 122 clusters (by the sizes of the file), and is written 32 KiB at a time."""
    measured = [(520_704, 0, 0, b"QFI\xfb"), (1_028_608, 1, 121, b"QFI\xfb"), (1_536_512, 1, 0, b"\0\0\0\0")]
    file = MemoryFile(create(MIB, cluster_bits=12, version=2))
    seen = []
    for clusters in (121, 121, 122):
        image = run(open_image(OF_2009), file)
        for at in range(0, clusters * 4096, 32768):
            run(image.write_vmstate(at, b"s" * min(32768, clusters * 4096 - at)), file)
        run(snapshots.create(image, "x", clusters * 4096), file)
        run(image.close(), file)
        found = check(file)
        seen.append((file.size, len(found.problems), found.leaks, bytes(file.content[:4])))
    planted("2009: savevm loops", seen == measured)
    assert seen == measured
    assert file.content[:16].hex() == "00000000000fc00000000000000fd000"
    count, offset = int.from_bytes(file.content[60:64], "big"), int.from_bytes(file.content[64:72], "big")
    assert (count, offset) == (3, 375 * 4096), "the live snapshot table, patched into the L2 table"


@needs_qemu
def test_bitmaps_that_are_not_kept_up_to_date_are_not_believed_any_more(tmp_path: Path) -> None:
    path = tmp_path / "image"
    assert qemu("qemu-img", "create", "-f", "qcow2", path, "1M").returncode == 0
    assert qemu("qemu-img", "bitmap", "--add", path, "dirt").returncode == 0
    assert "dirt" in qemu("qemu-img", "info", path).stdout
    file = MemoryFile(path.read_bytes())
    run(run(open_image(), file).close(), file)
    path.write_bytes(file.content)
    assert "dirt" not in qemu("qemu-img", "info", path).stdout
