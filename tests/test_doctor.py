"""The doctor says what is there, and says missing where nothing is: with controls in which it must not say ok."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest

from powercut import doctor
from powercut.doctor import DRIVERS, PACKAGES, PROGRAMS, Finding, State


def by_name() -> dict[str, Finding]:
    findings = doctor.examine()
    table = {finding.name: finding for finding in findings}
    assert len(table) == len(findings), "a name given twice"
    return table


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_each_thing_is_looked_at_once_and_says_what_needs_it() -> None:
    table = by_name()
    assert {"python", "kvm", "scratch", "unix sockets", "free space", "memory", "cores"} <= table.keys()
    assert PACKAGES.keys() | PROGRAMS.keys() | {f"driver {name}" for name in DRIVERS} <= table.keys()
    for finding in table.values():
        assert finding.detail
        assert finding.needed_for
        assert finding.mend or finding.state is not State.MISSING


def test_what_the_tests_themselves_run_on_is_ok() -> None:
    table = by_name()
    assert table["python"].state is State.OK
    for name in PACKAGES:
        assert table[name].state is State.OK, table[name]


def test_programs_that_are_here_state_a_version() -> None:
    here = [name for name in PROGRAMS if shutil.which(name)]
    if not here:
        pytest.skip("none of the programs is installed")
    table = by_name()
    for name in here:
        assert table[name].state is State.OK, table[name]
        assert table[name].detail[0].isdigit()


@pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="qemu-storage-daemon is not installed")
def test_debians_daemon_has_every_driver() -> None:
    table = by_name()
    assert [table[f"driver {name}"].state for name in DRIVERS] == [State.OK] * len(DRIVERS)


@pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="qemu-storage-daemon is not installed")
def test_control_a_driver_that_does_not_exist_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DRIVERS, "nosuch", ("nothing", "file=a"))
    assert by_name()["driver nosuch"].state is State.MISSING


def test_control_an_empty_path_has_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    table = by_name()
    for name in [*PROGRAMS, *(f"driver {name}" for name in DRIVERS)]:
        assert table[name].state is State.MISSING, table[name]


def test_control_a_package_that_is_not_there_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "nosuchpackage", ("nosuchpackage", "nothing"))
    assert by_name()["nosuchpackage"].state is State.MISSING


def test_control_programs_that_fail_hang_or_do_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "qemu-img", "echo no; exit 3")
    program(tmp_path, "qemu-io", "exec /bin/sleep 60")
    program(tmp_path, "qemu-storage-daemon", "echo no such driver here")
    (tmp_path / "strace").write_bytes(b"\x7fELF, not really")
    (tmp_path / "strace").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(doctor, "DEADLINE", 0.3)
    table = by_name()
    assert table["qemu-img"].state is State.LIMITED
    assert "code 3" in table["qemu-img"].detail
    assert table["qemu-io"].state is State.LIMITED
    assert "0.3 s" in table["qemu-io"].detail
    assert table["strace"].state is State.LIMITED
    assert table["driver qcow2"].state is State.LIMITED, "an answer that is not understood is not ok"


def test_control_a_directory_too_deep_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    table = by_name()
    assert table["unix sockets"].state is State.MISSING
    assert table["scratch"].state is State.OK


def test_kvm_is_never_called_ok_before_a_guest_ran() -> None:
    """A guest that hangs is as good as none: its answer is what counts, and it is kept."""
    finding = by_name()["kvm"]
    assert (finding.state is State.OK) == (finding.detail == "a probe guest booted under it")
