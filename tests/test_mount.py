"""A store served as a directory behaves like a directory."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from powercut.crash.store import in_memory
from powercut.errors import EnvironmentFault, NotServed
from powercut.explore.calls import Calls, Remembered
from powercut.mount import Mount
from support.filetrace import files_under


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
exec 3<> f; echo unlinked >&3; rm f; ls; exec 3>&-; : > e; wc -c < e; ls nothing
mkdir p p/q; mkdir p; echo x > p/q/f; mv p/q r; ls p r; cat r/f; rmdir r; rmdir p; mv r s; cat r/f; mkdir t u
mv s/f t/; rmdir s; ln t/f l; cat l; mv t u; ls -R u; mkdir v; echo y > v/f; mv -T v u; mv -T u l
mv l u/f; cat u/f; rmdir v; mkdir w; mv -T v w; ls -R
tar cf t.tar u w && rm -r u w && tar xf t.tar && find u w | sort; rm t.tar
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
        assert files_under(Path(path)) == files_under(tmp_path / "real")
    assert not os.path.exists(mount.path), "nothing is left"


def test_what_is_not_served_is_said(planted):
    """A program that is refused something has not been shown the state: that must not pass for its verdict."""
    calls = Calls(in_memory())  # type: ignore[arg-type]
    with Mount() as mount:
        for command, what in (("ln -s here there", "a symbolic link"), ("mkfifo there", "a device, socket")):
            with pytest.raises(NotServed, match=what), mount.serving(calls) as path:
                subprocess.run(command.split(), cwd=path, capture_output=True, check=False)
            planted(f"not served: {what}", True)
        with mount.serving(calls) as path:
            subprocess.run(["mkdir", "there"], cwd=path, check=True)


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
