"""What happened in a rollout, as a person would want to read it, from its folder alone.

A story is a pure function of the journal and the trajectory, so it can be told of a rollout that is over, that runs in
another process, or that was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import msgspec

from orchestrator.budgets import Limit
from orchestrator.capture import DIRECTOR, RecordedSegment, read_trajectory
from orchestrator.journal import read_journal
from orchestrator.result import RolloutResult, result_of
from orchestrator.visits import Visit, duration, visits_of
from states.errors import ConfigError, JournalError
from states.events import Captured, Event, Share, Usage
from states.journal import Transition, fold
from states.machine import CLOSED

WIDTH = 100
HEAD, TAIL = 8, 6
"""So many steps of a long turn are shown from its beginning, and from its end."""

TRACEBACK = "Traceback (most recent call last)"
"""How a note that is a traceback begins."""

LAST_LINES = 12
"""How many lines are told of a traceback, a log or a long message: the last ones, where the cause is."""

Style = Callable[..., str]
"""How words are made to stand out: `click.style`, or nothing."""


def plain(text: str, **_look: Any) -> str:
    """Words as they are."""
    return text


@attrs.frozen
class Turn:
    """One turn: who was asked what, what came of it, and its steps."""

    number: int
    role: str
    ended_by: str
    complete: bool
    usage: Usage
    seconds: float
    steps: tuple[Mapping[str, Any], ...]
    late: int
    """Steps that came after the turn was sealed."""
    sealed: bool


@attrs.frozen
class Story:
    """Everything that is told of one rollout."""

    folder: Path
    about: Mapping[str, Any]
    result: RolloutResult
    visits: tuple[Visit, ...]
    turns: tuple[Turn, ...]
    asked: tuple[Turn, ...] = ()
    """What an agent that directs was asked: each under the number of the turn that it decided."""

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "folder": str(self.folder),
            "about": dict(self.about),
            "result": self.result.to_json(),
            "path": [
                {
                    "state": visit.state,
                    "entered": visit.entered,
                    "seconds": round(visit.seconds, 6),
                    "event": visit.event.name if visit.event else None,
                    "cause": visit.cause if visit.event else None,
                    "stayed": [event.name for event in visit.stayed],
                }
                for visit in self.visits
            ],
            "turns": [attrs.asdict(turn) for turn in self.turns],
            "asked": [attrs.asdict(turn) for turn in self.asked],
        }


def story_of(folder: Path) -> Story:
    """Read a rollout's folder.

    Raises:
        ConfigError: there is no rollout in it.
        JournalError: its journal cannot be read, or contradicts the table.
    """
    if not (folder / "journal.jsonl").is_file():
        raise ConfigError(f"{folder} holds no rollout: there is no journal.jsonl in it")
    records = read_journal(folder)
    if not records:
        raise JournalError(f"{folder / 'journal.jsonl'} is empty: the rollout ended before its first line")
    folded = fold(records)
    about = folded.header.info
    tracked = bool(about.get("tracked"))
    result = result_of(
        folded,
        records,
        task=str(about.get("task") or ""),
        tracking="metered" if tracked else "untracked",
        why_untracked=_why_untracked(folder),
        folder=folder,
    )
    moves = [record for record in records if isinstance(record, Transition)]
    shares = {share.turn: share for share in result.usage.by_turn if share.turn}
    nobodys = Share("", 0)
    turns = tuple(_turn(s, moves, shares.get(s.number, nobodys)) for s in read_trajectory(folder))
    asked = tuple(_asked(segment) for segment in read_trajectory(folder / DIRECTOR))
    return Story(folder, about, result, visits_of(records), turns, asked)


def _why_untracked(folder: Path) -> str:
    """The one thing that a journal does not know; `result.json` has it once the rollout is over."""
    try:
        return str(msgspec.json.decode((folder / "result.json").read_bytes())["usage"]["reason"])
    except (OSError, msgspec.DecodeError, LookupError, TypeError):
        return ""


def _turn(segment: RecordedSegment, moves: Sequence[Transition], share: Share) -> Turn:
    captured = next(
        (m.event for m in moves if isinstance(m.event, Captured) and m.event.segment == segment.number), None
    )
    ended = _endings(moves)
    return Turn(
        number=segment.number,
        role=str(segment.about.get("role", "")),
        ended_by=ended[segment.number - 1] if segment.number <= len(ended) else "",
        complete=captured.complete if captured else False,
        usage=share.usage,
        seconds=share.seconds,
        steps=tuple(step.data for step in segment.steps if not step.late),
        late=sum(step.late for step in segment.steps),
        sealed=segment.sealed is not None,
    )


def _asked(segment: RecordedSegment) -> Turn:
    """One question to a director. What it was told are the turns before, which are told already."""
    sealed = segment.sealed or {}
    return Turn(
        number=int(segment.about.get("turn", 0)),
        role=str(segment.about.get("role", "")),
        ended_by="",
        complete=bool(sealed.get("complete")),
        usage=Usage(**sealed["usage"]) if "usage" in sealed else Usage(),
        seconds=0.0,
        steps=tuple(step.data for step in segment.steps[1:] if not step.late),
        late=sum(step.late for step in segment.steps),
        sealed=segment.sealed is not None,
    )


def _endings(moves: Sequence[Transition]) -> list[str]:
    """What ended each turn, in order: the first event that led out of `executing`, and a stop reason if it has one."""
    ended = []
    for move in moves:
        if move.source == "executing":
            stop = getattr(move.event, "stop", "")
            ended.append(stop or move.event.name)
    return ended


# --- telling it ----------------------------------------------------------------------------------------------


def tell(story: Story, *, style: Style = plain, every_step: bool = False) -> str:
    """The whole story as text. `every_step`: long turns are not cut in the middle."""
    parts = [
        _head(story, style),
        _path(story, style),
        _scene(story, style),
        *_told_turns(story, style, every_step=every_step),
        _usage(story.result),
        _errors(story.result, style),
        _notes(story.result, style),
        _files(story.folder),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def tell_shortly(story: Story, *, style: Style = plain) -> str:
    """What matters at the end of a run: the way it took, the verdict, usage, and what went wrong."""
    result = story.result
    way = " > ".join(visit.state for visit in story.visits)
    lines = [f"path      {way}", f"verdict   {result.verdict.owner}: {result.verdict.reason}"]
    for part in (_usage(result), _errors(result, style), _notes(result, style)):
        lines += part
    return "\n".join(lines) + "\n"


COLOURS = {"rewarded": "green", "unverified": "cyan", "void": "yellow", "failed": "red", "cancelled": "magenta"}


def headline(result: RolloutResult, style: Style = plain) -> str:
    """One line: which rollout, where it stands, and its reward."""
    colour = COLOURS.get(result.ending or "", "blue")
    reward = f"reward {result.reward:g}" if result.reward is not None else "no reward"
    where = style(result.state, fg=colour, bold=True)
    return f"{style(result.rollout, bold=True)}  {where}  {reward}  in {duration(result.seconds)}"


def _head(story: Story, style: Style) -> list[str]:
    result, about = story.result, story.about
    lines = [headline(result, style)]
    if result.task:
        lines.append(f"task      {result.task}")
    for name, role in dict(about.get("roles", {})).items():
        model = f", {role['model']}" if role.get("model") else ""
        lines.append(f"role      {name}: {role.get('agent')} ({role.get('protocol')}{model})")
    if about.get("sandbox"):
        lines.append(f"sandbox   {about['sandbox']}, network {about.get('network')}")
    if len(result.rewards) > 1:
        lines.append("rewards   " + ", ".join(f"{name} {value:g}" for name, value in result.rewards.items()))
    who = f"{result.verdict.owner}: " if result.ending else ""
    return [*lines, f"verdict   {who}{result.verdict.reason}"]


def _path(story: Story, style: Style) -> list[str]:
    lines = [style("Path", bold=True)]
    if not story.visits:
        return []
    began = story.visits[0].entered
    for visit in story.visits:
        over = visit.state in CLOSED
        spent = "" if over else duration(visit.seconds)
        then = f"{_named(visit.event)}{_cause(visit)}" if visit.event else ("" if over else "is here")
        outside = "".join(f"{_named(event)} (stayed), " for event in visit.stayed)
        lines.append(f"  {visit.entered - began:>9.3f} s  {visit.state:<18} {spent:>10}  {outside}{then}".rstrip())
    return lines


def _named(event: Event) -> str:
    """The event, and who it came from where somebody did it."""
    by = getattr(event, "by", "")
    return f"{event.name} by {one_line(by, 40)}" if by else event.name


def _cause(visit: Visit) -> str:
    return {"handler": "", "deadline": " (deadline)", "error": " (error)", "outside": " (from outside)"}.get(
        visit.cause, f" ({visit.cause})"
    )


def _scene(story: Story, style: Style) -> list[str]:
    """A scene of several roles by role: how often each spoke, what it asked and who answered, what it spent."""
    names = [*dict(story.about.get("roles", {})), *(turn.role for turn in (*story.turns, *story.asked))]
    roles = list(dict.fromkeys(names))
    if len(roles) < 2:
        return []
    lines = [style("Scene", bold=True)]
    for role in roles:
        directs = role == story.about.get("director")
        turns = [turn for turn in (story.asked if directs else story.turns) if turn.role == role]
        steps = [step for turn in turns for step in turn.steps]
        calls = sum(step.get("type") == "tool_call" for step in steps)
        took = f"turn {', '.join(str(turn.number) for turn in turns)}" if turns else "no turn"
        said = [f"directs, asked {len(turns)} times"] if directs else [took, f"{calls} tool calls"]
        if role in story.result.usage.by_role and story.result.usage.tracking == "metered":
            said.append(_used(story.result.usage.by_role[role]))
        lines.append(f"  {one_line(role)}: " + "; ".join(said))
        lines += [f"    {_step(step, style)}" for step in steps if step.get("type") == "question"]
    return lines


def _used(usage: Usage) -> str:
    """What somebody used, in a few words."""
    cost = f", ${usage.cost:.4f}" if usage.cost else ""
    return f"{usage.calls} model calls, {usage.tokens:,} tokens{cost}"


def _told_turns(story: Story, style: Style, *, every_step: bool) -> list[list[str]]:
    """The turns, and between them what a director said."""
    told, last = [], len(story.turns)
    for turn in story.turns:
        told += [_told_decision(one, style) for one in story.asked if one.number == turn.number]
        told.append(_told_turn(turn, style, every_step=every_step))
    return [*told, *(_told_decision(one, style) for one in story.asked if one.number > last)]


def _told_decision(asked: Turn, style: Style) -> list[str]:
    tokens = f": {asked.usage.tokens:,} tokens" if asked.usage.tokens else ""
    broken = "" if asked.complete else " (left, or failed)"
    head = style(f"Before turn {asked.number}", bold=True) + f"  {one_line(asked.role)}{tokens}{broken}"
    return [head, *("  " + _step(step, style) for step in asked.steps if step.get("type") in MARKS)]


def _told_turn(turn: Turn, style: Style, *, every_step: bool) -> list[str]:
    took = f" in {duration(turn.seconds)}" if turn.seconds else ""
    count = f"{len(turn.steps)} steps{took}"
    tokens = f", {_used(turn.usage)}" if turn.usage.calls else ""
    how = turn.ended_by or "open"
    whole = "" if turn.complete else (", partial" if turn.sealed else ", not sealed")
    late = f", {turn.late} steps came late" if turn.late else ""
    lines = [style(f"Turn {turn.number}", bold=True) + f"  {turn.role}: {how}{whole}; {count}{tokens}{late}"]
    steps = [step for step in turn.steps if every_step or step.get("type") in MARKS]
    left_out = 0 if every_step else max(0, len(steps) - HEAD - TAIL)
    shown = steps if not left_out else [*steps[:HEAD], *steps[-TAIL:]]
    for index, step in enumerate(shown):
        if left_out and index == HEAD:
            lines.append(style(f"  ... {left_out} more steps ...", dim=True))
        lines.append("  " + _step(step, style))
    return lines


MARKS = {
    "user_message": ">",
    "agent_message": "<",
    "agent_thought": "~",
    "tool_call": "*",
    "question": "?",
    "plan": "#",
}
"""What a step begins with, by its kind. Others (settings, counters) are told only where every step is."""


def _step(step: Mapping[str, Any], style: Style) -> str:
    kind = str(step.get("type", ""))
    mark = MARKS.get(kind, "-")
    if kind == "tool_call":
        status = str(step.get("status") or "")
        look = {"completed": {"fg": "green"}, "failed": {"fg": "red"}}.get(status, {})
        title = one_line(str(step.get("title") or step.get("kind") or "tool"), WIDTH - 20)
        return f"{mark} {title}  {style(status, **look)}".rstrip()
    if kind == "question":
        why = f": {step['why']}" if step.get("why") else ""
        answer = step.get("answer") or "no answer"
        return one_line(f"{mark} {step.get('prompt')} -> {answer} ({step.get('by')}{why})", WIDTH)
    if kind == "plan":
        entries = [f"{entry.get('content')} ({entry.get('status')})" for entry in step.get("entries") or ()]
        return f"{mark} {one_line('; '.join(entries), WIDTH - 4)}"
    text = one_line(str(step.get("text") or step.get("update") or kind), WIDTH - 4)
    return f"{mark} {style(text, dim=True) if kind == 'agent_thought' else text}"


def one_line(text: str, width: int = WIDTH) -> str:
    r"""Text of an agent as one line: its control characters cannot do anything to a terminal.

    >>> one_line("a \x1b[2J\n b", 20)
    'a ?[2J b'
    """
    line = " ".join("".join(c if c.isprintable() or c.isspace() else "?" for c in text).split())
    return line if len(line) <= width else line[: width - 4].rstrip() + " ..."


def _usage(result: RolloutResult) -> list[str]:
    usage, total = result.usage, result.usage.total
    if usage.tracking != "metered":
        return [f"usage     untracked{f': {usage.reason}' if usage.reason else ''}", *_budgets(result)]
    failed = f" ({total.failed_calls} failed)" if total.failed_calls else ""
    cached = f" ({total.cache_read_input_tokens:,} cached)" if total.cache_read_input_tokens else ""
    cost = f"${total.cost:.4f}" if total.cost is not None else "price unknown"
    tokens = f"{total.input_tokens:,} tokens in{cached}, {total.output_tokens:,} out"
    lines = [f"usage     {total.calls} calls{failed}, {tokens}, {cost}"]
    if len(usage.by_role) > 1:
        lines += [f"          {role}: {_used(one)}" for role, one in usage.by_role.items()]
    return [*lines, *_budgets(result)]


def _budgets(result: RolloutResult) -> list[str]:
    """Every budget, with what was spent of it where that is known."""
    lines = []
    for use in result.budgets:
        limit = Limit(use.scope, use.kind, use.limit, use.of)
        spent = "" if use.spent is None else f": {_amount(use.kind, use.spent)} spent"
        over = f", {_amount(use.kind, use.overshoot)} too much" if use.overshoot else ""
        lines.append(f"budget    {one_line(str(limit))}{spent}{over}")
    return lines


def _amount(kind: str, amount: float) -> str:
    """So much of a budget, as a person reads it: `120` (the budget says of what), `0.24 s`, `$0.0105`."""
    return {"cost": f"${amount:,.6g}", "wall_sec": f"{round(amount, 2):g} s"}.get(kind, f"{amount:,.12g}")


def _errors(result: RolloutResult, style: Style) -> list[str]:
    if not result.errors:
        return []
    lines = [style("Errors", bold=True)]
    for error in result.errors:
        message, *more = str(error["message"]).splitlines() or [""]
        lines.append(f"  {style(error['state'], fg='red')}  {error['error']}: {one_line(message, 400)}")
        lines += ["      ..."] if len(more) > LAST_LINES else []
        lines += [f"      {one_line(line, 400)}" for line in more[-LAST_LINES:]]
        lines += [f"      {one_line(line)}" for line in str(error.get("stderr") or "").splitlines()[-LAST_LINES:]]
    return lines


def _notes(result: RolloutResult, style: Style) -> list[str]:
    notes = [f"  {line}" for note in result.notes for line in _noted(note)]
    leaked = [f"  {style('still held', fg='red')}: {what}" for what in result.leaked]
    return [style("Notes", bold=True), *notes, *leaked] if notes or leaked else []


def _noted(note: str) -> list[str]:
    """A note as a line; a traceback as its last ones: there is the frame of what a user brought, and the error."""
    lines = note.splitlines()
    if len(lines) < 2 or TRACEBACK not in lines[0]:
        return [one_line(note, 400)]
    cut = ["    ..."] if len(lines) - 1 > LAST_LINES else []
    return [one_line(lines[0]), *cut, *(f"    {one_line(line)}" for line in lines[1:][-LAST_LINES:])]


def _files(folder: Path) -> list[str]:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    return [f"artifacts {folder}", f"          {'  '.join(names)}"]


# --- a folder of rollouts ------------------------------------------------------------------------------------


def rollouts_in(folder: Path) -> Iterator[Path]:
    """The rollout folders right under a folder, the oldest first."""
    found = [path.parent for path in folder.glob("*/journal.jsonl")]
    yield from sorted(found, key=lambda path: (path / "journal.jsonl").stat().st_mtime)


def summary(folder: Path) -> dict[str, Any]:
    """One rollout as one row: from its `result.json` where it is over, from its journal otherwise.

    A rollout whose journal cannot be read is a row that says so.
    """
    try:
        result = story_of(folder).result
    except (JournalError, ConfigError) as error:
        return {"rollout": folder.name, "state": "unreadable", "error": str(error)}
    return {
        "rollout": result.rollout,
        "task": result.task,
        "state": result.state,
        "reward": result.reward,
        "ended_by": result.ended_by,
        "turns": result.turns,
        "tokens": result.usage.total.tokens if result.usage.tracking == "metered" else None,
        "seconds": round(result.seconds, 3),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys as aligned text."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([_cell(row.get(key)) for key in keys] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(keys))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
