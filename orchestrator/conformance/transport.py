"""What a transport has to do, as clauses that anybody can run on one of their own.

Each clause plays scripts of `orchestrator.agents.scripted` in a whole rollout, on the real kernel in the fake sandbox,
and returns its `story`: journal and trajectory as text without what may differ from one transport to another. A
transport conforms when every clause passes; two of them agree when their stories are equal:

    mine = TransportUnderTest("mine", cast_mine)
    outcomes = await run_clauses(TRANSPORT_CLAUSES, mine, lacks=("lost",))

`cast` seats scripted agents: it gets a script for each role, the sandbox (whose `on_spawn` it may set), and the
`Backstage` that those agents report to, and returns the scene's roles.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import anyio
import attrs

from orchestrator.agents.scripted import Backstage
from orchestrator.budgets import Budgets
from orchestrator.capture import RecordedSegment, read_trajectory
from orchestrator.config import Role, RolloutConfig, Scene, Turn
from orchestrator.conformance.clauses import Clause, same, true
from orchestrator.journal import encode_any, to_json
from orchestrator.rollout import Rollout
from orchestrator.sandboxes.fake import Call, FakeSandbox
from states.errors import SandboxError
from states.events import Captured, Share, Usage
from states.journal import Note, Record, Transition
from states.ports import AskUserRequest, ExecResult

Script = Mapping[str, Any]

SOON: Final = 0.3
"""Seconds of a deadline that is meant to pass: enough for a script to have shown what comes before."""
LONG: Final = 20.0
"""Seconds after which a rollout of a clause is stuck."""
GO_ON: Final = "Go on."

SAY: Final = ({"think": "well"}, {"shell": "make it"}, {"say": "done"})
WAIT: Final = ({"say": "working"}, {"shell": "now"}, {"wait_cancel": True})
"""Work, run a command at which the clause does something, and wait for a cancel."""
MAY_I: Final = ({"permission": {"title": "May I?"}}, {"say": "went on"})


@attrs.frozen
class TransportUnderTest:
    """A transport, and how scripted agents are seated on it."""

    name: str
    cast: Callable[[Mapping[str, Script], FakeSandbox, Callable[[str], Backstage]], Sequence[Role]]
    """Called with the scripts by role, the sandbox, and what gives each role its `Backstage`."""


@attrs.define(eq=False)
class FixedMeter:
    """What a gateway would have counted, set by a clause. A `states.ports.Meter`."""

    counted: Usage = Usage()
    _turns: list[tuple[str, int]] = attrs.field(factory=lambda: [("", 0)], init=False)
    _used: dict[tuple[str, int], Usage] = attrs.field(factory=dict, init=False)

    def usage(self) -> Usage:
        """So far."""
        return self.counted

    def shares(self) -> tuple[Share, ...]:
        """So far; what came since the last look is of the turn that began last."""
        new = self.counted - sum(self._used.values(), Usage())
        self._used[self._turns[-1]] = self._used.get(self._turns[-1], Usage()) + new
        return tuple(Share(role, turn, usage) for (role, turn), usage in self._used.items())

    def turn_began(self, role: str, turn: int, _budgets: Budgets) -> None:
        """What is counted from here on is of this turn."""
        self.shares()
        self._turns.append((role, turn))

    async def settle(self) -> Usage:
        """So far."""
        return self.counted

    @property
    def error(self) -> Exception | None:
        """Nothing goes wrong."""
        return None

    def provider_failure(self) -> str | None:
        """Nothing goes wrong."""
        return None

    def close(self) -> None:
        """Nothing is held."""


# --- a rollout on the stand ----------------------------------------------------------------------------------


@attrs.define(eq=False, init=False)
class Act:
    """One rollout of a clause: what is played, what is done to it meanwhile, and what came of it.

    `scripts` is one script, or one by role. `at` maps states to what is done when they are first entered (`session`
    is either session state), `now` is done by the command `now` of a script. Further keywords are `RolloutConfig`'s.
    """

    rollout: Rollout
    sandbox: FakeSandbox
    meter: FixedMeter
    told: list[str]
    segments: list[RecordedSegment]
    _at: dict[str, list[Callable[[Act], Any]]]
    _now: Callable[[Act], Any]
    _cues: dict[str, anyio.Event]
    _folder: Path
    _config: dict[str, Any]

    def __init__(
        self,
        transport: TransportUnderTest,
        scripts: Script,
        *,
        roles: Sequence[str] = ("agent",),
        turns: Sequence[Turn] | None = None,
        at: Mapping[str, Callable[[Act], Any]] | None = None,
        now: Callable[[Act], Any] = lambda _: None,
        **config: Any,
    ) -> None:
        self.sandbox, self.meter, self.told, self.segments = FakeSandbox(on_exec=self._exec), FixedMeter(), [], []
        self._at = {state: [act] for state, act in (at or {}).items()}
        self._now, self._cues = now, {}
        by_role = {role: scripts.get(role, scripts) for role in roles}
        scene = Scene(tuple(transport.cast(by_role, self.sandbox, self._backstage)), tuple(turns or map(Turn, by_role)))
        self._config = {
            "prompt": "Do it.",
            "scene": scene,
            "sandbox": self.sandbox,
            "verifier": None,
            "clock": itertools.count().__next__,
            "new_id": lambda: "act",
            "hooks": (self._entered,),
            **config,
        }

    async def play(self) -> Act:
        """Run it to its close, and check what holds for every rollout."""
        with tempfile.TemporaryDirectory() as name:
            self._folder = Path(name, "act")
            self.rollout = Rollout(RolloutConfig(**self._config, out=Path(name)))
            self.rollout._world.models._meters.append(self.meter)  # noqa: SLF001 - the double in a gateway's place
            with anyio.fail_after(LONG):
                await self.rollout.run()
            self.segments = read_trajectory(self._folder)
        self._is_sound()
        return self

    def _is_sound(self) -> None:
        same("prompts and their captures", self.events.count("Prompted"), self.events.count("Captured"))
        same("segments and their seals", [s.sealed is not None for s in self.segments], [True] * len(self.segments))
        for role in {word.partition(":")[0] for word in self.told}:
            opened, closed = self.told.count(f"{role}:connect"), self.told.count(f"{role}:close")
            true(f"{role} was connected {opened} times and closed {closed} times", closed <= opened)
        lines = [line for line in self.rollout.journal if isinstance(line, Transition)]
        true("an event leads from where the one before led to", all(a.dest == b.source for a, b in _pairs(lines)))

    # -- what is done to it

    def _backstage(self, role: str) -> Backstage:
        return Backstage(lambda word: self.told.append(f"{role}:{word}"), self._cue)

    async def _cue(self, name: str) -> None:
        await self._cues.setdefault(name, anyio.Event()).wait()

    def cue(self, name: str) -> None:
        """Let scripts that wait for it go on."""
        self._cues.setdefault(name, anyio.Event()).set()

    def _entered(self, moved: Transition) -> Any:
        if moved.dest != moved.source:
            for act in self._at.pop("session" if moved.dest.startswith("session/") else moved.dest, ()):
                return act(self)
        return None

    def _exec(self, call: Call) -> ExecResult:
        if call.command == "now":
            self._now(self)
        return ExecResult("made it\n", "", 0)

    async def until_recorded(self, text: str) -> None:
        """Wait until the trajectory on disk holds this text."""
        while text.encode() not in (self._folder / "trajectory.jsonl").read_bytes():  # noqa: ASYNC110
            await anyio.sleep(0.002)  # a poll, not a pause: the line ends it

    # -- what came of it

    @property
    def events(self) -> list[str]:
        """The names of its events, in order."""
        return [record.event.name for record in self.rollout.journal if isinstance(record, Transition)]

    @property
    def state(self) -> str:
        """Where it ended."""
        return self.rollout.state

    @property
    def steps(self) -> list[list[str]]:
        """What each turn's segment says after its prompt: texts, ids of tool calls, answers; late ones with `late`."""
        return [[_brief(step.data) + (" (late)" * step.late) for step in s.steps[1:]] for s in self.segments]

    @property
    def complete(self) -> list[bool]:
        """Whether each turn was captured whole."""
        return [segment.sealed["complete"] for segment in self.segments if segment.sealed is not None]

    @property
    def answers(self) -> list[tuple[Any, str]]:
        """What questions were answered, and by whom."""
        found = [step.data for segment in self.segments for step in segment.steps]
        return [(step["answer"], step["by"]) for step in found if step["type"] == "question"]

    @property
    def story(self) -> str:
        """Journal and trajectory as text, without what may differ between transports."""
        journal = [json.dumps(_told_alike(record)) for record in self.rollout.journal]
        return "\n".join([*journal, *map(_segment_alike, self.segments)])


def _pairs(values: list[Any]) -> list[tuple[Any, Any]]:
    return list(itertools.pairwise(values))


def _brief(step: Mapping[str, Any]) -> str:
    match step:
        case {"type": "question", "answer": answer, "by": by}:
            return f"{by}: {answer}"
        case {"tool_call_id": call, "status": status}:
            return f"{call} {status}"
        case {"text": text}:
            return str(text)
        case _:
            return str(step.get("type"))


# --- what may differ -----------------------------------------------------------------------------------------

WORDS: Final = {
    "session/acp": "session",
    "session/factory": "session",
    "AcpOpened": "Opened",
    "FactoryOpened": "Opened",
    "session-factory": "transport",
    "acp": "transport",
}
"""The one allowed difference: acp or factory in the names of states, events and transports."""

IDS: Final = frozenset({"session_id", "agent", "agent_digest", "identity", "time", "scratch"})
"""Ids, paths, hashes of inputs, times, and an agent's own name, which ACP lets it say and a class has as its name."""

PROSE: Final = frozenset({"message", "stderr", "evidence", "given_back"})
"""Sentences for people: what an error said (a JSON-RPC code, or a Python class), and how an end was proven (exit
code and stdin, or a revoked handle). That they are there is compared, and clauses look for the script's words in
them; a step's own text is compared in full."""


def _alike(value: Any, key: str = "") -> Any:
    if key in IDS and not isinstance(value, dict):  # a role may have any of these names
        return "…"
    if key == "owner" and isinstance(value, dict):
        return "this process"
    if key in PROSE:
        return "said" if value else ""
    if isinstance(value, dict):
        return {k: _alike(v, k) for k, v in sorted(value.items())}
    if isinstance(value, list):
        return [_alike(v) for v in value]
    return WORDS.get(value, value) if isinstance(value, str) else value


def _told_alike(record: Record) -> Any:
    if isinstance(record, Note):
        return "note"
    if isinstance(record, Transition) and isinstance(record.event, Captured):  # how long a turn took differs
        record = attrs.evolve(record, event=attrs.evolve(record.event, seconds=0.0))
    return _alike(json.loads(encode_any(to_json(record))))


def _segment_alike(segment: RecordedSegment) -> str:
    """What is kept of a turn. That a session dropped steps of its own only those show who show all their steps."""
    return json.dumps(_alike(attrs.asdict(segment, filter=lambda field, _: field.name != "compacted")))


# --- what clauses play ---------------------------------------------------------------------------------------


def _turns(*turns: Sequence[Any]) -> Script:
    return {"turns": [list(turn) for turn in turns]}


def _prompts(count: int, role: str = "agent") -> tuple[Turn, ...]:
    return tuple(Turn(role, None if number == 0 else GO_ON) for number in range(count))


def _cancel(act: Act) -> None:
    act.rollout.cancel()


def _cancel_twice(act: Act) -> None:
    act.rollout.cancel("code", "first")
    act.rollout.cancel("terminal", "second")


def _interrupt(act: Act) -> None:
    act.rollout.interrupt()


STUBBORN: Final = ({"say": "working"}, {"ignore_cancel": True}, {"shell": "now"}, {"hang": True})


# --- turns ---


async def a_turn_is_recorded_whole(transport: TransportUnderTest) -> str:
    """Thoughts, commands and messages of a turn are steps in their order, sealed as complete."""
    act = await Act(transport, _turns(SAY)).play()
    same("steps", act.steps, [["well", "call_1 completed", "done"]])
    same("complete", act.complete, [True])
    same("what the agent was asked", act.told, ["agent:connect", "agent:prompt", "agent:close"])
    return act.story


async def an_empty_turn_is_a_turn(transport: TransportUnderTest) -> str:
    """A turn in which nothing happened is sealed with its prompt alone."""
    act = await Act(transport, _turns([])).play()
    same("steps", (act.steps, act.complete), ([[]], [True]))
    return act.story


async def turns_of_one_role_share_a_session(transport: TransportUnderTest) -> str:
    """The second prompt goes to the same session, and each message to the segment of its own turn."""
    act = await Act(transport, _turns([{"say": "one"}], [{"say": "two"}]), turns=_prompts(2)).play()
    same("steps", act.steps, [["one"], ["two"]])
    same("connects", act.told.count("agent:connect"), 1)
    return act.story


async def a_refusal_ends_a_turn_like_any_other(transport: TransportUnderTest) -> str:
    """The stop reason is data: the turn is whole, and the next one follows."""
    act = await Act(transport, _turns([{"say": "no"}, {"stop": "refusal"}], SAY), turns=_prompts(2)).play()
    same("complete", act.complete, [True, True])
    return act.story


async def max_tokens_ends_a_turn_like_any_other(transport: TransportUnderTest) -> str:
    """A turn that ran out of tokens is whole, and the next one follows."""
    act = await Act(transport, _turns([{"stop": "max_tokens"}], SAY), turns=_prompts(2)).play()
    same("complete", act.complete, [True, True])
    return act.story


async def an_unknown_stop_reason_is_an_error_of_the_agent(transport: TransportUnderTest) -> str:
    """What is no stop reason ends the turn as failed, with what came before recorded."""
    act = await Act(transport, _turns([{"say": "hm"}, {"stop": "because"}])).play()
    same("steps", (act.steps, act.complete), ([["hm"]], [False]))
    true("the turn did not fail", "TurnFailed" in act.events)
    return act.story


async def chunks_make_one_message(transport: TransportUnderTest) -> str:
    """A message that comes in pieces is one step with the whole text."""
    act = await Act(transport, _turns([{"say": "a long story", "chunks": 5}, {"think": "hm"}, {"say": "end"}])).play()
    same("steps", act.steps, [["a long story", "hm", "end"]])
    return act.story


async def a_flood_is_recorded(transport: TransportUnderTest) -> str:
    """Two thousand pieces of a message are one step, with nothing lost."""
    act = await Act(transport, _turns([{"flood": 2000, "text": "word "}])).play()
    same("length", [len(text) for text in act.steps[0]], [10_000])
    return act.story


async def a_big_text_is_recorded(transport: TransportUnderTest) -> str:
    """A message of a megabyte is a step like any other."""
    act = await Act(transport, _turns([{"say": "x" * 2**20}, {"tool": "one"}])).play()
    same("lengths", [len(text) for text in act.steps[0]], [2**20, len("one pending")])
    return act.story


async def every_character_survives(transport: TransportUnderTest) -> str:
    """Text of any script, line separators, NUL and emoji come through as they were, even cut anywhere."""
    text = "grüß Gott \u2028 日本語 \U0001f9ea \x00 \x1b[0m {\"json\": 'no'}"
    act = await Act(transport, _turns([{"say": text, "chunks": 9}])).play()
    same("steps", act.steps, [[text]])
    return act.story


async def tool_updates_go_to_their_call(transport: TransportUnderTest) -> str:
    """Two calls that are updated in turns are two steps; an update of a call nobody announced is one, too."""
    script = [{"tool": "a"}, {"tool": "b"}, {"tool_update": "a", "status": "completed"}, {"say": "between"}]
    script += [{"tool_update": "b", "status": "failed", "title": "B"}, {"tool_update": "c", "status": "completed"}]
    act = await Act(transport, _turns(script)).play()
    same("steps", act.steps, [["a completed", "b failed", "between", "c completed"]])
    return act.story


async def an_echo_of_the_prompt_is_not_recorded_twice(transport: TransportUnderTest) -> str:
    """The prompt is step 0 already; the agent's own copy of it is no step."""
    act = await Act(transport, _turns([{"echo": "Do it."}, {"say": "done"}])).play()
    same("steps", act.steps, [["done"]])
    return act.story


async def what_a_session_forgets_stays_recorded(transport: TransportUnderTest) -> str:
    """A session that drops steps of its own, within a turn or between turns, loses nothing that was recorded."""
    script = _turns([{"say": "one"}, {"tool": "a"}, {"compact": 1}, {"say": "two"}], [{"compact": 0}, {"say": "three"}])
    act = await Act(transport, script, turns=_prompts(2)).play()
    same("steps", act.steps, [["one", "a pending", "two"], ["three"]])
    return act.story


# --- errors ---


async def an_error_ends_the_turn_and_keeps_its_steps(transport: TransportUnderTest) -> str:
    """What came before the error is recorded, as a partial turn; the error's words are in the journal."""
    act = await Act(transport, _turns([{"say": "hm"}, {"error": "it broke"}])).play()
    same("steps", (act.steps, act.complete), ([["hm"]], [False]))
    failed = [m.event for m in act.rollout.journal if isinstance(m, Transition) and m.event.name == "TurnFailed"]
    true("the journal does not say what broke", "it broke" in str(failed))
    return act.story


class _Always:
    """A plan that takes the listed turns, whatever came of the last one."""

    def __init__(self, turns: Sequence[Turn], before: Callable[[int], Awaitable[None]] | None = None) -> None:
        self._turns, self._before = turns, before

    async def next(self, facts: Any) -> Any:
        """The next turn of the list."""
        from states.events import Next

        if self._before is not None:
            await self._before(facts.prompted)
        if facts.prompted >= len(self._turns):
            return Next("done", why="every turn was taken")
        turn = self._turns[facts.prompted]
        return Next("turn", turn.role, turn.prompt or "Do it.")


async def a_session_survives_an_error(transport: TransportUnderTest) -> str:
    """The turn after one that failed is taken in a live session, and is whole."""
    turns = _prompts(2)
    script = _turns([{"say": "hm"}, {"error": "once"}], [{"say": "fine"}])
    act = await Act(transport, script, turns=turns, plan=_Always(turns)).play()
    same("steps", (act.steps[-1], act.complete), (["fine"], [False, True]))
    return act.story


# --- connecting ---


async def a_connect_may_fail_once(transport: TransportUnderTest) -> str:
    """A handle that does not open is tried again, and the turn is taken."""
    act = Act(transport, _turns(SAY), at={"quiescing": lambda act: act.sandbox.faults.clear()})
    act.sandbox.faults["open"] = SandboxError("not now")
    await act.play()
    same("steps", act.steps, [["well", "call_1 completed", "done"]])
    same("failures", act.events.count("ConnectFailed"), 1)
    return act.story


async def a_connect_may_fail_for_good(transport: TransportUnderTest) -> str:
    """An agent that refuses every connect ends the rollout as failed, with nothing graded and nobody prompted."""
    act = await Act(transport, {"turns": [[]], "connect": [{"error": "no licence"}]}).play()
    same("end", (act.state, act.events.count("Prompted")), ("closed/failed", 0))
    true("the journal does not say why", "no licence" in str(act.rollout.journal))
    return act.story


async def a_connect_that_hangs_is_given_up(transport: TransportUnderTest) -> str:
    """It is ended at its state's deadline, as often as is tried."""
    act = await Act(transport, {"turns": [[]], "connect": [{"hang": True}]}, deadlines={"connecting": SOON}).play()
    same("end", (act.state, act.events.count("ConnectFailed")), ("closed/failed", 2))
    return act.story


# --- cancelling the rollout, at every point ---


async def _cancelled_at(transport: TransportUnderTest, state: str, script: Script, **config: Any) -> Act:
    act = await Act(transport, script, at={state: _cancel_twice}, **config).play()
    same("end", act.state, "closed/cancelled")
    return act


async def a_cancel_before_connecting(transport: TransportUnderTest) -> str:
    """Nobody is connected."""
    act = await _cancelled_at(transport, "disconnected", _turns(SAY))
    same("what the agent was asked", act.told, [])
    return act.story


async def a_cancel_while_connecting(transport: TransportUnderTest) -> str:
    """The connect is given up, and nobody is prompted."""
    act = await _cancelled_at(transport, "connecting", {**_turns(SAY), "connect": [{"hang": True}]})
    true("somebody was prompted", "agent:prompt" not in act.told)
    return act.story


async def a_cancel_in_a_session(transport: TransportUnderTest) -> str:
    """The session is closed without a prompt."""
    act = await _cancelled_at(transport, "session", _turns(SAY))
    same("what the agent was asked", act.told, ["agent:connect", "agent:close"])
    return act.story


async def a_cancel_before_the_prompt_is_sent(transport: TransportUnderTest) -> str:
    """The open turn is settled at once: no prompt is sent, and no cancel of one that never was."""
    act = await _cancelled_at(transport, "executing", _turns(SAY))
    same("what the agent was asked", act.told, ["agent:connect", "agent:close"])
    same("steps", act.steps, [[]])
    return act.story


async def a_cancel_in_a_turn(transport: TransportUnderTest) -> str:
    """The agent is asked to stop once, its last words are recorded, and no second prompt follows."""
    script = _turns([{"say": "working"}, {"on_cancel": [{"say": "; stopping"}]}, {"shell": "now"}, {"wait_cancel": 1}])
    act = await Act(transport, script, turns=_prompts(2), now=_cancel_twice).play()
    same("what the agent was asked", act.told, ["agent:connect", "agent:prompt", "agent:cancel", "agent:close"])
    same("end", (act.state, len(act.segments)), ("closed/cancelled", 1))
    same("last words", act.steps[0][-1], "; stopping")
    return act.story


async def a_cancel_while_cancelling(transport: TransportUnderTest) -> str:
    """The cancelled turn goes on settling; the rollout ends where the cancel leads."""
    act = Act(transport, _turns(WAIT), now=_interrupt, at={"cancelling": _cancel}, turns=_prompts(2))
    await act.play()
    same("end", (act.state, act.told.count("agent:cancel")), ("closed/cancelled", 1))
    return act.story


async def a_cancel_while_capturing(transport: TransportUnderTest) -> str:
    """The segment is sealed once all the same."""
    act = await _cancelled_at(transport, "capturing/whole", _turns(SAY))
    same("steps", act.steps, [["well", "call_1 completed", "done"]])
    return act.story


async def a_cancel_while_quiescing(transport: TransportUnderTest) -> str:
    """The session is closed once all the same."""
    act = await _cancelled_at(transport, "quiescing", _turns(SAY))
    same("closes", act.told.count("agent:close"), 1)
    return act.story


# --- cancelling a turn ---


async def a_session_survives_a_cancelled_turn(transport: TransportUnderTest) -> str:
    """An interrupted turn that settles is followed by the next one in the same session."""
    act = await Act(transport, _turns(WAIT, [{"say": "again"}]), turns=_prompts(2), now=_interrupt).play()
    same("steps", act.steps, [["working", "call_1 completed"], ["again"]])
    same("connects", act.told.count("agent:connect"), 1)
    return act.story


async def a_deadline_cancels_a_turn(transport: TransportUnderTest) -> str:
    """What the agent says until it settles is recorded, and the turn is whole."""
    script = _turns([{"say": "working"}, {"on_cancel": [{"tool": "last"}]}, {"wait_cancel": True}])
    act = await Act(transport, script, deadlines={"executing": SOON}).play()
    same("steps", act.steps, [["working", "last pending"]])
    true("no deadline passed", "DeadlinePassed" in act.events)
    return act.story


async def a_silent_agent_is_idle(transport: TransportUnderTest) -> str:
    """Nothing heard for the idle limit cancels the turn."""
    act = await Act(transport, _turns([{"say": "working"}, {"wait_cancel": True}]), idle_sec=SOON).play()
    true("it was not idle", "IdlePassed" in act.events)
    same("steps", act.steps, [["working"]])
    return act.story


async def a_budget_cancels_a_turn(transport: TransportUnderTest) -> str:
    """The second tool call of two ends the turn."""
    script = _turns([{"tool": "one"}, {"tool": "two"}, {"wait_cancel": True}])
    act = await Act(transport, script, budgets=Budgets(tool_calls=2)).play()
    true("no budget was spent", "BudgetSpent" in act.events)
    return act.story


async def a_spent_budget_lets_no_prompt_be_sent(transport: TransportUnderTest) -> str:
    """The second turn of two is one too many: its prompt never comes, and the session is closed."""
    act = await Act(transport, _turns(SAY, SAY), turns=_prompts(2), budgets=Budgets(turns=1)).play()
    same("what the agent was asked", act.told, ["agent:connect", "agent:prompt", "agent:close"])
    same("complete", act.complete, [True])
    return act.story


async def a_deaf_agent_is_replaced(transport: TransportUnderTest) -> str:
    """A turn that ignores its cancel is partial, its session is closed, and the next role takes its turn."""
    scripts = {"coder": _turns(STUBBORN), "reviewer": _turns([{"say": "mine"}])}
    act = Act(transport, scripts, roles=("coder", "reviewer"), now=_interrupt, deadlines={"cancelling": SOON})
    await act.play()
    true("it was responsive", "Unresponsive" in act.events)
    same("steps", (act.steps, act.complete), ([["working", "call_1 completed"], ["mine"]], [False, True]))
    return act.story


async def a_session_that_swallows_cancellation_is_left_behind(transport: TransportUnderTest) -> str:
    """Not even cancelling its task ends the prompt: the rollout goes on without it."""
    script = _turns([{"say": "working"}, {"ignore_cancel": True}, {"shell": "now"}, {"hang": True, "swallow": True}])
    act = await Act(transport, script, now=_cancel, deadlines={"cancelling": SOON}).play()
    same("end", (act.state, act.complete), ("closed/cancelled", [False]))
    return act.story


# --- questions ---


async def a_policy_allows(transport: TransportUnderTest) -> str:
    """Nobody bound a handler: the policy allows, and says that it did."""
    act = await Act(transport, _turns(MAY_I)).play()
    same("answers", act.answers, [("allow", "policy")])
    return act.story


async def a_policy_denies(transport: TransportUnderTest) -> str:
    """A command that is asked for and denied is not run."""
    act = await Act(transport, _turns([{"shell": "now", "ask": True}]), policy="deny").play()
    same("answers", (act.answers, act.sandbox.calls), ([("reject", "policy")], []))
    return act.story


async def a_handler_answers(transport: TransportUnderTest) -> str:
    """One that is bound before the run answers, and sees question, options and their kinds."""
    asked: list[AskUserRequest] = []

    async def handler(request: AskUserRequest) -> str:
        asked.append(request)
        return "reject"

    act = await Act(transport, _turns(MAY_I), on_ask_user=handler).play()
    same("answers", act.answers, [("reject", "handler")])
    same("question", [(a.prompt, a.options) for a in asked], [("May I?", ("allow", "reject"))])
    return act.story


async def a_cleared_handler_answers_no_more(transport: TransportUnderTest) -> str:
    """After it was cleared the policy answers again."""

    async def handler(_request: AskUserRequest) -> str:
        return "reject"

    at = {"capturing/whole": lambda act: act.rollout.on_ask_user(None)}
    act = await Act(transport, _turns(MAY_I), turns=_prompts(2), on_ask_user=handler, at=at).play()
    same("answers", act.answers, [("reject", "handler"), ("allow", "policy")])
    return act.story


async def a_handler_that_raises_declines(transport: TransportUnderTest) -> str:
    """Its error is an answer, and the turn goes on."""

    async def handler(_request: AskUserRequest) -> str:
        raise RuntimeError("not today")

    act = await Act(transport, _turns(MAY_I), on_ask_user=handler).play()
    same("answers", (act.answers, act.steps[0][-1]), ([("reject", "handler")], "went on"))
    return act.story


async def an_option_that_was_not_offered_declines(transport: TransportUnderTest) -> str:
    """An answer that no option holds is not passed on to the agent."""
    act = await Act(transport, _turns(MAY_I), on_ask_user=lambda _request: "perhaps").play()
    same("answers", act.answers, [("reject", "handler")])
    return act.story


async def a_question_ends_with_its_turn(transport: TransportUnderTest) -> str:
    """A question that is open when its turn is cancelled is answered by nobody, and the turn settles."""

    async def handler(_request: AskUserRequest) -> str:
        act.rollout.interrupt()
        await anyio.sleep_forever()
        return "allow"

    act = Act(transport, _turns(MAY_I), on_ask_user=handler)
    await act.play()
    same("answers", act.answers, [(None, "nobody")])
    true("the turn did not settle", "Settled" in act.events)
    return act.story


async def a_choice_is_answered(transport: TransportUnderTest) -> str:
    """An elicitation with choices and one for free text reach the handler as such."""
    script = [{"elicit": {"message": "Which?", "options": ["a", "b"]}}, {"elicit": {"message": "Your name?"}}]

    async def handler(request: AskUserRequest) -> str:
        return request.options[-1] if request.options else "Ada"

    act = await Act(transport, _turns(script), on_ask_user=handler).play()
    same("answers", act.answers, [("b", "handler"), ("Ada", "handler")])
    return act.story


# --- approvals, of agents in process (`approvals`) ---

APPROVE: Final = ({"shell": "now", "ask": "approval"}, {"say": "went on"})
"""Ask for the approval of a command, and run it if it is given."""


async def an_approval_is_asked_for_like_every_question(transport: TransportUnderTest) -> str:
    """The handler sees its kind, the command and its options; approved, the command is run."""
    asked: list[AskUserRequest] = []

    async def handler(request: AskUserRequest) -> str:
        asked.append(request)
        return "allow"

    act = await Act(transport, _turns(APPROVE), on_ask_user=handler).play()
    same("question", [(a.kind, a.prompt, a.options) for a in asked], [("approval", "now", ("allow", "reject"))])
    same("answers", (act.answers, len(act.sandbox.calls)), ([("allow", "handler")], 1))
    kinds = [step.data["kind"] for step in act.segments[0].steps if step.data["type"] == "question"]
    same("kind of the step", kinds, ["approval"])
    return act.story


async def an_approval_that_is_denied_runs_nothing(transport: TransportUnderTest) -> str:
    """The policy declines it, the command is not run, and the turn goes on."""
    act = await Act(transport, _turns(APPROVE), policy="deny").play()
    same("answers", (act.answers, act.sandbox.calls), ([("reject", "policy")], []))
    same("last step", act.steps[0][-1], "went on")
    return act.story


async def an_approval_whose_handler_raises_runs_nothing(transport: TransportUnderTest) -> str:
    """The error is a declined answer that says why."""

    async def handler(_request: AskUserRequest) -> str:
        raise RuntimeError("not today")

    act = await Act(transport, _turns(APPROVE), on_ask_user=handler).play()
    same("answers", (act.answers, act.sandbox.calls), ([("reject", "handler")], []))
    true("the step does not say why", "RuntimeError: not today" in _why(act))
    return act.story


async def an_approval_whose_handler_outlasts_its_limit_runs_nothing(transport: TransportUnderTest) -> str:
    """Nobody waits longer than the limit of a handler."""

    async def handler(_request: AskUserRequest) -> str:
        await anyio.sleep_forever()
        return "allow"

    act = await Act(transport, _turns(APPROVE), on_ask_user=handler, answer_sec=SOON).play()
    same("answers", (act.answers, act.sandbox.calls), ([("reject", "handler")], []))
    true("the step does not say why", "did not answer within" in _why(act))
    return act.story


def _why(act: Act) -> str:
    return "".join(step.data["why"] for step in act.segments[0].steps if step.data["type"] == "question")


# --- swaps ---


async def a_swap_opens_a_fresh_session(transport: TransportUnderTest) -> str:
    """The old session is closed, once, before the new one is opened; its steps begin at zero."""
    script = _turns([{"say": "one"}], [{"say": "two"}])
    turns = (Turn("coder"), Turn("reviewer"), Turn("coder", GO_ON))
    act = await Act(transport, script, roles=("coder", "reviewer"), turns=turns).play()
    same("steps", act.steps, [["one"], ["one"], ["one"]])
    told = [f"{role}:{word}" for role in ("coder", "reviewer", "coder") for word in ("connect", "prompt", "close")]
    same("what the agents were asked", act.told, told)
    return act.story


async def a_handler_stays_bound_over_a_swap(transport: TransportUnderTest) -> str:
    """It answers the questions of every role."""
    act = Act(transport, _turns(MAY_I), roles=("coder", "reviewer"), on_ask_user=lambda _request: "reject")
    await act.play()
    same("answers", act.answers, [("reject", "handler")] * 2)
    return act.story


async def usage_is_counted_for_who_spent_it(transport: TransportUnderTest) -> str:
    """What the gateway counted in a turn is in that turn's seal; the sum over a swap is what it counted."""
    counts = iter((1000, 1400))

    def count(act: Act) -> None:
        act.meter.counted = Usage(calls=1, input_tokens=next(counts))

    act = await Act(transport, _turns([{"shell": "now"}]), roles=("coder", "reviewer"), now=count).play()
    spent = act.rollout.result().usage
    same("by role", {role: usage.tokens for role, usage in spent.by_role.items()}, {"coder": 1000, "reviewer": 400})
    same("total", spent.total.tokens, 1400)
    return act.story


# --- late events ---


async def a_late_event_stays_in_its_segment(transport: TransportUnderTest) -> str:
    """What comes after the seal and before the next prompt is kept with the turn that it came from, marked late."""
    script = _turns([{"say": "one"}, {"late": [{"cue": "late"}, {"tool": "late"}]}], [{"say": "two"}])
    turns = _prompts(2)

    async def before(prompted: int) -> None:
        if prompted == 1:
            act.cue("late")
            await act.until_recorded('"late":true')

    act = Act(transport, script, turns=turns, plan=_Always(turns, before))
    await act.play()
    same("steps", act.steps, [["one", "late pending (late)"], ["two"]])
    return act.story


async def a_late_event_finds_its_call(transport: TransportUnderTest) -> str:
    """An update that comes while the next turn runs goes to the call's own turn."""
    first = [{"tool": "job"}, {"late": [{"cue": "late"}, {"tool_update": "job", "status": "completed"}, {"say": "x"}]}]
    second = [{"say": "two"}, {"shell": "now"}, {"cue": "recorded"}, {"say": "three"}]
    turns = _prompts(2)
    act = Act(transport, _turns(first, second), turns=turns, now=lambda act: act.cue("late"))

    async def watch() -> None:
        while "_folder" not in dir(act) or not (act._folder / "trajectory.jsonl").exists():  # noqa: ASYNC110, SLF001
            await anyio.sleep(0.002)
        await act.until_recorded('"text":"x"')
        act.cue("recorded")

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        await act.play()
    same("steps", act.steps[0], ["job completed"])
    return act.story


# --- the agent goes away (`lost`) ---


async def a_lost_agent_leaves_its_steps(transport: TransportUnderTest) -> str:
    """An agent that dies in its turn leaves what it had said, as a partial turn."""
    act = await Act(transport, _turns([{"say": "working"}, {"die": 3}])).play()
    same("steps", (act.steps, act.complete), ([["working"]], [False]))
    true("it was not lost", "Lost" in act.events)
    return act.story


async def an_agent_lost_while_it_is_cancelled_ends_the_turn(transport: TransportUnderTest) -> str:
    """An agent that answers a cancel by dying ends the turn as partial; the next role takes its turn."""
    scripts = {"coder": _turns([{"on_cancel": [{"die": 3}]}, *WAIT]), "reviewer": _turns([{"say": "mine"}])}
    act = await Act(transport, scripts, roles=("coder", "reviewer"), now=_interrupt).play()
    true("it was not lost", "Lost" in act.events)
    return act.story


async def an_agent_lost_between_turns_is_connected_again(transport: TransportUnderTest) -> str:
    """The next turn is taken in a fresh session."""
    script = _turns([{"say": "one"}, {"late": [{"cue": "die"}, {"die": 3}]}])
    turns = _prompts(2)

    async def before(prompted: int) -> None:
        if prompted == 1 and "Lost" not in act.events:
            act.cue("die")
            await anyio.sleep_forever()

    act = Act(transport, script, turns=turns, plan=_Always(turns, before))
    await act.play()
    same("connects", (act.told.count("agent:connect"), act.events.count("Lost")), (2, 1))
    return act.story


# --- the suite -----------------------------------------------------------------------------------------------


def _clause(check: Callable[[TransportUnderTest], Awaitable[str]], *needs: str) -> Clause[TransportUnderTest]:
    return Clause(check.__name__, (check.__doc__ or "").strip(), check, frozenset(needs))


TRANSPORT_CLAUSES: Final = (
    *map(
        _clause,
        (
            a_turn_is_recorded_whole,
            an_empty_turn_is_a_turn,
            turns_of_one_role_share_a_session,
            a_refusal_ends_a_turn_like_any_other,
            max_tokens_ends_a_turn_like_any_other,
            an_unknown_stop_reason_is_an_error_of_the_agent,
            chunks_make_one_message,
            a_flood_is_recorded,
            a_big_text_is_recorded,
            every_character_survives,
            tool_updates_go_to_their_call,
            an_echo_of_the_prompt_is_not_recorded_twice,
            what_a_session_forgets_stays_recorded,
            an_error_ends_the_turn_and_keeps_its_steps,
            a_session_survives_an_error,
            a_connect_may_fail_once,
            a_connect_may_fail_for_good,
            a_connect_that_hangs_is_given_up,
            a_cancel_before_connecting,
            a_cancel_while_connecting,
            a_cancel_in_a_session,
            a_cancel_before_the_prompt_is_sent,
            a_cancel_in_a_turn,
            a_cancel_while_cancelling,
            a_cancel_while_capturing,
            a_cancel_while_quiescing,
            a_session_survives_a_cancelled_turn,
            a_deadline_cancels_a_turn,
            a_silent_agent_is_idle,
            a_budget_cancels_a_turn,
            a_spent_budget_lets_no_prompt_be_sent,
            a_deaf_agent_is_replaced,
            a_session_that_swallows_cancellation_is_left_behind,
            a_policy_allows,
            a_policy_denies,
            a_handler_answers,
            a_cleared_handler_answers_no_more,
            a_handler_that_raises_declines,
            an_option_that_was_not_offered_declines,
            a_question_ends_with_its_turn,
            a_choice_is_answered,
            a_swap_opens_a_fresh_session,
            a_handler_stays_bound_over_a_swap,
            usage_is_counted_for_who_spent_it,
            a_late_event_stays_in_its_segment,
            a_late_event_finds_its_call,
        ),
    ),
    *(
        _clause(check, "lost")
        for check in (
            a_lost_agent_leaves_its_steps,
            an_agent_lost_while_it_is_cancelled_ends_the_turn,
            an_agent_lost_between_turns_is_connected_again,
        )
    ),
    *(
        _clause(check, "approvals")
        for check in (
            an_approval_is_asked_for_like_every_question,
            an_approval_that_is_denied_runs_nothing,
            an_approval_whose_handler_raises_runs_nothing,
            an_approval_whose_handler_outlasts_its_limit_runs_nothing,
        )
    ),
)
"""Everything that a transport has to do. `lost`: its agents are processes that can go away by themselves; `approvals`:
they ask for approvals, which ACP does not know."""
