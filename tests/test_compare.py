"""Two QEMUs in one table, and exit codes for `git bisect run`: stock QEMU against one whose disk loses a write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from powercut import compare
from powercut.cli import main
from powercut.errors import InputError
from support.qemu import needs_qemu

RAW = ["errors", "raw", "--event", "flush_to_disk", "--error", "EIO", "--lasting", "once", "--jobs", "1"]


@pytest.fixture(scope="module")
def losing(tmp_path_factory) -> Path:
    """A folder with a qemu-storage-daemon under which operation 2 of a guest is lost."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to build the QEMU that loses a write")
    folder = tmp_path_factory.mktemp("losing")
    library, source = folder / "dropping.so", Path(__file__).parent / "dropping.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    program = folder / "qemu-storage-daemon"
    assert library.exists()
    program.write_text(f'#!/bin/sh\nLD_PRELOAD={library} exec {shutil.which(program.name)} "$@"\n')
    program.chmod(0o755)
    return folder


def powercut(tmp_path: Path, *words: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, [*words, "--save", str(tmp_path / "kept")])
    return done.exit_code, done.output


@needs_qemu
def test_a_difference_is_one_table(tmp_path, losing, planted):
    out = tmp_path / "c.json"
    stock = shutil.which("qemu-img")
    code, said = powercut(tmp_path, *RAW, "--qemu", stock, "--qemu", str(losing), "--json", str(out))
    document = json.loads(out.read_text())
    planted("two QEMUs: one loses a write", code == 1 and "raw" in document["differing"])
    assert code == 1, said
    assert document["schema"] == "powercut.compare/1"
    assert {row["name"]: row["cells"] for row in document["rows"]}["raw"] == ["HOLDS", "BROKEN"]
    assert "raw: acknowledged reopened-zeros, without any error" in document["differing"]
    assert "(qemu-storage-daemon)" in document["sides"][1]["about"]
    assert said.splitlines()[2].split() == ["A", "B"]
    assert os.environ["PATH"].startswith(str(losing)) is False, "PATH is as it was"


@needs_qemu
def test_control_twice_the_same_differs_in_nothing(tmp_path):
    out = tmp_path / "c.json"
    stock = shutil.which("qemu-img")
    code, said = powercut(tmp_path, *RAW, "--qemu", stock, "--qemu", stock, "--json", str(out))
    assert (code, json.loads(out.read_text())["differing"]) == (0, [])
    assert "differs" not in said


@needs_qemu
def test_the_gate_compares_too(tmp_path, losing):
    (tmp_path / "one.toml").write_text(
        'about = "a"\nexpect = "HOLDS"\nformat = "raw"\nsize = "64k"\n'
        'errors = { event = "pwritev", lasting = ["once"] }\nworkload = { history = ["write 0 4k", "write 8k 4k"] }\n'
    )
    code, said = powercut(tmp_path, "gate", str(tmp_path / "one.toml"), "--qemu", "qemu-img", "--qemu", str(losing))
    assert code == 1
    line = next(line for line in said.splitlines() if line.startswith("one "))
    assert line.split()[1:3] == ["HOLDS", "BROKEN"]
    assert line.endswith("differs")


@needs_qemu
def test_bisect_says_good_and_bad(tmp_path, losing):
    assert powercut(tmp_path, *RAW, "--bisect")[0] == 0
    assert powercut(tmp_path, *RAW, "--bisect", "--qemu", str(losing))[0] == 1
    lie = 'about = "a"\nexpect = "BROKEN"\nformat = "raw"\nsize = "1M"\nworkload = { operations = 20 }\n'
    (tmp_path / "lie.toml").write_text(lie + 'record = { lie = ["flush"] }\n')
    assert powercut(tmp_path, "gate", str(tmp_path / "lie.toml"))[0] == 0
    assert powercut(tmp_path, "gate", str(tmp_path / "lie.toml"), "--bisect")[0] == 1, "expected, and bad all the same"


@pytest.mark.parametrize(
    "words",
    [
        ["errors", "raw", "--event", "l2_load"],  # UNKNOWN
        ["errors", "raw", "--event", "nonsense"],  # a mistake
        ["errors", "raw", "--no-such-option"],
        ["errors", "raw", "--qemu", "/nonexistent"],
        ["gate", "/nonexistent.toml"],
        ["loop"],
    ],
)
def test_bisect_skips_what_cannot_be_judged(tmp_path, words):
    assert powercut(tmp_path, *words, "--bisect")[0] == 125


@pytest.mark.parametrize(("breaking", "code"), [("raise OSError(32, 'pipe')", 125), ("sys.exit(1)", 1), ("1 / 0", 125)])
def test_bisect_takes_a_bug_of_ours_for_none_of_qemus(breaking, code):
    program = "import sys; from powercut import cli; from powercut.faults import sweep\n"
    program += f"def run(*a, **k):\n    {breaking}\nsweep.run = run\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}cli.main(['errors', 'raw', '--bisect'])"], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr


def test_a_build_tree_is_found_and_path_is_restored(tmp_path, monkeypatch):
    (tmp_path / "storage-daemon").mkdir()
    for name in ("qemu-img", "storage-daemon/qemu-storage-daemon"):
        (tmp_path / name).write_text("#!/bin/sh\necho x version 9.9.9\n")
        (tmp_path / name).chmod(0o755)
    assert compare.about(str(tmp_path)) == "9.9.9 (qemu-img, qemu-storage-daemon)"
    before = os.environ["PATH"]
    with compare.using(str(tmp_path / "qemu-img")):
        assert shutil.which("qemu-storage-daemon") == str(tmp_path / "storage-daemon" / "qemu-storage-daemon")
    assert os.environ["PATH"] == before
    (tmp_path / "empty").mkdir()
    for wrong, said in ((tmp_path / "empty", "neither a folder"), (tmp_path / "missing", "missing was not found")):
        with pytest.raises(InputError, match=said), compare.using(str(wrong)):
            pass


@needs_qemu
@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_bisect_finds_the_commit_that_loses_a_write(tmp_path, losing, planted):
    """Eight commits of a QEMU; the sixth begins to lose a write, the fourth and the fifth cannot be run at all."""
    tree, program = tmp_path / "qemu", tmp_path / "qemu" / "qemu-storage-daemon"
    tree.mkdir()

    def git(*words: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        done = subprocess.run(["git", *identity, *words], cwd=tree, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    git("init", "-q")
    good = f'exec {shutil.which(program.name)} "$@"'
    for number in range(1, 9):
        body = "exit 1" if number in (4, 5) else good if number < 6 else f'exec {losing / program.name} "$@"'
        program.write_text(f"#!/bin/sh\n# {number}\n{body}\n")
        program.chmod(0o755)
        git("add", ".")
        git("commit", "-q", "-m", f"commit {number}")
    git("bisect", "start", "HEAD", "HEAD~7")
    powercut_errors = [sys.executable, "-m", "powercut.cli", *RAW, "--qemu", str(tree), "--save", str(tmp_path / "k")]
    said = subprocess.run(
        ["git", "bisect", "run", *powercut_errors, "--bisect"], cwd=tree, capture_output=True, text=True, timeout=300
    ).stdout
    planted("git bisect: the commit that loses a write", "commit 6" in said)
    assert "There are only 'skip'ped commits left to test" in said, said
    suspects = {line for line in said.splitlines() if len(line) == 40}
    assert {git("show", "-s", "--format=%s", suspect).strip() for suspect in suspects} == {
        "commit 4", "commit 5", "commit 6",
    }  # fmt: skip
