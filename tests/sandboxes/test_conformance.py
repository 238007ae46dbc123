"""Every sandbox that ships runs the clauses of the conformance suite, one test each, on asyncio and on trio."""

from __future__ import annotations

import itertools

import anyio
import pytest

from orchestrator.conformance import CLAUSE_SEC, SANDBOX_CLAUSES, ClauseError, run_clauses
from orchestrator.sandboxes.fake import FakeSandbox
from orchestrator.sandboxes.local import LocalSandbox
from states.errors import SandboxError

pytestmark = pytest.mark.anyio


@pytest.mark.sandbox
@pytest.mark.parametrize("clause", SANDBOX_CLAUSES, ids=str)
async def test_local_sandbox_conforms(clause, tmp_path):
    """The clause holds for a local sandbox, which leaves nothing behind."""
    made = []

    def make():
        made.append(LocalSandbox(name=f"box-{len(made)}", root=tmp_path / str(len(made))))
        return made[-1]

    with anyio.fail_after(CLAUSE_SEC):
        await clause.check(make)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("clause", [clause for clause in SANDBOX_CLAUSES if not clause.needs], ids=str)
async def test_fake_sandbox_conforms(clause):
    """What needs no real process holds for the fake sandbox too."""
    await clause.check(FakeSandbox)


@pytest.mark.sandbox
@pytest.mark.daytona
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("channel", ["session", "pty"])
@pytest.mark.parametrize("clause", [c for c in SANDBOX_CLAUSES if "large" not in c.needs], ids=str)
async def test_daytona_sandbox_conforms(clause, channel, daytona_service):
    """The clause holds for a Daytona sandbox over either channel, and the service keeps nothing of it."""
    numbers = itertools.count()

    def make():
        return daytona_service.sandbox(f"box-{next(numbers)}", channel=channel)

    with anyio.fail_after(CLAUSE_SEC):
        await clause.check(make)
    assert await daytona_service.left() == []


async def test_report_says_which_clause_failed_and_how():
    """`run_clauses` raises nothing: a broken sandbox is a report."""

    def broken():
        return FakeSandbox(faults={"start": SandboxError("no room")})

    outcomes = await run_clauses(SANDBOX_CLAUSES, broken, lacks=("processes",))
    failed = [outcome for outcome in outcomes if not outcome.passed]
    assert len(failed) > 5
    assert all("no room" in outcome.said for outcome in failed)
    assert str(failed[0]).startswith("FAIL  ")
    assert all(outcome.passed for outcome in await run_clauses(SANDBOX_CLAUSES, FakeSandbox, lacks=("processes",)))


async def test_clause_fails_on_a_sandbox_that_lies():
    """A sandbox that answers every command with nothing does not conform."""
    clause = SANDBOX_CLAUSES[0]
    with pytest.raises(ClauseError, match="expected"):
        await clause.check(FakeSandbox)


def test_each_clause_says_what_it_asserts():
    """Names are unique and each clause has its sentence."""
    assert len({clause.name for clause in SANDBOX_CLAUSES}) == len(SANDBOX_CLAUSES)
    assert all(clause.asserts.endswith(".") for clause in SANDBOX_CLAUSES)
