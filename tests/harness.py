"""Rollouts for tests: both transports, the fake sandbox, an injected clock, and traces that read as text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

import anyio
import attrs
from scripted_peer import acp_agent

from orchestrator import AgentConfig, Budgets, Role, Rollout, RolloutConfig, Scene, Turn
from orchestrator.agents.scripted import ScriptedAgent
from orchestrator.journal import event_data, to_json
from orchestrator.sandboxes.fake import FakeSandbox
from states.events import Event, Share, Usage
from states.journal import Transition, fold
from states.ports import ExecResult

TRANSPORTS = ("acp", "session-factory")
SAY = {"turns": [[{"think": "well"}, {"shell": "make it"}, {"say": "done"}]]}
FACTORIES: dict[str, ScriptedAgent] = {}


def build_agent(env: Mapping[str, str]) -> ScriptedAgent:
    """The session factory of these tests: `module:callable` finds the agent that a test made."""
    return FACTORIES[env["AGENT"]]


@attrs.define(eq=False)
class FakeVerifier:
    """A verifier whose answers are a list: a reward, or an error to raise."""

    answers: list[Any] = attrs.field(factory=lambda: [1.0])
    runs: int = 0

    async def verify(self) -> dict[str, float]:
        self.runs += 1
        answer = self.answers[min(self.runs, len(self.answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            return await answer()
        return {"reward": answer}

    async def check(self) -> dict[str, float]:
        return await self.verify()


@attrs.define(eq=False)
class FakeMeter:
    """What a gateway would have counted."""

    counted: Usage = Usage()
    failure: str | None = None
    error: Exception | None = None
    turns: list[tuple[str, int]] = attrs.field(factory=lambda: [("", 0)])
    used: dict[tuple[str, int], Usage] = attrs.field(factory=dict)

    def usage(self) -> Usage:
        return self.counted

    def shares(self) -> tuple[Share, ...]:
        """What came since the last look is of the turn that was begun last."""
        new = self.counted - sum(self.used.values(), Usage())
        self.used[self.turns[-1]] = self.used.get(self.turns[-1], Usage()) + new
        return tuple(Share(role, turn, usage) for (role, turn), usage in self.used.items())

    def turn_began(self, role: str, turn: int, _budgets: Budgets) -> None:
        self.shares()
        self.turns.append((role, turn))

    async def settle(self) -> Usage:
        return self.counted

    def provider_failure(self) -> str | None:
        return self.failure


@attrs.define(eq=False)
class Stand:
    """A rollout on the test stand, with what it was made of."""

    rollout: Rollout
    sandbox: FakeSandbox
    agents: dict[str, ScriptedAgent]
    sent: list[str]
    verifier: FakeVerifier


def build(
    transport: str,
    script: Mapping[str, Any] | Mapping[str, Mapping[str, Any]] = SAY,
    *,
    roles: tuple[str, ...] = ("agent",),
    turns: tuple[Turn, ...] | None = None,
    verifier: FakeVerifier | None = None,
    exec_result: Callable[[Any], Any] = lambda _call: ExecResult("made it\n", "", 0),
    rules: Mapping[str, Any] | None = None,
    faults: Mapping[str, Any] | None = None,
    **config: Any,
) -> Stand:
    """One rollout over `transport` in the fake sandbox, playing `script` (or one script by role)."""
    scripts = {role: script.get(role, script) for role in roles}
    sent: list[str] = []
    sandbox = FakeSandbox(on_exec=exec_result, faults=dict(faults or {}))
    agents = {}
    for role in roles:
        agents[role] = FACTORIES[f"{id(sandbox)}-{role}"] = ScriptedAgent(scripts[role])
    sandbox.on_spawn = lambda process: acp_agent(scripts[process.handle.name.rpartition("-")[0]], sent)(process)
    verifier = verifier or FakeVerifier()
    base = {
        "prompt": "Do it.",
        "scene": Scene(
            tuple(Role(role, agent_config(transport), env={"AGENT": f"{id(sandbox)}-{role}"}) for role in roles),
            tuple(Turn(role) for role in roles) if turns is None else turns,
        ),
        "sandbox": sandbox,
        "verifier": verifier,
        "out": None,
        "clock": itertools.count().__next__,
        "new_id": lambda: "r1",
    }
    rollout = Rollout(RolloutConfig(**{**base, **config}))
    if rules:
        rollout._world.rules = attrs.evolve(rollout._world.rules, **rules)
        rollout._journal.records[0] = attrs.evolve(rollout._journal.records[0], rules=rollout._world.rules)
    return Stand(rollout, sandbox, agents, sent, verifier)


def agent_config(transport: str) -> AgentConfig:
    """The scripted agent over either transport."""
    if transport == "acp":
        return AgentConfig("scripted", "acp", launch=("scripted",), in_image=True, calls_model=False)
    return AgentConfig("scripted", transport, session_factory="harness:build_agent", calls_model=False)


def on(state: str, act: Callable[[], Any], *, nth: int = 1) -> Callable[[Transition], None]:
    """A hook that acts when `state` is entered for the nth time, before its handler runs."""
    entered = itertools.count(1)

    def hook(moved: Transition) -> None:
        if moved.dest == state and moved.source != state and next(entered) == nth:
            act()

    return hook


class Twisted:
    """A transport some of whose methods are a test's own."""

    def __init__(self, real: Any, methods: Mapping[str, Any]) -> None:
        self._real = real
        self.__dict__.update(methods)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def twist(stand: Stand, **methods: Any) -> Callable[[], None]:
    """Replace methods of the transport in use from here on."""

    def act() -> None:
        rollout = stand.rollout

        def twisted(stage: Any) -> Any:
            if hasattr(stage, "connection"):
                return attrs.evolve(stage, connection=twisted(stage.connection))
            if hasattr(stage, "seat"):
                return attrs.evolve(stage, seat=twisted(stage.seat))
            return attrs.evolve(stage, transport=Twisted(stage.transport, methods))

        rollout._stage = twisted(rollout._stage)

    return act


def raising(error: Exception) -> Callable[..., Any]:
    """An async function that raises."""

    async def method(*_: Any) -> Any:
        raise error

    return method


def trace(rollout: Rollout) -> str:
    """The rollout as text: a line a transition, its cause and the data that says something."""
    return "\n".join(_line(record) for record in rollout.journal if isinstance(record, Transition)) + "\n"


def _line(moved: Transition) -> str:
    data = {k: v for k, v in event_data(moved.event).items() if k not in _untold(moved) and _says_something(v)}
    shown = json.dumps(_plain(data), sort_keys=True) if data else ""
    cause = "" if moved.cause == "handler" else f" ({moved.cause})"
    return f"{moved.source} --{moved.event.name}--> {moved.dest}{cause} {shown}".rstrip()


def _untold(moved: Transition) -> tuple[str, ...]:
    """What differs from run to run: an agent's last words, and how long a turn took."""
    return ("stderr", "seconds") if moved.event.name == "Captured" else ("stderr",)


def _says_something(value: Any) -> bool:
    return value not in ("", None, (), {}, 0, Usage())


def _plain(value: Any) -> Any:
    if attrs.has(type(value)):
        return {k: v for k, v in attrs.asdict(value).items() if _says_something(v)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return value


def assert_sound(stand: Stand) -> None:
    """What holds for every rollout that closed: the journal folds, every turn is captured once, nothing is held."""
    rollout = stand.rollout
    moves = [record for record in rollout.journal if isinstance(record, Transition)]
    assert rollout.closed, f"stands in {rollout.state}"
    assert fold(rollout.journal).position.state == rollout.state
    names = [move.event.name for move in moves]
    assert names.count("Prompted") == names.count("Captured")
    assert (rollout.result().reward is not None) <= ("Verified" in names)
    leaked = next(move.event.leaked for move in moves if move.event.name == "Released")
    assert not rollout._world.leases.open() or leaked
    for agent in stand.agents.values():
        assert all(session.closed <= 1 for session in agent.sessions)
    seals = [line for line in rollout._world._trajectory._sink.lines if b'"sealed"' in line]
    assert len(seals) == names.count("Prompted"), "one seal a turn"


async def drive(stand: Stand) -> Stand:
    """Run it to its close and check what holds for every rollout."""
    with anyio.fail_after(20):
        await stand.rollout.run()
    assert_sound(stand)
    return stand


def fire(stand: Stand, event: Event) -> Callable[[], None]:
    """An event from outside, to be posted by a hook."""
    return lambda: stand.rollout._post(event)


__all__ = [
    "FACTORIES",
    "SAY",
    "TRANSPORTS",
    "FakeMeter",
    "FakeVerifier",
    "Stand",
    "build",
    "drive",
    "fire",
    "on",
    "to_json",
    "trace",
]
