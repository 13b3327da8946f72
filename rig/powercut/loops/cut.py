"""Loops that end in a power cut: recorded below the format over NBD, and explored to the end.

Requests and answers of the guest are marked in the same trace. A mark may come a little later than what it marks, but
a request is marked before the guest is told to make it, and an answer after it was given: what is taken for promised
was promised. The image is served with the size that it may come to need, since such a device cannot grow.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from powercut import __version__, formats
from powercut.capture.nbd import RecordingExport
from powercut.crash.options import atom_of
from powercut.disk import Bytes
from powercut.endings import Running
from powercut.explore import run
from powercut.explore.run import Outcome
from powercut.explore.session import Plan
from powercut.guest.daemon import version
from powercut.guest.ledger import Ledger
from powercut.guest.workload import Operation
from powercut.loops.cycle import Cycled, Lane, copy
from powercut.report import outcome as reports
from powercut.trace import SECTOR, Kind, TraceWriter
from powercut.verdict import Problem, Severity, Verdict
from quire.nbd import Server

_SEVERITIES = {severity.label: severity for severity in Severity}


class MarkingLedger(Ledger):
    """A ledger that marks what is noted in it in a trace, as events of file `guest`."""

    def __init__(self, sectors: int, writer: TraceWriter, guest: int) -> None:
        super().__init__(sectors)
        self._writer = writer
        self._guest = guest
        self._marks: dict[int, int] = {}  # by operation, the position of its mark

    def issue(self, number: int, operation: Operation) -> None:
        super().issue(number, operation)
        mark = self._writer.issue(operation.kind, self._guest, operation.offset, operation.length, ref=number)
        self._marks[number] = mark

    def complete(self, number: int, error: int) -> None:
        super().complete(number, error)
        self._writer.complete(self._marks.pop(number), error)


class CutLane(Lane):
    """A row of loops, each with new images that are served by recording servers."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        formats.find(self.scenario.format)
        self._outcomes: list[Outcome] = []

    def _live(self, cycled: Cycled) -> Running:
        self._outcomes = []
        with ExitStack() as self._serving:
            return super()._live(cycled)

    def _nodes(self) -> list[dict[str, Any]]:
        return [self._serve(number) for number in range(len(self.images))]

    def _serve(self, number: int) -> dict[str, Any]:
        """Serve an image and record what is asked of it. Returns its block node."""
        image, plan = self.images[number], self.plan
        size = -(-formats.find(image.format).host_size(image.size) // SECTOR) * SECTOR
        os.truncate(image.path, max(size, image.path.stat().st_size))
        meta = {
            "powercut": __version__,
            "qemu": version(),
            "recorder": "nbd",
            "scope": "overlap",
            "format": image.format,
            "size": image.size,
            "depth": self.scenario.workload.depth,
        }
        writer = self._serving.enter_context(TraceWriter(self._trace(number), meta))
        of_image = writer.file("image", image.path.stat().st_size, "image")
        writer.base_file(of_image, image.path)
        if image.backing:
            raw = image.path.with_name("base.raw")
            image.read_base(raw)
            writer.base_file(writer.file("base", raw.stat().st_size, "backing"), raw)
            raw.unlink()
        guest = writer.file("guest", image.size, "guest")
        self._ledgers[number] = MarkingLedger(image.size // SECTOR, writer, guest)
        if image.backing:
            writer.complete(writer.issue(Kind.WRITE, guest, 0, min(image.size, image.backing), ref=0))
            writer.complete(writer.issue(Kind.FLUSH, guest))
        socket = self.folder / f"disk{number}.sock"
        socket.unlink(missing_ok=True)
        export = RecordingExport(image.path, writer, of_image, frozenset(self.scenario.record.lie))
        self._serving.callback(export.write_back)
        self._serving.enter_context(Server(export, socket))
        file = {"driver": "nbd", "server": {"type": "unix", "path": str(socket)}}
        below = {"backing": image.base_node()} if image.backing else {}
        unmap = "unmap" if plan.discard else "ignore"
        return {"driver": image.format, "file": {**file, "discard": unmap}, "discard": unmap, **below}

    def _trace(self, number: int) -> Path:
        return self.folder / f"disk{number}.trace"

    def _look(self, cycled: Cycled, running: Running, firsts: list[Bytes]) -> None:
        explore = self.scenario.explore
        for number, image in enumerate(self.images):
            plan = Plan(str(self._trace(number)), image.format, atom_of(str(explore.atom))[0], explore.rules)
            outcome = run.explore_trace(plan, budget=explore.budget, jobs=1)
            self._outcomes.append(outcome)
            cycled.states += outcome.coverage.log2_states
            cycled.checks += outcome.coverage.checks
            if outcome.verdict is Verdict.UNKNOWN:
                cycled.unknown = "; ".join(outcome.reasons)
            for finding in outcome.findings:
                severity = _SEVERITIES[finding.severity]
                cycled.problems.append(Problem(finding.rule, finding.kind, finding.where, severity, finding.text))
        self._ledgers = []

    def keep(self, folder: Path) -> None:
        """Copy the recordings, and save what was found in them."""
        for number, outcome in enumerate(self._outcomes):
            trace = folder / self._trace(number).name
            copy(self._trace(number), trace)
            findings = [finding.of_trace(str(trace)) for finding in outcome.findings]
            reports.save(findings, folder / f"{trace.name}.findings")
