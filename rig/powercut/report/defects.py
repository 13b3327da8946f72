"""The scoreboard of planted defects as text and as JSON."""

from __future__ import annotations

from typing import Any

from powercut.report.text import count

SCHEMA = "powercut.defects/1"


def _size(operations: int, lost: int | None) -> str:
    return count(operations, "operation") + (f", {lost} lost" if lost is not None else "")


def text(board: Any) -> str:
    """The board (`powercut.defects.scoreboard.Board`) for people."""
    width = max(len(row.defect.name) for row in board.rows)
    lines = [f"{'defect':{width}}  {'since':7}  {'kind':11}  found by"]
    for row in board.rows:
        defect = row.defect
        hits = [
            f"{method} ({_size(len(hit.scenario.workload.history), hit.trouble.lost)}, {hit.seconds:.1f} s)"
            for method, hit in row.hits.items()
            if hit is not None
        ]
        lines.append(f"{defect.name:{width}}  {defect.when or '-':7}  {defect.sort:11}  {', '.join(hits) or 'MISSED'}")
        if row.soonest is not None:
            lines.append(f"{'':{width}}  {'; '.join(row.soonest.scenario.workload.history)}")
            lines.append(f"{'':{width}}  -> {row.soonest.trouble.text}")
    lines += [f"FALSE ALARM  {alarm}" for alarm in board.alarms]
    lines.append(
        f"{board.found}/{len(board.rows)} found, {count(len(board.alarms), 'false alarm')} in "
        f"{count(board.runs_without, 'run')} without a defect, {board.seconds:.0f} s"
    )
    return "\n".join(lines)


def document(board: Any) -> dict[str, Any]:
    """The board as JSON, schema `powercut.defects/1`."""
    return {
        "schema": SCHEMA,
        "exit_code": board.exit_code,
        "found": board.found,
        "defects": [_row(row) for row in board.rows],
        "false_alarms": board.alarms,
        "runs_without": board.runs_without,
        "seconds": round(board.seconds, 1),
    }


def _row(row: Any) -> dict[str, Any]:
    defect = row.defect
    return {
        "name": defect.name,
        "when": defect.when or None,
        "kind": str(defect.sort),
        "upstream": defect.upstream or None,
        "happened": defect.happened,
        "shows": defect.shows,
        "era": defect.era.value,
        "methods": {method: None if hit is None else _hit(hit) for method, hit in row.hits.items()},
    }


def _hit(hit: Any) -> dict[str, Any]:
    scenario = hit.scenario
    return {
        "history": list(scenario.workload.history),
        "size": scenario.size,
        "options": scenario.options,
        "backing": scenario.backing,
        "depth": scenario.workload.depth,
        "text": hit.trouble.text,
        "lost": hit.trouble.lost,
        "tried": hit.tried,
        "seconds": round(hit.seconds, 2),
    }
