"""What came of loops on the model of the driver, as text and as JSON."""

from __future__ import annotations

from typing import Any

import msgspec

SCHEMA = "powercut.modelloop/1"


def text(outcome: Any) -> str:
    """The story (`powercut.defects.modelloop.Outcome`) for people."""
    lines = list(outcome.story)
    if outcome.remains:
        lines += ["what is left of the image:", *(f"  {line}" for line in outcome.remains.splitlines())]
    return "\n".join(lines)


def document(outcome: Any) -> dict[str, Any]:
    """The outcome as JSON, schema `powercut.modelloop/1`."""
    return {
        "schema": SCHEMA,
        "verdict": outcome.word,
        "why": outcome.why,
        "loops": outcome.loops,
        "failed": outcome.failed,
        "refcount_fell": outcome.fell,
        "header_gone": outcome.gone,
        "story": outcome.story,
        "remains": outcome.remains,
        "seconds": round(outcome.seconds, 2),
        "scenario": msgspec.to_builtins(outcome.scenario),
    }
