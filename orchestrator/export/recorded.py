"""What a rollout's folder says, read once, as every export wants it: turns, what was done in them, and model calls.

`trajectory.jsonl` tells steps, `llm.jsonl` model calls, and neither says which belong together, since an agent's
transport and its model are two different seams. They are brought together here: a tool call's id is that of the model
call that asked for it, words are compared, and calls that no step names go with the act that follows them. So the
usage of a turn's acts is the usage of its calls, to the token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import msgspec

from orchestrator.capture import RecordedSegment, read_trajectory
from orchestrator.export import chat
from orchestrator.gateway.llm_log import expand, used_by
from orchestrator.journal import encode_any, read_journal, read_lines
from orchestrator.result import RolloutResult
from orchestrator.show import story_of
from orchestrator.visits import Visit
from states.errors import JournalError
from states.events import AcpOpened, Captured, Event, FactoryOpened, Prompted, Usage
from states.journal import Record, Transition

Step = Mapping[str, Any]
"""A step as the trajectory has it: `type`, and the fields of that type."""


def tool_result(step: Step) -> str:
    """What a tool call gave back, as text: ACP's blocks, a diff by its new text, a terminal by its output."""
    content, raw = step.get("content"), step.get("raw_output")
    blocks = content if isinstance(content, list) else [content]
    return "\n".join(filter(None, map(_block, blocks))) or chat.text_of(raw)


def _block(block: Any) -> str:
    if isinstance(block, Mapping) and block.get("type") == "diff":
        return f"{block.get('path', '')}\n{block.get('newText') or block.get('new_text') or ''}"
    return chat.text_of(block)


@attrs.frozen
class Call:
    """One model call. Times are seconds since the epoch."""

    number: int
    role: str
    began: float
    ended: float
    api: str
    model: str
    """What the agent asked for."""
    upstream_model: str
    status: int | None
    error: str | None
    streamed: bool
    first_byte: float | None
    """Seconds until the first byte of the answer."""
    turn: int
    """The turn in which it was made, from 1; 0 before the role's first one, and where the log does not say."""
    counted: Usage
    """What it adds to sums."""
    request: Mapping[str, Any] = attrs.field(repr=False)
    response: Mapping[str, Any] | None = attrs.field(repr=False)

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Call:
        """Read it off a line of `llm.jsonl`, its references resolved."""
        began = float(line["time"])
        return cls(
            number=line["call"],
            role=line.get("role") or "",
            began=began,
            ended=began + float(line.get("latency_sec") or 0.0),
            api=line.get("api") or "",
            model=line.get("model") or line.get("upstream_model") or "",
            upstream_model=line.get("upstream_model") or "",
            status=line.get("status"),
            error=line.get("error"),
            streamed=bool(line.get("streamed")),
            first_byte=line.get("first_byte_sec"),
            turn=int(line.get("turn") or 0),
            counted=used_by(line),
            request=line.get("request") or {},
            response=line.get("response"),
        )

    @functools.cached_property
    def asked(self) -> tuple[chat.Message, ...]:
        """The conversation that was sent."""
        return chat.asked(self.api, self.request)

    @functools.cached_property
    def answered(self) -> chat.Message | None:
        """What the model said; None when the call failed."""
        return chat.answered(self.api, self.response)

    @property
    def finish(self) -> chat.Finish:
        """Why the model stopped."""
        return chat.finish_of(self.api, self.response)

    @property
    def tools(self) -> tuple[chat.Tool, ...]:
        """What the model could call."""
        return chat.tools_of(self.api, self.request)


@attrs.frozen
class Act:
    """What an agent thought, said and did at one time: one inference, where steps and model calls tell them apart.

    `calls` are the model calls that it came of: none where nothing was metered, several where one cannot say.
    """

    thought: str = ""
    said: str = ""
    tools: tuple[Step, ...] = ()
    calls: tuple[Call, ...] = ()
    late: bool = False
    """It came after the turn was sealed, and counts for nothing."""

    @property
    def usage(self) -> Usage:
        """What its calls used."""
        return sum((call.counted for call in self.calls), Usage())

    @property
    def messages(self) -> tuple[chat.Message, ...]:
        """The same as messages: what was said and asked for, then what each tool gave back."""
        uses = [
            chat.ToolUse(str(step.get("tool_call_id") or ""), self.tool_name(step), encode_any(given).decode())
            for step, given in ((step, self.tool_arguments(step)) for step in self.tools)
        ]
        results = (chat.Message("tool", tool_result(s), use=u.id) for s, u in zip(self.tools, uses, strict=True))
        return (chat.Message("assistant", self.said, self.thought, tuple(uses)), *results)

    def tool_name(self, step: Step) -> str:
        """What the model called a tool; where no call is known, the step's kind."""
        return next((use.name for use in self._uses(step)), "") or str(step.get("kind") or "other")

    def tool_arguments(self, step: Step) -> dict[str, Any]:
        """With what a tool was called, as the agent says, or else as its model did."""
        given = step.get("raw_input")
        if isinstance(given, Mapping):
            return {str(key): value for key, value in given.items()}
        if given is not None:
            return chat.arguments_of(given)
        return next((use.parsed() for use in self._uses(step)), {})

    def _uses(self, step: Step) -> Iterable[chat.ToolUse]:
        replies = (call.answered for call in self.calls)
        return (use for reply in replies if reply for use in reply.uses if use.id == step.get("tool_call_id"))


@attrs.frozen
class Turn:
    """One turn: who was asked, how it ended, and its entries in order. Times are seconds since the epoch."""

    number: int
    role: str
    protocol: str
    began: float
    ended: float
    """When `executing` was left; of a turn that is open, when its journal ends."""
    left_by: Event | None
    """The event that led out of `executing`; None for an open turn."""
    complete: bool
    sealed: bool
    usage: Usage
    entries: tuple[Act | Step, ...]
    """Acts of the agent, and what is none: `user_message`, `question`, `plan`, and others."""
    calls: tuple[Call, ...]
    steps: tuple[Step, ...]
    """The same as the trajectory has it, step by step; without those that came late."""

    @property
    def ended_by(self) -> str:
        """A stop reason, or the name of the event that led out of `executing`; empty for an open turn."""
        return str(getattr(self.left_by, "stop", "")) or (self.left_by.name if self.left_by else "")

    @property
    def acts(self) -> tuple[Act, ...]:
        """What the agent did."""
        return tuple(entry for entry in self.entries if isinstance(entry, Act))

    @property
    def messages(self) -> tuple[chat.Message, ...]:
        """The turn as its agent showed it: a conversation without questions, plans, and what came late."""
        return tuple(message for entry in self.entries for message in _messages(entry))


def _messages(entry: Act | Step) -> tuple[chat.Message, ...]:
    if isinstance(entry, Act):
        return entry.messages if not entry.late else ()
    return (chat.Message("user", _text(entry)),) if entry.get("type") == "user_message" else ()


@attrs.frozen
class Recorded:
    """Everything that exports read of one rollout; `about` is what was asked for (`config.json`)."""

    folder: Path
    about: Mapping[str, Any]
    result: RolloutResult
    records: tuple[Record, ...] = attrs.field(repr=False)
    visits: tuple[Visit, ...]
    turns: tuple[Turn, ...]
    calls: tuple[Call, ...]
    other_calls: tuple[Call, ...]
    """Those of `calls` that belong to no turn: a director's."""
    agents: Mapping[str, str]
    """What an agent said it is when it was connected, by role."""

    @property
    def id(self) -> str:
        """The rollout's id."""
        return self.result.rollout

    @property
    def roles(self) -> dict[str, Mapping[str, Any]]:
        """What is known of each role: `agent`, `protocol`, `model`."""
        roles: dict[str, Mapping[str, Any]] = dict(self.about.get("roles") or {})
        return roles

    @property
    def ended(self) -> float:
        """When its last record was written: seconds since the epoch."""
        return self.records[-1].time

    @property
    def metered(self) -> bool:
        """Whether model calls were counted."""
        return self.result.usage.tracking == "metered"

    @property
    def outcome(self) -> str:
        """What it came to, in a sentence: every export says it somewhere."""
        result = self.result
        reward = f"reward {result.reward:g}" if result.reward is not None else "no reward"
        partial = ", its last turn is partial" if result.trajectory_source.startswith("partial") else ""
        owner = "" if result.ending is None else f"{result.verdict.owner}: "
        return f"{result.state}: {reward}{partial}; {owner}{result.verdict.reason}"

    def model_of(self, role: str) -> str:
        """The model under which a role asks; empty for one that calls none."""
        return str(self.roles.get(role, {}).get("model") or "")


Source = Recorded | Path | str
"""A rollout that was read, or the folder to read it from."""


def recorded(source: Source) -> Recorded:
    """Read a rollout's folder, whatever state it is in: over, running, killed.

    Raises:
        ConfigError: there is no rollout in it.
        JournalError: a file in it cannot be read.
    """
    if isinstance(source, Recorded):
        return source
    folder = Path(source)
    story = story_of(folder)
    records = read_journal(folder)
    calls = tuple(_calls(folder))
    moves = [record for record in records if isinstance(record, Transition)]
    used = {share.turn: share.usage for share in story.result.usage.by_turn}
    turns = tuple(
        attrs.evolve(turn, usage=used.get(turn.number, turn.usage))
        for turn in _turns(read_trajectory(folder), moves, calls, records[-1].time)
    )
    of_turns = {call.number for turn in turns for call in turn.calls}
    return Recorded(
        folder=folder,
        about=story.about,
        result=story.result,
        records=tuple(records),
        visits=story.visits,
        turns=turns,
        calls=calls,
        other_calls=tuple(call for call in calls if call.number not in of_turns),
        agents=_agents(moves),
    )


def _calls(folder: Path) -> Iterable[Call]:
    file = folder / "llm.jsonl"
    if not file.exists():
        return
    lines = []
    for line in read_lines(file):
        try:
            lines.append(msgspec.json.decode(line))
        except msgspec.DecodeError as error:
            if line.endswith(b"}"):
                raise JournalError(f"{file}: not a line of it: {line[:120]!r}") from error
    for whole in expand(lines):
        if whole.get("via") == "refused":  # a budget was spent: no model heard of it
            continue
        try:
            yield Call.of(whole)
        except (LookupError, TypeError, ValueError) as error:
            raise JournalError(f"{file}: a line lacks what a call has ({type(error).__name__}: {error})") from error


def _agents(moves: Sequence[Transition]) -> dict[str, str]:
    agents: dict[str, str] = {}
    role = ""
    for move in moves:
        role = getattr(move.event, "role", role)
        if isinstance(move.event, AcpOpened | FactoryOpened):
            agents[role] = move.event.agent
    return agents


# --- turns -----------------------------------------------------------------------------------------------------


def _turns(
    segments: Sequence[RecordedSegment], moves: Sequence[Transition], calls: Sequence[Call], end: float
) -> tuple[Turn, ...]:
    began = [float(segment.about.get("time") or 0.0) for segment in segments]
    roles = [str(segment.about.get("role", "")) for segment in segments]
    owned: dict[int, list[Call]] = {}
    for call in calls:
        at = call.turn - 1 if 0 < call.turn <= len(roles) else _turn_of(call, roles, began)
        owned.setdefault(at, []).append(call)
    return tuple(
        _turn(segment, _moves_of(segment.number, moves), tuple(owned.get(at, ())), began[at], end)
        for at, segment in enumerate(segments)
    )


def _turn_of(call: Call, roles: Sequence[str], began: Sequence[float]) -> int:
    """By time: its role's last turn that had begun, or else its first; -1 if it has none, as a director's has none."""
    own = [at for at, role in enumerate(roles) if not call.role or role == call.role]
    return next((at for at in reversed(own) if began[at] <= call.began), own[0] if own else -1)


def _moves_of(number: int, moves: Sequence[Transition]) -> list[Transition]:
    """The transitions of one turn, from its prompt to before the next one's."""
    starts = [at for at, move in enumerate(moves) if isinstance(move.event, Prompted)]
    if number > len(starts):
        return []
    return list(moves[starts[number - 1] : (starts[number:] or [len(moves)])[0]])


def _turn(
    segment: RecordedSegment, moves: Sequence[Transition], calls: tuple[Call, ...], began: float, end: float
) -> Turn:
    left = next((move for move in moves if move.source == "executing" and move.dest != "executing"), None)
    captured = next((move.event for move in moves if isinstance(move.event, Captured)), None)
    return Turn(
        number=segment.number,
        role=str(segment.about.get("role", "")),
        protocol=str(segment.about.get("protocol", "")),
        began=moves[0].time if moves else began,
        ended=left.time if left else end,
        left_by=left.event if left else None,
        complete=captured.complete if captured else False,
        sealed=segment.sealed is not None,
        usage=captured.usage if captured else Usage(),
        entries=_with_calls(_entries(segment), calls),
        calls=calls,
        steps=tuple(step.data for step in segment.steps if not step.late),
    )


def _entries(segment: RecordedSegment) -> list[Act | Step]:
    """The steps of a turn, those of one act joined."""
    entries: list[Act | Step] = []
    open_at = -1
    """Where the act stands that goes on: a question in the middle of it does not end it."""
    for step in segment.steps:
        kind = step.data.get("type")
        if kind in {"agent_thought", "agent_message", "tool_call"}:
            last = entries[open_at] if open_at >= 0 else None
            if isinstance(last, Act) and last.late == step.late and _goes_on(last, str(kind)):
                entries[open_at] = _grown(last, step.data)
            else:
                entries.append(_grown(Act(late=step.late), step.data))
                open_at = len(entries) - 1
        elif kind != "session_update":
            entries.append(step.data)
            open_at = open_at if kind == "question" else -1
    return entries


def _goes_on(act: Act, kind: str) -> bool:
    """Whether a step of this kind can be of the same inference: it thinks, then speaks, then calls tools."""
    return kind == "tool_call" or not (act.tools or act.said)


def _grown(act: Act, step: Step) -> Act:
    if step["type"] == "tool_call":
        return attrs.evolve(act, tools=(*act.tools, step))
    if step["type"] == "agent_message":
        return attrs.evolve(act, said=_text(step))
    return attrs.evolve(act, thought="\n".join(filter(None, (act.thought, _text(step)))))


def _text(step: Step) -> str:
    text = str(step.get("text") or "")
    return text or (chat.text_of(step["content"]) if "content" in step else "")


# --- which model call an act came of ---------------------------------------------------------------------------


def _with_calls(entries: Sequence[Act | Step], calls: Sequence[Call]) -> tuple[Act | Step, ...]:
    """The entries with each call in one act: the one that names it, or else the next one that names a later call."""
    split = [part for entry in entries for part in (_split(entry, calls) if isinstance(entry, Act) else (entry,))]
    acts = [at for at, entry in enumerate(split) if isinstance(entry, Act) and not entry.late]
    if calls and not acts:
        split.append(Act())
        acts = [len(split) - 1]
    taken = 0
    for at in acts:
        act = split[at]
        assert isinstance(act, Act)
        named = _named_by(act, calls[taken:])
        upto = len(calls) if at == acts[-1] else taken + named
        split[at] = attrs.evolve(act, calls=tuple(calls[taken:upto]))
        taken = upto
    return tuple(split)


def _split(act: Act, calls: Sequence[Call]) -> list[Act]:
    """Tools one after another without a word between, told apart by the calls that asked for them."""
    asked_by = {use.id: call.number for call in calls if call.answered for use in call.answered.uses}
    parts, known = [attrs.evolve(act, tools=())], None
    for step in act.tools:
        number = asked_by.get(str(step.get("tool_call_id")))
        if known is not None and number is not None and number != known:
            parts.append(Act(late=act.late))
        known = number if number is not None else known
        parts[-1] = attrs.evolve(parts[-1], tools=(*parts[-1].tools, step))
    return parts


def _named_by(act: Act, calls: Sequence[Call]) -> int:
    """How many of these calls, in order, led to this act: up to the last whose reply it shows; 0 if none does."""
    ids = {str(step.get("tool_call_id")) for step in act.tools}
    shown = 0
    for count, call in enumerate(calls, start=1):
        reply = call.answered
        if reply is not None and (
            any(use.id in ids for use in reply.uses)
            or (act.said and reply.text and reply.text.strip() == act.said.strip())
        ):
            shown = count
            if not ids:
                break  # the same words may come again; the first that says them is meant
    return shown
