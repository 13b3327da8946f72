"""Requests held in flight on a real QEMU: raw holds, and a server that spoils what it held is found out."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

from powercut.cli import main

pytestmark = pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="QEMU's tools are not installed")


def raced(tmp_path, *arguments: str):
    out = tmp_path / "races.json"
    command = ["races", "raw", "--length", "2", "--json", str(out), "--save", str(tmp_path / "found"), *arguments]
    result = CliRunner().invoke(main, command)
    return result.exit_code, json.loads(out.read_text()), result.output


def test_raw_holds(tmp_path, figure):
    code, document, said = raced(tmp_path)
    assert (code, document["verdict"]) == (0, "HOLDS"), said
    figure("races on raw, cases", str(document["coverage"]["cases"]))


@pytest.mark.parametrize(("lie", "length"), [("drop", 2), ("misplace", 2), ("stale", 3)])
def test_a_server_that_spoils_what_it_held_is_found(tmp_path, lie, length, planted):
    """A stale read needs an operation past it to be held at all, so histories of three."""
    code, document, said = raced(tmp_path, "--lie", lie, "--length", str(length))
    planted(f"held requests: {lie}", code == 1)
    assert (code, document["verdict"]) == (1, "BROKEN"), said
