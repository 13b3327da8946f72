"""The promise `survives-errors`: errors of the disk at every call. The line fails, nothing acknowledged is lost, the
tree is as before or after; every crash state that such a run leaves soon after, or at its end, is judged."""

from __future__ import annotations

import errno

import pytest

from powercut.crash.store import in_memory
from powercut.formats.quire.disturbed import disturbed
from powercut.verdict import Verdict
from quire.errors import QuireError
from quire.sets import Set
from support.errors import ERRORS, Failing, with_errors
from support.quires import RECORDS, SIZE

CASES = [
    pytest.param("data", errno.EIO, "C"),
    pytest.param("data", errno.ENOSPC, "C"),
    pytest.param("data", errno.EIO, "P"),
    pytest.param("data", errno.ENOSPC, "P"),
    *(
        pytest.param("tree", error, records, marks=pytest.mark.slow)
        for error in (errno.EIO, errno.ENOSPC)
        for records in RECORDS
    ),
]


@pytest.mark.parametrize(("name", "error", "records"), CASES)
def test_an_error_at_every_call(tmp_path, figure, name, error, records):
    struck = checks = 0
    for call, outcome in with_errors(tmp_path, ERRORS[name], RECORDS[records], error):
        struck, checks = struck + 1, checks + outcome.checks
        assert outcome.verdict is Verdict.HOLDS, (struck, call, [*map(str, outcome.findings)], outcome.reasons)
    assert struck > 10
    what = f"quire, survives-errors, {errno.errorcode[error]} at every call, {name}, {records} records"
    figure(what, f"{struck} calls, each exhausted, {checks:,} checks")


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_an_error_at_every_call_of_create(figure, error):
    """What is left is a set, or refused; and a set if it was said to be one."""
    failed = 0
    for at in range(100):
        failing, store = Failing(at, error), in_memory()
        try:
            Set.create(disturbed(store, failing), SIZE, slots=4).close()
        except OSError:
            assert failing.struck
            failed += 1
        else:
            assert not failing.struck, failing.struck
        for write in (False, True):
            try:
                with Set.open(store, write=write) as quire:
                    image = quire.image("main")
                    assert not any(image.read(0, image.size))
            except QuireError:
                assert failing.struck
        if failing.count <= at:
            break
    assert failed > 5
    figure(f"quire, survives-errors, {errno.errorcode[error]} at every call, create", f"{failed} calls")
