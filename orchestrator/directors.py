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

import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Final, overload

import attrs

from orchestrator._tasks import foreign
from orchestrator._words import shown, traced
from orchestrator.budgets import Limits
from orchestrator.config import DirectorRole, Role, Turn
from orchestrator.registry import AgentConfig
from states.errors import ConfigError, DirectorError, OrchestratorError, said
from states.events import Captured, Checked, Event, Next, Prompted, Recovered, Share
from states.journal import Folded, Header, Record, Transition, fold_record
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
    steps: Sequence[Mapping[str, Any]] = ()
    feedback: Mapping[str, float] | None = None

    @property
    def said(self) -> str:
        """The agent's messages of this turn, as one text."""
        return "\n".join(str(step.get("text", "")) for step in self.steps if step.get("type") == "agent_message")


@attrs.frozen
class Story:
    """What happened so far, as a director sees it.

    `turns` are those that were taken, in order; one that was cut off, and is asked again, is not among them. Their
    steps are read when somebody looks at them. `checks` counts the soft verifications, and `coming` is the number of
    the turn that is decided now: its segment's.
    """

    instruction: str
    turns: tuple[TurnTaken, ...] = ()
    checks: int = 0
    coming: int = 1
    _ledger: tuple[Share, ...] = attrs.field(default=(), repr=False)
    _limits: Limits = attrs.field(default=Limits(), repr=False)

    def spent(self, role: str) -> str:
        """Why `role` can take no further turn (which budget is spent), empty while it can.

        A turn that is given to it all the same is not taken: the rollout ends, and says so.
        """
        return str(next(self._limits.gone(self._limits.holding(role), self._ledger), ""))


@attrs.frozen(eq=False)
class _Steps(Sequence[Mapping[str, Any]]):
    """The steps of one turn, read from where they were written when somebody looks at them."""

    _read: Callable[[int], tuple[Mapping[str, Any], ...]] = attrs.field(repr=False)
    _number: int
    _found: list[tuple[Mapping[str, Any], ...]] = attrs.field(factory=list, init=False)

    def _all(self) -> tuple[Mapping[str, Any], ...]:
        if not self._found:
            self._found.append(self._read(self._number))
        return self._found[0]

    @overload
    def __getitem__(self, at: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Mapping[str, Any]]: ...
    def __getitem__(self, at: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        return self._all()[at]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


@attrs.define(eq=False)
class Chronicle:
    """Tells the story of a rollout while it happens. Each time costs what is new, however long it is by then."""

    instruction: str
    _records: Sequence[Record]
    """The journal's own, which grows."""
    _steps: Callable[[int], tuple[Mapping[str, Any], ...]]
    _limits: Limits
    _told: list[Folded] = attrs.field(factory=list, init=False)
    """The fold of the records that were read, once there is one."""
    _read: int = attrs.field(default=1, init=False)
    _taken: dict[int, TurnTaken] = attrs.field(factory=dict, init=False)
    _checks: int = attrs.field(default=0, init=False)

    def __call__(self) -> Story:
        """The story so far."""
        for record in self._records[self._read :]:
            folded = fold_record(self._fold(), record)
            self._told[:] = [folded]
            self._read += 1
            if isinstance(record, Transition):
                self._happened(record.event, folded.position.facts)
        facts = self._fold().position.facts
        turns = tuple(
            turn if turn.ended_by else attrs.evolve(turn, steps=_Steps(self._steps, number))  # more may have come
            for number, turn in self._taken.items()
        )
        return Story(self.instruction, turns, self._checks, facts.prompted + 1, facts.ledger, self._limits)

    def _fold(self) -> Folded:
        if not self._told:
            header = self._records[0]
            assert isinstance(header, Header), "a journal begins with its header"
            self._told.append(Folded(header))
        return self._told[0]

    def _happened(self, event: Event, facts: Facts) -> None:
        number = facts.prompted
        match event:
            case Prompted(role=role, text=text):
                self._taken[number] = TurnTaken(role, text, steps=_Steps(self._steps, number))
            case Captured(complete=complete) if turn := self._taken.get(number):
                self._taken[number] = attrs.evolve(turn, ended_by=facts.ended_by, complete=complete)
            case Checked(feedback=feedback):
                self._checks += 1
                if turn := self._taken.get(number):
                    self._taken[number] = attrs.evolve(turn, feedback=feedback)
            case Recovered(again=Next()):
                self._taken.pop(number, None)


@attrs.frozen
class DirectedPlan:
    """A `states.ports.Plan` whose decisions are a director's."""

    director: Director
    tell: Callable[[], Story]
    roles: tuple[str, ...]
    max_checks: int
    note: Callable[[str], None] = attrs.field(default=lambda _text: None, repr=False)
    """Gets the traceback of what a director raised."""

    async def next(self, _facts: Facts) -> Next:
        """Ask the director, within the bounds. Raises `DirectorError`, `ConfigError` for what is no decision."""
        story = self.tell()
        decision = await self._asked(story)
        if isinstance(decision, Next) and decision.kind == "check" and story.checks >= self.max_checks:
            return Next("done", why=f"the limit of {self.max_checks} checks is reached")
        return self._next(decision, story)

    async def _asked(self, story: Story) -> Decision:
        try:
            with foreign():
                answer = self.director(story)
                return await answer if inspect.isawaitable(answer) else answer
        except OrchestratorError:
            raise
        except Exception as error:
            self.note(traced(error))
            raise DirectorError(f"the director raised {type(error).__name__}: {said(error)}") from error

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


def _check_limit(name: str, limit: object) -> None:
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ConfigError(f"{name}: limit must be a whole number, 1 or more, not {shown(limit)}")


def until_verified(role: str, *, limit: int = 3, enough: float = 1.0) -> Director:
    """Let `role` try again, told what the check said, until it gives `enough` or `limit` turns are taken.

    What the check says is feedback; the reward is given at the end, on a dead scene, like any other.
    Raises `ConfigError` for a `limit` below 1.
    """
    _check_limit("until_verified", limit)

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
    """`worker` works, `reviewer` reviews; until the reviewer says `approval`, or `limit` reviews are over.

    Raises `ConfigError` for a `limit` below 1.
    """
    _check_limit("until_approved", limit)

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
