"""A live session: turns and their ways out, the cancel fence, late updates, loss, and the one close."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from acp_peers import Talk, Wire, talking_to, talking_to_script

from states.errors import AgentLost
from states.events import Lost, Settled, TurnEnded, TurnFailed, Usage

pytestmark = pytest.mark.anyio


async def cancelled(talk: Talk, turn: Any) -> Any:
    """Cancel as the state handler does: executing is left, then cancelling drives the turn to its end."""
    with anyio.fail_after(10):
        return await talk.transport.cancelling(turn)


async def lost(talk: Talk) -> Any:
    """How an agent that goes away between turns is known to have gone."""
    (watch,) = talk.transport.watches(talk.connection)
    return await watch()


async def executing(talk: Talk, turn: Any, until: anyio.Event) -> None:
    """Be in `executing` until something happened, then leave it as the kernel does."""
    async with anyio.create_task_group() as group:
        group.start_soon(talk.transport.executing, turn)
        await until.wait()
        group.cancel_scope.cancel()


# --- turns ---------------------------------------------------------------------------------------------------


async def test_consecutive_turns_of_one_session_have_a_segment_each() -> None:
    async def play(wire: Wire) -> None:
        await wire.handshake()
        for word in ("one", "two", "three"):
            request = await wire.prompted()
            await wire.say(word)
            await wire.end_turn(request)
        await wire.farewell()

    async with talking_to(play) as (talk, stage):
        for number in range(3):
            assert await talk.turn(f"turn {number}") == TurnEnded("end_turn", steps=2)
            talk.turns[-1].segment.seal(complete=True, usage=Usage())
        assert [step["text"] for step in talk.session.steps] == ["turn 0", "one", "turn 1", "two", "turn 2", "three"]
    assert [talk.texts(number) for number in (1, 2, 3)] == [
        [("agent_message", "one")],
        [("agent_message", "two")],
        [("agent_message", "three")],
    ]
    prompts = [m["params"]["prompt"] for m in stage.wire.received if m.get("method") == "session/prompt"]
    assert prompts == [[{"type": "text", "text": f"turn {number}"}] for number in range(3)]


async def test_chunks_of_one_message_are_one_step_and_a_new_message_is_a_new_one() -> None:
    """A change of messageId, of kind, or a tool call between begins a new step; a note between does not."""

    async def play(wire: Wire) -> None:
        await wire.handshake()
        request = await wire.prompted()
        await wire.say("a")
        await wire.update("usage_update", used=1, size=2)
        await wire.say("b")
        await wire.update("agent_thought_chunk", content={"type": "text", "text": "hm"})
        await wire.say("c")
        await wire.say("d", messageId="m2")
        await wire.update("tool_call", toolCallId="c1", title="t")
        await wire.say("e", messageId="m2")
        await wire.say("")
        await wire.update("agent_message_chunk", content={"type": "image", "data": "aGk=", "mimeType": "image/png"})
        await wire.say("f", messageId="m2")
        await wire.end_turn(request)
        await wire.farewell()

    async with talking_to(play) as (talk, _):
        await talk.turn()
    steps = [(step["type"], step.get("text")) for step in talk.steps() if step["type"] != "session_update"]
    assert steps == [
        ("agent_message", "ab"),
        ("agent_thought", "hm"),
        ("agent_message", "c"),
        ("agent_message", "d"),
        ("tool_call", None),
        ("agent_message", "e"),
        ("agent_message", ""),
        ("agent_message", "f"),
    ]
    image = [step for step in talk.steps() if "content" in step and step["type"] == "agent_message"]
    assert image[0]["content"]["mimeType"] == "image/png"


async def test_a_plan_is_a_step_each_time_it_changes() -> None:
    async def play(wire: Wire) -> None:
        await wire.handshake()
        request = await wire.prompted()
        await wire.update("plan", entries=[{"content": "x", "status": "pending"}])
        await wire.update("plan", entries=[{"content": "x", "status": "completed"}])
        await wire.end_turn(request)
        await wire.farewell()

    async with talking_to(play) as (talk, _):
        await talk.turn()
    assert [step["entries"][0]["status"] for step in talk.steps()] == ["pending", "completed"]


@pytest.mark.parametrize("pieces", [["say it twice"], ["say ", "it", " twice"]])
async def test_our_own_prompt_coming_back_is_not_a_second_step(pieces: list[str]) -> None:
    """Whole or in pieces; what the user did not say is a step."""

    async def play(wire: Wire) -> None:
        await wire.handshake()
        request = await wire.prompted()
        for piece in [*pieces, "something else"]:
            await wire.update("user_message_chunk", content={"type": "text", "text": piece})
        await wire.end_turn(request)
        await wire.farewell()

    async with talking_to(play) as (talk, _):
        await talk.turn("say it twice")
    assert talk.texts() == [("user_message", "something else")]


async def test_usage_in_the_reply_is_kept_as_the_agents_own_word() -> None:
    """It is a step, in the turn's own segment and counted, and never metered usage."""
    usage = {"totalTokens": 3, "inputTokens": 1, "outputTokens": 2}

    async def play(wire: Wire) -> None:
        await wire.handshake()
        await wire.reply(await wire.prompted(), {"stopReason": "end_turn", "usage": usage})
        await wire.farewell()

    async with talking_to(play) as (talk, _):
        assert await talk.turn() == TurnEnded("end_turn", steps=2)
    assert talk.steps() == [{"type": "session_update", "update": "prompt_response", "data": {"usage": usage}}]


async def test_on_change_is_called_for_each_change_and_may_raise() -> None:
    """An error of a watcher is noted in the evidence; it ends neither the turn nor the reader."""
    seen: list[int] = []

    async def play(wire: Wire) -> None:
        await wire.handshake()
        request = await wire.prompted()
        await wire.say("a")
        await wire.say("b")
        await wire.update("tool_call", toolCallId="c", title="t")
        await wire.end_turn(request)
        await wire.farewell()

    def watch(session: Any) -> None:
        seen.append(len(session.steps))
        if len(seen) == 2:
            raise ValueError("watcher broke")

    async with talking_to(play) as (talk, _):
        talk.session.on_change = watch
        assert await talk.turn() == TurnEnded("end_turn", steps=3)
        evidence = await talk.transport.quiescing(talk.connection)
    assert seen == [2, 2, 3]
    assert any("on_change raised ValueError: watcher broke" in sentence for sentence in evidence)


async def test_a_session_can_be_prompted_without_a_transport() -> None:
    """As a plain `Session`: steps are there, and a cancel between prompts kills no later one."""

    async def play(wire: Wire) -> None:
        await wire.handshake()
        for word in ("one", "two"):
            request = await wire.prompted()
            await wire.say(word)
            await wire.end_turn(request)
        await wire.farewell()

    async with talking_to(play) as (talk, stage):
        assert await talk.session.prompt("first") == "end_turn"
        await talk.session.cancel()
        assert await talk.session.prompt("second") == "end_turn"
        assert [step["text"] for step in talk.session.steps] == ["first", "one", "second", "two"]
    assert "session/cancel" not in [m.get("method") for m in stage.wire.received]


# --- no timer ------------------------------------------------------------------------------------------------


def test_no_timer_stands_between_the_reply_and_the_end_of_the_turn() -> None:
    """The whole turn, capture included, on a clock that never moves: whatever waited for time would wait for ever."""
    import trio
    import trio.testing

    async def play(wire: Wire) -> None:
        await wire.handshake()
        request = await wire.prompted()
        await wire.say("hello")
        options = [{"optionId": "y", "name": "Y", "kind": "allow_once"}]
        await wire.ask("session/request_permission", toolCall={"toolCallId": "c"}, options=options)
        await wire.answer()
        await wire.end_turn(request)
        await wire.farewell()

    async def main() -> None:
        async with talking_to(play) as (talk, _):
            assert await talk.turn() == TurnEnded("end_turn", steps=4)

    trio.run(main, clock=trio.testing.MockClock(rate=0.0))


# --- cancelling ----------------------------------------------------------------------------------------------


async def test_a_cancelled_turn_settles_with_what_came_until_its_answer() -> None:
    """session/cancel is sent once, updates are taken until the prompt answers, and the session goes on."""
    ready = anyio.Event()

    async def play(wire: Wire) -> None:
        await wire.handshake()
        request = await wire.prompted()
        await wire.say("working")
        ready.set()
        await wire.until("session/cancel")
        await wire.say(", stopping")
        await wire.end_turn(request, "cancelled")
        await wire.end_turn(await wire.prompted())
        await wire.farewell()

    async with talking_to(play) as (talk, stage):
        turn = talk.prepare()
        await executing(talk, turn, ready)
        await talk.session.cancel()
        assert await cancelled(talk, turn) == Settled("cancelled", steps=2)
        assert await talk.turn("next") == TurnEnded("end_turn", steps=1)
    assert talk.texts() == [("agent_message", "working, stopping")]
    assert [m.get("method") for m in stage.wire.received].count("session/cancel") == 1


async def test_pending_and_new_permission_requests_of_a_cancelled_turn_are_answered_cancelled() -> None:
    """Also those that come after the cancel, and elicitations."""
    ready = anyio.Event()
    call = {"toolCall": {"toolCallId": "c", "title": "rm"}, "options": [{"optionId": "y", "kind": "allow_once"}]}

    async def play(wire: Wire) -> None:
        await wire.handshake()
        request = await wire.prompted()
        await wire.ask("session/request_permission", 1, **call)
        form = {"type": "object", "properties": {"name": {"type": "string"}}}
        await wire.ask("elicitation/create", 2, message="Who?", mode="form", requestedSchema=form)
        await wire.say("asked")
        while len(talk.session.steps) < 5:
            await anyio.lowlevel.checkpoint()
        ready.set()
        await wire.until("session/cancel")
        await wire.ask("session/request_permission", 3, **call)
        answers = {m["id"]: m["result"] for m in [await wire.read() for _ in range(3)]}
        assert answers[1] == answers[3] == {"outcome": {"outcome": "cancelled"}}
        assert answers[2] == {"action": "cancel"}
        await wire.end_turn(request, "cancelled")
        await wire.farewell()

    async def never(_request: Any) -> str:
        await anyio.sleep_forever()
        raise AssertionError

    async with talking_to(play) as (talk, _):
        talk.session.on_ask_user(never)
        turn = talk.prepare()
        await executing(talk, turn, ready)
        assert isinstance(await cancelled(talk, turn), Settled)
    questions = [step for step in talk.steps() if step["type"] == "question"]
    assert [step["answer"] for step in questions] == [None, None, None]
    assert {step["by"] for step in questions} == {"nobody"}


@pytest.mark.parametrize("answer", [{"error": {"code": -32603, "message": "aborted"}}, {"result": "rubbish"}])
async def test_any_answer_settles_a_cancelled_turn(answer: dict[str, Any]) -> None:
    """Agents answer a cancel with errors too; the turn has answered and the session may be used."""
    ready = anyio.Event()

    async def play(wire: Wire) -> None:
        await wire.handshake()
        request = await wire.prompted()
        ready.set()
        await wire.until("session/cancel")
        await wire.send(id=request["id"], **answer)
        await wire.farewell()

    async with talking_to(play) as (talk, _):
        turn = talk.prepare()
        await executing(talk, turn, ready)
        assert await cancelled(talk, turn) == Settled("cancelled", steps=1)


async def test_an_agent_that_dies_of_the_cancel_is_lost() -> None:
    ready = anyio.Event()

    async def play(wire: Wire) -> int:
        await wire.handshake()
        await wire.prompted()
        ready.set()
        await wire.until("session/cancel")
        return 3

    async with talking_to(play) as (talk, _):
        turn = talk.prepare()
        await executing(talk, turn, ready)
        event = await cancelled(talk, turn)
        assert isinstance(event, Lost)
        assert event.exit_code == 3


async def test_an_agent_that_ignores_the_cancel_is_waited_for_until_the_state_gives_up() -> None:
    """The transport sets no bound of its own: the state has the deadline, and abandons the turn."""
    ready = anyio.Event()

    async def play(wire: Wire) -> None:
        await wire.handshake()
        await wire.prompted()
        ready.set()
        await wire.farewell()

    async with talking_to(play) as (talk, stage):
        turn = talk.prepare()
        await executing(talk, turn, ready)
        with anyio.move_on_after(0.1) as scope:
            await talk.transport.cancelling(turn)
        assert scope.cancelled_caught
        turn.inflight.abandon()
        await talk.transport.capturing(turn)
        await talk.transport.quiescing(talk.connection)
    methods = [m.get("method") for m in stage.wire.received]
    assert methods[-3:] == ["session/cancel", "$/cancel_request", "session/close"]


async def test_a_cancel_before_the_prompt_was_sent_never_sends_it() -> None:
    """The fence: a cancel can neither overtake its prompt nor hit the next one."""

    async def play(wire: Wire) -> None:
        await wire.handshake()
        await wire.end_turn(await wire.prompted())
        await wire.farewell()

    async with talking_to(play) as (talk, stage):
        turn = talk.prepare("never started")
        assert await cancelled(talk, turn) == Settled("cancelled", steps=1)
        turn = talk.prepare("started, but too late")
        await talk.session.cancel()
        turn.inflight.start()
        assert await turn.inflight.outcome() == TurnEnded("cancelled", steps=1)
        assert await talk.turn("second") == TurnEnded("end_turn", steps=1)
    prompts = [m["params"]["prompt"][0]["text"] for m in stage.wire.received if m.get("method") == "session/prompt"]
    assert prompts == ["second"]
    assert "session/cancel" not in [m.get("method") for m in stage.wire.received]


# --- late and between turns ----------------------------------------------------------------------------------


async def test_what_comes_after_the_seal_is_late_and_changes_no_count() -> None:
    """New steps, growth and tool results go to the segment they belong to, also while a later turn runs."""
    sealed = anyio.Event()

    async def play(wire: Wire) -> None:
        await wire.handshake()
        request = await wire.prompted()
        await wire.update("tool_call", toolCallId="bg", title="sleep 5 &", status="in_progress")
        await wire.end_turn(request)
        await sealed.wait()
        await wire.say("by the way")
        request = await wire.prompted()
        await wire.say("second turn")
        await wire.update("tool_call_update", toolCallId="bg", status="completed")
        await wire.end_turn(request)
        await wire.farewell()

    async with talking_to(play) as (talk, _):
        assert await talk.turn() == TurnEnded("end_turn", steps=2)
        talk.turns[0].segment.seal(complete=True, usage=Usage())
        sealed.set()
        while len(talk.session.steps) < 3:
            await anyio.lowlevel.checkpoint()
        assert await talk.turn("again") == TurnEnded("end_turn", steps=2)
        assert (talk.turns[0].segment.steps, talk.turns[0].segment.tool_calls) == (2, 1)
    first, second = talk.recorded()
    assert first.sealed is not None
    assert first.sealed["steps"] == 2
    assert [(step.data.get("text"), step.late) for step in first.steps[2:]] == [("by the way", True)]
    assert first.steps[1].data["status"] == "completed"
    assert [step.data["text"] for step in second.steps] == ["again", "second turn"]


async def test_capturing_reads_what_is_in_the_pipe_when_the_turn_is_given_up() -> None:
    """An unresponsive turn is partial, but what the agent had written by then is not lost."""
    ready = anyio.Event()

    async def play(wire: Wire) -> None:
        await wire.handshake()
        await wire.prompted()
        ready.set()
        for number in range(5000):
            await wire.say(f"{number} ")
        await anyio.sleep_forever()

    async with talking_to(play, close_sec=0.1, exit_sec=0.1) as (talk, _):
        turn = talk.prepare()
        await executing(talk, turn, ready)
        turn.inflight.abandon()
        await talk.transport.capturing(turn)
        assert talk.texts()[0][1].split() == [str(number) for number in range(5000)]


async def test_a_permission_request_between_turns_is_answered_cancelled() -> None:
    """Nothing is permitted when nobody is prompted."""
    answers: list[Any] = []

    async def play(wire: Wire) -> None:
        await wire.handshake()
        await wire.end_turn(await wire.prompted())
        options = [{"optionId": "y", "kind": "allow_once"}]
        await wire.ask("session/request_permission", toolCall={"toolCallId": "c"}, options=options)
        answers.append((await wire.answer())["result"])
        await wire.farewell()

    async with talking_to(play) as (talk, _):
        await talk.turn()
        while not answers:
            await anyio.lowlevel.checkpoint()
    assert answers == [{"outcome": {"outcome": "cancelled"}}]


# --- loss ----------------------------------------------------------------------------------------------------


async def test_an_agent_that_goes_away_between_turns_is_lost() -> None:
    """`lost` returns with exit code and last words; before that it waits."""
    go = anyio.Event()

    async def play(wire: Wire) -> int:
        await wire.handshake()
        await wire.end_turn(await wire.prompted())
        await go.wait()
        wire.process.stderr(b"killed by the OOM killer\n")
        return -9

    async with talking_to(play) as (talk, _):
        await talk.turn()
        with anyio.move_on_after(0.02) as waiting:
            await lost(talk)
        assert waiting.cancelled_caught
        go.set()
        event = await lost(talk)
        assert event.exit_code == -9
        assert event.failure.stderr == "killed by the OOM killer\n"
        with pytest.raises(AgentLost):
            await talk.session.prompt("anyone?")
        evidence = await talk.transport.quiescing(talk.connection)
    assert "exit code -9" in evidence[0]


async def test_a_sandbox_that_dies_is_not_blamed_on_the_agent() -> None:
    """Its stream breaks with an error of the sandbox, and that is whose failure it is."""

    async def play(wire: Wire) -> None:
        await wire.handshake()
        await wire.prompted()
        await anyio.sleep_forever()

    async with talking_to(play) as (talk, _):
        from states.errors import SandboxError

        turn = talk.prepare()
        talk.session._peer._lose(SandboxError("the host is down"))
        event = await talk.transport.executing(turn)
        assert isinstance(event, TurnFailed)
        assert event.failure.owner == "sandbox"
        assert (await lost(talk)).failure.owner == "sandbox"


async def test_an_error_of_ours_while_reading_is_ours() -> None:
    """A trajectory that cannot be written fails the turn with the harness as owner, and hides nothing."""

    async def play(wire: Wire) -> None:
        await wire.handshake()
        await wire.prompted()
        await wire.say("x")
        await anyio.sleep_forever()

    async with talking_to(play) as (talk, _):

        class FullDisk:
            def write(self, _line: bytes) -> None:
                raise OSError(28, "No space left on device")

        turn = talk.prepare()
        turn.segment._sink = FullDisk()
        event = await talk.transport.executing(turn)
        assert isinstance(event, TurnFailed)
        assert event.failure.owner == "harness"
        assert "No space left" in event.failure.message


# --- close ---------------------------------------------------------------------------------------------------


async def test_a_session_is_closed_exactly_once_and_leaves_no_task() -> None:
    """However often and from wherever quiescing runs."""

    async def play(wire: Wire) -> int:
        await wire.handshake()
        await wire.farewell()
        return 0

    async with talking_to(play) as (talk, stage):
        first = await talk.transport.quiescing(talk.connection)
        assert await talk.transport.quiescing(talk.connection) == first
        assert talk.session._peer._task.done
    assert first == ("session/close was answered", "agent exited with code 0 after its stdin was closed")
    assert [m.get("method") for m in stage.wire.received].count("session/close") == 1


async def test_session_close_is_sent_only_where_it_is_advertised() -> None:
    async def play(wire: Wire) -> None:
        await wire.reply(await wire.read(), {"protocolVersion": 1, "agentCapabilities": {"sessionCapabilities": {}}})
        await wire.reply(await wire.read(), {"sessionId": "s1"})
        await wire.farewell()

    async with talking_to(play) as (talk, stage):
        evidence = await talk.transport.quiescing(talk.connection)
    assert evidence[0] == "the agent has no session/close"
    assert "session/close" not in [m.get("method") for m in stage.wire.received]


async def test_an_agent_that_neither_closes_nor_exits_is_left_to_the_handle_within_the_bounds() -> None:
    """Codex, openhands and older claude ignore the end of their stdin."""

    async def play(wire: Wire) -> None:
        await wire.handshake()
        await anyio.sleep_forever()

    async with talking_to(play, close_sec=0.1, exit_sec=0.1) as (talk, _):
        start = anyio.current_time()
        evidence = await talk.transport.quiescing(talk.connection)
        assert anyio.current_time() - start < 2
        assert talk.session._peer._task.done
    assert evidence == (
        "session/close was not answered within 0.1 s",
        "agent still ran 0.1 s after its stdin was closed",
    )


async def test_a_close_that_is_cancelled_still_ends_the_reader() -> None:
    async def play(wire: Wire) -> None:
        await wire.handshake()
        await anyio.sleep_forever()

    async with talking_to(play) as (talk, _):
        with anyio.move_on_after(0.05):
            await talk.transport.quiescing(talk.connection)
        await talk.session._peer.ended()
        assert talk.session._peer._task.done


# --- the scripted agent as a real process --------------------------------------------------------------------


async def test_a_process_that_dies_is_lost_with_its_exit_code_and_stderr(tmp_path: Path) -> None:
    script = {"turns": [[{"say": "I fail"}, {"stderr": "fatal: no model"}, {"die": 3}]]}
    async with talking_to_script(tmp_path, script) as talk:
        event = await talk.turn()
        assert isinstance(event, Lost)
        assert event.exit_code == 3
        assert event.failure.stderr == "fatal: no model\n"
    assert talk.texts() == [("agent_message", "I fail")]


async def test_a_process_killed_by_a_signal_is_lost_with_that_signal(tmp_path: Path) -> None:
    async with talking_to_script(tmp_path, {"turns": [[{"signal": "SIGKILL"}]]}) as talk:
        event = await talk.turn()
        assert isinstance(event, Lost)
        assert event.exit_code == -9


async def test_a_grandchild_that_holds_the_pipes_holds_up_nobody(tmp_path: Path) -> None:
    """The agent is gone, what it left behind keeps stdout open: the loss shows once we look, and close is bounded."""
    script = {"turns": [[{"spawn": "sleep 6"}, {"say": "bye"}]], "close": [{"die": 0}]}
    async with talking_to_script(tmp_path, script) as talk:
        assert await talk.turn() == TurnEnded("end_turn", steps=2)
        start = anyio.current_time()
        evidence = await talk.transport.quiescing(talk.connection)
        assert anyio.current_time() - start < 5
    assert evidence


async def test_a_process_that_closes_stdout_and_lives_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no exit code to report, and the failure says so."""
    monkeypatch.setattr("orchestrator.transports.acp_wire.EXIT_SEC", 0.1)
    async with talking_to_script(tmp_path, {"turns": [[{"close_stdout": True}]]}) as talk:
        event = await talk.turn()
        assert isinstance(event, Lost)
        assert event.exit_code is None
        assert "it still runs" in event.failure.message


async def test_a_process_is_cancelled_while_it_sleeps(tmp_path: Path) -> None:
    """With updates between the cancel and the answer."""
    script = {"turns": [[{"on_cancel": [{"say": "stopped"}]}, {"say": "zzz "}, {"sleep": 30}, {"say": "never"}]]}
    async with talking_to_script(tmp_path, script) as talk:
        ready = anyio.Event()
        talk.session.on_change = lambda _session: ready.set()
        turn = talk.prepare()
        await executing(talk, turn, ready)
        assert await cancelled(talk, turn) == Settled("cancelled", steps=2)
    assert talk.texts() == [("agent_message", "zzz stopped")]


async def test_a_process_that_ignores_cancel_and_eof_is_ended_by_its_handle(tmp_path: Path) -> None:
    script = {
        "ignore_eof": True,
        "close": [{"silent": True}],
        "turns": [[{"ignore_cancel": True}, {"say": "no"}, {"hang": 1}]],
    }
    async with talking_to_script(tmp_path, script, close_sec=0.2, exit_sec=0.2) as talk:
        ready = anyio.Event()
        talk.session.on_change = lambda _session: ready.set()
        turn = talk.prepare()
        await executing(talk, turn, ready)
        with anyio.move_on_after(0.1) as scope:
            await talk.transport.cancelling(turn)
        assert scope.cancelled_caught
        evidence = await talk.transport.quiescing(talk.connection)
    assert "still ran" in evidence[1]


async def test_every_other_trick_of_the_scripted_agent_is_survived(tmp_path: Path) -> None:
    """Noise, flood, a megabyte, late updates, odd stop reasons, errors, raw lines, in one session."""
    script = {
        "start": [{"noise": 3}],
        "turns": [
            [{"noise": 50}, {"flood": 3000, "text": "w "}, {"huge": 1_000_000, "id": "m"}],
            [{"stop": "refusal"}, {"usage": {"totalTokens": 2, "inputTokens": 1, "outputTokens": 1}}],
            [{"error": {"code": -32000, "message": "overloaded"}}],
            [{"reply": {"stopReason": "end_turn"}}, {"late": [{"say": "late"}]}],
            [{"reply_line": '{"jsonrpc":"2.0","id":$id,"error":"boom"}'}],
            [{"line": "null"}, {"notify": "_x/y"}, {"request": "vendor/ask"}, {"say": "$last"}],
            [{"tool": "c1", "status": "in_progress"}, {"tool_update": "c1", "status": "failed"}],
        ],
    }
    async with talking_to_script(tmp_path, script) as talk:
        assert await talk.turn() == TurnEnded("end_turn", steps=3)
        assert await talk.turn() == TurnEnded("refusal", steps=2)
        assert isinstance(await talk.turn(), TurnFailed)
        assert isinstance(await talk.turn(), TurnEnded)
        failed = await talk.turn()
        assert isinstance(failed, TurnFailed)
        assert "no object" in failed.failure.message
        await talk.turn()
        await talk.turn()
        assert talk.session._peer.noise.count == 54
    assert talk.texts(1) == [("agent_message", "w " * 3000), ("agent_message", "x" * 1_000_000)]
    assert "-32601" in talk.texts(6)[-1][1]
    assert [step["status"] for step in talk.steps(7)] == ["failed"]


async def test_the_scripted_agent_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    """Isolated mode, no site packages: as in a sandbox that has Python and nothing else."""
    from acp_peers import SCRIPTED, HostHandle, connected, launch

    path = tmp_path / "script.json"
    path.write_text('{"turns": [[{"say": "hi"}]]}')
    argv = (sys.executable, "-I", "-S", str(SCRIPTED), str(path))
    async with connected(HostHandle(), launch(argv=argv, cwd=str(tmp_path))) as talk:
        assert await talk.turn() == TurnEnded("end_turn", steps=2)
