"""Journals of the same rollout in two places, made comparable.

What differs from run to run is masked, each for a reason that stands beside it, and is held to what it must be first:
a mask that took anything would hide a count that is wrong.
"""

from __future__ import annotations

import json
import re

from orchestrator.capture import read_trajectory

IDS = (
    # Names that each rollout has of its own: of itself, its session, its sandbox, its keys.
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b"), "UUID"),
    (re.compile(r"\b[0-9a-f]{12}\b"), "ID"),
    # The kernel's numbers. That a process was there, and that others were looked at, is asked for: no zero.
    (re.compile(r"\(pid [1-9]\d* here\)"), "(pid N here)"),
    # How many processes are looked at is how many the machine, or the container, has at that moment.
    (re.compile(r"none of [1-9]\d* processes is in PID namespace [1-9]\d*"), "none of N processes is in namespace N"),
    # Its manifest gives this agent a tenth of a second, which it keeps or not; every other end is compared.
    (
        re.compile(r"codex-acp (exited with code 0|still ran 0\.1 s) after its stdin was closed"),
        "codex-acp saw its end",
    ),
    # A free port of this machine, and temporary folders.
    (re.compile(r"127\.0\.0\.1:[1-9]\d*"), "127.0.0.1:PORT"),
    (re.compile(r"/tmp/[\w./-]+"), "PATH"),
)


def comparable(folder) -> list[str]:
    """A journal without ids, times, paths, ports and leases: its transitions and notes, a line each."""
    segments = {segment.number: segment for segment in read_trajectory(folder / "trajectory.jsonl")}
    lines, begun = [], None
    for line in (folder / "journal.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["type"] in ("header", "lease"):
            continue
        at = record.pop("time")
        record.pop("seq")
        match record:
            case {"event": "Prompted"}:
                begun = at
            case {"event": "TurnEnded", "data": data}:
                # What is there when the turn is answered: agents tell of their settings during a turn, or after it.
                assert data.pop("steps") >= 1
            case {"event": "Captured", "data": data}:
                data["steps"] = said_of(segments[data["segment"]], data["steps"])
                # The time that a turn takes is no property of it; it is the turn's, and so within its records.
                assert 0 < data.pop("seconds") <= at - begun + CLOCKS_SEC
        text = json.dumps(record, sort_keys=True)
        for pattern, word in IDS:
            text = pattern.sub(word, text)
        lines.append(text)
    return lines


CLOCKS_SEC = 0.1
"""Journals have the time of the day, turns are measured by the clock that never goes back."""


def said_of(segment, counted: int) -> int:
    """How many steps of a turn say or do something; all that were in time are as many as the journal has counted.

    The others tell of an agent's commands and settings, which they do when it suits them, during a turn or after it.
    """
    in_time = [step.data for step in segment.steps if not step.late]
    assert len(in_time) == counted
    return sum(data["type"] != "session_update" for data in in_time)


def said_and_done(folder) -> list[tuple]:
    """What was said and done in the turns, in order: texts, and tool calls with how each ended."""
    return [
        tuple(step.data.get(key) for key in ("type", "text", "title", "status"))
        for segment in read_trajectory(folder / "trajectory.jsonl")
        for step in segment.steps
        if step.data["type"] != "session_update"
    ]
