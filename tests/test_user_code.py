"""What a user's own code raises is told with its traceback and its owner; what it returns amiss, by what it must be."""

from __future__ import annotations

import asyncio

import anyio
import pytest
from harness import FakeVerifier, build, drive
from sessions import HandAgent, by_hand, events

from orchestrator import ConfigError, Rollout, RolloutConfig, Turn, run_sync
from orchestrator._tasks import StrayCancellation, first_of, foreign
from orchestrator._words import TRACE, traced
from orchestrator.directors import CHECK
from orchestrator.export import FORMATS, document, export
from orchestrator.questions import Questions
from orchestrator.sandboxes.fake import FakeSandbox
from states.events import Checked
from states.ports import AskUserRequest

pytestmark = pytest.mark.anyio
NOTHING = {"missing_key": 1}


def looked_up(*_given):
    """A user's function with a mistake in it."""
    return NOTHING["missing"]


async def awaited(*given):
    """The same, awaited."""
    return looked_up(*given)


def told_once(result, *frames):
    """The one note is the traceback, from the seam to the user's own line, and of nothing else."""
    (note,) = [note for note in result.notes if "Traceback" in note]
    assert all(frame in note for frame in (*frames, 'NOTHING["missing"]'))
    assert note.rstrip().endswith("KeyError: 'missing'")
    assert note.count("Traceback") == 1, note


async def test_the_traceback_of_a_prompt_that_raises_is_a_note():
    """And the failure is the agent's."""
    stand = await drive(by_hand(HandAgent(lambda session, *_: awaited())))
    result = stand.rollout.result()
    assert result.errors[0]["owner"] == "agent"
    told_once(result, "in looked_up", "in awaited")


async def test_the_traceback_of_a_connect_that_raises_is_a_note():
    """One for each time that it was tried."""
    stand = await drive(by_hand(HandAgent(make=looked_up), max_connects=1))
    assert "connect() raised KeyError: 'missing'" in stand.rollout.result().verdict.reason
    told_once(stand.rollout.result(), "in looked_up", "in connect")


def test_a_program_that_calls_run_sync_is_told_of_its_own_exception_alone():
    """That no loop ran before is nothing to be told of."""

    def director(_story):
        return looked_up()

    result = run_sync(RolloutConfig(prompt="x", agent="scripted", sandbox="fake", director=director, out=None))
    told_once(result, "in director", "in looked_up")


@pytest.mark.parametrize("director", [looked_up, awaited])
async def test_a_director_that_raises_is_named_in_the_verdict(director):
    """Not only what it raised."""
    stand = await drive(build("session-factory", director=director, turns=()))
    result = stand.rollout.result()
    assert "the director raised KeyError: 'missing'" in result.verdict.reason
    told_once(result, "in looked_up")


async def test_a_verifier_that_raises_owns_the_failure():
    """As one that returns rubbish does."""
    stand = await drive(build("session-factory", verifier=FakeVerifier([awaited]), max_verifies=1))
    result = stand.rollout.result()
    assert result.verdict.owner == "verifier"
    assert "verify() raised KeyError: 'missing'" in result.verdict.reason
    told_once(result, "in looked_up", "in awaited")


class Rubbish:
    """A verifier whose feedback is a number, where numbers by name are wanted."""

    async def verify(self):
        return {"reward": 1.0}

    async def check(self):
        return 5


async def test_feedback_that_is_no_mapping_is_the_verifiers_failure_and_no_feedback():
    """The director that asked for it sees none, and fails at nothing."""
    decisions = iter([Turn("agent"), CHECK, None])
    stand = build("session-factory", turns=(), verifier=Rubbish(), director=lambda _story: next(decisions))
    await stand.rollout.run()
    (checked,) = events(stand, Checked)
    assert checked.feedback is None
    assert checked.failure.owner == "verifier"
    assert checked.failure.message == "check() returned 5; it must return numbers by name"
    assert stand.rollout.state == "closed/rewarded"


@pytest.mark.parametrize(
    ("agent", "sentence"),
    [
        (3, "the factory harness:build_agent returned 3; it must return an Agent, an object with connect("),
        (None, "the factory harness:build_agent returned None; it must return an Agent"),
        (HandAgent(make=lambda: None), "connect() returned None, which is no Session: it lacks prompt, cancel, on_ask"),
        (HandAgent(make=lambda: "x"), "connect() returned 'x', which is no Session: it lacks prompt, cancel, on_ask"),
    ],
)
async def test_what_a_factory_returns_amiss_is_said_to_be_that(agent, sentence):
    """And what it must be. It is not tried again, nor is there a traceback of ours."""
    result = (await drive(by_hand(agent))).rollout.result()
    assert sentence in result.verdict.reason
    assert result.verdict.owner == "agent"
    assert len(result.errors) == 1
    assert not any("Traceback" in note for note in result.notes)


async def test_an_exec_that_returns_text_is_said_to_do_that():
    """The sandbox is somebody's own: what it must return stands in the verdict."""

    class Mine:
        async def start(self): ...
        async def exec(self, command, *, timeout_sec=None):
            return "rollout: done"

        async def upload(self, source, target): ...
        async def download(self, source, target): ...

    result = await Rollout(RolloutConfig(prompt="x", agent="scripted", sandbox=Mine(), out=None)).run()
    assert result.verdict.owner == "sandbox"
    assert "exec() returned 'rollout: done', which lacks stdout, stderr, return_code" in result.verdict.reason
    assert "it must return an object with stdout, stderr and return_code" in result.verdict.reason


def test_of_a_long_traceback_its_end_is_kept():
    """There is the code of whoever raised it, and what it said."""
    text = traced(KeyError("x" * 2 * TRACE + " at the end"))
    assert len(text) < TRACE + 100
    assert text.startswith("[... ")
    assert text.rstrip().endswith("at the end'")


@pytest.mark.parametrize("to", FORMATS)
def test_an_export_of_nothing_on_disk_is_one_sentence(tmp_path, to):
    """`result.folder` is None after `out=None`; a result is no folder either."""
    with pytest.raises(ConfigError, match=r"kept nothing on disk \(out=None\)"):
        export(None, to, tmp_path / f"it{FORMATS[to].suffix}")
    result = run_sync(RolloutConfig(prompt="x", agent="scripted", sandbox="fake", out=None))
    with pytest.raises(ConfigError, match=r"made of a rollout's folder \(result.folder\), not of a RolloutResult"):
        document(result, to)
    assert not list(tmp_path.iterdir())


# --- a cancellation that nobody asked for ---


async def stray(*_given, **_named):
    """As clients do that let out what became of a call of their own."""
    call = asyncio.ensure_future(asyncio.sleep(60))
    call.cancel()
    await call


class StrayVerifier:
    """A verifier whose client lets its cancellation out."""

    verify = check = stray


class StrayBox:
    """A host's sandbox of that kind."""

    has_environment = True
    start = exec = upload = download = stray


STRAYS = {
    "hook": ({"hooks": (stray,)}, "closed/unverified", "agent"),
    "verifier": ({"verifier": StrayVerifier(), "max_verifies": 1}, "closed/failed", "verifier"),
    "director": ({"director": stray}, "closed/failed", "harness"),
    "sandbox": ({"sandbox": StrayBox()}, "closed/failed", "sandbox"),
}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("whose", STRAYS)
async def test_a_cancellation_that_a_users_code_let_out_is_its_own_error(whose):
    """Nobody cancelled anything: neither is the rollout cancelled, nor is the host's task."""
    given, state, owner = STRAYS[whose]
    base = {"prompt": "x", "agent": "scripted", "sandbox": FakeSandbox(), "verifier": None, "out": None}
    rollout = Rollout(RolloutConfig(**{**base, **given}))
    with anyio.fail_after(20):
        result = await rollout.run()
    assert (result.state, result.verdict.owner) == (state, owner)
    assert asyncio.current_task().cancelling() == 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_question_whose_handler_lets_a_cancellation_out_is_declined():
    """And says so, as for whatever else a handler raises."""
    questions = Questions()
    questions.bind(stray)
    answer = await questions.answer(AskUserRequest("May I?", ("yes",)))
    assert (answer.option, answer.by) == (None, "handler")
    assert "nobody had cancelled the rollout" in answer.why


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_state_whose_part_lets_a_cancellation_out_has_crashed():
    """Whatever part it is of: the kernel takes no cancellation for the host's that the host did not ask for."""

    class Stray(FakeSandbox):
        start = stray

    result = await Rollout(RolloutConfig(prompt="x", agent="scripted", sandbox=Stray(), verifier=None, out=None)).run()
    assert result.state == "closed/failed"
    assert "nobody had cancelled the rollout" in result.verdict.reason


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("ours_first", [True, False])
async def test_a_wait_among_others_that_lets_a_cancellation_out_fails_them_all(ours_first):
    """It is an error of that wait, whichever place it has."""
    waits = (stray, anyio.sleep_forever) if ours_first else (anyio.sleep_forever, stray)
    with pytest.raises(StrayCancellation, match="nobody had cancelled"):
        await first_of(*waits)


async def test_a_hosts_own_cancellation_goes_through_foreign_code():
    """By a scope around it, on either loop."""
    with anyio.move_on_after(0) as scope, foreign():
        await anyio.sleep_forever()
    assert scope.cancelled_caught
