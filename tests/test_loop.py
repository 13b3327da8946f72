"""Shutdown loops: clean where QEMU is right, and each planted fault found, kept, and found again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from powercut import endings
from powercut.cli import main
from powercut.endings import Running
from powercut.errors import Crashed, EnvironmentFault
from powercut.guest.images import Image
from powercut.guest.machine import Machine
from powercut.loops import loop
from powercut.loops.cycle import Lane
from powercut.loops.loop import Loops
from powercut.scenario import Loop, Recording, Scenario, Workload
from powercut.scratch import scratch
from support.guests import hardware

pytestmark = pytest.mark.guest
Planted = Callable[[str, bool], None]


def scenario(
    format: str = "qcow2", *, operations: int = 60, options: dict[str, str] | None = None, **of: object
) -> Scenario:
    plan = Loop(**of)  # type: ignore[arg-type]
    workload = Workload(operations=operations, depth=8)
    return Scenario("", "CLEAN", format, "64M", options or {}, "16M", workload, loop=plan)


@pytest.mark.parametrize("format", ["qcow2", "raw"])
@pytest.mark.parametrize("ending", ["quit", "sigterm", "sigkill"])
def test_stock_qemu_is_clean(format: str, ending: str, tmp_path: Path) -> None:
    hardware()
    described = scenario(format, ending=ending)
    if format == "raw":
        described = replace_backing(described)
    outcome = Loops(described, accelerator="tcg").run(loops=3, jobs=1, save=tmp_path)
    assert outcome.word == "CLEAN", [failure.cycled for failure in outcome.failures + outcome.unknown]
    assert outcome.loops == 3
    assert outcome.operations["completed"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", sorted(set(endings.ENDINGS) - {"quit", "sigterm", "sigkill"}))
def test_every_other_ending_is_clean_with_stock_qemu(ending: str, tmp_path: Path) -> None:
    hardware()
    outcome = Loops(scenario(ending=ending), accelerator="tcg").run(loops=1, save=tmp_path)
    assert outcome.word == "CLEAN", [failure.cycled for failure in outcome.failures + outcome.unknown]


def test_a_power_cut_finds_a_disk_that_lies(tmp_path: Path, planted: Planted) -> None:
    hardware()
    described = scenario(ending="power-cut", discard=False)
    assert Loops(described, accelerator="tcg").run(loops=2, save=tmp_path).word == "CLEAN"
    lying = msgspec.structs.replace(described, record=Recording(lie=("flush",)))
    outcome = Loops(lying, accelerator="tcg").run(loops=1, save=tmp_path)
    planted("loop: power cut, flushes lie", outcome.word == "BROKEN")
    assert outcome.word == "BROKEN"
    folder = outcome.failures[0].folder
    assert folder is not None
    (findings,) = folder.glob("*.findings")
    finding = next(findings.glob("acknowledged*.json"))
    result = CliRunner().invoke(main, ["replay", str(finding), "--out", str(tmp_path / "crash.img")])
    assert result.exit_code == 0, result.output
    assert "confirmed" in result.output


@pytest.mark.parametrize("device", ["virtio-blk", "virtio-scsi", "nvme"])
def test_disks_that_are_plugged_in(device: str, tmp_path: Path) -> None:
    hardware()
    described = scenario(start="plug", device=device, disks=2, cache="none", operations=20)
    assert Loops(described, accelerator="tcg").run(loops=1, save=tmp_path).word == "CLEAN"


def test_images_lie_on_the_file_system_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware()
    looping = Loops(scenario(host="xfs", operations=20), accelerator="tcg")
    outcome = looping.run(loops=1, save=tmp_path)
    assert outcome.word == "CLEAN"
    assert outcome.host == "xfs" or outcome.host.startswith("not on xfs: ")
    monkeypatch.setattr("powercut.guest.hosting.os.geteuid", lambda: 1000)
    outcome = Loops(scenario(host="xfs", operations=20), accelerator="tcg").run(loops=1, save=tmp_path)
    assert (outcome.word, outcome.host) == ("CLEAN", "not on xfs: only root may mount")


def test_savevm_on_a_raw_image_is_refused_in_qemus_words(tmp_path: Path) -> None:
    hardware()
    described = replace_backing(scenario("raw", ending="savevm-quit"))
    with pytest.raises(EnvironmentFault, match=r"savevm: .*does not support snapshots"):
        Loops(described, accelerator="tcg").run(loops=2, jobs=2, save=tmp_path)


def test_control_a_snapshot_that_is_not_loaded_is_noticed(
    tmp_path: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware()
    monitor = Machine.monitor
    monkeypatch.setattr(
        Machine, "monitor", lambda self, line, *more: "" if "load" in line else monitor(self, line, *more)
    )
    outcome = Loops(scenario(ending="loadvm-quit"), accelerator="tcg").run(loops=1, save=tmp_path)
    planted("loop: loadvm did nothing", outcome.word == "BROKEN")
    assert outcome.word == "BROKEN"


def test_control_a_snapshot_of_another_moment_is_noticed(
    tmp_path: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The active layer is right, and the snapshot is not: it was taken before the guest wrote."""
    hardware()
    saves = endings.find("savevm-quit")

    def end(running: Running) -> None:
        saves.end(running)
        path = running.images[0].path
        for words in (["-d", "loop"], ["-c", "now"], ["-a", "empty"], ["-c", "loop"], ["-a", "now"]):
            subprocess.run(["qemu-img", "snapshot", *words, path], check=True, timeout=60)

    def first(self: Image, options: dict[str, str]) -> None:
        create(self, options)
        subprocess.run(["qemu-img", "snapshot", "-c", "empty", self.path], check=True, timeout=60)

    create = Image.create
    monkeypatch.setattr(Image, "create", first)
    monkeypatch.setattr(endings, "find", lambda name: replace(saves, end=end))
    outcome = Loops(scenario(ending="savevm-quit"), accelerator="tcg").run(loops=1, save=tmp_path)
    texts = [problem.text for failure in outcome.failures for problem in failure.cycled.problems]
    found = bool(texts) and all(text.startswith("snapshot loop: guest sector") for text in texts)
    planted("loop: a snapshot of another moment", found)
    assert found, texts


def replace_backing(described: Scenario) -> Scenario:
    return msgspec.structs.replace(described, backing=None)


def overwrite_header(running: Running) -> None:
    """What QEMU of 2009 did: a table of zeros in place of the header."""
    with open(running.images[0].path, "r+b") as image:
        image.write(bytes(4096))


def forget_a_table(running: Running) -> None:
    """The active L1 table loses its first entry: what the guest had there is gone."""
    with open(running.images[0].path, "r+b") as image:
        image.seek(40)
        image.seek(int.from_bytes(image.read(8), "big"))
        image.write(bytes(8))


def stale_content(running: Running) -> None:
    """All data clusters hold zeros, and no table says so."""
    path = running.images[0].path
    data = bytearray(path.read_bytes())
    for at in range(5 << 16, len(data), 512):
        if data[at : at + 32] == data[at + 32 : at + 64] and any(data[at : at + 32]):
            data[at : at + 512] = bytes(512)
    path.write_bytes(data)


def crash(running: Running) -> None:
    """QEMU dies of a signal that is none of ours."""
    raise Crashed("QEMU was ended by SIGABRT: assertion failed")


FAULTS = {"ends": crash, "header": overwrite_header, "acknowledged": stale_content, "structure": forget_a_table}


@pytest.mark.parametrize("rule", FAULTS)
def test_a_planted_fault_is_found_and_kept(
    rule: str, tmp_path: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware()
    find = endings.find

    def faulty(name: str) -> endings.Ending:
        ending = find(name)

        def end(running: Running) -> None:
            ending.end(running)
            if running.number == 2:
                FAULTS[rule](running)

        return replace(ending, end=end)

    monkeypatch.setattr(endings, "find", faulty)
    outcome = Loops(scenario(ending="quit"), accelerator="tcg").run(loops=3, jobs=1, save=tmp_path)
    found = [failure.cycled.number for failure in outcome.failures] == [2]
    planted(f"loop: {rule}", found)
    assert found, outcome
    assert outcome.word == "BROKEN"
    problems = outcome.failures[0].cycled.problems
    assert rule in {problem.rule for problem in problems} | {problem.kind for problem in problems}
    folder = outcome.failures[0].folder
    assert folder is not None
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "disk0.qcow2",
        "disk0.qcow2.before",
        "disk0.qcow2.base",
        "command",
        "qmp.log",
        "serial.log",
        "loop.json",
    }
    assert '"quit"' in (folder / "qmp.log").read_text()
    kept, number, operation, images = loop.load(folder)
    again = Loops(kept, accelerator="tcg").replay(folder, images, number, operation, tmp_path / "again")
    assert again.word == "BROKEN"
    monkeypatch.undo()
    without = Loops(kept, accelerator="tcg").replay(folder, images, number, operation, tmp_path / "without")
    assert without.word == "CLEAN"


def test_until_proof_stops_where_the_proof_is_complete(tmp_path: Path) -> None:
    hardware()
    described = scenario(operations=4)
    outcome = Loops(described, accelerator="tcg").run(proof=0.3, jobs=2, save=tmp_path)
    assert outcome.bound is not None
    assert outcome.bound <= 0.3
    assert outcome.loops == 9


def test_a_new_image_each_time_begins_anew() -> None:
    machine = hardware()
    with scratch() as folder:
        lane = Lane(scenario(fresh=True, operations=8), machine, folder)
        for number in (1, 2):
            assert not lane.run(number).problems
            assert lane.before == []


def test_command(tmp_path: Path) -> None:
    hardware()
    words = "loop qcow2 --loops 2 --ops 8 --accelerator tcg --option cluster_size=4096 --json -"
    result = CliRunner().invoke(main, [*words.split(), "--save", str(tmp_path / "kept")])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["schema"] == "powercut.loop/1"
    assert (document["verdict"], document["loops"], document["failures"]) == ("CLEAN", 2, 0)
    assert document["accelerator"] == {"name": "tcg", "why": ""}
    assert 0.77 < document["bound"] < 0.78


@pytest.mark.parametrize("ending", ["sigkill", "guest-poweroff"])
def test_files_in_ext4(ending: str, tmp_path: Path) -> None:
    hardware()
    described = replace_backing(scenario(ending=ending, filesystem="ext4", operations=12))
    outcome = Loops(described, accelerator="tcg").run(loops=1, save=tmp_path)
    assert outcome.word == "CLEAN", [failure.cycled for failure in outcome.failures + outcome.unknown]
    assert outcome.operations["flushed"] >= 3


def break_a_file(running: Running) -> None:
    """Every sector of a stamp's operation 2 is gone; the file system does not know."""
    path = running.images[0].path
    data = bytearray(path.read_bytes())
    for at in range(0, len(data), 512):
        if data[at : at + 8] == (2).to_bytes(8, "little") and data[at : at + 32] == data[at + 32 : at + 64]:
            data[at : at + 512] = bytes(512)
    path.write_bytes(data)


def break_the_superblock(running: Running) -> None:
    """A count in the superblock is wrong (ext4, s_free_blocks_count_lo and s_checksum are not touched together)."""
    path = running.images[0].path
    data = bytearray(path.read_bytes())
    data[1024 + 12 : 1024 + 16] = bytes(4)
    path.write_bytes(data)


@pytest.mark.parametrize(("fault", "kind"), [(break_a_file, "file-content"), (break_the_superblock, "e2fsck")])
def test_control_files_in_ext4(
    fault: Callable[[Running], None], kind: str, tmp_path: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware()
    quits = endings.find("quit")

    def end(running: Running) -> None:
        quits.end(running)
        fault(running)

    monkeypatch.setattr(endings, "find", lambda name: replace(quits, end=end))
    described = replace_backing(scenario("raw", filesystem="ext4", operations=8))
    outcome = Loops(described, accelerator="tcg").run(loops=1, save=tmp_path)
    found = [problem.kind for failure in outcome.failures for problem in failure.cycled.problems]
    planted(f"loop: ext4 {kind}", kind in found)
    assert kind in found


# A boot sector that writes itself to sector 2 of one track after the other, by the BIOS, and never stops:
# cli; ax = ds = es = ss = 0; sp = 0x7c00; sti; cx = 2
# again: ax = 0x301; bx = 0x7c00; dx = 0x80; int 0x13; inc ch; jmp again
BOOT = bytes.fromhex("fa31c08ed88ec08ed0bc007cfbb90200b80103bb007cba8000cd13fec5ebf1".ljust(1020, "0") + "55aa")


@pytest.mark.parametrize("ending", ["sigkill", "commit-quit"])
def test_a_disk_that_was_brought_is_never_written_to(ending: str, tmp_path: Path) -> None:
    hardware()
    brought = tmp_path / "mine.raw"
    brought.write_bytes(BOOT + bytes((8 << 20) - 512))
    before = brought.read_bytes(), brought.stat().st_mtime_ns
    plan = Loop(ending=ending, device="ide", disk=str(brought), after=1.5)
    outcome = Loops(Scenario("", "CLEAN", loop=plan), accelerator="tcg").run(loops=2, jobs=1, save=tmp_path / "kept")
    assert outcome.word == "CLEAN", [failure.cycled for failure in outcome.failures + outcome.unknown]
    assert (brought.read_bytes(), brought.stat().st_mtime_ns) == before


def test_control_a_disk_that_was_brought(tmp_path: Path, planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware()
    brought = tmp_path / "mine.raw"
    brought.write_bytes(BOOT + bytes((8 << 20) - 512))
    quits = endings.find("quit")
    sizes = []

    def end(running: Running) -> None:
        quits.end(running)
        sizes.append(running.images[0].path.stat().st_size)
        overwrite_header(running)

    monkeypatch.setattr(endings, "find", lambda name: replace(quits, end=end))
    plan = Loop(device="ide", disk=str(brought), after=3)
    outcome = Loops(Scenario("", "CLEAN", loop=plan), accelerator="tcg").run(loops=1, save=tmp_path / "kept")
    planted("loop: header of an overlay", outcome.word == "BROKEN")
    assert outcome.word == "BROKEN"
    assert sizes[0] > 5 << 16, "the guest had written"


def test_a_scenario_of_loops_in_the_gate(tmp_path: Path) -> None:
    hardware()
    text = 'about = "x"\nexpect = "{}"\nsize = "64M"\nworkload.operations = 8\nloop = {{ loops = 50, quick = 1 }}\n'
    good, bad, ugly = tmp_path / "good.toml", tmp_path / "bad.toml", tmp_path / "ugly.toml"
    good.write_text(text.format("CLEAN"))
    bad.write_text(text.format("BROKEN"))
    ugly.write_text(text.format("CLEAN") + "[loop]\n")
    done = CliRunner().invoke(main, ["gate", str(good), str(bad), "--save", str(tmp_path), "--json", "-"])
    assert done.exit_code == 1, done.output
    results = json.loads(done.stdout)["results"]
    assert [(result["state"], result["loops"]["loops"]) for result in results] == [("expected", 1), ("unexpected", 1)]
    assert CliRunner().invoke(main, ["gate", str(ugly)]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("loop qcow2 --ending explode", "no ending 'explode'; there are quit"),
        ("loop qcow2 --qemu /nonexistent/qemu", "/nonexistent/qemu was not found"),
        ("loop qcow2 --qemu true", "is no QEMU"),
        ("loop qcow2 --until-proof 7", "not a rate"),
        ("loop qcow2 --device floppy", "floppy"),
        ("loop", "FORMAT"),
        ("loop qcow2 --size 5", "not a positive multiple of 512"),
        ("loop qcow2 --option nothing=1", "Invalid parameter 'nothing'"),
        ("loop nothing", "Unknown file format 'nothing'"),
        ("loop qcow2 --aio native", "requires cache.direct=on"),
        ("loop qcow2 --filesystem ext4 --backing 16M", "without a backing file"),
        ("loop --disk /nonexistent/disk", "/nonexistent/disk: No such file"),
        ("loop --disk /dev/null", "is no file"),
        ("loop --disk README.md --ending guest-panic", "needs our agent"),
        ("loop --replay /nonexistent", "No such file"),
    ],
)
def test_bad_words_are_a_sentence(words: str, said: str) -> None:
    if len(words.split()) > 1:
        hardware()
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    hardware()
    command = [
        sys.executable,
        "-m",
        "powercut.cli",
        "loop",
        "qcow2",
        "--accelerator",
        "tcg",
        "--save",
        tmp_path / "kept",
    ]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as rig:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("powercut-guest-*/lane*/machine/stderr")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        rig.send_signal(signal.SIGINT)
        _, said = rig.communicate(timeout=60)
    assert rig.returncode == 3, said
    assert "interrupted" in said
    assert list(tmp_path.iterdir()) == []
    ours = os.fsencode(str(tmp_path))
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert ours not in process.read_bytes()
