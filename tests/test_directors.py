"""Directors: the next turn is decided by what happened so far, over both transports, as snapshots and as properties."""

from __future__ import annotations

import anyio
import anyio.lowlevel
import pytest
from harness import TRANSPORTS, FakeVerifier, assert_sound, build, trace

from orchestrator import ConfigError, Role, RolloutConfig, Scene, Turn, directors
from orchestrator.capture import Trajectory
from orchestrator.directors import CHECK, scripted_user, until_approved, until_verified
from orchestrator.plans import FixedPlan


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """Both transports."""
    return request.param


def played(make):
    """Run what `make` builds on both loops; the stand of the last, after checking that both went the same way."""

    async def run():
        stand = make()
        with anyio.fail_after(20):
            await stand.rollout.run()
        assert_sound(stand)
        return stand

    stands = [anyio.run(run, backend=loop) for loop in ("asyncio", "trio")]
    assert trace(stands[0].rollout) == trace(stands[1].rollout)
    return stands[1]


def prompts(stand):
    """Who was prompted with what, in order."""
    moves = [record.event for record in stand.rollout.journal if hasattr(record, "event")]
    return [(event.role, event.text) for event in moves if event.name == "Prompted"]


def test_a_scripted_user_says_its_lines_and_leaves(transport, snapshot):
    """One session, one turn a line; None is the task's instruction."""
    stand = played(lambda: build(transport, director=scripted_user("agent", [None, "And now in red.", "Thanks."])))
    assert prompts(stand) == [("agent", "Do it."), ("agent", "And now in red."), ("agent", "Thanks.")]
    assert trace(stand.rollout) == snapshot


def test_a_role_tries_again_until_the_check_is_content(transport, snapshot):
    """Feedback is told, and never becomes the reward: that is given at the end, on a dead scene."""
    verifier = lambda: FakeVerifier([0.0, 0.5, 1.0, 1.0])  # noqa: E731
    stand = played(lambda: build(transport, director=until_verified("agent", limit=5), verifier=verifier()))
    assert [text for _, text in prompts(stand)][1:] == [
        "The work was checked and is not right yet (reward 0). Look at the task again and mend it.",
        "The work was checked and is not right yet (reward 0.5). Look at the task again and mend it.",
    ]
    assert stand.rollout.result().reward == 1.0
    assert trace(stand.rollout) == snapshot


def test_a_reviewer_is_asked_until_it_approves(transport, snapshot):
    """Worker and reviewer swap in one sandbox; the reviewer's words reach the worker."""
    scripts = {
        "coder": {"turns": [[{"say": "I wrote it."}]]},
        "reviewer": {"turns": [[{"say": "No."}]]},
    }
    words = iter(["Line 3 is wrong.", "APPROVED", "Line 3 is wrong.", "APPROVED"])

    def speak(moved):
        # A session is new after each swap, so what the reviewer says is put into its script as it connects.
        if moved.event.name == "RoleAssigned" and moved.event.role == "reviewer":
            scripts["reviewer"]["turns"] = [[{"say": next(words)}]]

    director = until_approved("coder", "reviewer")
    roles = ("coder", "reviewer")
    stand = played(
        lambda: build(transport, scripts, roles=roles, director=director, turns=(Turn("coder"),), hooks=(speak,))
    )
    assert [role for role, _ in prompts(stand)] == ["coder", "reviewer", "coder", "reviewer"]
    assert "Line 3 is wrong." in prompts(stand)[2][1]
    assert trace(stand.rollout) == snapshot


def test_a_director_sees_the_steps_the_ending_and_the_feedback_of_each_turn(transport):
    """The story is what the trajectory and the journal say."""
    seen = []

    def director(story):
        seen.append(story.turns)
        return [Turn("agent"), CHECK, Turn("agent", "More."), None][len(seen) - 1]

    played(lambda: seen.clear() or build(transport, director=director))
    first = seen[1][0]
    assert (first.role, first.prompt, first.ended_by, first.complete) == ("agent", "Do it.", "end_turn", True)
    assert [step["type"] for step in first.steps] == ["user_message", "agent_thought", "tool_call", "agent_message"]
    assert first.said == "done"
    assert first.feedback is None
    assert seen[2][0].feedback == {"reward": 1.0}
    assert [turn.prompt for turn in seen[3]] == ["Do it.", "More."]


def test_a_story_costs_what_is_new_however_long_it_is(transport, monkeypatch):
    """Thirty decisions that look at the last turn's words read each line once, and fold each record once."""
    folded, lines = [], []
    fold_record, take = directors.fold_record, Trajectory.take

    def counted(trajectory, more):
        more = list(more)
        lines.extend(more)
        take(trajectory, more)

    monkeypatch.setattr(directors, "fold_record", lambda *given: folded.append(given) or fold_record(*given))
    monkeypatch.setattr(Trajectory, "take", counted)

    def director(story):
        assert all(turn.said == "done" for turn in story.turns[-1:])
        return Turn("agent") if len(story.turns) < 30 else None

    stand = played(lambda: folded.clear() or lines.clear() or build(transport, director=director))
    assert stand.rollout.result().turns == 30
    assert len(folded) < len(stand.rollout.journal)
    assert lines == list(stand.rollout._world._trajectory._sink.lines)


def test_a_turn_that_is_looked_at_while_it_is_open_is_whole_afterwards(transport):
    """What was read of it then is read again, and what a director was handed stays as it was."""
    seen = []

    def look(moved):
        if moved.event.name in ("Prompted", "Captured"):
            seen.append([step["type"] for step in stands[-1].rollout.story.turns[0].steps])
            stands[-1].rollout.story.turns[0].steps[0]["type"] = "nobody else's"

    stands = []
    played(lambda: stands.append(build(transport, hooks=(look,))) or stands[-1])
    assert seen[-2:] == [["user_message"], ["user_message", "agent_thought", "tool_call", "agent_message"]]


def test_a_director_may_be_async(transport):
    """An awaitable decision is awaited."""

    async def director(story):
        await anyio.lowlevel.checkpoint()
        return None if story.turns else Turn("agent")

    stand = played(lambda: build(transport, director=director))
    assert stand.rollout.result().turns == 1


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (Turn("nobody"), "the director gave a turn to 'nobody'; the scene has agent"),
        ("again", "the director returned 'again'; expected a Turn, CHECK or None"),
    ],
)
def test_a_director_that_makes_no_sense_fails_the_rollout_with_a_sentence(transport, answer, sentence):
    """Nothing is graded, and the result says what the director did."""
    stand = played(lambda: build(transport, director=lambda _story: answer))
    result = stand.rollout.result()
    assert (result.state, result.verdict.owner) == ("closed/failed", "harness")
    assert sentence in result.verdict.reason


def test_turns_and_checks_are_bounded_whatever_a_director_wants(transport):
    """An endless director ends at the limit, and the work is verified."""
    stand = played(lambda: build(transport, director=lambda _story: Turn("agent"), max_turns=3))
    assert (stand.rollout.result().turns, stand.rollout.state) == (3, "closed/rewarded")
    stand = played(
        lambda: build(transport, director=lambda story: CHECK if story.turns else Turn("agent"), max_checks=2)
    )
    assert (stand.rollout.state, stand.verifier.runs) == ("closed/rewarded", 3)


def test_a_plan_and_a_director_exclude_each_other():
    """One clear error, before anything exists."""
    scene = Scene((Role("agent", "noop"),), (Turn("agent"),))
    with pytest.raises(ConfigError, match="either a plan or a director"):
        RolloutConfig(prompt="x", scene=scene, plan=FixedPlan((), "x"), director=lambda _story: None)
