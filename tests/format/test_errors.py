"""Errors of the disk at every call: the line fails, nothing acknowledged is lost, the tree is as before or after."""

from __future__ import annotations

import errno

import pytest

from powercut.verdict import Verdict
from support.errors import ERRORS, with_errors
from support.quires import RECORDS

CASES = [
    pytest.param("data", errno.EIO, "C"),
    pytest.param("data", errno.ENOSPC, "C"),
    pytest.param("data", errno.EIO, "P", marks=pytest.mark.slow),
    pytest.param("data", errno.ENOSPC, "P", marks=pytest.mark.slow),
    *(
        pytest.param("tree", error, records, marks=pytest.mark.slow)
        for error in (errno.EIO, errno.ENOSPC)
        for records in RECORDS
    ),
]


@pytest.mark.parametrize(("name", "error", "records"), CASES)
def test_an_error_at_every_call(tmp_path, figure, name, error, records):
    struck = checks = exhausted = 0
    for call, outcome in with_errors(tmp_path, ERRORS[name], RECORDS[records], error):
        struck, checks = struck + 1, checks + outcome.checks
        exhausted += outcome.verdict is Verdict.HOLDS
        assert outcome.verdict is not Verdict.BROKEN, (struck, call, [*map(str, outcome.findings)])
    assert struck > 10
    what = f"quire, {errno.errorcode[error]} at every call, {name}, {records} records"
    figure(what, f"{struck} calls, {exhausted} exhausted, {checks} checks")
