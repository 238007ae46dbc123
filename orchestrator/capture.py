"""Capture: every step is on disk as it arrives, and each turn's segment is sealed once.

`trajectory.jsonl` is append-only, so its cost is linear in what the agent does. A line is one of

    {"segment": 1, "opened": {...}}                  a turn begins: role, session, protocol; step 0 is its prompt
    {"segment": 1, "step": 3, "data": {...}}         a new step
    {"segment": 1, "step": 3, "text": "more"}        its text grew
    {"segment": 1, "step": 3, "set": {...}}          fields of it changed
    {"segment": 1, "compacted": "why"}               the session dropped steps of its own; nothing is lost here
    {"segment": 1, "sealed": {...}}                  the turn's count: steps, tool calls, usage, complete

and `"late": true` on whatever came after the seal, which changes no count. `read_trajectory` folds the lines back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import anyio
import attrs
import msgspec

from orchestrator.journal import FileSink, MemorySink, Sink, encode_any, read_lines
from states.errors import JournalError
from states.events import Usage

DIRECTOR = "director.jsonl"
"""What an agent that directs was told and said, in the same form: a segment a question."""


@attrs.define(eq=False)
class TurnSegment:
    """`states.ports.Segment`, writing to a sink. Memory does not grow with what is written."""

    number: int
    _sink: Sink
    _clock: Callable[[], float] = anyio.current_time
    _on_tool_call: Callable[[], None] = lambda: None
    _unsure: Callable[[str], int] = lambda _text: 0
    """How much of a text's end may be half a secret: that is held back until it is whole, or until it is none."""
    _steps: int = 0
    _tool_calls: int = 0
    _started: int = 0
    _last: float = -math.inf
    _began: float = math.nan
    _seals: list[Mapping[str, Any]] = attrs.field(factory=list)
    _held: dict[int, str] = attrs.field(factory=dict)
    _asked: set[int] = attrs.field(factory=set)
    """Questions that are not answered yet."""

    @property
    def steps(self) -> int:
        """How many steps this segment holds; late ones are not counted."""
        return self._steps

    @property
    def tool_calls(self) -> int:
        """How many of them are tool calls."""
        return self._tool_calls

    @property
    def seconds(self) -> float:
        """How long ago it was opened; 0 where another process opened it."""
        return 0.0 if math.isnan(self._began) else round(self._clock() - self._began, 6)

    @property
    def sealed(self) -> Mapping[str, Any] | None:
        """What it was sealed with; None while it is open."""
        return self._seals[0] if self._seals else None

    def opened(self, text: str, **about: Any) -> None:
        """Begin: who is prompted in which session, and the prompt as the first step."""
        self._began = self._clock()
        self._write({"opened": about})
        self.started({"type": "user_message", "text": text})

    def started(self, step: Mapping[str, Any]) -> int:
        """A new step; returns its index in this segment."""
        self._let_go()
        index = self._started
        text = step.get("text")
        if isinstance(text, str) and (half := self._unsure(text)):
            self._held[index] = text[len(text) - half :]
            step = {**step, "text": text[: len(text) - half]}
        self._write({"step": index, "data": step})
        self._started += 1  # only now: a step that could not be written has no index
        if step.get("type") == "question":
            self._asked.add(index)
        if not self._seals:
            self._steps += 1
            if step.get("type") == "tool_call":
                self._tool_calls += 1
                self._on_tool_call()
        return index

    def grew(self, index: int, text: str) -> None:
        """The text of a message or thought grew by `text`."""
        if index not in self._held:
            self._let_go()
        text = self._held.pop(index, "") + text
        if half := self._unsure(text):
            self._held[index] = text[len(text) - half :]
            text = text[: len(text) - half]
        self._last = self._clock()
        if text:
            self._write({"step": index, "text": text})

    def updated(self, index: int, fields: Mapping[str, Any]) -> None:
        """Fields of a step changed."""
        if "text" in fields:
            self._held.pop(index, None)
        self._let_go()
        self._write({"step": index, "set": fields})
        if "answer" in fields:
            self._asked.discard(index)

    def compacted(self, why: str) -> None:
        """The session dropped steps of its own."""
        self._write({"compacted": why})

    async def changed_since(self, seconds: float) -> None:
        """Return once nothing has been written for `seconds`. Who waits for an answer of ours is not silent."""
        since = self._clock()
        while (due := max(self._last, since) + seconds) > self._clock():
            await anyio.sleep_until(anyio.current_time() + due - self._clock())
            if self._asked:
                since = self._clock()

    def seal(self, *, complete: bool, usage: Usage) -> None:
        """Commit it. Raises `JournalError` on a second seal: that is a bug of ours."""
        if self._seals:
            raise JournalError(f"segment {self.number} is sealed already")
        self._let_go()
        seal = {"steps": self._steps, "tool_calls": self._tool_calls, "usage": usage, "complete": complete}
        self._write({"sealed": seal})
        self._seals.append(seal)
        self._sink.close()

    def _let_go(self) -> None:
        """What was held back is no secret: nothing more came of it."""
        while self._held:
            index, text = self._held.popitem()
            self._write({"step": index, "text": text})

    def _write(self, line: dict[str, Any]) -> None:
        line["segment"] = self.number
        if self._seals:
            line["late"] = True
        self._last = self._clock()
        self._sink.write(encode_any(line))


@attrs.define
class RecordedStep:
    """A step as folded back from disk. `late`: it came after its segment's seal."""

    data: dict[str, Any]
    late: bool = False


@attrs.define
class RecordedSegment:
    """One turn of the trajectory as folded back from disk. `sealed` is None when no seal was written."""

    number: int
    about: dict[str, Any] = attrs.field(factory=dict)
    steps: list[RecordedStep] = attrs.field(factory=list)
    compacted: list[str] = attrs.field(factory=list)
    sealed: dict[str, Any] | None = None


def read_trajectory(path: Path) -> list[RecordedSegment]:
    """The segments of a trajectory file, or of the rollout folder that holds one, in order of their turns.

    A folder without the file has no turns. Raises `JournalError` for a line that cannot be read.
    """
    file = path / "trajectory.jsonl" if path.is_dir() else path
    if not file.exists():
        return []
    return fold_trajectory(read_lines(file))


def fold_trajectory(lines: Iterable[bytes]) -> list[RecordedSegment]:
    """The segments that these lines make."""
    trajectory = Trajectory()
    trajectory.take(lines)
    return [trajectory.segments[number] for number in sorted(trajectory.segments)]


@attrs.define(eq=False)
class Trajectory:
    """Segments by number, as the lines that were taken so far make them."""

    segments: dict[int, RecordedSegment] = attrs.field(factory=dict, init=False)
    _texts: dict[tuple[int, int], list[str]] = attrs.field(factory=dict, init=False)

    def take(self, lines: Iterable[bytes]) -> None:
        """Take further lines. Raises `JournalError` for one that is whole and is none of a trajectory."""
        for line in lines:
            try:
                raw = msgspec.json.decode(line)
                segment = self.segments.setdefault(raw["segment"], RecordedSegment(raw["segment"]))
                self._apply(segment, raw)
            except (msgspec.MsgspecError, KeyError, IndexError, TypeError) as error:
                if line.endswith(b"}"):
                    raise JournalError(f"not a line of a trajectory: {line[:120]!r}") from error
        for (number, index), parts in self._texts.items():
            data = self.segments[number].steps[index].data
            data["text"] = "".join([str(data.get("text", "")), *parts])
        self._texts.clear()

    def _apply(self, segment: RecordedSegment, raw: dict[str, Any]) -> None:
        match raw:
            case {"opened": about}:
                # Opened once more: its prompt never got into the journal, and whoever took over gave its number again.
                segment.about = about
                segment.steps.clear()
                for key in [key for key in self._texts if key[0] == segment.number]:
                    del self._texts[key]
            case {"data": data}:
                segment.steps.append(RecordedStep(data, raw.get("late", False)))
            case {"text": text, "step": index}:
                self._texts.setdefault((segment.number, index), []).append(text)
            case {"set": fields, "step": index}:
                if "text" in fields:
                    self._texts.pop((segment.number, index), None)
                segment.steps[index].data.update(fields)
            case {"compacted": why}:
                segment.compacted.append(why)
            case {"sealed": sealed}:
                segment.sealed = sealed


@attrs.define(eq=False)
class GrowingTrajectory:
    """A trajectory that is being written: each look reads what was appended since the last one, and no more."""

    _sink: FileSink | MemorySink
    _known: Trajectory = attrs.field(factory=Trajectory, init=False)
    _read: int = attrs.field(default=0, init=False)

    def steps(self, number: int) -> tuple[dict[str, Any], ...]:
        """The steps of this segment by now, each a copy; none where nothing is known of it. Raises `JournalError`."""
        self._known.take(self._appended())
        segment = self._known.segments.get(number)
        return tuple(dict(step.data) for step in segment.steps) if segment else ()

    def _appended(self) -> list[bytes]:
        if isinstance(self._sink, MemorySink):
            lines = self._sink.lines[self._read :]
            self._read += len(lines)
            return lines
        try:
            with self._sink.path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except FileNotFoundError:  # its first line makes it
            return []
        except OSError as error:
            raise JournalError(f"{self._sink.path} cannot be read: {error.strerror or error}") from error
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.splitlines()


def recovered(path: Path, number: int, sink: Sink) -> TurnSegment:
    """A segment whose writer was killed, as it stands on disk: ready for its one seal, or with the one that it got."""
    found = next((s for s in read_trajectory(path) if s.number == number), RecordedSegment(number))
    counted = [step.data for step in found.steps if not step.late]
    calls = sum(step.get("type") == "tool_call" for step in counted)
    seals: list[Mapping[str, Any]] = [found.sealed] if found.sealed else []
    return TurnSegment(number, sink, steps=len(counted), tool_calls=calls, started=len(found.steps), seals=seals)
