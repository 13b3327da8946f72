"""A store served as a directory behaves like a directory."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from powercut.crash.store import in_memory
from powercut.errors import EnvironmentFault
from powercut.explore.calls import Calls, Remembered
from powercut.mount import Mount


def usable() -> bool:
    try:
        with Mount():
            return True
    except EnvironmentFault:
        return False


pytestmark = pytest.mark.skipif(not usable(), reason="FUSE cannot be used here")

SCRIPT = """
echo one > a; echo two >> a; cat a; mv a b; ls; cp b c; echo other > c; mv c b; cat b; rm b; ls; cat b
head -c 3000 /dev/zero | tr '\\0' x > d; truncate -s 1000 d; wc -c < d; truncate -s 5000 d; cksum d
dd if=d of=e bs=512 count=3 seek=2 conv=notrunc,fsync 2> /dev/null; cksum e; wc -c < e
exec 3<> f; echo unlinked >&3; rm f; ls; exec 3>&-; : > e; wc -c < e; ls nothing; cd ..
"""


def test_a_shell_cannot_tell_it_from_a_real_directory(tmp_path):
    (tmp_path / "real").mkdir()

    def said(folder: str) -> str:
        done = subprocess.run(["sh", "-c", SCRIPT], cwd=folder, capture_output=True, text=True, timeout=30)
        return done.stdout + done.stderr.replace(folder, "")

    expected = said(str(tmp_path / "real"))
    calls = Calls(in_memory())  # type: ignore[arg-type]
    with Mount() as mount, mount.serving(calls) as path:
        assert said(path) == expected
        assert sorted(os.listdir(path)) == sorted(os.listdir(tmp_path / "real"))
        for name in os.listdir(path):
            with open(os.path.join(path, name), "rb") as one, open(tmp_path / "real" / name, "rb") as other:
                assert one.read() == other.read()
    assert not os.path.exists(mount.path), "nothing is left"


def test_the_process_stays_where_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    with Mount():
        assert os.getcwd() == str(tmp_path)
        assert signal.getsignal(signal.SIGTERM) is handler


def test_what_a_call_raises_is_raised_to_whoever_serves():
    def calls(name: str, *words: object) -> object:
        raise LookupError(name)

    with Mount() as mount, pytest.raises(LookupError), mount.serving(calls) as path:
        subprocess.run(["ls", path], capture_output=True, check=False)


def test_a_program_that_is_given_the_same_need_not_run_again(planted):
    """And one that is given something else must: the control."""
    remembered: Remembered[int] = Remembered()
    with Mount() as mount:

        def outcome(content: bytes) -> tuple[int, bool]:
            def fresh() -> Calls:
                store = in_memory()
                store.create("a").write(0, content)
                return Calls(store)  # type: ignore[arg-type]

            known = remembered.recall(fresh())
            if known is not None:
                return known, True
            calls = fresh()
            with mount.serving(calls) as path:
                done = subprocess.run(["grep", "-c", "x", f"{path}/a"], capture_output=True, check=False)
            remembered.keep(calls, int(done.stdout))
            return int(done.stdout), False

        assert outcome(b"x\nx\n") == (2, False)
        assert outcome(b"x\nx\n") == (2, True)
        other = outcome(b"x\ny\n")
        planted("another content, same calls", other == (1, False))
        assert other == (1, False)
        assert outcome(b"x\ny\n") == (1, True)
