"""ACP's session/update notifications as steps of the trajectory, written as they arrive.

Known kinds are read through typed shapes; fields and kinds that are not known are kept raw, and so is an update that
is malformed. Nothing here waits or raises for what an agent sends, and text is never concatenated as it grows: a
message of n chunks costs n appends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import msgspec

from states.events import Usage
from states.ports import Segment

_UNSET: Any = msgspec.UNSET

_MESSAGES = {
    "agent_message_chunk": "agent_message",
    "agent_thought_chunk": "agent_thought",
    "user_message_chunk": "user_message",
}


class Content(msgspec.Struct):
    """The part of a content block that is read."""

    type: str
    text: str | None = None


class Chunk(msgspec.Struct, rename="camel"):
    """A piece of a message or a thought."""

    content: Content
    message_id: str | None = None


class ToolCall(msgspec.Struct, rename="camel"):
    """A tool call, or what changed of one. None and absent both mean: as before."""

    tool_call_id: str
    title: str | None = None
    kind: str | None = None
    status: str | None = None
    content: list[Any] | None = None
    locations: list[Any] | None = None
    raw_input: Any = None
    raw_output: Any = None


class Plan(msgspec.Struct):
    """The agent's plan, whole."""

    entries: list[Any]


_CHUNK_FIELDS = frozenset({"sessionUpdate", "content", "messageId"})
_TOOL_FIELDS = frozenset(field.encode_name for field in msgspec.structs.fields(ToolCall)) | {"sessionUpdate"}


@attrs.define(eq=False)
class Unplaced:
    """Stands in for a segment until the first turn has one: what is written is kept by the recorder alone."""

    number: int = 0
    steps: int = 0
    tool_calls: int = 0
    seconds: float = 0.0
    sealed: Mapping[str, Any] | None = None

    def started(self, step: Mapping[str, Any]) -> int:  # noqa: ARG002
        """Not written yet."""
        return 0

    def grew(self, index: int, text: str) -> None:
        """Not written yet."""

    def updated(self, index: int, fields: Mapping[str, Any]) -> None:
        """Not written yet."""

    def compacted(self, why: str) -> None:
        """Not written yet."""

    async def changed_since(self, seconds: float) -> None:
        """Not written yet."""

    def seal(self, *, complete: bool, usage: Usage) -> None:
        """Not written yet."""


NOWHERE = Unplaced()


@attrs.define(eq=False)
class Step:
    """One step as far as it is known, and where it is written."""

    fields: dict[str, Any]
    segment: Segment = NOWHERE
    index: int = 0
    texts: list[str] = attrs.field(factory=list)
    message_id: str = ""

    def snapshot(self) -> dict[str, Any]:
        """The step as a dict of its own."""
        if self.texts:
            self.fields["text"] = "".join((self.fields.get("text", ""), *self.texts))
            self.texts.clear()
        return dict(self.fields)


_NO_STEP = Step({"type": ""})


def _nobody() -> None:
    """Nobody wants to know."""


@attrs.define(eq=False)
class Recorder:
    """All steps of one session, in order; each is written to the segment that was open when it began.

    Updates that come before the first turn wait for it; those between turns go to the last segment.
    """

    session_id: str = ""
    """Of the session that is recorded; empty while it is being opened."""
    changed: Callable[[], None] = _nobody
    _steps: list[Step] = attrs.field(factory=list, init=False)
    _waiting: list[Step] = attrs.field(factory=list, init=False)
    """Steps that no segment holds yet."""
    _tools: dict[str, Step] = attrs.field(factory=dict, init=False)
    _open: Step = attrs.field(default=_NO_STEP, init=False)
    _segment: Segment = attrs.field(default=NOWHERE, init=False)
    _prompt: str = attrs.field(default="", init=False)
    _echoed: int = attrs.field(default=0, init=False)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Every step so far. A copy: costs as much as there is."""
        return [step.snapshot() for step in self._steps]

    def forget(self) -> None:
        """Before the first turn: drop what came, since the history that session/load replays is no work of ours."""
        self._steps.clear()
        self._waiting.clear()
        self._tools.clear()
        self._open = _NO_STEP

    def turn(self, segment: Segment, prompt: str) -> None:
        """From here on new steps go to `segment`, whose step 0 is the prompt already."""
        self._segment, self._prompt, self._echoed, self._open = segment, prompt, 0, _NO_STEP
        if segment is not NOWHERE:
            for step in self._waiting:
                step.segment, step.index = segment, segment.started(step.snapshot())
            self._waiting.clear()
        self._steps.append(Step({"type": "user_message", "text": prompt}, segment))

    def start(self, fields: dict[str, Any]) -> Step:
        """A new step."""
        step = Step(fields, self._segment, self._segment.started(fields))
        self._steps.append(step)
        if self._segment is NOWHERE:
            self._waiting.append(step)
        self.changed()
        return step

    def update(self, step: Step, fields: Mapping[str, Any]) -> None:
        """Fields of a step changed."""
        step.fields.update(fields)
        step.segment.updated(step.index, fields)
        self.changed()

    # -- what the agent sends

    def session_update(self, params: Any) -> None:
        """Take one session/update notification, whatever it holds."""
        update = params.get("update") if isinstance(params, dict) else None
        if not isinstance(update, dict):
            self._keep("malformed", params)
            return
        if params.get("sessionId") != self.session_id and self.session_id:
            self._keep(update.get("sessionUpdate"), update, session_id=params.get("sessionId"))
            return
        kind = update.get("sessionUpdate")
        try:
            if not isinstance(kind, str):
                self._keep(kind, update)
            elif kind in _MESSAGES:
                self._chunk(_MESSAGES[kind], msgspec.convert(update, Chunk), update)
            elif kind in ("tool_call", "tool_call_update"):
                self.tool_call(update)
            elif kind == "plan":
                self._open = _NO_STEP
                self.start({"type": "plan", "entries": msgspec.convert(update, Plan).entries})
            else:
                self._keep(kind, update)
        except msgspec.ValidationError as error:
            self._keep(kind, update, malformed=str(error))

    def tool_call(self, update: Mapping[str, Any]) -> None:
        """A tool call, or what changed of one; either may come first, and so may a permission request for it.

        Raises `msgspec.ValidationError` when it is malformed.
        """
        call = msgspec.convert(update, ToolCall)
        fields = {
            name: value
            for name, value in msgspec.structs.asdict(call).items()
            if value is not None and name != "tool_call_id"
        }
        if extra := {k: v for k, v in update.items() if k not in _TOOL_FIELDS}:
            fields["extra"] = extra
        known = self._tools.get(call.tool_call_id)
        if known is not None:
            self.update(known, fields)
            return
        self._open = _NO_STEP
        blank = {"kind": "other", "title": "", "status": "pending", "content": []}
        step = {"type": "tool_call", "tool_call_id": call.tool_call_id, **blank, **fields}
        self._tools[call.tool_call_id] = self.start(step)

    def reply(self, reported: Mapping[str, Any]) -> None:
        """What the agent says of the turn in its answer to the prompt: its own words, metered by nobody."""
        if reported:
            self._keep("prompt_response", reported)

    def _chunk(self, kind: str, chunk: Chunk, update: Mapping[str, Any]) -> None:
        text, message_id = chunk.content.text, chunk.message_id or ""
        if chunk.content.type != "text" or text is None:
            self._open = _NO_STEP
            self.start({"type": kind, "text": "", "content": update["content"]})
            return
        if not text or (kind == "user_message" and self._is_echo(text)):
            return
        grown = self._open
        if grown.fields["type"] == kind and grown.message_id == message_id:
            grown.texts.append(text)
            grown.segment.grew(grown.index, text)
            self.changed()
            return
        extra = {k: v for k, v in update.items() if k not in _CHUNK_FIELDS}
        self._open = self.start({"type": kind, "text": text} | ({"extra": extra} if extra else {}))
        self._open.message_id = message_id

    def _is_echo(self, text: str) -> bool:
        """Whether this is the next piece of our own prompt, which is written already."""
        if not self._prompt.startswith(text, self._echoed) or self._echoed >= len(self._prompt):
            return False
        self._echoed += len(text)
        return True

    def _keep(self, kind: Any, update: Any, **about: Any) -> None:
        """An update that is no step of its own is kept raw; it does not interrupt a message that is growing."""
        data = {k: v for k, v in update.items() if k != "sessionUpdate"} if isinstance(update, dict) else update
        self.start({"type": "session_update", "update": kind, "data": data, **about})
