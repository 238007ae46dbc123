"""Small things that several exports say in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from orchestrator.export.recorded import Step

DISTRIBUTION = "rollout-orchestrator"


def lean(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document without what is not known: most formats refuse null, or take it for a value.

    >>> lean({"model": None, "tokens": 0})
    {'tokens': 0}
    """
    return {key: value for key, value in document.items() if value is not None}


def iso(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601.

    >>> iso(1.5)
    '1970-01-01T00:00:01.500000+00:00'
    """
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")


def own_version() -> str:
    """Our package's version; `0` in a source tree that is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "0"


def sentence(step: Step) -> str:
    """A step that is no act of an agent, in words."""
    kind = str(step.get("type") or "unknown")
    if kind == "question":
        return f"question: {step.get('prompt')} -> {step.get('answer')} ({step.get('by')})"
    if kind == "plan":
        given = step.get("entries")
        entries = [entry for entry in given if isinstance(entry, Mapping)] if isinstance(given, list) else []
        return "plan: " + "; ".join(f"{entry.get('content')} ({entry.get('status')})" for entry in entries)
    return kind
