"""Journals of the same rollout in two places, made comparable."""

from __future__ import annotations

import json
import re

IDS = (
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f-]{27}\b"), "UUID"),
    (re.compile(r"\b[0-9a-f]{12}\b"), "ID"),
    (re.compile(r'("seconds": )[\d.e-]+'), r"\1N"),
    (re.compile(r"\(pid \d+ here\)"), "(pid N here)"),
    (re.compile(r"none of \d+ processes is in PID namespace \d+"), "none of N processes is in PID namespace N"),
    (re.compile(r" (exited with code 0|still ran [\d.]+ s) after its stdin was closed"), " saw the end of its stdin"),
    (re.compile(r"127\.0\.0\.1:\d+"), "127.0.0.1:PORT"),
    (re.compile(r"/tmp/[\w./-]+"), "PATH"),
)


def comparable(folder) -> list[str]:
    """A journal without ids, times, paths, ports and leases: its transitions and notes, a line each."""
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
