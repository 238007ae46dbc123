"""A scripted in-process agent that needs no model: what it does is data, for tasks, demos and tests.

The script is the same as that of `scripted_acp`, so that one script can be played over both transports:

    {"turns": [[{"think": "a file is missing"}, {"shell": "echo hi > hello.txt"}, {"say": "done"}]]}

`turns` holds a list of actions for each prompt; the last one serves every further prompt. `connect` and `close` are
actions that are played there. An action is an object with one of

    say, think          text; "chunks": n cuts it
    shell               run a command in the sandbox and show it as a tool call; "ask": true asks for permission first,
                        "ask": "approval" for an approval, as agents in process do (over ACP that is a permission)
    echo                show the prompt, given again as the value, as the agent's own step
    tool, tool_update   a tool call by its id, with the other keys as its fields
    permission, elicit  ask: {"title", "options"}, or {"message", "options"}
    sleep, wait_cancel  n seconds, or until cancel comes; both end at once when it comes
    cue                 wait until `Backstage.cue` gives the cue of this name
    ignore_cancel       from here on cancel changes nothing
    on_cancel, late     actions after cancel and before the answer; actions after the answer
    compact             forget all steps but the last n
    stop                the stop reason of the turn's answer
    error               raise an AgentError with this text; "type" names another exception
    hang                do nothing for ever; "swallow": true swallows even the cancellation of its task
    flood               n chunks of "text"
    die                 end the process with this exit code; in process, raise SystemExit

It is called with the script as its keyword `env`'s `ROLLOUT_SCRIPT` (JSON), or built directly: `ScriptedAgent({...})`.
"""

from __future__ import annotations

import builtins
import inspect
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import anyio
import attrs

from orchestrator._tasks import Detached
from states.errors import AgentError, ConfigError
from states.ports import AgentCapabilities, AskHandler, AskUserRequest

Action = Mapping[str, Any]
Asked = Literal["permission", "approval"]
ALLOW, REJECT = "allow", "reject"
FIELD = "answer"
"""The one field of the form that `elicit` asks with."""


async def _no_cue(name: str) -> None:
    raise ConfigError(f"nobody gives the cue {name!r}: build the agent with a Backstage")


def _nobody(_word: str) -> None:
    """Nobody wants to know."""


@attrs.frozen
class Backstage:
    """Who stands beside a scripted agent: `told` hears what its client asks of it, `cue` holds it until a cue.

    The words are `connect`, `prompt`, `cancel` and `close`.
    """

    told: Callable[[str], None] = _nobody
    cue: Callable[[str], Awaitable[None]] = _no_cue


class Actor(Protocol):
    """Who plays a script: how it shows what it does, and how it asks."""

    backstage: Backstage

    async def message(self, kind: str, text: str) -> None:
        """Some more text of a message or a thought."""

    async def echo(self, text: str) -> None:
        """Show the prompt."""

    async def tool(self, call: str, fields: Mapping[str, Any]) -> None:
        """A tool call begins."""

    async def tool_update(self, call: str, fields: Mapping[str, Any]) -> None:
        """A tool call changes."""

    async def ask(self, request: AskUserRequest) -> str | None:
        """Ask; the id of the option chosen, None when it was declined."""

    async def shell(self, command: str) -> tuple[str, int]:
        """Run a command: its output and exit code."""

    async def compact(self, keep: int) -> None:
        """Forget steps."""

    async def die(self, code: int) -> None:
        """End the process."""


class Cancelled(Exception):
    """The client asked the turn to end."""


@attrs.define(eq=False)
class Play:
    """Plays the actions of one turn for an actor. `cancel` is what its client calls."""

    actor: Actor
    numbers: itertools.count[int]
    stop: str = "end_turn"
    on_cancel: Sequence[Action] = ()
    late: Sequence[Action] = ()
    _cancelled: anyio.Event = attrs.field(factory=anyio.Event, init=False)
    _deaf: list[bool] = attrs.field(factory=list, init=False)

    def cancel(self) -> None:
        """Ask the turn to end."""
        self._cancelled.set()

    async def turn(self, actions: Sequence[Action]) -> str:
        """Play a turn; returns its stop reason."""
        try:
            await self.perform(actions)
        except Cancelled:
            await self.perform(self.on_cancel, deaf=True)
            return "cancelled"
        return self.stop

    async def perform(self, actions: Sequence[Action], *, deaf: bool = False) -> None:
        """Play actions in order. `deaf` ones are not ended by a cancel."""
        for action in actions:
            name = next((key for key in action if hasattr(self, f"_do_{key}")), None)
            if name is None:
                raise ConfigError(f"a script's action has no known name: {dict(action)}")
            await getattr(self, f"_do_{name}")(action[name], action)
            if self._cancelled.is_set() and not self._deaf and not deaf:
                raise Cancelled

    async def _do_say(self, value: str, action: Action) -> None:
        await self._text("agent_message", value, action.get("chunks", 1))

    async def _do_think(self, value: str, action: Action) -> None:
        await self._text("agent_thought", value, action.get("chunks", 1))

    async def _text(self, kind: str, text: str, chunks: int) -> None:
        size = -(-len(text) // chunks) or 1
        for start in range(0, len(text), size):
            await self.actor.message(kind, text[start : start + size])

    async def _do_flood(self, value: int, action: Action) -> None:
        for _ in range(value):
            await self.actor.message("agent_message", action.get("text", "word "))

    async def _do_echo(self, value: str, _action: Action) -> None:
        await self.actor.echo(value)

    async def _do_tool(self, value: str, action: Action) -> None:
        await self.actor.tool(value, {k: v for k, v in action.items() if k != "tool"})

    async def _do_tool_update(self, value: str, action: Action) -> None:
        await self.actor.tool_update(value, {k: v for k, v in action.items() if k != "tool_update"})

    async def _do_shell(self, value: str, action: Action) -> None:
        call = f"call_{next(self.numbers)}"
        await self.actor.tool(call, {"title": value, "kind": "execute", "status": "in_progress"})
        kind: Asked = "approval" if action.get("ask") == "approval" else "permission"
        if action.get("ask") and await self._may_i(value, call, kind) != ALLOW:
            await self.actor.tool_update(call, {"status": "failed"})
            return
        output, code = await self.actor.shell(value)
        content = [{"type": "content", "content": {"type": "text", "text": output}}]
        await self.actor.tool_update(call, {"status": "failed" if code else "completed", "content": content})

    async def _may_i(self, title: str, call: str, kind: Asked = "permission") -> str | None:
        kinds = ("allow_once", "reject_once")
        return await self.actor.ask(AskUserRequest(title, (ALLOW, REJECT), kinds, request_id=call, kind=kind))

    async def _do_permission(self, value: Mapping[str, Any], _action: Action) -> None:
        await self._may_i(value.get("title", "May I?"), f"asked_{next(self.numbers)}")

    async def _do_elicit(self, value: Mapping[str, Any], _action: Action) -> None:
        options = tuple(value.get("options", ()))
        kinds = ("choice",) * len(options)
        await self.actor.ask(AskUserRequest(value["message"], options, kinds, request_id=FIELD, kind="elicitation"))

    async def _do_cue(self, value: str, _action: Action) -> None:
        await self.actor.backstage.cue(value)

    async def _do_sleep(self, value: float, _action: Action) -> None:
        if self._deaf:
            await anyio.sleep(value)
        else:
            with anyio.move_on_after(value):
                await self._cancelled.wait()

    async def _do_wait_cancel(self, _value: Any, _action: Action) -> None:
        await self._cancelled.wait()

    async def _do_ignore_cancel(self, _value: Any, _action: Action) -> None:
        self._deaf.append(True)

    async def _do_on_cancel(self, value: Sequence[Action], _action: Action) -> None:
        self.on_cancel = value

    async def _do_late(self, value: Sequence[Action], _action: Action) -> None:
        self.late = value

    async def _do_compact(self, value: int, _action: Action) -> None:
        await self.actor.compact(value)

    async def _do_die(self, value: int, _action: Action) -> None:
        await self.actor.die(value)

    async def _do_stop(self, value: str, _action: Action) -> None:
        self.stop = value

    async def _do_error(self, value: str, action: Action) -> None:
        kind = getattr(builtins, action.get("type", ""), AgentError)
        raise kind(value)

    async def _do_hang(self, _value: Any, action: Action) -> None:
        while True:
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                if not action.get("swallow"):
                    raise


@attrs.define(eq=False)
class ScriptedAgent:
    """Builds sessions that play `script`. `sessions` are those it built, for whoever wants to look at them."""

    script: Mapping[str, Any]
    sessions: list[ScriptedSession] = attrs.field(factory=list)
    backstage: Backstage = Backstage()

    async def connect(self, sandbox: Any, role: str, *, agent_env: Mapping[str, str] | None = None) -> ScriptedSession:
        """Open a session in `sandbox` for `role`."""
        session = ScriptedSession(self.script, sandbox, role, dict(agent_env or {}), self.backstage)
        self.sessions.append(session)
        self.backstage.told("connect")
        await Play(session, session.numbers).perform(self.script.get("connect", ()))
        return session

    def capabilities(self) -> AgentCapabilities:
        """It asks, when its script says so."""
        return AgentCapabilities(ask_user=True)


@attrs.define(eq=False)
class ScriptedSession:
    """One conversation with a script. Satisfies `states.ports.Session`."""

    script: Mapping[str, Any]
    sandbox: Any
    role: str
    agent_env: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    backstage: Backstage = Backstage()
    on_change: Callable[[Any], None] | None = None
    prompts: list[str] = attrs.field(factory=list)
    closed: int = 0
    numbers: itertools.count[int] = attrs.field(factory=lambda: itertools.count(1))
    _steps: list[dict[str, Any]] = attrs.field(factory=list)
    _plays: list[Play] = attrs.field(factory=list)
    _handlers: list[AskHandler] = attrs.field(factory=list)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Everything that happened so far, less what a script let it forget."""
        return self._steps

    async def prompt(self, text: str) -> str:
        """Play the next turn. What the script says comes `late` is played by a task of its own."""
        self.backstage.told("prompt")
        self.prompts.append(text)
        await self._show("user_message", text=text)
        turns = self.script.get("turns", [[]])
        play = Play(self, self.numbers)
        self._plays[:] = [play]
        stop = await play.turn(turns[min(len(self.prompts), len(turns)) - 1])
        if play.late:
            Detached(play.perform, (play.late,), name="late").start()
        return stop

    async def cancel(self) -> None:
        """Ask the turn in flight to end."""
        self.backstage.told("cancel")
        for play in self._plays:
            play.cancel()

    def on_ask_user(self, handler: AskHandler | None) -> None:
        """Bind who answers."""
        self._handlers[:] = [handler] if handler else []

    async def close(self) -> None:
        """Play `close`, and count how often it was called."""
        self.backstage.told("close")
        self.closed += 1
        await Play(self, self.numbers).perform(self.script.get("close", ()))

    # --- the actor ---

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change(self)

    async def _show(self, kind: str, /, **fields: Any) -> None:
        self._steps.append({"type": kind, **fields})
        self._changed()

    async def message(self, kind: str, text: str) -> None:
        """Some more text; a new step unless the last one is of this kind."""
        if self._steps and self._steps[-1]["type"] == kind:
            self._steps[-1]["text"] += text
            self._changed()
        else:
            await self._show(kind, text=text)

    async def echo(self, text: str) -> None:
        """Nothing more: the prompt is a step of this session already."""

    async def tool(self, call: str, fields: Mapping[str, Any]) -> None:
        """A tool call begins."""
        blank = {"kind": "other", "title": call, "status": "pending", "content": []}
        await self._show("tool_call", tool_call_id=call, **{**blank, **fields})

    async def tool_update(self, call: str, fields: Mapping[str, Any]) -> None:
        """A tool call changes, or is heard of for the first time."""
        known = [step for step in self._steps if step.get("tool_call_id") == call]
        if not known:
            await self.tool(call, {"title": "", **fields})
        for step in known:
            step.update(fields)
        self._changed()

    async def ask(self, request: AskUserRequest) -> str | None:
        """Ask whoever is bound; what a permission is for is shown first."""
        if request.kind == "permission":
            await self.tool_update(request.request_id, {"title": request.prompt})
        for handler in self._handlers:
            answer = handler(request)
            return await answer if inspect.isawaitable(answer) else answer
        return None

    async def shell(self, command: str) -> tuple[str, int]:
        """Run a command in the sandbox."""
        done = await self.sandbox.exec(command)
        return done.stdout + done.stderr, done.return_code

    async def compact(self, keep: int) -> None:
        """Forget all steps but the last `keep`."""
        self._steps = self._steps[len(self._steps) - keep :]
        self._changed()

    async def die(self, code: int) -> None:
        """What an agent's own code may do to the process that it lives in."""
        raise SystemExit(code)


def from_env(env: Mapping[str, str]) -> ScriptedAgent:
    """The session factory `orchestrator.agents.scripted:from_env`: plays the JSON of `ROLLOUT_SCRIPT`."""
    text = env.get("ROLLOUT_SCRIPT")
    if not text:
        raise ConfigError('the scripted agent wants its script as JSON in --env ROLLOUT_SCRIPT={"turns": [...]}')
    try:
        return ScriptedAgent(json.loads(text))
    except ValueError as error:
        raise ConfigError(f"ROLLOUT_SCRIPT is not JSON: {error}") from error
