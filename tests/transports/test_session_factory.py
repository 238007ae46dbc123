"""The session-factory transport against agents written by hand: how they connect, what they hold, and misbehave."""

from __future__ import annotations

import asyncio
import threading

import anyio
import anyio.to_thread
import attrs
import harness
import pytest
from harness import FACTORIES, FakeVerifier, build, drive
from sessions import HandAgent, HandSession, by_hand, captures, events, names, segments

from orchestrator import AgentConfig, AgentError, ExecResult, HandleRevoked, Session
from orchestrator.sandboxes.fake import HANG, FakeSandbox
from orchestrator.transports.gate import GatedHandle
from orchestrator.transports.steps import StepReader
from states import events as ev
from states.errors import JournalError

pytestmark = pytest.mark.anyio


async def say_done(session, _text):
    session.show(type="agent_message", text="done")
    return "end_turn"


# --- connecting ---


@pytest.mark.parametrize("asks_for_env", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
async def test_both_connect_signatures_work_sync_and_async(asks_for_env, is_async):
    """`agent_env` is handed to those who name it, by inspection; a connect that is no coroutine will do."""
    got = []

    def make(sandbox, role, env=None):
        got.append((role, env))
        return HandSession(say_done, sandbox, role)

    async def with_env(sandbox, role, *, agent_env):
        return make(sandbox, role, agent_env)

    async def without(sandbox, role):
        return make(sandbox, role)

    def plain_with_env(sandbox, role, agent_env=None):
        return make(sandbox, role, agent_env)

    agent = HandAgent()
    both = {(True, True): with_env, (False, True): without, (True, False): plain_with_env, (False, False): make}
    connect = both[asks_for_env, is_async]
    agent = type("Agent", (), {"connect": staticmethod(connect)})()
    stand = await drive(by_hand(agent))
    assert stand.rollout.result().reward == 1.0
    ((role, env),) = got
    assert role == "agent"
    if asks_for_env:
        assert env["BENCHFLOW_AGENT_CWD"] == env["ROLLOUT_CWD"] == "/app"
        assert "AGENT" in env


async def test_a_connect_that_raises_type_error_is_called_once_a_try():
    """The signature is read, never tried out: a TypeError of its own is its own."""
    calls = []

    class Broken:
        async def connect(self, sandbox, role, *, agent_env=None):
            calls.append(role)
            raise TypeError("unexpected keyword argument 'agent_env'")

    stand = by_hand(Broken())
    await drive(stand)
    assert len(calls) == names(stand).count("ConnectFailed") == 2
    assert "connect() raised TypeError" in stand.rollout.result().verdict.reason


def by_factory(factory, monkeypatch, **config):
    """A rollout whose session factory is this function."""
    monkeypatch.setattr(harness, "FACTORY", factory, raising=False)
    agent = AgentConfig("mine", "session-factory", session_factory="harness:FACTORY", calls_model=False)
    stand = build("session-factory", **config)
    stand.agents = {}
    scene = stand.rollout.config.the_scene()
    roles = tuple(attrs.evolve(role, agent=agent, model="m") for role in scene.roles)
    stand.rollout = type(stand.rollout)(attrs.evolve(stand.rollout.config, scene=attrs.evolve(scene, roles=roles)))
    return stand


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_factory_gets_those_keywords_that_it_names(monkeypatch, is_async):
    """`task`, `model`, `env`: whichever stand in its signature; it may be async.

    None for `**keywords`: factories of other harnesses hand those to a constructor that knows none of ours.
    """
    got = []

    def plain(model, env):
        got.append((model, env["ROLLOUT_MODEL"]))
        return HandAgent(say_done)

    async def other(task, model, env, **keywords):
        got.append((model, env["ROLLOUT_MODEL"]))
        assert (task, keywords) == (None, {})
        return HandAgent(say_done)

    stand = await drive(by_factory(other if is_async else plain, monkeypatch))
    assert stand.rollout.result().reward == 1.0
    assert got == [("m", "m")]


class NoListener(HandSession):
    """Refuses the assignment of on_change."""

    def __setattr__(self, name, value):
        if name == "on_change" and value is not None:
            raise AttributeError("on_change is read-only")
        object.__setattr__(self, name, value)


async def test_a_session_that_refuses_on_change_is_not_connected():
    stand = await drive(by_hand(HandAgent(make=lambda: NoListener(say_done))))
    assert names(stand).count("ConnectFailed") == 1, "a second try must fail alike"
    assert "refuses the assignment of on_change" in stand.rollout.result().verdict.reason


async def test_what_is_no_session_is_refused_by_what_it_lacks():
    class Half:
        on_change = None
        steps = ()

        async def prompt(self, text):
            return "end_turn"

    stand = await drive(by_hand(HandAgent(make=Half)))
    assert "it lacks cancel, on_ask_user" in stand.rollout.result().verdict.reason
    assert isinstance(HandSession(say_done), Session)


EXITS = [
    SystemExit(3),
    KeyboardInterrupt(),
    asyncio.CancelledError("mine"),
    RuntimeError("x"),
    JournalError("not yours"),
]


def raises(error):
    def function(*_args, **_keywords):
        raise error

    return function


@pytest.mark.parametrize("error", EXITS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["connect", "prompt", "cancel", "close", "on_ask_user", "steps", "session_id"])
async def test_nothing_that_an_agent_raises_leaves_the_rollout(where, error):  # noqa: C901 - one agent, seven places
    """Exits, interrupts, cancellations of its own making and even our own errors are facts about the agent."""

    async def play(session, _text):
        if where == "prompt":
            raise error
        if where == "cancel":
            await anyio.sleep_forever()
        return "end_turn"

    def read(session):
        if where == "steps" and session.prompts:
            raise error
        return []

    async def method(self, *_args):
        raise error

    body = {where: method} if where in ("cancel", "close") else {}
    if where == "on_ask_user":
        body = {where: raises(error)}
    if where == "session_id":
        body = {where: property(raises(error))}

    class Hostile(HandSession):
        steps = property(read, lambda *_: None)

    hostile = type("Hostile", (Hostile,), body)

    class Agent(HandAgent):
        async def connect(self, sandbox, role):
            if where == "connect":
                raise error
            return hostile(play, sandbox, role)

    stand = by_hand(Agent(), deadlines={"executing": 0.05, "cancelling": 0.05} if where == "cancel" else {})
    await drive(stand)
    ended = {"connect": "failed", "on_ask_user": "failed", "session_id": "failed"}.get(where, "rewarded")
    assert stand.rollout.state == f"closed/{ended}"
    if where == "steps":
        assert captures(stand)[0].truncated
    if where == "prompt":
        assert events(stand, ev.TurnFailed)[0].failure.owner in ("agent", "harness")


async def test_an_error_whose_text_cannot_be_read_or_written_is_still_a_fact():
    """Lone surrogates are no UTF-8, and `__str__` may raise: the journal says what can be said."""

    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no comment")

    for error, said in ((Mute(), "Mute"), (ValueError("\ud800 half"), "? half")):

        async def play(_session, _text, error=error):
            raise error

        stand = by_hand(HandAgent(play))
        await drive(stand)
        assert events(stand, ev.TurnFailed)[0].failure.message.replace("\ud800", "?") == said


async def test_a_prompt_that_answers_rubbish_failed():
    async def play(_session, _text):
        return "finished"

    stand = await drive(by_hand(HandAgent(play)))
    assert "no stop reason" in events(stand, ev.TurnFailed)[0].failure.message


async def test_steps_that_are_shown_from_another_thread_are_on_disk_when_they_come():
    """Agents built on synchronous libraries work in threads; what they show is read on the loop."""
    seen = []

    async def play(session, _text):
        def work():
            session.show(type="agent_message", text=threading.current_thread().name)

        await anyio.to_thread.run_sync(work)
        seen.extend(step.data["type"] for step in segments(stand)[0].steps)
        return "end_turn"

    stand = by_hand(HandAgent(play))
    await drive(stand)
    assert seen == ["user_message", "agent_message"]


async def test_an_agent_that_keeps_its_handle_finds_it_revoked():
    """After its session nothing passes, and what ran on its behalf when it was abandoned was ended."""
    kept = []

    async def play(session, _text):
        kept.append(session.sandbox)
        await session.sandbox.exec("sleep for ever")
        return "end_turn"

    stand = by_hand(HandAgent(play), deadlines={"executing": 0.05, "cancelling": 0.05}, faults={"exec": HANG})
    await drive(stand)
    with pytest.raises(HandleRevoked, match="its session is over"):
        await kept[0].exec("echo hello > hello.txt")
    (quiet,) = events(stand, ev.Quiet)
    assert "sandbox handle revoked" in quiet.evidence[0]


# --- the gate ---


async def gated(**sandbox):
    fake = FakeSandbox(**sandbox)
    await fake.start()
    handle = fake.handle("agent")
    await handle.open()
    return fake, GatedHandle("/app", handle, {"WHO": "agent"})


async def test_a_gate_lets_calls_through_only_while_it_is_open():
    fake, gate = await gated(on_exec=lambda call: ExecResult(call.env["WHO"] + call.cwd, "", 0))
    with pytest.raises(HandleRevoked, match="closed: no turn is open"):
        await gate.exec("true")
    gate.open()
    assert (await gate.exec("true")).stdout == "agent/app"
    assert (await gate.exec("true", env={"WHO": "me"}, cwd="/tmp")).stdout == "me/tmp"
    await gate.write_file("/app/a", b"1")
    assert await gate.read_file("/app/a") == b"1"
    gate.close()
    for call in (gate.exec("true"), gate.read_file("/app/a"), gate.write_file("/app/a", b"2")):
        with pytest.raises(HandleRevoked):
            await call
    assert fake.files["/app/a"] == b"1"


async def test_a_revoked_gate_never_opens_again():
    _, gate = await gated()
    gate.open()
    await gate.revoke()
    gate.close()
    gate.open()
    with pytest.raises(HandleRevoked, match="revoked"):
        await gate.exec("true")
    assert await gate.revoke() == "sandbox handle revoked, 0 running command(s) ended"


@pytest.mark.parametrize("operation", ["exec", "read_file", "write_file"])
async def test_revoking_ends_what_runs(operation):
    """A command as well as a file on its way: nothing of an agent happens after its handle is revoked."""
    _, gate = await gated(faults={operation: HANG})
    gate.open()
    calls = {
        "exec": lambda: gate.exec("sleep"),
        "read_file": lambda: gate.read_file("/app/a"),
        "write_file": lambda: gate.write_file("/app/a", b""),
    }
    ended = []

    async def call():
        try:
            await calls[operation]()
        except HandleRevoked as error:
            ended.append(str(error))

    async with anyio.create_task_group() as group:
        group.start_soon(call)
        await anyio.wait_all_tasks_blocked()
        assert await gate.revoke() == "sandbox handle revoked, 1 running command(s) ended"
    assert ended == ["the call was ended: the session that made it is over"]


# --- the reader ---


@attrs.define(eq=False)
class Paper:
    """A segment that keeps what is written."""

    number: int = 1
    lines: list = attrs.field(factory=list)
    count: int = 1

    def started(self, step):
        self.lines.append(("step", self.count, step["type"]))
        self.count += 1
        return self.count - 1

    def grew(self, index, text):
        self.lines.append(("grew", index, text))

    def updated(self, index, fields):
        self.lines.append(("set", index, dict(fields)))

    def compacted(self, why):
        self.lines.append(("compacted", why))


def reading(prompt="Do it."):
    paper, reader = Paper(), StepReader()
    reader.turn(paper, prompt)
    return paper, reader


def test_text_that_grew_is_written_by_what_it_grew():
    paper, reader = reading()
    step = {"type": "agent_message", "text": "a" * 100}
    reader.look([step])
    step["text"] += "bc"
    reader.look([step])
    reader.look([step])
    assert paper.lines == [("step", 1, "agent_message"), ("grew", 1, "bc")]


def test_text_that_was_rewritten_is_written_anew():
    paper, reader = reading()
    reader.look([{"type": "agent_message", "text": "abc"}])
    reader.look([{"type": "agent_message", "text": "xyz!"}])
    assert paper.lines[1] == ("set", 1, {"text": "xyz!"})


def test_a_thorough_look_finds_what_a_quick_one_may_miss():
    """A quick look compares the end of a text, the last step and the open tool calls; a thorough one everything."""
    paper, reader = reading()
    long = "a" * 200
    reader.look([{"type": "agent_message", "text": long}, {"type": "agent_thought", "text": "hm"}])
    changed = [{"type": "agent_message", "text": "b" + long[1:]}, {"type": "agent_thought", "text": "hm"}]
    reader.look(changed)
    assert len(paper.lines) == 2
    reader.look(changed, thorough=True)
    assert paper.lines[2] == ("set", 1, {"text": "b" + long[1:]})


def test_a_tool_call_is_watched_until_it_is_done():
    paper, reader = reading()
    call = {"type": "tool_call", "tool_call_id": "1", "status": "pending"}
    steps = [call, {"type": "agent_message", "text": "x"}]
    reader.look(steps)
    call["status"], call["gone"] = "completed", 1
    reader.look(steps)
    del call["gone"]
    reader.look(steps, thorough=True)
    assert paper.lines[2:] == [("set", 1, {"status": "completed", "gone": 1}), ("set", 1, {"gone": None})]


def test_the_sessions_own_copy_of_our_prompt_is_written_once():
    paper, reader = reading("Do it.")
    reader.look([{"type": "user_message", "text": "Do it."}, {"type": "user_message", "text": "Do it."}])
    assert paper.lines == [("step", 1, "user_message")]


def test_steps_that_a_session_forgot_stay_written():
    paper, reader = reading()
    steps = [{"type": "agent_message", "text": str(n)} for n in range(3)]
    call = {"type": "tool_call", "tool_call_id": "1", "status": "pending"}
    reader.look([*steps, call])
    reader.look([{"type": "agent_message", "text": "summary"}, {**call, "status": "completed"}])
    assert paper.lines[4] == ("compacted", "the session went from 4 to 2 steps")
    assert paper.lines[5:] == [("step", 5, "agent_message"), ("set", 4, {"status": "completed"})]


def test_foreign_values_are_kept_as_they_print():
    paper, reader = reading()
    reader.look(["a string", {"type": "tool_call", "status": "completed", "content": {1, 2}, 3: object}])
    assert [line[2] for line in paper.lines] == ["unknown", "tool_call"]


@pytest.mark.parametrize("steps", [None, "text", b"bytes", 3, {"type": "x"}])
def test_steps_that_are_no_list_are_the_agents_error(steps):
    _, reader = reading()
    with pytest.raises(AgentError, match="not a list"):
        reader.look(steps)


def test_before_the_first_prompt_nothing_is_written():
    reader = StepReader()
    reader.look([{"type": "agent_message", "text": "hello"}])
    reader.note({"type": "question"})({"answer": 1})
    paper = Paper()
    reader.turn(paper, "x")
    reader.look([{"type": "agent_message", "text": "hello"}])
    assert paper.lines == [("step", 1, "agent_message")]


async def test_the_verifier_is_not_run_while_an_agents_command_is_on_its_way():
    """Quiescence: the command of an abandoned prompt is ended before the verifier starts."""
    order = []

    async def run(_call):
        try:
            await anyio.sleep_forever()
        finally:
            order.append("command ended")

    async def play(session, _text):
        await session.sandbox.exec("sleep")

    async def verify():
        order.append("verified")
        return {"reward": 1.0}

    stand = by_hand(HandAgent(play), deadlines={"executing": 0.05, "cancelling": 0.05}, verifier=FakeVerifier([verify]))
    stand.sandbox.on_exec = run
    await drive(stand)
    assert order == ["command ended", "verified"]
    assert FACTORIES
