"""Scenario files: good ones are read, and of a bad one the first sentence says file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from powercut.errors import InputError
from powercut.guest.workload import Verb
from powercut.recording.operations import operations, possible
from powercut.scenario import Scenario, Workload, from_options, load, parse_size
from powercut.trace import Kind

SHIPPED = sorted((Path(__file__).parents[1] / "scenarios").glob("*.toml"))
GOOD = """\
# a comment, so that lines count
about = "all keys"
expect = "BROKEN"
format = "qcow2"
size = "64M"
backing = "32M"
rule = "acknowledged"
qemu = ["7.2", "8"]

[options]
cluster_size = "4k"

[workload]
operations = 10
seed = -3
with = ["zero", "discard"]
depth = 2

[record]
via = "nbd"
lie = ["flush"]

[explore]
atom = 4096
budget = 5
rules = ["opens", "acknowledged"]
"""


def scenario(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "some-name.toml"
    path.write_text(text)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(str(path))
    return said


def test_every_key_arrives(tmp_path):
    got = load(scenario(tmp_path, GOOD))
    assert (got.name, got.about, got.expect, got.size, got.backing) == ("some-name", "all keys", "BROKEN", "64M", "32M")
    assert (got.rule, got.qemu, got.options) == ("acknowledged", ("7.2", "8"), {"cluster_size": "4k"})
    assert (got.workload.operations, got.workload.seed, got.workload.depth) == (10, -3, 2)
    assert got.workload.extra == ("zero", "discard")
    assert (got.record.via, got.record.lie, got.record.no_flush) == ("nbd", ("flush",), False)
    assert (got.explore.atom, got.explore.budget, got.explore.rules) == (4096, 5, ("opens", "acknowledged"))


def test_two_lines_are_enough(tmp_path):
    got = load(scenario(tmp_path, 'about = "least"\nexpect = "HOLDS"\n'))
    assert (got.format, got.size, got.workload, got.explore.budget) == ("qcow2", "256M", Workload(), None)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_scenario_loads(path):
    got = load(path)
    assert got.name == path.stem
    assert got.about
    assert got.quire is not None or operations(got)
    assert got.trace is None or (path.parent / got.trace).is_file()


def test_there_are_shipped_scenarios():
    assert len(SHIPPED) > 10


HEAD = 'about = "x"\nexpect = "HOLDS"\n'


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('expect = "HOLDS"\n', None, "about"),
        ('about = "x"\n', None, "expect"),
        ('about = "x"\nexpect = "MAYBE"\n', 2, "MAYBE"),
        ('about = 1\nexpect = "HOLDS"\n', 1, "about"),
        (HEAD + "colour = 1\n", 3, "colour"),
        (HEAD + "[workload]\n\n# why\nops = 5\n", 6, "ops"),
        (HEAD + "workload = { operations = 5, ops = 5 }\n", 3, "ops"),
        (HEAD + "workload.seed = 1\nworkload.ops = 5\n", 4, "ops"),
        (HEAD + "[workload]\nseed = 2\noperations = 0\n", 5, "workload.operations"),
        (HEAD + '[workload]\noperations = "5"\n', 4, "workload.operations"),
        (HEAD + "[workload]\noperations = 5.5\n", 4, "workload.operations"),
        (HEAD + "[workload]\ndepth = -1\n", 4, "workload.depth"),
        (HEAD + '[workload]\nwith = ["zero",\n  "erase"]\n', 5, "workload.with"),
        (HEAD + '[workload]\nhistory = [\n  "flush",\n  5,\n]\n', 6, "workload.history"),
        (HEAD + '[workload]\nwith = "zero"\n', 4, "workload.with"),
        (HEAD + "workload = 5\n", 3, "workload"),
        (HEAD + "[[workload]]\nseed = 5\n", 3, "workload"),
        (HEAD + '[record]\nvia = "usb"\n', 4, "usb"),
        (HEAD + '[record]\nlie = ["trim"]\n', 4, "trim"),
        (HEAD + "[record]\nno_flush = 1\n", 4, "record.no_flush"),
        (HEAD + "[record]\nno_flush = true\n", 4, "no_flush"),
        (HEAD + "[explore]\natom = 1024\n", 4, "1024"),
        (HEAD + "[explore]\nbudget = 0\n", 4, "explore.budget"),
        (HEAD + '[explore]\nrules = ["opens", "nice"]\n', 4, "nice"),
        (HEAD + "[options]\na = 'b'\ncluster_size = 4096\n", 3, "options"),
        (HEAD + 'rule = "opens"\n', 2, "rule"),
        (HEAD + 'qemu = ["7.2"]\n', 2, "qemu"),
        (HEAD + "size = 4096\n", 3, "size"),
        (HEAD + 'size = "4096x"\n', 3, "4096x"),
        (HEAD + 'size = ""\n', 3, "size"),
        (HEAD + 'size = "-1M"\n', 3, "-1M"),
        (HEAD + 'size = "0"\n', 3, "size"),
        (HEAD + 'size = "1000"\n', 3, "512"),
        (HEAD + 'backing = "1.5M"\n', 3, "backing"),
        (HEAD + 'backing = "100"\n', 3, "backing"),
        (HEAD + "size = 1979-05-27\n", 3, "size"),
        (HEAD + 'about = "again"\n', 3, "overwrite"),
        (HEAD + "size = \n", 3, "nvalid"),
        (HEAD + "[workload\n", 3, "xpected"),
        (HEAD + "\x00\n", 3, "nvalid"),
    ],
)
def test_bad_files_are_refused_with_their_line(tmp_path, text, line, says):
    path = scenario(tmp_path, text)
    said = refusal(path)
    assert says in said
    if line is not None:
        assert said.startswith(f"{path}:{line}: "), said


def test_files_that_are_not_text_or_not_there(tmp_path):
    (tmp_path / "some-name.toml").write_bytes(b'about = "\xff\xfe"\n')
    refusal(tmp_path / "some-name.toml")
    refusal(tmp_path / "missing.toml")
    refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("512", 512), ("4k", 4096), ("4K", 4096), ("20G", 20 << 30), ("2t", 2 << 40)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "4 k", "4kB", "0x10", "1e3", "-4k", "4k\n", "\uff14k"])
def test_what_is_not_a_size(text):
    with pytest.raises(InputError):
        parse_size(text)


def test_command_line_options_become_a_scenario_or_one_sentence():
    assert from_options({"about": "", "expect": "HOLDS", "size": "1M"}).size == "1M"
    with pytest.raises(InputError, match="erase"):
        from_options({"about": "", "expect": "HOLDS", "workload": {"with": ["erase"]}})


def history(*lines: str) -> Scenario:
    return Scenario(about="", expect="HOLDS", size="1M", workload=Workload(history=lines))


def test_a_history_is_taken_word_by_word():
    got = operations(
        history("write 64k 4k", "zero 0 1M", "zero 512 512 unmap", "discard 1023k 1k", "flush", "  flush  ")
    )
    assert [(o.kind, o.offset, o.length, o.unmap) for o in got] == [
        (Kind.WRITE, 65536, 4096, False),
        (Kind.ZERO, 0, 1 << 20, False),
        (Kind.ZERO, 512, 512, True),
        (Kind.DISCARD, 1023 << 10, 1024, False),
        (Kind.FLUSH, 0, 0, False),
        (Kind.FLUSH, 0, 0, False),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "erase 0 4k",
        "write",
        "write 0",
        "write 0 4k 4k",
        "write 0 4k unmap",
        "discard 0 4k unmap",
        "flush 0 4k",
        "flush unmap",
        "unmap",
        "write 0 0",
        "write 0 100",
        "write 1 512",
        "write 1M 512",
        "write 0 2M",
        "write -512 512",
        "WRITE 0 4k",
        "write 0 4kb",
        "zero unmap",
        "reopen now",
        "snapshot",
        "snapshot create",
        "snapshot create s1 s2",
        "snapshot apply s1",
        "snapshot delete s1",
        "resize",
        "resize 0",
        "resize 100",
        "commit",
        "commit now",
    ],
)
def test_histories_that_make_no_sense(line):
    with pytest.raises(InputError) as caught:
        operations(history("flush", line))
    assert repr(line) in str(caught.value) or "is not a size" in str(caught.value)


def test_a_history_knows_the_size_of_the_disk_and_its_snapshots():
    got = operations(
        history(
            "snapshot create s1", "resize 2M", "write 1M 1M", "snapshot apply s1", "write 0 1M", "snapshot delete s1"
        )
    )
    assert [operation.verb for operation in got if operation.verb] == [
        Verb.CREATE, Verb.RESIZE, Verb.APPLY, Verb.DELETE
    ]  # fmt: skip
    for lines in (
        ["resize 2M", "write 1M 2M"],
        ["resize 512", "write 512 512"],
        ["snapshot create s1", "resize 2M", "snapshot apply s1", "write 1M 512"],
        ["snapshot create s1", "snapshot create s1"],
        ["snapshot create s1", "snapshot delete s1", "snapshot apply s1"],
    ):
        with pytest.raises(InputError):
            operations(history(*lines))


def test_what_cannot_be_is_left_out():
    lines = ["snapshot apply s1", "snapshot create s1", "resize 512", "write 512 512", "snapshot apply s1", "flush"]
    assert possible(history(*lines)).workload.history == (
        "snapshot create s1",
        "resize 512",
        "snapshot apply s1",
        "flush",
    )


def test_raw_images_have_no_snapshots():
    with pytest.raises(InputError, match="raw"):
        operations(Scenario(about="", expect="HOLDS", format="raw", workload=Workload(history=("snapshot create s1",))))
