"""Clauses: what a part of yours has to do, each with its sentence and its check, and how they are run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import Any, Final, Generic, TypeVar

import anyio
import attrs

from states.errors import said

T = TypeVar("T")

CLAUSE_SEC: Final = 120.0


class ClauseError(AssertionError):
    """A part did not do what a clause asserts. The message says what was seen instead."""


@attrs.frozen
class Clause(Generic[T]):
    """One thing that a part has to do: what it asserts, and the check, which raises `ClauseError`."""

    name: str
    asserts: str
    check: Callable[[T], Awaitable[Any]]
    needs: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name


@attrs.frozen
class Outcome:
    """How a clause went. `said` is empty where it passed."""

    clause: Clause[Any]
    passed: bool
    said: str = ""

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.clause.name}{': ' + self.said if self.said else ''}"


async def run_clauses(
    clauses: Collection[Clause[T]],
    part: T,
    *,
    lacks: Collection[str] = (),
    tell: Callable[[Outcome], None] = lambda _outcome: None,
) -> tuple[Outcome, ...]:
    """Run clauses one after the other; what a part `lacks` leaves out the clauses that need it. Raises nothing.

    `part` is what the clauses check: for `SANDBOX_CLAUSES` a callable that makes a sandbox, for `TRANSPORT_CLAUSES` a
    `TransportUnderTest`. `tell` hears of each outcome as soon as it is known.
    """
    outcomes = []
    for clause in clauses:
        if clause.needs & set(lacks):
            continue
        try:
            with anyio.fail_after(CLAUSE_SEC):
                await clause.check(part)
        except Exception as exc:
            outcomes.append(Outcome(clause, passed=False, said=f"{type(exc).__name__}: {said(exc)}"))
        else:
            outcomes.append(Outcome(clause, passed=True))
        tell(outcomes[-1])
    return tuple(outcomes)


def same(what: str, seen: object, wanted: object) -> None:
    """Raise `ClauseError` unless they are equal."""
    if seen != wanted:
        raise ClauseError(f"{what}: expected {wanted!r:.200}, saw {seen!r:.200}")


def true(what: str, seen: object) -> None:
    """Raise `ClauseError` unless it is true."""
    if not seen:
        raise ClauseError(what)
