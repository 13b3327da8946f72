"""What the exploration of a recorded store came to, as JSON."""

from __future__ import annotations

from typing import Any

from powercut.verdict import Problem


def document(
    verdict: str, coverage: dict[str, float], found: list[tuple[Problem, str]], reasons: list[str]
) -> dict[str, Any]:
    """Schema `powercut.store-verdict/1`. `found` are problems, each with the decisions in words."""
    return {
        "schema": "powercut.store-verdict/1",
        "verdict": verdict,
        "coverage": coverage,
        "reasons": reasons,
        "findings": [
            {
                "rule": problem.rule,
                "kind": problem.kind,
                "severity": problem.severity.label,
                "text": problem.text,
                "state": words.splitlines()[1:],
            }
            for problem, words in found
        ],
    }
