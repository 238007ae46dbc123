"""What came of a rollout: one neutral, typed value, a fold of its journal and written once as `result.json`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from orchestrator.budgets import Budgets, Limit, Limits, limits_of
from states.errors import Owner
from states.events import Captured, Ending, Failure, Prompted, Recovered, Released, Scope, Share, Usage, Verified
from states.journal import Folded, Note, Record, Transition
from states.machine import CLOSED, INITIAL

SCHEMA = 1


@attrs.frozen
class Verdict:
    """Who owns the ending, and why, in a sentence. It comes from the edge that was taken and its evidence.

    >>> Verdict("provider", "nothing was done: all 3 model calls failed").owner
    'provider'
    """

    owner: Owner
    reason: str


@attrs.frozen
class TrackedUsage:
    """What models were used for, and by whom. `tracking` is `metered` or `untracked`, and then `reason` says why.

    `by_turn` has a share for each turn, in order, and one with turn 0 for what a role used outside its turns. Both
    `by_role` and `by_turn` add up to `total`.

    >>> TrackedUsage("untracked", "usage_tracking is off").total.tokens
    0
    """

    tracking: str
    reason: str = ""
    total: Usage = Usage()
    by_role: Mapping[str, Usage] = attrs.field(factory=dict)
    by_turn: tuple[Share, ...] = ()


@attrs.frozen
class BudgetUse:
    """A budget there was, what was spent of it, and by how much that is too much.

    `of` names the role, or the turn by its number. `spent` is None where nothing adds up (silences), or where it is not
    known (a price). See `orchestrator.budgets`.
    """

    scope: Scope
    of: str
    kind: str
    limit: float
    spent: float | None
    overshoot: float = 0.0


@attrs.frozen
class RolloutResult:
    """The outcome of one rollout.

    `reward` is None unless the rollout was verified; `verdict.reason` says why. `state` is where it stands: a `closed`
    leaf, or the state in which it was stopped. Times are seconds, `started` since the epoch. `trajectory_source` is one
    of `acp | session | partial_acp | partial_session` (partial: the last turn is), empty when no turn was taken.
    `leaked` is what could not be given back; what was kept by the user's own wish is a note.

    Example:
        >>> from orchestrator import RolloutConfig, run_sync
        >>> from orchestrator.sandboxes.fake import FakeSandbox
        >>> result = run_sync(RolloutConfig(prompt="Do it.", agent="scripted", sandbox=FakeSandbox(), out=None))
        >>> result.state, result.reward, result.ended_by, result.usage.tracking
        ('closed/unverified', None, 'end_turn', 'untracked')
    """

    rollout: str
    task: str
    state: str
    ending: Ending | None
    reward: float | None
    verdict: Verdict
    ended_by: str
    usage: TrackedUsage
    rewards: Mapping[str, float] = attrs.field(factory=dict)
    trajectory_source: str = ""
    turns: int = 0
    steps: int = 0
    tool_calls: int = 0
    state_seconds: Mapping[str, float] = attrs.field(factory=dict)
    started: float = 0.0
    seconds: float = 0.0
    errors: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    leaked: tuple[str, ...] = ()
    budgets: tuple[BudgetUse, ...] = ()
    folder: Path | None = None
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """The document that `result.json` holds; `orchestrator/result.schema.json` is its JSON Schema."""
        document = attrs.asdict(self)
        document["folder"] = str(self.folder) if self.folder else None
        return document

    def _repr_html_(self) -> str:
        """What a notebook shows: the outcome, and the run on the machine."""
        return self._repr_mimebundle_()["text/html"]

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:  # noqa: ARG002
        """The same by media type; IPython picks."""
        from orchestrator.notebook import shown

        return shown(self)


def result_of(
    folded: Folded, records: Sequence[Record], *, task: str, tracking: str, why_untracked: str, folder: Path | None
) -> RolloutResult:
    """Fold a journal's records into the result. Reads nothing else, so a journal alone gives it too."""
    facts = folded.position.facts
    moves = [record for record in records if isinstance(record, Transition)]
    start = folded.header.time
    return RolloutResult(
        rollout=folded.header.rollout,
        task=task,
        state=folded.position.state,
        ending=facts.ending,
        reward=facts.reward,
        rewards=next((dict(m.event.rewards) for m in moves if isinstance(m.event, Verified)), {}),
        verdict=verdict_of(folded),
        ended_by=facts.ended_by,
        usage=TrackedUsage(tracking, why_untracked, facts.usage, _by_role(facts.ledger), facts.ledger),
        trajectory_source=_source(moves),
        turns=facts.prompted,
        steps=facts.steps,
        tool_calls=facts.tool_calls,
        state_seconds=seconds_by_state(start, moves),
        started=start,
        seconds=round(moves[-1].time - start, 6) if moves else 0.0,
        errors=tuple(_errors(moves)),
        notes=tuple(record.text for record in records if isinstance(record, Note)),
        leaked=_leaked(folded, moves),
        budgets=tuple(_budgets(folded, records, moves)),
        folder=folder,
    )


def redacted(result: RolloutResult, clean: Callable[[str], str]) -> RolloutResult:
    """The result with every text that came from elsewhere cleaned: it leaves the process too."""
    errors = tuple({k: clean(v) if isinstance(v, str) else v for k, v in error.items()} for error in result.errors)
    verdict = attrs.evolve(result.verdict, reason=clean(result.verdict.reason))
    return attrs.evolve(result, verdict=verdict, errors=errors, notes=tuple(map(clean, result.notes)))


def verdict_of(folded: Folded) -> Verdict:
    """Who owns the ending: read off the ending, the failure that came with it, and what was metered."""
    facts = folded.position.facts
    failure = facts.failure
    match facts.ending:
        case "rewarded":
            return Verdict("agent", f"verified; the last turn ended by {facts.ended_by or 'nothing: none was taken'}")
        case "unverified":
            return Verdict("agent", "not verified: there is no verifier, or its host has one of its own")
        case "void" if facts.worked.failed_calls and facts.worked.failed_calls == facts.worked.calls:
            words = f": {failure.message}" if failure is not None and failure.owner == "provider" else ""
            return Verdict("provider", f"nothing was done: all {facts.worked.calls} model calls failed{words}")
        case "void":
            return Verdict("agent", f"nothing was done: {facts.worked.calls} model calls, no tokens and no tool calls")
        case "cancelled":
            return Verdict("operator", "cancelled")
        case "failed" if failure:
            return Verdict(failure.owner, f"{failure.error}: {failure.message}")
        case "failed":
            return Verdict("harness", "failed")
        case None:
            how = f", stopped by {folded.stopped}" if folded.stopped else ""
            return Verdict("operator", f"not over: in {folded.position.state}{how}")


def seconds_by_state(start: float, moves: Sequence[Transition]) -> dict[str, float]:
    """Seconds spent in each state, by the journal's clock."""
    spent: dict[str, float] = {}
    since = start
    for move in moves:
        spent[move.source] = round(spent.get(move.source, 0.0) + move.time - since, 6)
        since = move.time
    return spent


def _by_role(ledger: Sequence[Share]) -> dict[str, Usage]:
    spent: dict[str, Usage] = {}
    for share in ledger:
        spent[share.role] = spent.get(share.role, Usage()) + share.usage
    return spent


_NOT_TIMED = frozenset({"paused", "verifying", "releasing", *CLOSED})
"""States whose time is not the rollout's."""


def driven_sec(records: Sequence[Record]) -> float:
    """Seconds of its own clock that a rollout has used: not those of pauses and of its end, nor when nobody drove it.

    `records` are a whole journal.
    """
    spent, since, state = 0.0, records[0].time, INITIAL
    for record in records[1:]:
        taken_over = isinstance(record, Transition) and isinstance(record.event, Recovered)
        if state not in _NOT_TIMED and not taken_over:
            spent += record.time - since
        since, state = record.time, record.dest if isinstance(record, Transition) else state
    return round(spent, 6)


def _budgets(folded: Folded, records: Sequence[Record], moves: Sequence[Transition]) -> Iterator[BudgetUse]:
    """Every budget, by the journal alone: its header names those that outlive a turn, each prompt those of its turn."""
    header = [Limit(**limit) for limit in folded.header.info.get("budgets", ())]
    prompts = [move.event for move in moves if isinstance(move.event, Prompted)]
    turns = (limits_of("turn", Budgets.of(p.budgets), str(number)) for number, p in enumerate(prompts, 1))
    roles = {role: Budgets() for role in folded.header.info.get("roles", ())}
    limits = Limits(roles=roles)
    for limit in (*header, *(limit for own in turns for limit in own)):
        spent = limits.amount(limit, folded.position.facts.ledger)
        if (limit.scope, limit.kind) == ("rollout", "wall_sec"):
            spent = driven_sec(records)
        over = round(max(0.0, (spent or 0.0) - limit.limit), 12)
        yield BudgetUse(limit.scope, limit.of, limit.kind, limit.limit, spent, over)


def _source(moves: Sequence[Transition]) -> str:
    opened = [move.dest for move in moves if move.source == "connecting" and move.dest.startswith("session/")]
    captures = [move.event for move in moves if isinstance(move.event, Captured)]
    if not captures or not opened:
        return ""
    label = "acp" if opened[-1] == "session/acp" else "session"
    return label if captures[-1].complete else f"partial_{label}"


def _leaked(folded: Folded, moves: Sequence[Transition]) -> tuple[str, ...]:
    """What a closed rollout still holds against everybody's wish: what its user wanted to keep is not lost."""
    kept = moves[-1].event.kept if moves and isinstance(moves[-1].event, Released) else ()
    held = (f"{lease.kind} {lease.name}" for lease in folded.leases.values())
    return tuple(name for name in held if name not in kept) if folded.position.closed else ()


def _errors(moves: Sequence[Transition]) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for move in moves:
        failure: Failure | None = getattr(move.event, "failure", None)
        if failure is not None:
            found.append({"state": move.source, "event": move.event.name, "time": move.time, **attrs.asdict(failure)})
    return found
