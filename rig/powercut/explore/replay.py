"""From a finding back to a crash image, and to the same fault found in it."""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, replace
from typing import Any

from powercut.crash import finding as findings
from powercut.crash import setfinding
from powercut.disk import ImageDisk
from powercut.errors import InputError
from powercut.explore import bundle
from powercut.explore.external import External
from powercut.explore.promised import Promised
from powercut.explore.session import Plan, Session
from powercut.formats.qcow2.check import check
from powercut.trace import SECTOR, Trace
from powercut.verdict import Problem, Severity

_ENOUGH = 100  # problems looked at in the written state


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay did. `confirmed`: judging the one state that was written breaks the same rule again."""

    confirmed: bool
    text: str
    document: dict[str, Any]


def replay(path: str, out: str, trace_path: str | None = None) -> Replayed:
    """Write the crash image of the finding in file `path` (or in a bundle) to `out`. Raises InputError."""
    if zipfile.is_zipfile(path):
        with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
            return replay(bundle.unpack(path, scratch), out)
    if setfinding.is_one(path):
        return _several(path, out, trace_path)
    finding = findings.load(path)
    trace = Trace(trace_path or finding.trace)
    trace.verify()
    model = Plan(
        trace.path,
        finding.format,
        finding.atom,
        lying=finding.lying,
        whole=finding.whole,
        order=finding.survivors,
        torn=finding.torn,
    )
    session = Session(model, trace, finding.fault)
    session.advance(finding.position)
    findings.apply(finding, session.image)
    findings.write_image(session.image, out, finding.patches)
    again = _by_checker(finding, out) if finding.checker else session.problems(_ENOUGH)
    confirmed = any(problem.rule == finding.rule for problem in again)
    lines = [f"{out}: {finding.format} image after a crash before position {finding.position:,} of {trace.path}"]
    lines.append(f"  {finding.severity} ({finding.rule}): {finding.text}")
    lines.append(f"  {'confirmed on the written state' if confirmed else 'NOT seen again on the written state'}")
    confirm = confirmation(finding, out)
    lines += [f"  see it with: {line}" for line in confirm]
    document = {
        "schema": "powercut.replay/1",
        "image": out,
        "finding": path,
        "confirmed": confirmed,
        "problems": [{"rule": p.rule, "kind": p.kind, "where": p.where, "text": p.text} for p in again],
        "confirm": confirm,
    }
    return Replayed(confirmed, "\n".join(lines), document)


def _several(path: str, out: str, trace_path: str | None) -> Replayed:
    """Write the files of a finding on several of them below `out`, and judge copies of them again."""
    finding = setfinding.load(path)
    trace = Trace(trace_path or finding.trace)
    trace.verify()
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise InputError(f"{out}: is there already: replay writes a directory")
    written = setfinding.write_state(finding, trace, out)
    with tempfile.TemporaryDirectory(prefix="powercut-") as scratch:
        copy = f"{scratch}/files"
        shutil.copytree(out, copy)
        if finding.checker:
            content, said = External(finding.checker, 0).run(os.path.join(copy, finding.image), copy)
            again = [] if content else [("checker", said)]
            confirm = [finding.checker.replace("{}", f"{out}/{finding.image}").replace("{dir}", out)]
        else:
            wrong = Promised(trace, finding.options).look_at(copy)
            again = [(one.rule, f"{image.path}: {one.text}") for image, one in wrong]
            confirm = sorted({one.shown_by(image, out) for image, one in wrong})
    confirmed = any(rule == finding.rule for rule, _ in again)
    lines = [f"{out}: {', '.join(written)} after a crash before position {finding.position:,} of {trace.path}"]
    lines.append(f"  {finding.severity} ({finding.rule}): {finding.text}")
    lines.append(f"  {'confirmed on the written state' if confirmed else 'NOT seen again on the written state'}")
    lines += [f"  see it with: {line}" for line in confirm]
    document = {
        "schema": "powercut.replay/1",
        "image": out,
        "finding": path,
        "confirmed": confirmed,
        "problems": [{"rule": rule, "text": text} for rule, text in again],
        "confirm": confirm,
    }
    return Replayed(confirmed, "\n".join(lines), document)


def _by_checker(finding: findings.Finding, image: str) -> list[Problem]:
    """What the finding's checker, and then the format's own on what it left, say of a copy of `image`."""
    with tempfile.TemporaryDirectory(prefix="powercut-", dir=os.path.dirname(image) or ".") as scratch:
        copy = f"{scratch}/image"
        shutil.copyfile(image, copy)
        content, said = External(finding.checker, 0).run(copy)
        if not content:
            return [Problem("checker", "broken", 0, Severity.CORRUPT, said.replace(copy, image))]
        left = [] if finding.format == "raw" else check(ImageDisk(copy)).problems
        return [replace(problem, rule="repairs") for problem in left]


def confirmation(finding: findings.Finding, image: str) -> list[str]:
    """Commands of QEMU's own that show the fault."""
    name = shlex.quote(image)
    if finding.checker:
        return [finding.checker.replace("{}", name) if "{}" in finding.checker else f"{finding.checker} {name}"]
    if finding.rule == "acknowledged":
        offset = finding.where * SECTOR
        return [f"qemu-io -r -f {finding.format} -c 'read -v {offset} {SECTOR}' {name}"]
    return [f"qemu-img check -f {finding.format} {name}"]
