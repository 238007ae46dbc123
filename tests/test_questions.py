"""Questions: who answers what, and that nothing a handler does is worse than a refusal."""

from __future__ import annotations

import io
import threading
from typing import Any

import anyio
import pytest

from orchestrator.questions import Answer, Questions, ask_on_terminal, question_step
from states.ports import AskUserRequest

pytestmark = pytest.mark.anyio

ASK = AskUserRequest("rm?", ("once", "always", "no"), ("allow_once", "allow_always", "reject_once"), "r1")
CHOICE = AskUserRequest("Which?", ("a", "b"), ("choice", "choice"), kind="elicitation")
FREE = AskUserRequest("Your name?", kind="elicitation")


@pytest.mark.parametrize(
    ("policy", "request_", "option"),
    [
        ("allow", ASK, "once"),
        ("deny", ASK, "no"),
        ("allow", CHOICE, "a"),
        ("deny", CHOICE, None),
        ("allow", FREE, None),
        ("deny", FREE, None),
        ("allow", AskUserRequest("?", ("x",), ("mystery",)), None),
        ("allow", AskUserRequest("?", ("x",)), None),
        ("deny", AskUserRequest("?", ("never",), ("reject_always",)), "never"),
        ("allow", AskUserRequest("?", ("ok", "no"), ("allow_once", "reject_once"), kind="approval"), "ok"),
    ],
)
async def test_a_policy_answers_by_the_kinds_of_the_options(policy: Any, request_: AskUserRequest, option: Any) -> None:
    answer = await Questions(policy).answer(request_)
    assert (answer.option, answer.by) == (option, "policy")


async def test_the_first_option_of_a_kind_stands_for_it() -> None:
    """Two that allow once: the agent's first is its default."""
    request = AskUserRequest("?", ("first", "second"), ("allow_once", "allow_once"))
    assert (await Questions().answer(request)).option == "first"


async def test_ask_without_a_terminal_takes_the_default_and_says_so() -> None:
    """The answer says so each time, a note the first time; an answer of a handler is nothing to note."""
    notes: list[str] = []
    questions = Questions("ask", note=notes.append)
    for _ in range(2):
        answer = await questions.answer(ASK)
        assert answer.option == "once"
        assert "no terminal" in answer.why
    assert notes == [answer.why]
    handled = Questions("ask", note=notes.append)
    handled.bind(lambda _request: "no")
    await handled.answer(ASK)
    assert len(notes) == 1


async def test_ask_with_a_terminal_asks_there() -> None:
    answer = await Questions("ask", terminal=lambda _request: "always").answer(ASK)
    assert answer == Answer("always", "terminal")


@pytest.mark.parametrize(("typed", "answer"), [("2\n", "always"), ("no\n", "no"), ("  once \n", "once"), ("9\n", "9")])
def test_a_person_answers_by_number_or_by_id(monkeypatch: Any, capsys: Any, typed: str, answer: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    assert ask_on_terminal(ASK) == answer
    assert "  2. always" in capsys.readouterr().err


async def test_a_terminal_that_ends_is_a_refusal(monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    answer = await Questions("ask", terminal=ask_on_terminal).answer(ASK)
    assert (answer.option, answer.by) == ("no", "terminal")
    assert "stdin ended" in answer.why


async def an_async_handler(request: AskUserRequest) -> str:
    return request.options[1]


class CallableHandler:
    async def __call__(self, request: AskUserRequest) -> str:
        return request.options[1]


@pytest.mark.parametrize(
    "handler",
    [
        an_async_handler,
        CallableHandler(),
        lambda request: request.options[1],
        lambda request: an_async_handler(request),  # noqa: PLW0108 - plain, but what it returns is awaited
    ],
    ids=["async", "object", "plain", "plain that returns an awaitable"],
)
async def test_every_shape_of_handler_answers(handler: Any) -> None:
    questions = Questions("deny")
    questions.bind(handler)
    assert await questions.answer(ASK) == Answer("always", "handler")


async def test_a_cleared_handler_gives_way_to_the_policy() -> None:
    """Bound, it stays; cleared with None it is gone: a defect of the originals."""
    questions = Questions("deny")
    questions.bind(an_async_handler)
    assert (await questions.answer(ASK)).by == "handler"
    assert (await questions.answer(ASK)).by == "handler"
    questions.bind(None)
    assert await questions.answer(ASK) == Answer("no", "policy", "declined: the policy is deny")


async def raises(_request: AskUserRequest) -> str:
    raise TimeoutError("of its own")


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        (raises, "raised TimeoutError: of its own"),
        (lambda _request: "yes", "'yes', which was not offered (once, always, no)"),
        (lambda _request: None, "gave no answer"),
        (lambda _request: 5, "5, which is no text"),
    ],
)
async def test_a_handler_that_answers_badly_declines_and_says_why(handler: Any, why: str) -> None:
    """Where the options hold a refusal it is that option; otherwise none."""
    questions = Questions()
    questions.bind(handler)
    answer = await questions.answer(ASK)
    assert (answer.option, answer.by) == ("no", "handler")
    assert why in answer.why
    assert (await questions.answer(CHOICE)).option is None


async def test_a_handler_that_outlasts_its_limit_declines() -> None:
    async def slow(_request: AskUserRequest) -> str:
        await anyio.sleep_forever()
        raise AssertionError

    questions = Questions(limit_sec=0.01)
    questions.bind(slow)
    answer = await questions.answer(ASK)
    assert answer.option == "no"
    assert "did not answer within 0.01 s" in answer.why


async def test_a_plain_handler_that_blocks_is_left_behind_at_its_limit() -> None:
    """The loop runs on meanwhile."""
    release = threading.Event()

    def blocks(_request: AskUserRequest) -> str:
        release.wait(30)
        return "once"

    questions = Questions(limit_sec=0.05)
    questions.bind(blocks)
    try:
        assert "did not answer within" in (await questions.answer(ASK)).why
    finally:
        release.set()


async def test_free_text_is_taken_as_it_is() -> None:
    questions = Questions()
    questions.bind(lambda _request: "Ada")
    assert await questions.answer(FREE) == Answer("Ada", "handler")


def test_a_question_and_its_answer_are_one_step() -> None:
    assert question_step(ASK, Answer("once", "policy")) == {
        "type": "question",
        "kind": "permission",
        "request_id": "r1",
        "prompt": "rm?",
        "options": ["once", "always", "no"],
        "option_kinds": ["allow_once", "allow_always", "reject_once"],
        "answer": "once",
        "by": "policy",
        "why": "",
    }
    assert question_step(ASK)["by"] == "nobody"
