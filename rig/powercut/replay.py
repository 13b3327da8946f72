"""From a finding back to a crash image, and to the same fault found in it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from powercut.crash import finding as findings
from powercut.session import Plan, Session
from powercut.trace import SECTOR, Trace

_ENOUGH = 100  # problems looked at in the written state


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay did. `confirmed`: judging the one state that was written breaks the same rule again."""

    confirmed: bool
    text: str
    document: dict[str, Any]


def replay(path: str, out: str, trace_path: str | None = None) -> Replayed:
    """Write the crash image of the finding in file `path` to `out`. Raises InputError."""
    finding = findings.load(path)
    trace = Trace(trace_path or finding.trace)
    trace.verify()
    session = Session(Plan(trace.path, finding.format, finding.atom), trace)
    session.advance(finding.position)
    findings.apply(finding, session.image)
    findings.write_image(session.image, out)
    again = session.problems(_ENOUGH)
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


def confirmation(finding: findings.Finding, image: str) -> list[str]:
    """Commands of QEMU's own that show the fault."""
    name = shlex.quote(image)
    if finding.rule == "acknowledged":
        offset = finding.where * SECTOR
        return [f"qemu-io -r -f {finding.format} -c 'read -v {offset} {SECTOR}' {name}"]
    return [f"qemu-img check -f {finding.format} {name}"]
