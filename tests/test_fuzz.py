"""Fuzzing the real QEMU: nothing in two operations of writes and flushes; a lie and the known defect are found."""

from __future__ import annotations

import shutil

import pytest
from click.testing import CliRunner

from powercut.cli import main

pytestmark = pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="QEMU's tools are not installed")


def test_all_histories_of_two_operations_hold(tmp_path):
    result = CliRunner().invoke(main, ["fuzz", "qcow2", "--systematic", "2", "--with", "", "--save", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "HOLDS" in result.output


def test_a_sample_that_finds_nothing_is_unknown(tmp_path):
    arguments = ["fuzz", "raw", "--with", "", "--examples", "5", "--seed", "3", "--save", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 3, result.output
