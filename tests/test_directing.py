"""An agent as the director: what it is told, what it may answer, and every way in which it can go wrong."""

from __future__ import annotations

import itertools
import json

import anyio
import pytest
from harness import FACTORIES, TRANSPORTS, FakeVerifier, agent_config, assert_sound, build, trace
from scripted_peer import acp_agent
from sessions import HandAgent

from orchestrator import DirectorRole, Role, Rollout, RolloutConfig, Scene, Turn, _tasks
from orchestrator.agents.scripted import Backstage, ScriptedAgent
from orchestrator.capture import fold_trajectory, read_trajectory
from orchestrator.config import ConfigError
from orchestrator.directing import Unclear, question, read_addition, read_answer
from orchestrator.gateway.upstream import Upstream
from states.errors import HandleRevoked, JournalError
from states.events import Next

UPSTREAM = Upstream("m", "http://127.0.0.1:9", ["openai-chat", "openai-responses"])

NAMES = itertools.count(1)


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """Over which the workers are driven; the director is in process always."""
    return request.param


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """Every task of ours that was started: none may outlive its rollout."""
    tasks = []
    start = _tasks.Detached.start
    monkeypatch.setattr(_tasks.Detached, "start", lambda task: tasks.append(task) or start(task))
    yield tasks
    assert [task.name for task in tasks if not task.done] == []


def director(agent, brief="", limit=None, checks=0) -> DirectorRole:
    """A director role played by this agent: a script's turns, or an agent of a test's own."""
    name = f"director-{next(NAMES)}"
    FACTORIES[name] = ScriptedAgent({"turns": agent}) if isinstance(agent, list) else agent
    role = Role("user", agent_config("session-factory"), env={"AGENT": name})
    return DirectorRole(role, brief, limit, checks)


def says(*answers: str) -> list:
    """A script that gives these answers, one a question."""
    return [[{"say": answer}] for answer in answers]


def play(transport, make, rewards=(1.0,), **config):
    """Play under the director that `make` makes, on both loops, in the same way; the last stand."""

    async def played():
        stand = build(transport, **{"turns": (), **config}, verifier=FakeVerifier(list(rewards)), director=make())
        with anyio.fail_after(30):
            await stand.rollout.run()
        assert_sound(stand)
        await anyio.wait_all_tasks_blocked()
        return stand

    stands = [anyio.run(played, backend=loop) for loop in ("asyncio", "trio")]
    assert trace(stands[0].rollout) == trace(stands[1].rollout)
    return stands[1]


def talk(stand):
    """What the director was told, and what it said to that, a segment a question."""
    return fold_trajectory(stand.rollout._world._told._sink.lines)


def told(stand) -> list[str]:
    """The questions that it was asked."""
    return [segment.steps[0].data["text"] for segment in talk(stand)]


def prompts(stand):
    """Who was prompted with what, in order."""
    moves = [record.event for record in stand.rollout.journal if hasattr(record, "event")]
    return [(event.role, event.text) for event in moves if event.name == "Prompted"]


def sessions(stand) -> list:
    """The director's own sessions, the oldest first."""
    return FACTORIES[stand.rollout.config.director.role.env["AGENT"]].sessions


def leases(stand) -> list[tuple[str, str]]:
    """What was done with the leases of a director."""
    records = [record for record in stand.rollout.journal if hasattr(record, "lease")]
    return [(r.action, r.lease.name) for r in records if r.lease.kind == "director"]


# --- answers -------------------------------------------------------------------------------------------------

BOTH = ("coder", "reviewer")


@pytest.mark.parametrize(
    ("answer", "roles", "decision"),
    [
        ("Do this.\nAnd that.", ("coder",), Turn("coder", "Do this.\nAnd that.")),
        ("TO reviewer: look\nat it", BOTH, Turn("reviewer", "look\nat it")),
        ("**TO coder:**\nmend it", BOTH, Turn("coder", "mend it")),
        ("TO coder:", BOTH, Turn("coder", None)),
        ("TO coder: x", ("coder",), Turn("coder", "x")),
        ("TO whom it may concern:\nhello", ("coder",), Turn("coder", "TO whom it may concern:\nhello")),
        ("DONE", BOTH, Next("done")),
        (" `DONE.` ", BOTH, Next("done")),
        ("Thank you!\n\nDONE: all is well", BOTH, Next("done", why="Thank you!\n\nall is well")),
        ("I am DONE with this", ("coder",), Turn("coder", "I am DONE with this")),
        ("CHECK", BOTH, Next("check")),
    ],
)
def test_an_answer_is_a_decision(answer, roles, decision):
    assert read_answer(answer, roles, checks=True) == decision


@pytest.mark.parametrize(
    ("answer", "roles", "checks", "said"),
    [
        ("", BOTH, True, "your answer was empty"),
        ("go on", BOTH, True, 'begin with a line "TO coder:"'),
        ("TO nobody: go on", BOTH, True, "nobody is called nobody; there is coder, reviewer"),
        ("TO nobody: go on", ("coder",), True, "nobody is called nobody; there is coder"),
        ("CHECK\nplease", ("coder",), True, "CHECK has to stand alone"),
        ("CHECK", ("coder",), False, "CHECK cannot be asked for"),
    ],
)
def test_an_answer_that_cannot_be_followed_says_why(answer, roles, checks, said):
    with pytest.raises(Unclear, match=said):
        read_answer(answer, roles, checks=checks)


def test_of_several_roles_the_one_that_spoke_last_is_meant():
    assert read_answer("Mend it.", BOTH, "reviewer") == Turn("reviewer", "Mend it.")
    assert read_answer("TO coder: Mend it.", BOTH, "reviewer") == Turn("coder", "Mend it.")


def test_an_addition_is_text_or_nothing():
    assert read_addition(" It is BF-1. ") == "It is BF-1."
    assert read_addition("no\nDONE") == ""
    with pytest.raises(Unclear, match="empty"):
        read_addition(" ")


def test_a_question_offers_what_can_be_answered_and_nothing_else():
    assert "CHECK" not in question(("coder",))
    assert "CHECK" in question(("coder",), checks=True)
    assert 'TO coder:" (coder, reviewer)' in question(BOTH)
    assert "TO " not in question(("coder",), "coder")
    assert question(BOTH, "reviewer").startswith("What do you say to reviewer?")
    assert 'another, begin with a line "TO coder:" (coder).' in question(BOTH, "reviewer")


# --- scenes --------------------------------------------------------------------------------------------------


def test_an_agent_directs_one_role(transport, snapshot):
    """Plain text is the next prompt; one session over all decisions; the end is journaled with the last words."""
    stand = play(transport, lambda: director(says("Make it red.", "And blue.", "Thanks.\nDONE"), "You like colours."))
    assert prompts(stand) == [("agent", "Make it red."), ("agent", "And blue.")]
    assert trace(stand.rollout) == snapshot
    assert "\n\n---\n\n".join(told(stand)) + "\n" == snapshot(name=f"told-{transport}")
    assert [segment.about["turn"] for segment in talk(stand)] == [1, 2, 3]
    assert all(segment.sealed["complete"] and segment.about["role"] == "user" for segment in talk(stand))
    assert len(sessions(stand)) == sessions(stand)[0].closed == 1
    assert leases(stand) == [("intended", "user-1"), ("returned", "user-1")]


def test_an_agent_directs_several_roles(transport, snapshot):
    """It names who is next; a name alone gives the task as it is; one session over all swaps."""
    answers = ("TO coder:", "TO reviewer: Review it.", "TO coder:\nMend it.", "DONE: it is right")
    scripts = {"coder": {"turns": says("I wrote it.")}, "reviewer": {"turns": says("Line 3 is wrong.")}}
    stand = play(transport, lambda: director(says(*answers)), script=scripts, roles=("coder", "reviewer"))
    assert prompts(stand) == [("coder", "Do it."), ("reviewer", "Review it."), ("coder", "Mend it.")]
    assert "reviewer said:\nLine 3 is wrong." in told(stand)[2]
    assert trace(stand.rollout) == snapshot
    assert len(sessions(stand)) == sessions(stand)[0].closed == 1


def test_a_director_may_ask_for_checks_and_is_told_what_they_found(transport):
    """Feedback is no reward; when its checks are used up it can ask for no more."""
    make = lambda: director(says("Do it.", "CHECK", "Again.", "CHECK", "DONE"), checks=1)  # noqa: E731
    stand = play(transport, make, rewards=(0.5, 1.0))
    assert "The work was checked: reward 0.5." in told(stand)[2]
    assert "CHECK" not in told(stand)[3]
    assert "That cannot be followed: CHECK cannot be asked for." in told(stand)[4]
    assert stand.rollout.result().reward == 1.0
    assert prompts(stand) == [("agent", "Do it."), ("agent", "Again.")]


def test_the_scenes_own_turns_come_first_with_what_the_director_adds(transport):
    """`DONE` adds nothing to a turn that is written; after the last one the director leads."""
    roles, turns = ("coder", "reviewer"), (Turn("coder"), Turn("reviewer", "Review."), Turn("coder", "Mend."))
    make = lambda: director(says("DONE", "The id is BF-1.", "Thanks.", "DONE"))  # noqa: E731
    stand = play(transport, make, roles=roles, turns=turns)
    assert [text for _, text in prompts(stand)] == ["Do it.", "Review.", "Mend.\n\nThe id is BF-1.", "Thanks."]
    assert prompts(stand)[-1][0] == "coder"
    assert "coder was asked:\nDo it.\n\ncoder said:" in told(stand)[0]
    assert "reviewer has the next turn" in told(stand)[0]


def test_a_directors_limit_counts_all_turns_and_never_cuts_the_scenes_own(transport):
    """It leads until so many were taken; turns that are written are taken whatever it is."""
    stand = play(transport, lambda: director(says("More."), limit=2))
    assert (len(prompts(stand)), stand.rollout.result().reward) == (2, 1.0)
    stand = play(transport, lambda: director(says("DONE"), limit=1), turns=(Turn("agent"), Turn("agent", "Again.")))
    assert len(prompts(stand)) == 2
    stand = play(transport, lambda: director(says("More.")), max_turns=3)
    assert len(prompts(stand)) == 3


def test_a_role_of_the_scene_may_direct_it_by_its_name():
    """The role takes no turns; what it may not be is said before anything exists."""
    led = director(says("Go.", "DONE"))
    scene = Scene((Role("coder", "noop"), led.role))
    base = {"prompt": "x", "scene": scene, "sandbox": "fake", "out": None}
    result = anyio.run(Rollout(RolloutConfig(**base, director="user")).run)
    assert (result.state, result.turns) == ("closed/unverified", 1)
    for config, sentence in (
        ({"director": "nobody"}, "'nobody' must be one of the scene's roles"),
        ({"scene": Scene((led.role,)), "director": "user"}, "beside one that works"),
        ({"scene": Scene(scene.roles, (Turn("user"),)), "director": "user"}, "takes no turns: it decides them"),
        ({"director": led}, "two roles of the scene are called 'user', one is the director"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            RolloutConfig(**{**base, **config})


@pytest.mark.parametrize(
    ("agent", "sentence"),
    [
        ("scripted-acp", "speaks acp: a director is a session-factory"),
        ("omnigent", "calls its model from the sandbox"),
    ],
)
def test_an_agent_of_the_sandbox_cannot_direct(agent, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Rollout(
            RolloutConfig(
                agent="noop", prompt="x", out=None, director=DirectorRole(Role("user", agent, "m")), upstream=UPSTREAM
            )
        )


# --- faults --------------------------------------------------------------------------------------------------


def failed(stand, *sentences: str):
    """It failed, it is the harness's, nothing was graded, and it says why."""
    result = stand.rollout.result()
    assert (result.state, result.verdict.owner, result.reward) == ("closed/failed", "harness", None)
    for sentence in sentences:
        assert sentence in result.verdict.reason
    assert all(session.closed == 1 for session in sessions(stand))
    assert not stand.rollout._world.leases.open()


def test_an_answer_that_cannot_be_followed_is_answered_once(transport):
    """What is wrong is said, and the second answer counts."""
    stand = play(transport, lambda: director(says("TO nobody: go", "Go.", "DONE")))
    assert prompts(stand) == [("agent", "Go.")]
    assert told(stand)[1].startswith("That cannot be followed: nobody is called nobody; there is agent. What do you")


def test_two_answers_that_cannot_be_followed_fail_the_rollout(transport):
    stand = play(transport, lambda: director(says("", "TO nobody: go")))
    failed(stand, "DirectorError: the director user gave no answer that can be followed: nobody is called nobody")
    assert prompts(stand) == []


def test_a_director_that_raises_fails_the_rollout_with_its_words(transport):
    """Before the first turn, and after one; what it had said is recorded as partial."""
    stand = play(transport, lambda: director([[{"error": "no idea"}]]))
    failed(stand, "DirectorError: the director user raised AgentError: no idea")
    stand = play(
        transport, lambda: director([*says("Go."), [{"say": "well"}, {"error": "what now", "type": "KeyError"}]])
    )
    failed(stand, "KeyError", "what now")
    assert prompts(stand) == [("agent", "Go.")]
    assert talk(stand)[1].sealed["complete"] is False
    assert [step.data["text"] for step in talk(stand)[1].steps[1:]] == ["well"]


@pytest.mark.parametrize("stop", ["refusal", "cancelled", "because"])
def test_a_director_that_ends_its_answer_oddly_fails_the_rollout(transport, stop):
    stand = play(transport, lambda: director([[{"say": "I will not."}, {"stop": stop}]]))
    failed(stand, "DirectorError", stop)


def test_a_director_that_cannot_be_connected_fails_the_rollout(transport):
    """With what its connect said; nothing was opened that is not given back."""

    def make():
        agent = ScriptedAgent({"connect": [{"error": "no such account"}]})
        return director(agent)

    stand = play(transport, make)
    result = stand.rollout.result()
    assert (result.state, result.verdict.owner) == ("closed/failed", "harness")
    assert (
        "the director user cannot be connected: connect() raised AgentError: no such account" in result.verdict.reason
    )
    assert leases(stand) == [("intended", "user-1"), ("returned", "user-1")]


@pytest.mark.parametrize("swallow", [False, True])
def test_a_director_that_hangs_is_left_at_the_deadline(transport, swallow):
    """Before the first turn and in a session; one that swallows its cancellation holds up nobody."""
    hang = [{"say": "hm"}, {"hang": True, "swallow": swallow}]
    stand = play(transport, lambda: director([hang]), deadlines={"disconnected": 0.3})
    failed(stand, "disconnected took longer than 0.3 s")
    short = dict.fromkeys(("session/acp", "session/factory"), 0.3)
    stand = play(transport, lambda: director([*says("Go."), hang]), deadlines=short)
    failed(stand, "took longer than 0.3 s")
    assert "the director user was left while it was asked for turn 2" in stand.rollout.result().notes
    assert talk(stand)[1].sealed["complete"] is False


def test_a_director_whose_rollout_has_no_time_left_ends_the_plan(transport):
    """The work is verified; nobody waits for the answer."""
    make = lambda: director([*says("Go."), [{"hang": True}]])  # noqa: E731
    stand = play(transport, make, timeout=0.5)
    assert (stand.rollout.state, stand.rollout.result().reward) == ("closed/rewarded", 1.0)
    assert [session.closed for session in sessions(stand)] == [1]


@pytest.mark.parametrize("before", [0, 1])
def test_a_cancel_while_the_director_thinks_closes_everything(transport, before):
    """In `disconnected` and in a session; what it had said is recorded."""
    stand = cancelled(transport, lambda: director([*says("Go.")[:before], [{"say": "hm"}, {"cue": "now"}]]))
    assert stand.rollout.state == "closed/cancelled"
    assert [session.closed for session in sessions(stand)] == [1]
    assert talk(stand)[-1].sealed["complete"] is False
    assert talk(stand)[-1].steps[-1].data["text"] == "hm"


def cancelled(transport, make):
    """Play, and cancel when the director waits for its cue."""

    async def played():
        stand = build(transport, turns=(), director=make())
        agent = FACTORIES[stand.rollout.config.director.role.env["AGENT"]]

        async def cue(_name):
            stand.rollout.cancel()
            await anyio.sleep_forever()

        agent.backstage = Backstage(cue=cue)
        with anyio.fail_after(30):
            await stand.rollout.run()
        assert_sound(stand)
        return stand

    stands = [anyio.run(played, backend=loop) for loop in ("asyncio", "trio")]
    assert trace(stands[0].rollout) == trace(stands[1].rollout)
    return stands[1]


def test_a_host_that_cancels_while_the_director_thinks_gets_its_cancellation_back(transport):
    """The rollout is closed first, and the director's session with it."""

    async def played():
        stand = build(transport, turns=(), director=director([[{"hang": True}]]))
        with anyio.move_on_after(0.3) as scope:
            await stand.rollout.run()
        assert scope.cancelled_caught
        assert_sound(stand)
        return stand

    for loop in ("asyncio", "trio"):
        stand = anyio.run(played, backend=loop)
        assert stand.rollout.state == "closed/cancelled"
        assert [session.closed for session in sessions(stand)] == [1]


def test_a_worker_that_is_lost_while_the_director_thinks_is_connected_again():
    """The half answer is kept as partial, and a new session of the director is told everything."""

    async def played():
        script = {"turns": [[{"say": "one"}, {"late": [{"cue": "die"}, {"die": 3}]}]]}
        stand = build("acp", script, turns=(), director=director([*says("Go."), [{"cue": "think"}]]))
        agent, die = FACTORIES[stand.rollout.config.director.role.env["AGENT"]], anyio.Event()

        async def cue(name):
            if name == "think":
                die.set()
                agent.script = {"turns": says("DONE: that was all")}  # of its next session
                await anyio.sleep_forever()
            await die.wait()

        agent.backstage = Backstage(cue=cue)
        stand.sandbox.on_spawn = acp_agent(script, backstage=Backstage(cue=cue))
        with anyio.fail_after(30):
            await stand.rollout.run()
        assert_sound(stand)
        return stand

    for loop in ("asyncio", "trio"):
        stand = anyio.run(played, backend=loop)
        assert stand.rollout.state == "closed/rewarded"
        assert [session.closed for session in sessions(stand)] == [1, 1]
        assert [segment.sealed["complete"] for segment in talk(stand)] == [True, False, True]
        assert told(stand)[2].startswith("You say what comes next")
        assert "agent was asked:\nGo.\n\nagent said:\none" in told(stand)[2]


def test_a_director_cannot_touch_the_sandbox(transport):
    """Commands and files are refused, also when it is clever enough to catch the error."""
    caught = []

    async def reach(session, _text):
        for call in (
            lambda: session.sandbox.exec("cat /tests/test.sh"),
            lambda: session.sandbox.read_file("/app/x"),
            lambda: session.sandbox.write_file("/app/x", b""),
        ):
            try:
                await call()
            except HandleRevoked as error:
                caught.append(str(error))
        session.show(type="agent_message", text="DONE")
        return "end_turn"

    stand = play(transport, lambda: director(HandAgent(reach)))
    assert set(caught) == {"user-1 directs: it must not touch the sandbox in which others work"}
    assert len(caught) == 6
    assert stand.sandbox.calls == []


def test_a_director_whose_close_hangs_is_abandoned(transport):
    """The work is verified without it."""

    def make():
        return director(ScriptedAgent({"turns": says("DONE"), "close": [{"hang": True}]}))

    stand = play(transport, make)
    assert stand.rollout.state in ("closed/rewarded", "closed/unverified")
    assert not stand.rollout._world.leases.open()


def test_a_stopped_rollout_that_is_detached_keeps_no_session_of_its_director(transport):
    """This process ends: the lease of a session that lives in it is given back."""

    async def played():
        stand = build(transport, turns=(), director=director(says("Go.", "Again.", "DONE")))
        with anyio.fail_after(30):
            async for moved in stand.rollout.run_iter():
                if moved.event.name == "Prompted":
                    stand.rollout.stop()
            await stand.rollout.detach()
        return stand

    for loop in ("asyncio", "trio"):
        stand = anyio.run(played, backend=loop)
        assert stand.rollout.state == "disconnected"
        assert [session.closed for session in sessions(stand)] == [1]
        assert not stand.rollout._world.leases.open("director")


def test_a_journal_that_cannot_be_written_leaves_no_session_of_a_director(transport):
    """As if killed; but this process lives on."""

    class Full:
        lines = 0

        def write(self, line):
            self.lines += 1
            if self.lines > 8:
                raise JournalError("disk full")

        def close(self):
            pass

    async def played():
        stand = build(transport, turns=(), director=director(says("Go.", "DONE")), journal=Full())
        with anyio.fail_after(30):
            await stand.rollout.run()
        return stand

    for loop in ("asyncio", "trio"):
        stand = anyio.run(played, backend=loop)
        assert not stand.rollout.closed
        assert [session.closed for session in sessions(stand)] == [1]


def test_what_a_director_says_is_on_disk_in_the_form_of_the_trajectory(tmp_path):
    """A file of its own, so that a segment of the trajectory is a turn as ever."""
    led = director(says("Go.", "DONE"))
    config = RolloutConfig(agent="noop", prompt="x", scene=None, sandbox="fake", out=tmp_path, director=led)
    result = anyio.run(Rollout(config).run)
    segments = read_trajectory(result.folder / "director.jsonl")
    assert [segment.steps[-1].data["text"] for segment in segments] == ["Go.", "DONE"]
    assert json.loads((result.folder / "config.json").read_text())["director"] == "user"
    assert [s.about["role"] for s in read_trajectory(result.folder)] == ["agent", "agent"]
