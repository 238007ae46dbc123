"""Whose fault an ending is, what a result says is left behind, and that nothing foreign breaks the telling."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import anyio
import pytest
from harness import TRANSPORTS, FakeMeter, FakeVerifier, build, drive, on, twist
from test_ways_out import hooked

from orchestrator.recovery import reap
from states.events import Usage

pytestmark = pytest.mark.anyio


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """Both transports."""
    return request.param


def in_executing(transport: str, executing: Any, **config: Any) -> Any:
    """A rollout whose turn is driven by `executing`."""
    stands: list[Any] = []
    stand = build(transport, hooks=(on("executing", lambda: twist(*stands, executing=executing)()),), **config)  # noqa: PLW0108
    stands.append(stand)
    return stand


async def test_a_deadline_is_a_deadline_whatever_is_raised_while_the_state_is_left(transport):
    """Our own clock decides, not the exception that the cancelled handler ends with."""

    async def executing(turn):
        turn.inflight.start()
        with contextlib.suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        raise RuntimeError("tidying up failed")

    stand = await drive(in_executing(transport, executing, turn_sec=0.02))
    assert stand.rollout.result().ended_by == "deadline"
    assert stand.rollout.result().notes[0].endswith("RuntimeError: tidying up failed")


async def test_an_error_that_cannot_be_printed_is_a_note_like_any_other(transport):
    """A hook's exception whose `__str__` raises does not get out of `run`."""

    class UnprintableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    def hook(_moved):
        raise UnprintableError

    stand = await drive(build(transport, hooks=(hook,)))
    assert stand.rollout.state == "closed/rewarded"
    assert "UnprintableError" in stand.rollout.result().notes[0]


@pytest.mark.parametrize(("state", "owner"), [("verifying", "verifier"), ("connecting", "agent")])
async def test_a_deadline_is_owned_by_whom_the_state_waited_for(transport, state, owner):
    """A verifier that hangs is the verifier's, an agent that never answers the agent's, not the harness's."""

    async def hangs(*_):
        await anyio.sleep_forever()

    act: list[Any] = []
    hook = on("connecting", lambda: act[0]() if state == "connecting" else None)
    verifier = FakeVerifier([hangs] if state == "verifying" else [1.0])
    stand = build(transport, verifier=verifier, deadlines={state: 0.02}, hooks=(hook,), max_connects=1)
    act.append(twist(stand, connecting=hangs))
    await drive(stand)
    assert (stand.rollout.state, stand.rollout.result().verdict.owner) == ("closed/failed", owner)


async def test_nothing_is_graded_over_a_failing_provider_also_beside_roles_without_a_model(transport):
    """Where a role calls no model, silence is no evidence, so the provider's failure has to be."""
    stand = build(transport, {"turns": [[{"say": "I cannot"}]]}, rules={"metered": False})
    stand.rollout._world.models._meters.append(FakeMeter(Usage(1, 1), "HTTP 401: no such key"))
    result = (await drive(stand)).rollout.result()
    assert (result.reward, result.verdict.owner) == (None, "provider")


async def test_a_void_that_is_the_providers_says_what_the_provider_said(transport):
    """In the verdict and among the errors, in its own words: nobody has to look for the reason."""
    stand = build(transport, {"turns": [[{"say": "I cannot"}]]}, rules={"metered": True})
    hooked(stand, on("executing", lambda: setattr(meter, "counted", Usage(2, 2))))
    stand.rollout._world.models._meters.append(meter := FakeMeter(failure="HTTP 401: no such key"))
    result = (await drive(stand)).rollout.result()
    assert (result.state, result.verdict.owner) == ("closed/void", "provider")
    assert result.verdict.reason == "nothing was done: all 2 model calls failed: HTTP 401: no such key"
    assert [(e["event"], e["owner"], e["error"]) for e in result.errors] == [("PlanDone", "provider", "ProviderError")]


async def test_what_is_held_is_not_leaked_while_it_runs_or_is_kept_by_wish(transport):
    """`leaked` is what could not be given back, and nothing else."""
    stand = build(transport, keep_sandbox="always")
    await stand.rollout.step()
    assert stand.rollout.result().leaked == ()
    await stand.rollout.run()
    assert stand.rollout.result().leaked == ()
    assert "was kept" in stand.rollout.result().notes[-1]


async def test_giving_back_what_was_kept_leaves_no_file_open(transport, tmp_path):
    """`reap` of a closed rollout opens the journal to write down what it gave back, and closes it."""
    await build(transport, out=tmp_path, keep_sandbox="always").rollout.run()
    assert await reap(tmp_path / "r1")
    journal = tmp_path / "r1" / "journal.jsonl"
    assert journal not in open_files()


def open_files() -> set[Path]:
    """What this process holds open."""
    return {fd.readlink() for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}
