"""Journals of the same rollout in two places, made comparable."""

from __future__ import annotations

import json
import re

from orchestrator.capture import read_trajectory

IDS = (
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b"), "UUID"),
    (re.compile(r"\b[0-9a-f]{12}\b"), "ID"),
    (re.compile(r'("(?:seconds|steps)": )[\d.e-]+'), r"\1N"),
    (re.compile(r"\(pid \d+ here\)"), "(pid N here)"),
    (re.compile(r"none of \d+ processes is in PID namespace \d+"), "none of N processes is in PID namespace N"),
    (re.compile(r" (exited with code 0|still ran [\d.]+ s) after its stdin was closed"), " saw the end of its stdin"),
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:PORT"),
    (re.compile(r"/tmp/[\w./-]+"), "PATH"),
)


def comparable(folder) -> list[str]:
    """A journal without ids, times, paths, ports and leases: its transitions and notes, a line each.

    Steps are not counted: agents tell of their commands and settings when it suits them, during a turn or after it.
    What was said and done in a turn is compared by `said_and_done`.
    """
    lines = []
    for line in (folder / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["type"] in ("header", "lease"):
            continue
        for name in ("time", "seq"):
            record.pop(name)
        text = json.dumps(record, sort_keys=True)
        for pattern, word in IDS:
            text = pattern.sub(word, text)
        lines.append(text)
    return lines


def said_and_done(folder) -> list[tuple]:
    """What was said and done in the turns, in order: texts, and tool calls with how each ended."""
    return [
        tuple(step.data.get(key) for key in ("type", "text", "title", "status"))
        for segment in read_trajectory(folder / "trajectory.jsonl")
        for step in segment.steps
        if step.data["type"] != "session_update"
    ]
