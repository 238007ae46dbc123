"""Explores a machine: every node that any legal event, at any time, can reach.

A node is a position (counters capped, texts dropped: no guard can tell the difference) and a `Ghost`: what is true in
the world, tracked beside the machine from the events alone, so that a wrong fold cannot hide a wrong edge. An
exploration is a function of a table, so a mutated table can be given to the same checks.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs

from states import events as ev
from states import machine as m
from states.errors import IllegalTransition

FAILURE = ev.Failure("agent", "AgentError", "it failed")
FINAL_FAILURE = attrs.evolve(FAILURE, retryable=False)

ALPHABET: tuple[ev.Event, ...] = (
    ev.Provisioned(),
    ev.RoleAssigned("coder", ev.Next("turn", "coder", "do it")),
    ev.AcpOpened("s1"),
    ev.FactoryOpened("s1"),
    ev.ConnectFailed(FAILURE),
    ev.ConnectFailed(FINAL_FAILURE),
    ev.Prompted(1, "coder", "do it"),
    ev.RoleSwapped(ev.Next("turn", "reviewer", "look")),
    ev.PlanDone(),
    ev.CheckAsked(),
    ev.Checked(),
    ev.Paused(),
    ev.Resumed(),
    ev.TurnEnded("end_turn"),
    ev.TurnFailed(FAILURE),
    ev.DeadlinePassed(900.0),
    ev.IdlePassed(60.0),
    ev.BudgetSpent("turn", "tokens", 10, 12),
    ev.Interrupted(),
    ev.Failed(FAILURE),
    ev.Settled("cancelled"),
    ev.Unresponsive(),
    ev.Lost(FAILURE),
    ev.Captured(1),
    ev.Captured(1, tool_calls=1),
    ev.Captured(1, usage=ev.Usage(calls=1, input_tokens=1)),
    ev.Captured(1, usage=ev.Usage(calls=1)),
    ev.Quiet(),
    ev.Quiet(usage=ev.Usage(calls=1, input_tokens=1)),
    ev.Unquiet(FAILURE),
    ev.Verified(1.0),
    ev.VerifierFailed(FAILURE),
    ev.SandboxFailed(FAILURE),
    ev.Cancelled(),
    ev.Recovered(1),
    ev.Released(),
)
"""One event for each effect that a guard could ever see."""

CONFIGURATIONS: tuple[m.Rules, ...] = tuple(
    m.Rules(metered=metered, has_verifier=has_verifier, can_freeze=can_freeze)
    for metered, has_verifier, can_freeze in itertools.product((False, True), repeat=3)
)
"""The 8 of machine.md."""

REQUIRED: tuple[m.Rules, ...] = (m.Rules(usage_required=True), m.Rules(usage_required=True, metered=True))
"""Usage required, which came after them."""

SMALL = (CONFIGURATIONS[-1], CONFIGURATIONS[0], REQUIRED[0])
"""Three that together reach all 106 edges."""

Fire = Callable[[m.Position, ev.Event, m.Rules], m.Position]
Table = tuple[m.Row, ...]


@attrs.frozen
class Ghost:
    """What is true in the world, whatever the machine believes."""

    provisioned: bool = False
    alive: bool = False
    """A process of an agent may be alive."""
    open: bool = False
    """A prompt was sent and its segment is not sealed."""
    leased: bool = True
    """We hold a sandbox, or meant to take one: journaled on entry."""
    verified: bool = False
    dead: bool = False
    """The session, of which something may be alive, is unusable."""
    unquiet: bool = False
    cancelled: bool = False
    """Cancelled came before any other ending."""
    prompted: bool = False
    worked: bool = False
    """Tokens or tool calls were seen."""
    called: bool = False
    """A model call was seen."""

    def silent(self, rules: m.Rules) -> bool:
        """Whether this rollout did nothing that could be graded, as design.md rule 10 has it."""
        nothing = (rules.metered and not self.worked) or (rules.usage_required and not self.called)
        return self.prompted and nothing


def haunt(ghost: Ghost, event: ev.Event, source: m.Position, target: m.Position) -> Ghost:
    """The world after `event`."""
    spent = getattr(event, "usage", ev.Usage())
    activity = {
        "worked": ghost.worked or bool(spent.tokens or getattr(event, "tool_calls", 0)),
        "called": ghost.called or bool(spent.calls),
    }
    changes: dict[type[ev.Event], dict[str, bool]] = {
        ev.Provisioned: {"provisioned": True},
        ev.RoleAssigned: {"alive": ghost.alive or target.state == "connecting"},
        ev.Prompted: {"open": True, "prompted": True},
        ev.Captured: {"open": False, **activity},
        ev.Lost: {"dead": True},
        ev.Unresponsive: {"dead": True},
        ev.Recovered: {"dead": ghost.alive},
        ev.Quiet: {"alive": False, "dead": False, **activity},
        ev.Unquiet: {"unquiet": True},
        ev.Verified: {"verified": True},
        ev.Cancelled: {"cancelled": ghost.cancelled or source.facts.ending is None},
        ev.Released: {"leased": False},
    }
    return attrs.evolve(ghost, **changes.get(type(event), {}))


@attrs.frozen
class Node:
    """Where a rollout is, and what is true in the world."""

    position: m.Position
    ghost: Ghost

    @property
    def state(self) -> str:
        return self.position.state

    @property
    def facts(self) -> m.Facts:
        return self.position.facts


@attrs.frozen(eq=False)
class Step:
    """One event that was fired, the row that took it, and where it led."""

    source: Node
    event: ev.Event
    row: m.Row
    target: Node

    @property
    def edge(self) -> tuple[m.Row, str]:
        """One of the 106."""
        return self.row, self.source.state

    @property
    def moves(self) -> bool:
        """Whether the state changed (a row that stays, or a retry in place, does not)."""
        return self.source.state != self.target.state

    def __str__(self) -> str:
        return f"{self.source.position} --{self.event}--> {self.target.position} ({self.target.ghost})"


@attrs.define(eq=False)
class Graph:
    """Everything that is reachable under one set of rules."""

    rules: m.Rules
    steps: Mapping[Node, tuple[Step, ...]]
    stuck: tuple[str, ...]
    """Legal events that no row took."""

    def all(self) -> Iterator[Step]:
        """Every step."""
        return itertools.chain.from_iterable(self.steps.values())

    def longest(self, start: Iterable[Node], allowed: Callable[[Step], bool]) -> Mapping[Node, int]:
        """Most moves on any path of allowed steps from each node.

        Raises `EndlessError` when such a path can go round for ever. Steps back to the very same node do not count:
        they change nothing at all.
        """
        known: dict[Node, int] = {}
        on_path: set[Node] = set()
        stack: list[tuple[Node, Iterator[Step], int]] = []

        def enter(node: Node) -> None:
            on_path.add(node)
            stack.append((node, (s for s in self.steps[node] if s.target != node and allowed(s)), 0))

        for root in start:
            if root in known:
                continue
            enter(root)
            while stack:
                node, steps, best = stack.pop()
                for step in steps:
                    if step.target in on_path:
                        raise EndlessError(str(step))
                    if step.target not in known:
                        stack.append((node, itertools.chain((step,), steps), best))
                        enter(step.target)
                        break
                    best = max(best, known[step.target] + step.moves)
                else:
                    known[node] = best
                    on_path.discard(node)
        return known

    def reaches(self, goal: Callable[[Node], bool], allowed: Callable[[Step], bool]) -> set[Node]:
        """The nodes that have a way of allowed steps to the goal."""
        back: dict[Node, list[Node]] = defaultdict(list)
        for step in self.all():
            if allowed(step):
                back[step.target].append(step.source)
        found = {node for node in self.steps if goal(node)}
        queue = deque(found)
        while queue:
            for node in back[queue.popleft()]:
                if node not in found:
                    found.add(node)
                    queue.append(node)
        return found


class EndlessError(AssertionError):
    """A path that must be finite goes round."""


@attrs.define(eq=False, slots=False)
class Space:
    """A table and its graphs (explored when somebody looks): what an invariant is a statement about."""

    table: Table
    fire: Fire
    configurations: tuple[m.Rules, ...] = (*CONFIGURATIONS, *REQUIRED)

    @classmethod
    def of(cls, table: Table, configurations: tuple[m.Rules, ...] = (*CONFIGURATIONS, *REQUIRED)) -> Space:
        """The space of any table, run by the plain interpreter."""
        return cls(table, interpreter(table), configurations)

    @functools.cached_property
    def graphs(self) -> tuple[Graph, ...]:
        """One graph a configuration."""
        return tuple(explore(self.table, self.fire, rules) for rules in self.configurations)

    def steps(self) -> Iterator[tuple[m.Rules, Step]]:
        """Every step under every configuration."""
        for graph in self.graphs:
            for step in graph.all():
                yield graph.rules, step

    def nodes(self) -> Iterator[tuple[m.Rules, Node]]:
        """Every node under every configuration."""
        for graph in self.graphs:
            for node in graph.steps:
                yield graph.rules, node

    def rows(self, event: type[ev.Event], state: str) -> tuple[m.Row, ...]:
        """The rows of one event in one state, in order."""
        return tuple(row for row in self.table if row.event is event and state in row.sources)


def canonical(position: m.Position, rules: m.Rules) -> m.Position:
    """The same position as far as any guard can tell, so that the space is finite."""
    facts = position.facts
    return m.Position(
        position.state,
        m.Facts(
            ending=facts.ending,
            link=facts.link,
            connects=min(facts.connects, rules.max_connects + 1),
            verifies=min(facts.verifies, rules.max_verifies + 1),
            prompted=min(facts.prompted, 1),
            tool_calls=min(facts.tool_calls, 1),
            usage=(usage := ev.Usage(calls=min(facts.usage.calls, 1), input_tokens=min(facts.usage.tokens, 1))),
            ledger=(ev.Share("", 1, usage),) if usage != ev.Usage() else (),
        ),
    )


def interpreter(table: Table) -> Fire:
    """The plainest machine that runs a table: the first row that fits is taken."""
    index: dict[tuple[type[ev.Event], str], list[m.Row]] = defaultdict(list)
    for row in table:
        for source in row.sources:
            index[row.event, source].append(row)

    def fire(position: m.Position, event: ev.Event, rules: m.Rules) -> m.Position:
        for row in index.get((type(event), position.state), ()):
            if row.guard is None or row.guard(position.facts, event, rules):
                return m.Position(row.to or position.state, m.fold(position.facts, event, row, position.state, rules))
        raise IllegalTransition(position.state, event.name)

    return fire


def explore(table: Table, fire: Fire, rules: m.Rules) -> Graph:
    """Fire every legal event in every node, from the start on, until nothing new comes up."""
    index: dict[str, list[tuple[ev.Event, tuple[m.Row, ...]]]] = {}
    for state in m.STATES:
        fitting = ((e, tuple(r for r in table if r.event is type(e) and state in r.sources)) for e in ALPHABET)
        index[state] = [(event, rows) for event, rows in fitting if rows]
    moves: dict[m.Position, list[tuple[ev.Event, m.Row, m.Position]]] = {}
    stuck: list[str] = []

    def movements(position: m.Position) -> list[tuple[ev.Event, m.Row, m.Position]]:
        found = []
        for event, rows in index[position.state]:
            try:
                target = canonical(fire(position, event, rules), rules)
            except IllegalTransition as error:
                stuck.append(f"{error} at {position}")
                continue
            row = next(row for row in rows if row.guard is None or row.guard(position.facts, event, rules))
            found.append((event, row, target))
        return found

    start = Node(m.Position(), Ghost())
    steps: dict[Node, tuple[Step, ...]] = {}
    queue = deque([start])
    seen = {start}
    while queue:
        node = queue.popleft()
        if node.position not in moves:
            moves[node.position] = movements(node.position)
        taken = []
        for event, row, target in moves[node.position]:
            there = Node(target, haunt(node.ghost, event, node.position, target))
            taken.append(Step(node, event, row, there))
            if there not in seen:
                seen.add(there)
                queue.append(there)
        steps[node] = tuple(taken)
    return Graph(rules, steps, tuple(stuck))
