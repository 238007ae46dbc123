"""Directors: who decides the next turn by looking at what happened so far.

A director is a callable, plain or async, that gets the `Story` and returns the next `Turn`, `CHECK` for a soft
verification (feedback, never the reward), or None for the end:

    def once_more(story: Story) -> Turn | None:
        if not story.turns:
            return Turn("coder")
        return Turn("coder", "Are you sure?") if len(story.turns) < 2 else None

    RolloutConfig(task=..., scene=..., director=once_more)

It is asked once per decision: the decision is journaled with the event that it leads to. Budgets and the bound on
checks hold whatever it says; after a turn that spent a budget it may go on with other roles. Shipped here:
`scripted_user`, `until_verified`, `until_approved`; and `model_user`, whose director is an agent
(`orchestrator.directing`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import attrs

from orchestrator.budgets import Limits
from orchestrator.capture import RecordedSegment
from orchestrator.config import DirectorRole, Role, Turn
from orchestrator.registry import AgentConfig
from states.errors import ConfigError
from states.events import Captured, Checked, Next, Prompted, Recovered
from states.journal import Folded, Header, Record, Transition, fold, fold_record
from states.machine import Facts

CHECK: Final = Next("check")
"""Ask for a soft verification: the next story's `feedback` holds what it said."""

Decision = Turn | Next | None
Director = Callable[["Story"], "Decision | Awaitable[Decision]"]


@attrs.frozen
class TurnTaken:
    """One turn that is over: who was prompted with what, how it ended, and the feedback of a check after it."""

    role: str
    prompt: str
    ended_by: str = ""
    complete: bool = False
    steps: tuple[Mapping[str, Any], ...] = ()
    feedback: Mapping[str, float] | None = None

    @property
    def said(self) -> str:
        """The agent's messages of this turn, as one text."""
        return "\n".join(str(step.get("text", "")) for step in self.steps if step.get("type") == "agent_message")


@attrs.define(eq=False, slots=False)
class Story:
    """What happened so far, as a director sees it. Steps are read from disk when somebody looks at them."""

    instruction: str
    _records: Sequence[Record]
    _segments: Callable[[], list[RecordedSegment]]
    _limits: Limits = Limits()

    def spent(self, role: str) -> str:
        """Why `role` can take no further turn (which budget is spent), empty while it can.

        A turn that is given to it all the same is not taken: the rollout ends, and says so.
        """
        limits = self._limits.holding(role)
        return str(next(self._limits.gone(limits, fold(self._records).position.facts.ledger), ""))

    @functools.cached_property
    def turns(self) -> tuple[TurnTaken, ...]:
        """Every turn that was taken, in order. One that was cut off, and is asked again, is not among them."""
        segments = {segment.number: segment for segment in self._segments()}
        return tuple(_with_steps(turn, segments.get(number)) for number, turn in self._taken().items())

    @property
    def coming(self) -> int:
        """The number of the turn that is decided now: its segment's."""
        return 1 + sum(isinstance(move.event, Prompted) for move in self._moves())

    @property
    def checks(self) -> int:
        """How many soft verifications there were."""
        return sum(isinstance(move.event, Checked) for move in self._moves())

    def _moves(self) -> Iterator[Transition]:
        return (record for record in self._records if isinstance(record, Transition))

    def _taken(self) -> dict[int, TurnTaken]:
        """The turns by the number of their segment."""
        taken: dict[int, TurnTaken] = {}
        again: set[int] = set()
        for event, facts in _events(self._records):
            number = facts.prompted
            match event:
                case Prompted(role=role, text=text):
                    taken[number] = TurnTaken(role, text)
                case Captured(complete=complete):
                    taken[number] = attrs.evolve(taken[number], ended_by=facts.ended_by, complete=complete)
                case Checked(feedback=feedback) if taken:
                    taken[number] = attrs.evolve(taken[number], feedback=feedback)
                case Recovered(again=Next()):
                    again.add(number)
        return {number: turn for number, turn in taken.items() if number not in again}


def _with_steps(turn: TurnTaken, segment: RecordedSegment | None) -> TurnTaken:
    return attrs.evolve(turn, steps=tuple(step.data for step in segment.steps)) if segment else turn


def _events(records: Sequence[Record]) -> Iterator[tuple[Any, Facts]]:
    header = records[0]
    assert isinstance(header, Header), "a journal begins with its header"
    folded = Folded(header)
    for record in records[1:]:
        folded = fold_record(folded, record)
        if isinstance(record, Transition):
            yield record.event, folded.position.facts


@attrs.frozen
class DirectedPlan:
    """A `states.ports.Plan` whose decisions are a director's."""

    director: Director
    tell: Callable[[], Story]
    roles: tuple[str, ...]
    max_checks: int

    async def next(self, _facts: Facts) -> Next:
        """Ask the director, within the bounds. Raises what it raises, `ConfigError` for what is no decision."""
        story = self.tell()
        answer = self.director(story)
        decision = await answer if inspect.isawaitable(answer) else answer
        if isinstance(decision, Next) and decision.kind == "check" and story.checks >= self.max_checks:
            return Next("done", why=f"the limit of {self.max_checks} checks is reached")
        return self._next(decision, story)

    def _next(self, decision: object, story: Story) -> Next:
        match decision:
            case None:
                return Next("done", why="the director ended it")
            case Next():
                return decision
            case Turn(role=role, prompt=prompt) if role in self.roles:
                text = story.instruction if prompt is None else prompt
                return Next("turn", role, text, budgets=decision.budgets.given())
            case Turn(role=role):
                raise ConfigError(f"the director gave a turn to {role!r}; the scene has {', '.join(self.roles)}")
            case _:
                raise ConfigError(f"the director returned {decision!r}; expected a Turn, CHECK or None")


# --- directors that ship -------------------------------------------------------------------------------------


def scripted_user(role: str, lines: Sequence[str | None]) -> Director:
    """A user who says these lines to `role`, one a turn; None is the task's instruction."""

    def user(story: Story) -> Decision:
        taken = len(story.turns)
        return Turn(role, lines[taken]) if taken < len(lines) else None

    return user


def until_verified(role: str, *, limit: int = 3, enough: float = 1.0) -> Director:
    """Let `role` try again, told what the check said, until it gives `enough` or `limit` turns are taken.

    What the check says is feedback; the reward is given at the end, on a dead scene, like any other.
    """

    def retry(story: Story) -> Decision:
        if not story.turns:
            return Turn(role)
        last = story.turns[-1]
        if story.checks < len(story.turns):
            return CHECK if len(story.turns) < limit else None
        if last.feedback is not None and last.feedback.get("reward", 0.0) >= enough:
            return None
        found = ", ".join(f"{name} {value:g}" for name, value in (last.feedback or {}).items()) or "nothing readable"
        return Turn(role, f"The work was checked and is not right yet ({found}). Look at the task again and mend it.")

    return retry


def until_approved(worker: str, reviewer: str, *, approval: str = "APPROVED", limit: int = 3) -> Director:
    """`worker` works, `reviewer` reviews; until the reviewer says `approval`, or `limit` reviews are over."""

    def review(story: Story) -> Decision:
        if not story.turns:
            return Turn(worker)
        last = story.turns[-1]
        if last.role == worker:
            return Turn(reviewer, f"{story.instruction}\n\nReview the work. Say {approval} when it is right.")
        reviews = sum(turn.role == reviewer for turn in story.turns)
        if approval in last.said or reviews >= limit:
            return None
        return Turn(worker, f"The reviewer said:\n\n{last.said}\n\nMend it.")

    return review


# --- a user played by a model --------------------------------------------------------------------------------

_USER = """\
You play the user in a conversation with an agent that works for you. Stay in that role: write as this user would, \
briefly, never as the agent, and never about playing a role. You are done when you have got what you want, or see that \
you will not get it."""


def model_user(
    model: str,
    *,
    persona: str,
    facts: Mapping[str, str] | None = None,
    limit: int | None = 8,
    name: str = "user",
    agent: str | AgentConfig = "model-user",
    **role: Any,
) -> DirectorRole:
    """A user played by a model, which is called through the gateway as the role `name`.

        RolloutConfig(task=..., agent="codex-acp", model="openai/gpt-5", director=model_user(
            "openai/gpt-5-mini", persona="You are impatient.", facts={"order_id": "BF-1042"}))

    Args:
        model: `provider/name`, as for every role.
        persona: Who the user is, and what it wants.
        facts: What it alone knows, and tells when it is asked for it.
        limit: So many turns are taken at most, the scene's own among them (those are always taken).
        name: Its name in the scene, in `llm.jsonl` and in the usage by role.
        agent: Who plays it: any session-factory agent that needs no sandbox.
        role: Further keywords of `Role`.
    """
    known = [f"- {key.replace('_', ' ')}: {value}" for key, value in (facts or {}).items()]
    parts = [_USER, f"Who you are:\n{persona.strip()}"] if persona.strip() else [_USER]
    if known:
        parts.append("What you alone know. Tell a fact when you are asked for it, and not before:\n" + "\n".join(known))
    return DirectorRole(Role(name, agent, model, **role), "\n\n".join(parts), limit)
