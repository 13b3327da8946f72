"""Several files explored with programs as checkers: what QEMU's tools and small programs do to images, captured."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.test_mount import usable

from powercut.cli import main
from powercut.crash.options import Options
from powercut.explore.promised import Promised
from powercut.explore.sets import SetPlan, explore_set
from powercut.trace import Trace
from powercut.verdict import Verdict

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler"),
    pytest.mark.skipif(shutil.which("qemu-img") is None, reason="QEMU's tools are not installed"),
    pytest.mark.skipif(not usable(), reason="FUSE cannot be used here"),
]


class Work:
    """A directory in which programs run, before the recording and in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "data"
        self.folder.mkdir()
        self.trace = str(folder / "t.trace")

    def run(self, *command: str) -> None:
        subprocess.run(command, cwd=self.folder, check=True, capture_output=True)

    def image(self, name: str, *writes: str, size: str = "4M", backing: str | None = None) -> None:
        more = ["-b", backing, "-F", "qcow2"] if backing else []
        self.run("qemu-img", "create", "-q", "-f", "qcow2", *more, name, *([] if backing else [size]))
        for write in writes:
            self.run("qemu-io", "-c", f"write -P {write}", name)

    def capture(self, *command: str) -> None:
        arguments = ["capture", "--out", self.trace, "--dir", str(self.folder), "--", *command]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output

    def program(self, text: str) -> None:
        self.capture(sys.executable, "-c", f"import os, shutil; os.chdir({str(self.folder)!r})\n{text}")

    def explore(self, *options: str) -> tuple[int, dict[str, object], str]:
        where = self.folder.parent
        arguments = ["explore", self.trace, "--jobs", "1", "--save", str(where / "f"), "--json", str(where / "j")]
        result = CliRunner().invoke(main, [*arguments, *options], catch_exceptions=False)
        assert (where / "j").exists(), result.output
        return result.exit_code, json.loads((where / "j").read_text()), result.output


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path)


@pytest.mark.parametrize("format", ["vhdx", "vmdk", "vdi", "qed", "parallels", "vpc", "qcow2"])
def test_a_conversion_that_syncs_holds_once_it_has_ended(work, format):
    work.run("qemu-io", "-f", "raw", "-c", "write -P 7 64k 128k", str(raw(work)))
    out = str(work.folder / "out")
    work.capture("qemu-img", "convert", "-t", "writeback", "-O", format, str(work.folder / "in.raw"), out)
    code, said, output = work.explore()
    assert (code, said["verdict"]) == (0, "HOLDS"), output
    assert said["judged"] == [f"out ({format}), once its maker had ended"]
    assert said["coverage"]["epochs"] == said["coverage"]["epochs_exhausted"] == 1


def raw(work: Work) -> Path:
    path = work.folder / "in.raw"
    with open(path, "wb") as file:
        file.truncate(1 << 20)
    return path


def test_a_conversion_that_does_not_sync_promises_nothing(work):
    """qemu-img convert ignores flushes unless told otherwise (-t): no verdict that it does not deserve."""
    work.run("qemu-io", "-f", "raw", "-c", "write -P 7 64k 128k", str(raw(work)))
    work.capture("qemu-img", "convert", "-O", "vhdx", str(work.folder / "in.raw"), str(work.folder / "out.vhdx"))
    code, said, output = work.explore()
    assert (code, said["verdict"]) == (3, "UNKNOWN"), output
    assert (
        "out.vhdx: its maker ended without having synced it: nothing is promised of it; "
        "qemu-img syncs what it writes with `-t writeback`"
    ) in said["reasons"]


@pytest.mark.parametrize("synced", [True, False])
def test_an_image_replaced_by_another(work, planted, synced):
    """The control: renamed over the old one before it is on disk."""
    work.image("a.qcow2", "1 0 256k")
    work.image("new", "2 0 512k")
    sync = "os.fsync(os.open('copy', os.O_RDWR))" if synced else ""
    work.program(f"shutil.copyfile('new', 'copy'); {sync}\nos.rename('copy', 'a.qcow2')")
    code, said, output = work.explore()
    if synced:
        assert (code, said["verdict"]) == (0, "HOLDS"), output
        return
    planted("an image renamed into place before it was synced", code == 1)
    assert code == 1, output
    path = said["findings"][0]["file"]
    replayed = CliRunner().invoke(main, ["replay", path, "--out", str(work.folder.parent / "crashed")])
    assert replayed.exit_code == 0, replayed.output
    assert "confirmed on the written state" in replayed.output


WRITES = ("write -P 3 32k 64k", "flush", "write -P 4 2M 64k", "flush", "write -P 5 512k 4k")


@pytest.mark.parametrize("format", ["qcow2", "vhdx", "qed", "parallels", "vpc", "vdi", "vmdk"])
def test_writing_to_an_image_of_each_format(work, format):
    """Flushed writes to an image that was there. QEMU writes the header's count of blocks of a vdi image, and the grain
    tables of a vmdk image, without regard to what must come first: its own check calls what is left an error.

    A vmdk image is read whole when it is opened, so what is in flight in it is explored by whole writes."""
    work.run("qemu-img", "create", "-q", "-f", format, "a", "4M")
    work.run("qemu-io", "-f", format, "-c", "write -P 1 0 64k", "-c", "write -P 2 512k 64k", "a")
    commands = [word for write in WRITES for word in ("-c", write)]
    work.capture("qemu-io", "-f", format, *commands, str(work.folder / "a"))
    atom = "write" if format == "vmdk" else "512"
    code, said, output = work.explore("--recovery-depth", "0", "--atom", atom)
    expected = "BROKEN" if format in ("vdi", "vmdk") else "HOLDS"
    assert said["verdict"] == expected, output
    if expected == "HOLDS":
        assert said["coverage"]["epochs"] == said["coverage"]["epochs_exhausted"] > 3
    else:
        assert code == 1
        assert {finding["rule"] for finding in said["findings"]} <= {"opens", "structure"}


@pytest.mark.parametrize("between", [[], ["-c", "flush"]])
def test_a_sector_written_twice_may_hold_what_it_held_in_between(work, between):
    work.image("a.qcow2", "1 0 256k", size="1M")
    twice = ["-c", "write -P 2 0 4k", *between, "-c", "write -z 4k 4k", *between, "-c", "write -P 3 0 8k"]
    work.capture("qemu-io", *twice, str(work.folder / "a.qcow2"))
    code, said, output = work.explore("--recovery-depth", "0")
    assert (code, said["verdict"]) == (0, "HOLDS"), output


def test_rebasing_a_chain_changes_its_backing_file_too_early(work):
    """A defect of qemu-img rebase (7.2), in safe mode: the header names the new backing file before the L2 table that
    leads to what was copied from the old one is on disk. After a crash in between, the disk silently reads wrong."""
    work.image("old.qcow2", "1 0 128k", size="1M")
    work.image("new.qcow2", "2 64k 128k", size="1M")
    work.image("a.qcow2", "3 512k 64k", backing="old.qcow2")
    onto = ["-F", "qcow2", "-b", "new.qcow2", str(work.folder / "a.qcow2")]
    work.capture("qemu-img", "rebase", "-t", "writeback", *onto)
    code, said, output = work.explore("--recovery-depth", "0")
    assert code == 1, output
    assert len(said["judged"]) == 3
    worst = said["findings"][0]
    assert (worst["severity"], worst["rule"]) == ("silent corruption", "content")
    replayed = CliRunner().invoke(main, ["replay", worst["file"], "--out", str(work.folder.parent / "crashed")])
    assert "confirmed on the written state" in replayed.output
    shown = shlex.split(replayed.output.split("see it with: ")[1].splitlines()[0])
    assert shown[0] == "qemu-io"
    assert "00 00 00 00" in subprocess.run(shown, capture_output=True, text=True, check=True).stdout, "it held ones"
    info = ["qemu-img", "info", "--output", "json", str(work.folder.parent / "crashed" / "a.qcow2")]
    assert json.loads(subprocess.run(info, capture_output=True, check=True).stdout)["backing-filename"] == "new.qcow2"


def test_resizing_holds(work):
    work.image("a.qcow2", "1 0 1M")
    work.capture("qemu-img", "resize", str(work.folder / "a.qcow2"), "6M")
    code, said, output = work.explore()
    assert (code, said["verdict"]) == (0, "HOLDS"), output


def test_a_snapshot_leaves_copied_flags_that_contradict_refcounts_for_a_while(work):
    """What `qemu-img check` calls an error, and so does our own check of the same recording."""
    work.image("a.qcow2", "1 0 1M")
    work.capture("qemu-img", "snapshot", "-c", "s", str(work.folder / "a.qcow2"))
    code, said, output = work.explore()
    assert code == 1, output
    assert {finding["rule"] for finding in said["findings"]} == {"structure"}


def test_committing_a_chain_holds_and_a_lying_disk_breaks_it(work, planted):
    """The base's data must be on disk before the overlay lets go of it."""
    work.image("base.qcow2", "1 0 256k", size="1M")
    work.image("a.qcow2", "2 128k 256k", backing="base.qcow2")
    work.capture("qemu-img", "commit", "-t", "writeback", str(work.folder / "a.qcow2"))
    code, said, output = work.explore("--recovery-depth", "0")
    assert (code, said["verdict"]) == (0, "HOLDS"), output
    assert said["coverage"]["log2_states"] > 1000
    code, said, output = work.explore("--recovery-depth", "0", "--lying-flushes", "1", "--budget", "40")
    planted("a commit on a disk whose last flush lied", code == 1)
    assert code == 1, output
    worst = said["findings"][0]
    assert (worst["rule"], worst["others"]) == ("content", "survived")
    assert [decided["file"] for decided in worst["decisions"]] == ["base.qcow2"], "one lost sector"
    assert worst["order"].startswith("base.qcow2 at 0x40000 had to be on disk"), "the base's L2 table"
    bundle, out = str(work.folder.parent / "b"), str(work.folder.parent / "crashed")
    assert CliRunner().invoke(main, ["bundle", worst["file"], "--out", bundle]).exit_code == 0
    Path(work.trace).unlink()
    replayed = CliRunner().invoke(main, ["replay", bundle, "--out", out])
    assert "confirmed on the written state" in replayed.output
    refused = CliRunner().invoke(main, ["shrink", worst["file"]])
    assert refused.exit_code == 2
    assert "its losses are the fewest already" in refused.output


CHECK = """
import os, sys
names = os.listdir(sys.argv[1])
sys.exit("b" in names and ("a" not in names or open(sys.argv[1] + "/a").read() != "content"))
"""


@pytest.mark.parametrize("how", ["fsync and directory", "fsync", "directory", "nothing"])
def test_any_command_judges_a_directory(work, planted, how):
    """b may be there only if a is, whole: that takes both syncs."""
    script = work.folder.parent / "check.py"
    script.write_text(CHECK)
    first = "os.fsync(f.fileno())" if "fsync" in how else ""
    second = "os.fsync(os.open('.', os.O_RDONLY))" if "directory" in how else ""
    work.program(f"f = open('a', 'w'); f.write('content'); f.flush(); {first}\n{second}\nopen('b', 'w')")
    _, said, output = work.explore("--checker", f"{sys.executable} {script} {{dir}}")
    expected = "HOLDS" if how == "fsync and directory" else "BROKEN"
    planted(f"b without a: synced {how}", said["verdict"] == expected)
    assert said["verdict"] == expected, output


@pytest.mark.parametrize("synced", [True, False])
def test_several_directories_are_explored_together(work, planted, synced):
    """A note in one directory speaks of data in another, which lies deeper."""
    data, notes = work.folder / "deep" / "data", work.folder / "notes"
    data.mkdir(parents=True)
    notes.mkdir()
    (data / "d").write_text("old")
    sync = "f.flush(); os.fsync(f.fileno())" if synced else ""
    program = f"import os; f = open({str(data / 'd')!r}, 'w'); f.write('new'); {sync}\nopen({str(notes / 'n')!r}, 'w')"
    directories = ["--dir", str(data), "--dir", str(notes)]
    captured = CliRunner().invoke(
        main, ["capture", "--out", work.trace, *directories, "--", sys.executable, "-c", program]
    )
    assert captured.exit_code == 0, captured.output
    script = work.folder.parent / "check.py"
    script.write_text(
        "import os, sys\nos.chdir(sys.argv[1])\nassert sorted(os.listdir('.')) == ['deep', 'notes']\n"
        "sys.exit(os.path.exists('notes/n') and open('deep/data/d').read() != 'new')"
    )
    _, said, output = work.explore("--checker", f"{sys.executable} {script} {{dir}}")
    planted("a note in another directory", (said["verdict"] == "HOLDS") == synced)
    assert said["verdict"] == ("HOLDS" if synced else "BROKEN"), output
    if not synced:
        out = work.folder.parent / "crashed"
        replayed = CliRunner().invoke(main, ["replay", said["findings"][0]["file"], "--out", str(out)])
        assert "confirmed on the written state" in replayed.output
        assert (out / "notes" / "n").exists()


def test_a_checker_that_repairs_is_explored_inside_its_repair(work, planted):
    """The control writes its repair in place, and so may be cut off in the middle of it."""
    script = work.folder.parent / "repair.py"
    for safely, expected in ((True, Verdict.HOLDS), (False, Verdict.BROKEN)):
        write = "f = open('t', 'w'); f.write('x' * 1024); f.flush(); os.fsync(f.fileno()); os.rename('t', 'a')"
        if not safely:
            write = "f = open('a', 'r+'); f.write('x' * 1024); f.close()"
        script.write_text(
            f"import os, sys\nos.chdir(sys.argv[1])\nnow = open('a').read()\n"
            f"if now not in ('o' * 1024, 'x' * 1024): sys.exit(1)\nif now[0] == 'o': {write}\n"
        )
        if not Path(work.trace).exists():
            (work.folder / "a").write_text("o" * 1024)
            work.program("open('other', 'w')")
        plan = SetPlan(work.trace, checker=f"{sys.executable} {script} {{dir}}")
        verdict = explore_set(plan, jobs=1).verdict
        if not safely:
            planted("a repair in place", verdict is expected)
        assert verdict is expected


@pytest.mark.parametrize("safely", [True, False])
def test_a_recovery_may_make_and_move_directories(work, planted, safely):
    """A new version is made in a directory beside the old one, which is then moved away; without the syncs a crash in
    between leaves a version without its content."""
    (work.folder / "now").mkdir()
    (work.folder / "now" / "v").write_text("old")
    work.program("open('wanted', 'w').close(); os.sync()")
    sync = "for p in ('next/v', 'next', '.'): os.fsync(os.open(p, os.O_RDONLY))" if safely else ""
    script = work.folder.parent / "update.py"
    script.write_text(
        "import os, shutil, sys\nos.chdir(sys.argv[1])\n"
        "at = 'now' if os.path.isdir('now') else 'next'\n"
        "if not os.path.isdir(at) or open(at + '/v').read() not in ('old', 'new'): sys.exit(1)\n"
        "if os.path.exists('next') or not os.path.exists('wanted'): sys.exit(0)\n"
        f"os.mkdir('next'); f = open('next/v', 'w'); f.write('new'); f.close()\n{sync}\n"
        "os.mkdir('past'); os.rename('now', 'past/now'); os.fsync(os.open('.', os.O_RDONLY))\n"
    )
    _, said, output = work.explore("--checker", f"{sys.executable} {script} {{dir}}")
    planted("a recovery that moves directories", (said["verdict"] == "HOLDS") == safely)
    assert said["verdict"] == ("HOLDS" if safely else "BROKEN"), output
    assert said["findings"] == [] or said["findings"][0]["level"] == 1


SQL = "import sqlite3; db = sqlite3.connect('db'); db.executescript({!r})"
LOOK = """
import os, sqlite3, sys
os.chdir(sys.argv[1])
try:
    db = sqlite3.connect("db")
    sound = db.execute("pragma integrity_check").fetchone() == ("ok",)
    sys.exit(not sound or db.execute("select sum(n) from t").fetchone()[0] not in (10, 20))
except sqlite3.DatabaseError as error:
    print(error)
    sys.exit(1)
"""


@pytest.mark.parametrize("synchronous", ["full", "off"])
def test_a_real_database_recovers_by_itself(work, planted, synchronous):
    """SQLite, whose journal is rolled back by the checker that opens it; the control is its own way not to sync."""
    work.run(sys.executable, "-c", SQL.format("create table t(n); insert into t values (10);"))
    script = work.folder.parent / "look.py"
    script.write_text(LOOK)
    change = f"pragma synchronous={synchronous}; update t set n = 20;"
    work.program(SQL.format(change))
    options = ["--checker", f"{sys.executable} {script} {{dir}}", "--atom", "4096", "--recovery-depth", "0"]
    _, said, output = work.explore(*options, "--budget", "2000")
    planted("a database that does not sync", (said["verdict"] == "BROKEN") == (synchronous == "off"))
    assert said["verdict"] == ("HOLDS" if synchronous == "full" else "BROKEN"), output


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_an_interruption_keeps_what_was_found(work, jobs):
    """Ctrl-C while the first states are judged, by one process or two."""
    script, log = work.folder.parent / "slow.py", work.folder.parent / "log"
    script.write_text(f"import time; open({str(log)!r}, 'a').write('x'); time.sleep(0.5)")
    work.program("".join(f"open('f{i}', 'w'); os.fsync(os.open('f{i}', os.O_RDWR))\n" for i in range(20)))
    save = str(work.folder.parent / "f")
    options = ["--checker", f"{sys.executable} {script} {{dir}}", "--jobs", jobs, "--save", save]
    command = [sys.executable, "-m", "powercut.cli", "explore", work.trace, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        for _ in range(600):
            if log.exists():
                break
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGINT)
        said, _ = running.communicate(timeout=60)
    assert running.returncode == 3, said
    assert "UNKNOWN" in said
    assert "because  interrupted" in said


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "the checker ended with signal 9"),
        ("raise SystemExit(42)", "the checker ended with exit code 42"),
    ],
)
def test_a_checker_that_fails_has_no_opinion(work, program, reason):
    script = work.folder.parent / "fails.py"
    script.write_text(program)
    work.program("open('a', 'w')")
    code, said, _ = work.explore("--checker", f"{sys.executable} {script} {{dir}}")
    assert (code, said["verdict"]) == (3, "UNKNOWN")
    assert any(reason in why for why in said["reasons"])


@pytest.mark.parametrize("expect", ["HOLDS", "BROKEN"])
def test_a_scenario_of_programs(tmp_path, expect):
    """In the gate, as expected and as not: then what shows it again is kept."""
    scenario = tmp_path / "resized.toml"
    scenario.write_text(
        f"""about = "a resize"
expect = "{expect}"
[program]
before = ["qemu-img create -q -f qcow2 a 1M"]
command = "qemu-img resize -q a 2M"
"""
    )
    result = CliRunner().invoke(main, ["gate", str(scenario), "--save", str(tmp_path / "kept")])
    assert result.exit_code == (0 if expect == "HOLDS" else 1), result.output
    assert (tmp_path / "kept" / "resized.trace").exists() == (expect == "BROKEN")
    scenario.write_text(scenario.read_text().replace("qemu-img create", "qemu-img frobnicate"))
    failed = CliRunner().invoke(main, ["gate", str(scenario)])
    assert failed.exit_code == 3
    assert "qemu-img frobnicate -q -f qcow2 a 1M: exit status 1: qemu-img: Command not found" in failed.output


def test_formats_are_told_by_their_contents(work):
    for format in ("qcow2", "vhdx", "vmdk", "vdi", "qed", "parallels", "vpc"):
        work.run("qemu-img", "create", "-q", "-f", format, f"{format}.image", "1M")
    (work.folder / "text").write_text("no image")
    work.program("open('x', 'w')")
    formats = Promised(Trace(work.trace), Options()).formats
    assert formats == {f"{name}.image": name for name in ("qcow2", "vhdx", "vmdk", "vdi", "qed", "parallels", "vpc")}
