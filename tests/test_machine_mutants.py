"""Who watches the checks: every broken table must be caught by one of them, or behave exactly like the whole one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator

import attrs
import pytest
import test_machine_invariants as invariants
from machine_space import SMALL, Space, Table
from test_machine_traces import TRACES, pairs, walk

from states import events as ev
from states import machine as m

Edge = tuple[int, str]
EDGES: tuple[Edge, ...] = tuple((number, source) for number, row in enumerate(m.TABLE) for source in row.sources)


def named(edge: Edge) -> str:
    """An edge for a reader."""
    number, source = edge
    row = m.TABLE[number]
    guard = f" [{row.guard.__name__}]" if row.guard else ""
    return f"{row.event.__name__}{guard}: {source} -> {row.to or 'stays'}"


def checks() -> Iterator[tuple]:
    """Every invariant, with each of its parameters; the cheap ones, which look at the table only, stand first."""
    for name, test in vars(invariants).items():
        if name.startswith("test_") and "space" in inspect.signature(test).parameters:
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            for value in marks[0].args[1] if marks else [None]:
                yield (name, test, {} if value is None else {marks[0].args[0]: value})


STATIC = 7
"""So many invariants read the table and need no exploration."""


def caught(table: Table, *, traces: bool = True) -> str:
    """The name of the first check that a table does not pass; empty when it passes them all."""
    space = Space.of(table, SMALL)
    found = _first_failure(space, list(checks())[:STATIC])
    if not found and traces:
        wrong = (name for name, (rules, text) in TRACES.items() if walk(space.fire, rules, text) != pairs(text))
        found = next(wrong, "")
    return found or _first_failure(space, list(checks())[STATIC:])


def _first_failure(space: Space, tests: list[tuple]) -> str:
    for name, test, arguments in tests:
        try:
            test(space, **arguments)
        except (AssertionError, pytest.fail.Exception):
            return name
    return ""


def without(edge: Edge) -> Table:
    """The table without one edge."""
    number, source = edge
    rows = list(m.TABLE)
    left = tuple(s for s in rows[number].sources if s != source)
    rows[number : number + 1] = [attrs.evolve(rows[number], sources=left)] if left else []
    return tuple(rows)


def replaced(edge: Edge, **changes) -> Table:
    """The table with one edge changed, at the same place."""
    number, source = edge
    row = m.TABLE[number]
    left = tuple(s for s in row.sources if s != source)
    new = [attrs.evolve(row, sources=(source,), **changes)]
    return (*m.TABLE[:number], *new, *([attrs.evolve(row, sources=left)] if left else []), *m.TABLE[number + 1 :])


def behaviour(table: Table) -> list:
    """Everything that can be seen of a table: where each event leads from each reachable position."""
    return [
        {(s.source.position, repr(s.event), s.target.position) for s in graph.all()}
        for graph in Space.of(table, SMALL).graphs
    ]


def test_the_whole_table_is_caught_by_nothing():
    assert caught(m.TABLE) == ""


def test_the_small_configurations_reach_every_edge():
    invariants.test_all_106_edges_are_fired(Space.of(m.TABLE, SMALL))


def test_the_static_checks_stand_first():
    """They alone must pass on a table that was never explored."""
    space = Space(m.TABLE, lambda *_: pytest.fail("explored"), SMALL)
    for _, test, arguments in list(checks())[:STATIC]:
        test(space, **arguments)


@pytest.mark.parametrize("edge", EDGES, ids=named)
def test_a_table_that_lacks_an_edge_is_caught(edge):
    assert caught(without(edge)) != ""


@pytest.mark.slow
def test_all_but_four_lost_edges_are_caught_without_a_trace():
    """The four are two words for one edge, so no graph can miss one of them: they are pinned by traces."""
    unseen = {named(edge) for edge in EDGES if not caught(without(edge), traces=False)}
    assert unseen == {
        "RoleSwapped: session/acp -> quiescing",
        "RoleSwapped: session/factory -> quiescing",
        "PlanDone: session/acp -> quiescing",
        "PlanDone: session/factory -> quiescing",
    }


READ_BY_GUARDS = (
    ev.RoleAssigned,
    ev.AcpOpened,
    ev.FactoryOpened,
    ev.ConnectFailed,
    ev.Prompted,
    ev.Lost,
    ev.Unresponsive,
    ev.Recovered,
    ev.Captured,
    ev.Quiet,
    ev.VerifierFailed,
)
"""Events whose change of the fold some guard reads; the others (`next`, `reward`) are pinned in `test_machine.py`."""


@pytest.mark.parametrize("event", READ_BY_GUARDS, ids=lambda event: event.__name__)
def test_a_fold_that_forgets_an_event_is_caught(event, monkeypatch):
    """Such as a Recovered that keeps the link: each is seen by an invariant or by a trace."""
    monkeypatch.setattr(m, "_CHANGES", {kind: change for kind, change in m._CHANGES.items() if kind is not event})
    assert caught(m.TABLE) != ""


def test_the_fold_forgets_no_event_that_a_guard_depends_on():
    assert set(m._CHANGES) - set(READ_BY_GUARDS) == {
        ev.RoleSwapped,
        ev.PlanDone,
        ev.CheckAsked,
        ev.Paused,
        ev.Released,
        ev.Verified,
    }


def mutants(edge: Edge) -> Iterator[tuple[str, Table]]:
    """An edge to every other state or to none, with every other ending, with its guard gone or turned round."""
    row = m.TABLE[edge[0]]
    for to in (*m.STATES, None):
        if to != row.to:
            yield f"to {to or 'stay'}", replaced(edge, to=to)
    for ending in ("rewarded", "unverified", "void", "failed", "cancelled", None):
        if ending != row.ending:
            yield f"with ending {ending}", replaced(edge, ending=ending)
    if guard := row.guard:
        yield "always", replaced(edge, guard=lambda *_: True)
        yield "negated", replaced(edge, guard=lambda *a: not guard(*a))


@functools.cache
def whole() -> list:
    """How the table behaves."""
    return behaviour(m.TABLE)


@pytest.mark.slow
@pytest.mark.parametrize("edge", EDGES, ids=named)
def test_every_other_mutant_is_caught_or_is_no_mutant_at_all(edge):
    """Some 2,500 of them. One that survives must behave as the table does, in every reachable position."""
    survivors = [(name, table) for name, table in mutants(edge) if not caught(table)]
    assert [name for name, table in survivors if behaviour(table) != whole()] == []
