"""The kernel's rules, one by one: what is heard when, what stops a handler, and what a host may do to a rollout."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import weakref

import anyio
import attrs
import pytest
from harness import SAY, TRANSPORTS, FakeVerifier, build, drive, fire, on, raising, twist
from sessions import HandAgent, by_hand, captures, events, names, states
from test_ways_out import DONE, REACH, TURN, hooked, planned

from orchestrator import ConfigError, ExecResult, Turn
from orchestrator.journal import MemorySink, read_journal
from orchestrator.recovery import resume
from orchestrator.sandboxes.fake import HANG, FakeSandbox
from orchestrator.tasks import demo_task, load_task
from states import events as ev
from states.errors import JournalError, QuietError
from states.events import Failure, Next
from states.journal import Transition, fold
from states.ports import AskUserRequest

pytestmark = pytest.mark.anyio

WAITS = {"turns": [[{"say": "working"}, {"wait_cancel": True}]]}
HANGS = {"turns": [[{"say": "working"}, {"ignore_cancel": True}, {"hang": True}]]}
TWICE = (Turn("agent"), Turn("agent", "Go on."))


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """Both transports."""
    return request.param


# --- what is heard first ---


async def test_a_handler_that_finished_is_heard_before_an_event_that_waits(transport):
    """The turn has ended in the moment in which it is cancelled: its capture is whole, and then it is cancelled."""
    stand = build(transport)

    async def executing(_turn):
        stand.rollout.cancel()
        return ev.TurnEnded("end_turn")

    await drive(hooked(stand, on("executing", twist(stand, executing=executing))))
    ended = names(stand).index("TurnEnded")
    assert names(stand)[ended : ended + 3] == ["TurnEnded", "Cancelled", "Captured"]
    assert stand.rollout.state == "closed/cancelled"
    assert captures(stand)[0].complete


async def test_an_event_that_moves_waits_for_the_handlers_end(transport):
    """The handler is cancelled, has ended, and only then the event is fired and the next handler runs."""
    order = []

    async def executing(_turn):
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            order.append(("handler ended in", stand.rollout.state))

    stand = build(transport, WAITS)
    hooked(
        stand,
        on("executing", twist(stand, executing=executing)),
        on("cancelling", lambda: order.append(("moved to", stand.rollout.state))),
    )
    async with anyio.create_task_group() as group:
        group.start_soon(stand.rollout.run)
        while stand.rollout.state != "executing":
            await anyio.lowlevel.checkpoint()
        await anyio.wait_all_tasks_blocked()
        stand.rollout.cancel()
    assert order == [("handler ended in", "executing"), ("moved to", "cancelling")]


async def test_an_event_that_stays_never_touches_the_handler(transport):
    """A cancel in `cancelling` is journaled, and the cancelling that runs goes on to its own end."""
    runs = []
    script = {
        "turns": [[{"say": "x"}, {"on_cancel": [{"ignore_cancel": True}, {"sleep": 0.05}]}, {"wait_cancel": True}]]
    }
    stand = build(transport, script, deadlines={"executing": 0.02})
    hooked(stand, on("cancelling", lambda: runs.append("entered")))
    async with anyio.create_task_group() as group:
        group.start_soon(stand.rollout.run)
        while stand.rollout.state != "cancelling":  # noqa: ASYNC110 - a poll, not a pause: what it waits for ends it
            await anyio.sleep(0.001)
        stand.rollout.cancel("code")
        stand.rollout.cancel("code")
        assert stand.rollout.state == "cancelling"
    assert runs == ["entered"]
    assert names(stand).count("Settled") == 1
    assert stand.rollout.state == "closed/cancelled"
    assert stand.rollout.result().ended_by == "deadline"


async def test_a_second_cancel_changes_nothing_and_one_on_a_closed_rollout_is_a_no_op(transport):
    stand = build(transport, WAITS)
    hooked(stand, on("executing", lambda: [stand.rollout.cancel("code"), stand.rollout.cancel("terminal")]))
    await drive(stand)
    assert [event.by for event in events(stand, ev.Cancelled)] == ["code", "terminal"]
    before = len(stand.rollout.journal)
    stand.rollout.cancel()
    stand.rollout.interrupt()
    stand.rollout.sandbox_failed("too late")
    assert len(stand.rollout.journal) == before


async def test_a_reward_survives_a_cancel_that_comes_while_it_is_released(transport):
    stand = build(transport)
    hooked(stand, on("releasing", stand.rollout.cancel))
    await drive(stand)
    assert (stand.rollout.state, stand.rollout.result().reward) == ("closed/rewarded", 1.0)


@pytest.mark.parametrize("state", ["disconnected", "connecting", "quiescing", "verifying", "releasing"])
async def test_an_interrupt_outside_a_turn_does_nothing(transport, state):
    stand = build(transport)
    hooked(stand, on(state, stand.rollout.interrupt))
    await drive(stand)
    assert "Interrupted" not in names(stand)
    assert stand.rollout.state == "closed/rewarded"


# --- driving ---


async def test_step_run_iter_and_run_agree(transport):
    """Three ways of driving, one path; every step returns the transition that it made."""
    by_run, by_iter, by_step = (build(transport) for _ in range(3))
    await by_run.rollout.run()
    seen = [moved.event.name async for moved in by_iter.rollout.run_iter()]
    stepped = []
    while not by_step.rollout.closed:
        stepped.append((await by_step.rollout.step()).event.name)
    assert names(by_run) == seen == stepped
    with pytest.raises(ConfigError, match="closed"):
        await by_step.rollout.step()


async def test_a_watcher_that_leaves_leaves_the_rollout_where_it_stands(transport):
    stand = build(transport)
    async with contextlib.aclosing(stand.rollout.run_iter()) as transitions:
        async for moved in transitions:
            if moved.dest == "connecting":
                break
    assert stand.rollout.state == "connecting"
    await drive(stand)


@pytest.mark.parametrize("kind", ["sync", "async", "raising", "hanging"])
async def test_a_hook_cannot_break_a_rollout(transport, kind, monkeypatch):
    """Plain and async ones are called once a transition; an error or a hang of one is a note."""
    monkeypatch.setattr("orchestrator.rollout.HOOK_SEC", 0.001)
    seen = []

    async def slow(moved):
        seen.append(moved.event.name)
        if kind == "hanging":
            await anyio.sleep_forever()

    def quick(moved):
        seen.append(moved.event.name)
        if kind == "raising":
            raise RuntimeError("mine")

    stand = hooked(build(transport), quick if kind in ("sync", "raising") else slow)
    await drive(stand)
    assert seen == names(stand)
    said = {"raising": "a hook raised RuntimeError", "hanging": "a hook raised TimeoutError"}.get(kind)
    notes = stand.rollout.result().notes
    assert len(notes) == (len(seen) if said else 0)
    assert all(said in note for note in notes)


async def test_a_hook_that_cannot_read_some_other_journal_is_a_hook_with_an_error(transport, tmp_path):
    """Only our own journal stops a rollout as if killed; what a hook does with others is the hook's."""
    stand = hooked(build(transport), lambda _moved: read_journal(tmp_path))
    await drive(stand)
    assert stand.rollout.state == "closed/rewarded"
    notes = stand.rollout.result().notes
    assert len(notes) == len(names(stand))
    assert all(note.startswith("a hook raised JournalError") for note in notes)


async def test_an_exception_group_of_a_handler_is_its_crash(transport):
    group = ExceptionGroup("two at once", [ValueError("a"), RuntimeError("b")])
    stand = build(transport, WAITS)
    await drive(hooked(stand, on("executing", twist(stand, executing=raising(group)))))
    (failed,) = events(stand, ev.Failed)
    assert failed.failure.error == "ExceptionGroup"
    assert stand.rollout.result().verdict.owner == "harness"


@pytest.mark.parametrize("rewards", [{}, {"reward": math.nan}, {"reward": "much"}, None, {"reward": math.inf}])
async def test_what_a_verifier_of_ones_own_returns_is_a_finite_reward_or_nothing(transport, rewards):
    """Otherwise NaN would reach the journal, which could not be read again."""

    async def verify():
        return rewards

    stand = await drive(build(transport, verifier=FakeVerifier([verify])))
    assert stand.rollout.result().verdict.owner == "verifier"
    assert stand.rollout.result().reward is None


@pytest.mark.parametrize("decision", ["go", None, 3])
async def test_a_plan_that_decides_rubbish_fails_the_rollout_and_raises_nothing(transport, decision):
    class Plan:
        async def next(self, facts):
            return ev.Next(decision) if isinstance(decision, str) else decision

    stand = await drive(build(transport, plan=Plan()))
    assert stand.rollout.state == "closed/failed"


# --- the journal cannot be written ---


@attrs.define(eq=False)
class Full(MemorySink):
    """A disk that is full from the nth line on."""

    room: int = 0

    def write(self, line):
        if len(self.lines) >= self.room:
            raise JournalError("no space left on device")
        self.lines.append(line)


@pytest.mark.parametrize("room", range(1, 16))
async def test_a_journal_that_cannot_be_written_stops_the_rollout_as_if_killed(transport, room):
    """Nothing happens after the line that could not be written; leases stay open, and what is there folds."""
    stand = build(transport, journal=Full(room=room))
    with anyio.fail_after(10):
        result = await stand.rollout.run()
    assert not stand.rollout.closed
    assert "no space left" in result.verdict.reason
    assert len(stand.rollout.journal) == room
    assert fold(stand.rollout.journal).position.state == stand.rollout.state
    assert bool(stand.rollout._world.leases.open()) == (room > 1)


async def test_a_cancel_that_cannot_be_journaled_is_not_the_cancellers_problem(transport):
    """Whoever cancels gets no error; the rollout itself meets it at its next line."""
    sink = Full(room=100)
    stand = build(transport, journal=sink)

    def cancel():
        sink.room = 0
        stand.rollout.cancel()

    result = await hooked(stand, on("capturing/whole", cancel)).rollout.run()
    assert result.state == "capturing/whole"


# --- the host cancels the task ---

STATES = {**REACH, "session": lambda t: planned(build(t), [TURN, None])}


def name_in(transport, state):
    return state if state != "session" else {"acp": "session/acp", "session-factory": "session/factory"}[transport]


@pytest.mark.parametrize("state", STATES)
async def test_a_host_that_cancels_in_any_state_gets_a_closed_rollout_and_its_cancellation(transport, state):
    """Sealed, released, closed; then the cancellation goes on."""
    stand = STATES[state](transport)
    after = []
    async with anyio.create_task_group() as group:

        async def host():
            try:
                await stand.rollout.run()
            except anyio.get_cancelled_exc_class():
                after.append(stand.rollout.state)
                raise

        if state == "provisioning":
            stand.sandbox.faults["start"] = HANG
            group.start_soon(host)
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        else:
            nth = 2 if state == "session" else 1
            hooked(stand, on(name_in(transport, state), group.cancel_scope.cancel, nth=nth))
            group.start_soon(host)
    expected = "closed/rewarded" if state == "releasing" else "closed/cancelled"
    assert after == [expected]
    assert events(stand, ev.Cancelled)[-1].by == "host"
    assert names(stand).count("Prompted") == names(stand).count("Captured")
    assert not stand.rollout._world.leases.open()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("times", [1, 2, 5])
async def test_a_task_that_asyncio_cancels_again_and_again_is_still_torn_down(transport, times, anyio_backend):
    """`task.cancel()` goes through every shield; the teardown runs in a task of its own and is waited for."""
    stand = build(transport, HANGS, deadlines={"cancelling": 0.1})
    task = asyncio.create_task(stand.rollout.run())
    while stand.rollout.state != "executing" or not stand.rollout.stage.segment.steps > 1:  # noqa: ASYNC110 - a poll, not a pause: what it waits for ends it
        await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.01)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert stand.rollout.state == "closed/cancelled"
    assert names(stand)[-6:] == ["Prompted", "Cancelled", "Unresponsive", "Captured", "Quiet", "Released"]


async def test_a_cancelling_host_whose_disk_is_full_still_gets_its_cancellation(transport):
    sink = Full(room=100)
    stand = build(transport, WAITS, journal=sink)
    raised = []
    async with anyio.create_task_group() as group:

        async def host():
            try:
                await stand.rollout.run()
            except anyio.get_cancelled_exc_class():
                raised.append(stand.rollout.state)
                raise

        def cancel():
            sink.room = 0
            group.cancel_scope.cancel()

        hooked(stand, on("executing", cancel))
        group.start_soon(host)
    assert raised == ["executing"]


async def test_a_hook_that_hangs_does_not_hold_up_a_cancelled_host(transport, monkeypatch):
    """Hooks are bounded, so teardown is."""
    monkeypatch.setattr("orchestrator.rollout.HOOK_SEC", 0.001)

    async def hangs(_moved):
        await anyio.sleep_forever()

    stand = hooked(build(transport, WAITS), hangs)
    with anyio.move_on_after(0.2):
        await stand.rollout.run()
    assert stand.rollout.state == "closed/cancelled"


# --- stop, pause ---


async def test_stop_interrupts_the_turn_and_leaves_with_leases_held(transport):
    stand = build(transport, WAITS, turns=TWICE)
    hooked(stand, on("executing", stand.rollout.stop))
    result = await stand.rollout.run()
    assert (result.state, result.ended_by, result.ending) == ("disconnected", "interrupted", None)
    assert result.verdict.owner == "operator"
    assert [lease.kind for lease in stand.rollout._world.leases.open()] == ["sandbox"]
    assert names(stand).count("Captured") == 1
    stand.rollout.cancel()
    assert (await stand.rollout.step()).dest == "releasing"


@pytest.mark.parametrize("state", ["disconnected", "connecting", "session", "quiescing"])
async def test_stop_between_turns_leaves_at_the_next_disconnected(transport, state):
    stand = build(transport, turns=TWICE)
    hooked(stand, on(name_in(transport, state), stand.rollout.stop))
    assert (await stand.rollout.run()).state == "disconnected"


@pytest.mark.parametrize("state", ["disconnected", "session"])
@pytest.mark.parametrize("kind", ["turn", "pause"])
async def test_a_stop_while_the_plan_decides_leaves_all_the_same(transport, state, kind, tmp_path):
    """What it decided is kept for whoever goes on; nobody is connected for it, and no pause holds up the stop."""
    asked = []

    class Plan:
        async def next(self, facts):
            asked.append(facts.prompted)
            if len(asked) == (1 if state == "disconnected" else 2):
                stand.rollout.stop("SIGINT")
                await anyio.lowlevel.checkpoint()
                return Next(kind, "agent" if kind == "turn" else "", "stopped at" if kind == "turn" else "")
            return Next("turn", "agent", "Do it.") if facts.prompted < 2 else Next("done")

    stand = build(transport, plan=Plan(), out=tmp_path)
    with anyio.fail_after(20):
        assert (await stand.rollout.run()).state == "disconnected"
    assert names(stand).count("RoleAssigned") == (0 if state == "disconnected" else 1)
    await stand.rollout.detach()
    held = []
    config = attrs.evolve(stand.rollout.config, hooks=())
    going = await resume(stand.rollout.folder, config)
    going.listeners.append(on("paused", lambda: held.append(going.held) or going.resume()))
    with anyio.fail_after(20):
        result = await going.run()
    assert result.state == "closed/rewarded"
    prompted = [
        record.event.text for record in going.journal if hasattr(record, "event") and hasattr(record.event, "text")
    ]
    assert ("stopped at" in prompted) == (kind == "turn")
    assert held == (["plan"] if (kind, state) == ("pause", "session") else [])


async def test_stop_lets_go_of_a_pause(transport):
    """Nobody would ever resume it."""
    stand = build(transport, turns=TWICE)
    hooked(stand, on("capturing/whole", stand.rollout.pause), on("paused", stand.rollout.stop))
    with anyio.fail_after(5):
        assert (await stand.rollout.run()).state == "disconnected"


async def test_paused_time_is_not_the_rollouts_whatever_ends_the_pause(transport):
    """Resumed, lost or cancelled."""
    now = [0.0]
    stand = build(transport, turns=TWICE, timeout=100.0, monotonic=lambda: now[0])

    def paused():
        now[0] += 1000.0
        stand.rollout.resume()

    hooked(stand, on("capturing/whole", stand.rollout.pause))

    async def later(moved):
        if moved.dest == "paused":
            group.start_soon(wake)

    async def wake():
        await anyio.wait_all_tasks_blocked()
        paused()

    async with anyio.create_task_group() as group:
        await drive(hooked(stand, later))
    assert names(stand).count("Captured") == 2
    assert 99.0 <= stand.rollout._world.time_left() <= 100.0


# --- deadlines, on a clock of our own ---


def mocked(function, *args):
    """Run on trio with a clock that jumps over every wait."""
    from trio.testing import MockClock

    return anyio.run(function, *args, backend="trio", backend_options={"clock": MockClock(autojump_threshold=0)})


def test_the_rollouts_timeout_ends_the_turn_which_is_verified(transport):
    """An hour's turn in a rollout of ten minutes: cancelled, captured whole, verified."""

    async def main():
        stand = await drive_unbounded(build(transport, WAITS, timeout=600.0, turn_sec=3600.0))
        result = stand.rollout.result()
        assert (result.state, result.ended_by, result.reward) == ("closed/rewarded", "deadline", 1.0)
        assert anyio.current_time() - started == pytest.approx(600.0, abs=1.0)
        return stand

    async def timed():
        nonlocal started
        started = anyio.current_time()
        return await main()

    started = 0.0
    mocked(timed)


async def drive_unbounded(stand):
    await stand.rollout.run()
    return stand


def test_a_rollout_whose_time_is_up_before_an_agent_was_asked_is_not_graded(transport):
    """The sandbox took all of it: nobody is to blame for an answer that nobody was asked for."""

    async def main():
        stand = build(transport, timeout=10.0)
        hooked(stand, lambda moved: anyio.sleep(20.0) if moved.dest == "disconnected" else None)
        await drive_unbounded(stand)
        assert stand.rollout.state == "closed/failed"
        assert stand.rollout.result().reward is None

    mocked(main)


TEN = {"deadlines": {"provisioning": 10.0}}
HUNG = {
    "provisioning": ({"faults": {"start": HANG}}, "SandboxFailed", 600.0),
    "connecting": ({"faults": {"open": HANG}}, "ConnectFailed", 360.0),
    "quiescing": ({"faults": {"end": HANG}}, "Unquiet", 30.0),
    "releasing": ({"faults": {"stop": HANG}}, "Released", 30.0),
    "executing": ({"script": HANGS}, "DeadlinePassed", 900.0),
    "cancelling": ({"script": HANGS}, "Unresponsive", 10.0),
}


@pytest.mark.parametrize("state", HUNG)
def test_a_state_that_hangs_is_left_after_its_own_deadline(transport, state):
    """Each by the event that the table of deadlines names, at the time that it names."""

    async def main():
        config, event, seconds = HUNG[state]
        stand = build(transport, clock=anyio.current_time, **config)
        await drive_unbounded(stand)
        spent = next(m for m in stand.rollout.journal if getattr(getattr(m, "event", None), "name", "") == event)
        entered = [m.time for m in stand.rollout.journal if getattr(m, "dest", "") == state]
        since = entered[0] if entered else stand.rollout.journal[0].time
        assert spent.time - since == pytest.approx(seconds, rel=0.01)
        assert stand.rollout.closed

    mocked(main)


@pytest.mark.parametrize(
    ("build_sec", "more", "seconds"), [(3600.0, {}, 3660.0), (9.0, {}, 600.0), (3600.0, TEN, 10.0)]
)
def test_a_sandbox_may_take_as_long_as_its_task_says_that_a_build_does(build_sec, more, seconds):
    """And what is around a build; never less than usual, and what the configuration says goes before it."""

    async def main():
        task = load_task(demo_task())
        task = attrs.evolve(task, limits=attrs.evolve(task.limits, build_timeout_sec=build_sec))
        stand = build("acp", clock=anyio.current_time, task=task, faults={"start": HANG}, **more)
        began = anyio.current_time()
        await drive_unbounded(stand)
        assert names(stand)[0] == "SandboxFailed"
        assert anyio.current_time() - began == pytest.approx(seconds, rel=0.01)

    mocked(main)


async def test_a_verifier_that_hangs_is_run_again_and_then_given_up(transport):
    async def hangs():
        await anyio.sleep_forever()

    stand = await drive(build(transport, verifier=FakeVerifier([hangs]), deadlines={"verifying": 0.02}))
    assert names(stand).count("VerifierFailed") == 2
    assert stand.rollout.state == "closed/failed"


async def test_a_sandbox_that_dies_under_an_agent_ends_the_rollout(transport):
    """The host that watches it says so; what is in memory is captured, and nothing is graded."""
    stand = build(transport, WAITS)

    def dies():
        stand.sandbox.die()
        fire(stand, ev.SandboxFailed(Failure("sandbox", "SandboxError", "host down")))()

    await drive(hooked(stand, on("executing", dies)))
    assert stand.rollout.result().verdict.owner == "sandbox"
    assert stand.rollout.state == "closed/failed"


async def test_a_sandbox_is_stopped_although_an_agents_end_could_not_be_proven(transport, monkeypatch):
    """Nothing is graded, and what ends everything is not left out for that."""
    stand = build(transport, faults={"end": QuietError("pid 7 is alive")})
    real = FakeSandbox.stop

    async def removes_it_with_all_that_is_in_it(sandbox):
        sandbox.faults.clear()
        await real(sandbox)

    monkeypatch.setattr(FakeSandbox, "stop", removes_it_with_all_that_is_in_it)
    await drive(stand)
    result = stand.rollout.result()
    assert (result.state, result.reward, result.verdict.owner) == ("closed/failed", None, "sandbox")
    assert result.leaked == ("agent agent-1",)


async def test_two_rollouts_of_one_process_do_not_know_of_each_other(transport):
    stands = [build(transport, exec_result=lambda call: ExecResult("", "", 0)) for _ in range(5)]
    hooked(stands[2], on("executing", stands[2].rollout.cancel))
    async with anyio.create_task_group() as group:
        for stand in stands:
            group.start_soon(drive, stand)
    assert [stand.rollout.state for stand in stands].count("closed/rewarded") == 4
    assert states(stands[2])[-1] == "closed/cancelled"


async def test_a_rollout_may_be_driven_within_one_task_and_cancelled_by_another(transport):
    async def play(_session, _text):
        await anyio.sleep_forever()

    stand = (
        by_hand(HandAgent(play), deadlines={"cancelling": 0.02})
        if transport == "session-factory"
        else build(transport, WAITS)
    )
    async with anyio.create_task_group() as group:
        group.start_soon(drive, stand)
        while stand.rollout.state != "executing":  # noqa: ASYNC110 - a poll, not a pause: what it waits for ends it
            await anyio.sleep(0.001)
        stand.rollout.cancel("code", "enough")
    assert stand.rollout.state == "closed/cancelled"
    assert DONE.kind == "done"


# --- what is left of it ---


@pytest.fixture
def no_collector():
    """What is freed here is freed by itself."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
async def test_a_closed_rollout_is_freed_at_once():
    """Nothing of it holds it in a circle: with hundreds on one loop a collector would stop them all to find that."""
    stand = await drive(build("session-factory"))
    world, agents = weakref.ref(stand.rollout._world), stand.agents
    del stand
    await anyio.wait_all_tasks_blocked()
    assert world() is None
    assert agents, "who keeps an agent and its sessions keeps no rollout"


@pytest.mark.parametrize("script", [SAY, WAITS], ids=["ended", "cancelled"])
async def test_a_closed_rollout_is_held_by_nobody(transport, script):
    """Neither by a task that goes on nor by whoever keeps its agents."""
    stand = build(transport, script)
    async with anyio.create_task_group() as group:
        group.start_soon(drive, stand)
        if script is WAITS:
            while stand.rollout.state != "executing":
                await anyio.lowlevel.checkpoint()
            stand.rollout.cancel()
    world, agents = weakref.ref(stand.rollout._world), stand.agents
    del stand
    await anyio.wait_all_tasks_blocked()
    gc.collect()  # a cancellation leaves circles of tracebacks, in both loops
    assert world() is None
    assert agents


async def test_a_session_that_was_closed_is_not_heard_any_more():
    """Its threads may live; what they say and ask then reaches nobody, and raises nothing in them."""
    stand = await drive(build("session-factory"))
    [session] = next(iter(stand.agents.values())).sessions
    written = list(stand.rollout._world._trajectory._sink.lines)
    session.steps.append({"type": "agent_message", "text": "from beyond"})
    session.on_change(session)
    assert await session._handlers[-1](AskUserRequest("May I?", ("yes",))) is None
    assert stand.rollout._world._trajectory._sink.lines == written


async def test_what_a_journal_keeps_is_what_it_wrote(transport, tmp_path):
    """No record holds a live value: the moves in memory are those that are read back."""
    stand = build(transport, out=tmp_path)
    await stand.rollout.run()
    moves = [record for record in stand.rollout.journal if isinstance(record, Transition)]
    assert moves == [record for record in read_journal(stand.rollout.folder) if isinstance(record, Transition)]
    assert all(getattr(move.event, "live", ev.ABSENT) is ev.ABSENT for move in moves)
