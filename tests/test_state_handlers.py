"""What the handlers do when the parts that they are given hang, raise, or lie: each still comes to its event."""

from __future__ import annotations

import anyio
import pytest
from harness import TRANSPORTS, FakeMeter, FakeVerifier, build, on, raising, twist
from sessions import captures, events, names
from test_ways_out import DONE, TURN, hooked, metered, planned

from orchestrator import ExecTimeout, ProviderError, VerifierError
from orchestrator.sandboxes.fake import HANG
from states import events as ev
from states.errors import said
from states.events import ABSENT, Failure, Next, Usage
from states.journal import LeaseRecord


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """Both transports."""
    return request.param


def mocked(stand):
    """Drive it to its close on a clock that jumps over every wait."""
    from trio.testing import MockClock

    anyio.run(stand.rollout.run, backend="trio", backend_options={"clock": MockClock(autojump_threshold=0)})
    assert stand.rollout.closed
    return stand


async def hangs(*_):
    await anyio.sleep_forever()


def test_calls_that_do_not_settle_hold_up_neither_the_seal_nor_the_end(transport):
    """What the gateway has counted so far is counted, once, and the journal says that more may have come."""
    stand = metered(build(transport, rules={"metered": True}), Usage(calls=1, input_tokens=5))

    class NeverSettles(FakeMeter):
        settle = hangs

    meter = NeverSettles()
    stand.rollout._world.models._meters[0] = meter
    hooked(stand, on("executing", lambda: setattr(meter, "counted", Usage(calls=1, input_tokens=5))))
    mocked(stand)
    assert captures(stand)[0].usage.tokens == stand.rollout.result().usage.total.tokens == 5
    assert any("did not settle" in note for note in stand.rollout.result().notes)
    assert stand.rollout.state == "closed/rewarded"


@pytest.mark.parametrize("way", ["raises", "hangs"])
def test_a_session_whose_end_fails_is_ended_for_certain(transport, way):
    """The polite end is only polite: that the handle is gone is what counts."""
    stand = build(transport)
    end = hangs if way == "hangs" else raising(OSError("a broken pipe"))
    mocked(hooked(stand, on("quiescing", twist(stand, quiescing=end))))
    assert stand.rollout.state == "closed/rewarded"
    assert events(stand, ev.Quiet)[0].evidence == ("fake: nothing of agent-1 is left",)
    said_so = {"raises": "the session's end raised OSError", "hangs": "the session did not end within 10 s"}[way]
    assert any(said_so in note for note in stand.rollout.result().notes)


@pytest.mark.parametrize("kind", ["ValueError", "hang"])
def test_a_capture_that_fails_is_truncated_and_sealed(transport, kind):
    """Whatever reading does, the seal follows."""
    stand = build(transport)
    read = hangs if kind == "hang" else raising(ValueError("rubbish"))
    mocked(hooked(stand, on("capturing/whole", twist(stand, capturing=read))))
    (captured,) = captures(stand)
    assert (captured.truncated, captured.complete) == (True, False)
    assert captured.steps >= 1


def test_what_a_dead_process_held_is_given_back_before_anything_is_taken(transport):
    """`provisioning` is entered again after a kill: the old sandbox goes first."""
    stand = build(transport)
    stand.rollout._world.leases.intend("agent", "old-1")
    mocked(stand)
    returned = [r.lease.name for r in stand.rollout.journal if getattr(r, "action", "") == "returned"]
    assert returned[0] == "old-1"
    assert stand.rollout.state == "closed/rewarded"


@pytest.mark.parametrize("fault", ["download", "stop"])
def test_what_cannot_be_brought_home_or_given_back_changes_no_ending(transport, fault, tmp_path):
    """A reward stands; a leak is data."""
    stand = build(transport, out=tmp_path, faults={fault: HANG})
    mocked(stand)
    result = stand.rollout.result()
    assert (result.reward, result.state) == (1.0, "closed/rewarded")
    assert result.leaked == (("sandbox fake",) if fault == "stop" else ())
    assert result.notes


def test_work_that_a_provider_spoilt_is_not_graded(transport):
    stand = metered(build(transport, rules={"metered": True}), Usage(calls=2, input_tokens=3))
    stand.rollout._world.meter.error = ProviderError("the provider speaks no known format")
    mocked(stand)
    assert stand.rollout.result().verdict.owner == "provider"
    assert "Verified" not in names(stand)


def test_tests_that_a_broken_check_left_behind_are_gone_before_the_scene_is_quiet(transport):
    """They are a lease: what does not give it back itself has it taken away."""
    verifier = FakeVerifier([VerifierError("no"), 1.0])
    stand = planned(build(transport, verifier=verifier, rules={"can_freeze": True}), [TURN, Next("check"), DONE])
    mocked(stand)
    assert "tests" in " ".join(events(stand, ev.Quiet)[0].evidence)
    given = [(r.lease.kind, r.action) for r in stand.rollout.journal if isinstance(r, LeaseRecord)]
    assert given.index(("tests", "returned")) > given.index(("tests", "intended"))
    assert stand.rollout.result().leaked == ()


def test_an_error_says_its_kind_where_it_says_nothing_or_cannot():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no comment")

    assert (said(ValueError()), said(ValueError("x")), said(Mute())) == ("ValueError", "x", "Mute")
    assert len(said(ValueError("x" * 10**6))) < 10**5
    assert Failure.of(Mute()).message == "Mute"


def test_what_was_not_handed_over_says_so_and_is_no_data():
    assert repr(ABSENT) == "ABSENT"
    assert ev.Prompted(0, "agent", "Do it.", live=object()).data() == {
        "turn": 0,
        "role": "agent",
        "text": "Do it.",
        "budgets": {},
    }


def test_a_sandbox_that_is_kept_is_not_given_back(transport):
    """Its lease stays open in the journal, where whoever kept it finds its name."""
    stand = mocked(build(transport, keep_sandbox="always"))
    assert stand.sandbox._phase == "up"
    assert [lease.kind for lease in stand.rollout._world.leases.open()] == ["sandbox"]
    assert stand.rollout.result().reward == 1.0


def test_a_command_that_outlasted_its_limit_keeps_what_it_had_printed():
    error = ExecTimeout("sleep took longer than 1 s", stdout="so far", stderr="hm")
    assert (str(error), error.stdout, error.stderr) == ("sleep took longer than 1 s", "so far", "hm")
    assert error.owner == "sandbox"


@pytest.mark.parametrize("before", [[], [TURN]], ids=["disconnected", "session"])
def test_a_plan_may_pause_a_rollout_where_it_stands(transport, before):
    """A pause is a decision like any other; an operator's word ends it."""
    stand = planned(build(transport), [*before, Next("pause"), TURN, DONE])

    async def wake():
        await anyio.wait_all_tasks_blocked()
        stand.rollout.resume("somebody")

    async def main():
        async with anyio.create_task_group() as group:
            hooked(stand, on("paused", lambda: group.start_soon(wake)))
            await stand.rollout.run()

    anyio.run(main)
    assert (names(stand).count("Paused"), events(stand, ev.Resumed)[0].by) == (1, "somebody")
    assert stand.rollout.state == "closed/rewarded"
    assert len(captures(stand)) == len(before) + 1


def test_a_meter_that_raises_keeps_no_turn_from_its_seal(transport):
    stand = metered(build(transport, rules={"metered": True}), Usage())

    class Broken(FakeMeter):
        settled: int = 0

        async def settle(self):
            if stand.rollout.state == "capturing/whole":
                raise OSError("the gateway is gone")
            return self.counted

    stand.rollout._world.models._meters[0] = Broken()
    mocked(stand)
    assert captures(stand)[0].complete
    assert any("usage could not be settled: OSError" in note for note in stand.rollout.result().notes)
