"""Segments on disk, over kills and disks that are full for a moment."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import FakeMeter

from orchestrator.capture import GrowingTrajectory, TurnSegment, fold_trajectory, read_trajectory, recovered
from orchestrator.journal import FileSink, MemorySink
from states import capturing
from states.errors import JournalError
from states.events import Usage
from states.machine import Facts
from states.ports import Vacant

pytestmark = pytest.mark.anyio
SAID = {"type": "agent_message", "text": "well"}


async def test_a_turn_that_was_sealed_before_the_kill_is_not_sealed_again(tmp_path: Path) -> None:
    """Killed between the seal and its line in the journal: what was sealed is what is captured, late steps aside."""
    file = tmp_path / "trajectory.jsonl"
    segment = TurnSegment(1, FileSink(file))
    segment.opened("do it")
    segment.started(SAID)
    segment.seal(complete=True, usage=Usage(calls=1, input_tokens=10))
    segment.started(SAID)
    rollout: Any = SimpleNamespace(stage=Vacant(), state="capturing/whole", facts=Facts(prompted=1))
    world: Any = SimpleNamespace(
        recovered_segment=lambda number: recovered(tmp_path, number, FileSink(file)),
        meter=FakeMeter(Usage(calls=1, input_tokens=10), turns=[("", 1)]),
    )
    captured = await capturing.run(rollout, world)
    assert (captured.steps, captured.usage.input_tokens, captured.complete) == (2, 10, True)
    assert file.read_text().count('"sealed"') == 1


async def test_a_step_that_could_not_be_written_leaves_no_hole() -> None:
    """The disk is full for one step and it is written again: what grows then is that step, not one beside it."""
    sink = MemorySink()
    segment = TurnSegment(1, sink)
    segment.opened("do it")
    segment._sink = SimpleNamespace(write=lambda _line: (_ for _ in ()).throw(JournalError("disk full")))
    with pytest.raises(JournalError):
        segment.started(SAID)
    segment._sink = sink
    segment.grew(segment.started(SAID), " done")
    assert [step.data["text"] for step in fold_trajectory(sink.lines)[0].steps] == ["do it", "well done"]


async def test_what_is_written_behind_a_torn_line_is_not_lost_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full in the middle of a line costs that line only."""
    segment = TurnSegment(1, FileSink(tmp_path / "trajectory.jsonl"))
    segment.opened("do it")
    real = os.write

    def half(fd: int, data: bytes) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:-10])

    with monkeypatch.context() as full:
        full.setattr("orchestrator.journal.os.write", half)
        with pytest.raises(JournalError, match="No space left"):
            segment.started(SAID)
    segment.started(SAID)
    assert [step.data["text"] for step in read_trajectory(tmp_path)[0].steps] == ["do it", "well"]


async def test_a_segment_that_was_opened_again_begins_anew() -> None:
    """Nobody was prompted the first time, whose line in the journal is missing: indices count from the second."""
    sink = MemorySink()
    for text in ("not sent", "do it"):
        segment = TurnSegment(1, sink)
        segment.opened(text)
        segment.grew(segment.started(SAID), f", {text}")
    (found,) = fold_trajectory(sink.lines)
    assert [step.data["text"] for step in found.steps] == ["do it", "well, do it"]


def test_a_trajectory_that_grows_is_read_line_by_line(tmp_path: Path) -> None:
    """Before there is a file, with half a line at its end, and on from there."""
    sink = FileSink(tmp_path / "trajectory.jsonl")
    growing = GrowingTrajectory(sink)
    assert growing.steps(1) == ()
    whole = [
        b'{"segment":1,"opened":{}}',
        b'{"segment":1,"step":0,"data":{"text":"a"}}',
        b'{"segment":1,"step":0,"text":"b"}',
    ]
    sink.path.write_bytes(b"\n".join(whole)[:-5])
    assert growing.steps(1) == ({"text": "a"},)
    sink.path.write_bytes(b"\n".join(whole) + b"\n")
    assert growing.steps(1) == ({"text": "ab"},)
    sink.path.unlink()
    sink.path.mkdir()
    with pytest.raises(JournalError, match="cannot be read"):
        growing.steps(1)
