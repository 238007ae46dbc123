"""One place that answers every question of any agent: permissions, elicitations, approvals.

Who answers is a chain of one: the handler that the embedder bound, or else the policy. Whatever goes wrong with a
handler is an answer too, a declined one that says why, so a question never hangs a turn and never raises in an agent.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal, Protocol

import anyio
import anyio.to_thread
import attrs

from orchestrator._tasks import foreign
from states.errors import AgentError
from states.ports import AskHandler, AskUserRequest

Policy = Literal["allow", "deny", "ask"]
By = Literal["policy", "handler", "terminal", "nobody"]

KINDS = ("permission", "elicitation", "approval")
ALLOW = ("allow_once", "allow_always")
REJECT = ("reject_once", "reject_always")
ANSWER_SEC = 300.0
"""How long who is asked may take, unless the rollout's configuration says otherwise."""


@attrs.frozen
class Answer:
    """What was answered: the id of an option (or free text where there are none), None when it was declined.

    `by` is who answered; `why` is empty unless there is something to explain.
    """

    option: str | None
    by: By
    why: str = ""


NOBODY_TO_ASK = "the policy is ask and there is no terminal to ask on: the default, allow, answered"
UNANSWERED = Answer(None, "nobody", "not answered yet")


def read_request(asked: Any) -> AskUserRequest:
    """A question as an agent puts it, be it of our own class or of another harness's of the same shape.

    Kinds may stand by option (`{"a": "allow_once"}`, as BenchFlow has them) or in the options' order; what has none is
    a choice. Raises `AgentError` for what is no question.
    """
    if isinstance(asked, AskUserRequest):
        return asked
    prompt, options = getattr(asked, "prompt", None), getattr(asked, "options", ())
    if not isinstance(prompt, str) or not isinstance(options, list | tuple):
        raise AgentError(f"a question has a prompt and options; {type(asked).__name__} is none")
    options = tuple(map(str, options))
    given = getattr(asked, "option_kinds", ())
    kinds = tuple(given.get(option, "") for option in options) if isinstance(given, Mapping) else tuple(given or ())
    named = getattr(asked, "kind", None)
    kind: Any = named if named in KINDS else ("permission" if any(kinds) else "elicitation")
    return AskUserRequest(prompt, options, tuple(map(str, kinds)), str(getattr(asked, "request_id", "")), kind)


def question_step(request: AskUserRequest, answer: Answer = UNANSWERED) -> dict[str, Any]:
    """A question, and how it was answered, as a step of the trajectory; the same for every transport."""
    return {
        "type": "question",
        "kind": request.kind,
        "request_id": request.request_id,
        "prompt": request.prompt,
        "options": list(request.options),
        "option_kinds": list(request.option_kinds),
        **answer_fields(answer),
    }


def answer_fields(answer: Answer) -> dict[str, Any]:
    """The fields of a question's step that its answer changes."""
    return {"answer": answer.option, "by": answer.by, "why": answer.why}


def declined(request: AskUserRequest, by: By, why: str) -> Answer:
    """A refusal: where the options hold one for it, that option; otherwise none."""
    return Answer(_first_of_kind(request, REJECT), by, f"declined: {why}")


def decide(request: AskUserRequest, policy: Literal["allow", "deny"]) -> Answer:
    """What a policy answers: it permits or refuses, takes the first of several choices, and writes no free text."""
    if policy == "deny":
        return declined(request, "policy", "the policy is deny")
    option = _first_of_kind(request, ALLOW)
    if option is None and request.options and request.kind == "elicitation":
        option = request.options[0]
    if option is None:
        missing = "offers nothing that allows" if request.options else "wants free text, which a policy does not write"
        return declined(request, "policy", f"the question {missing}")
    return Answer(option, "policy")


def _first_of_kind(request: AskUserRequest, kinds: tuple[str, ...]) -> str | None:
    offered = list(zip(request.option_kinds, request.options, strict=False))
    found = [option for wanted in kinds for kind, option in offered if kind == wanted]
    return found[0] if found else None


class Answerer(Protocol):
    """Who answers."""

    async def answer(self, request: AskUserRequest) -> Answer:
        """The answer. Never raises for what a question is."""


@attrs.frozen
class _PolicyAnswers:
    policy: Policy
    limit_sec: float | None
    terminal: Callable[[AskUserRequest], str] | None

    async def answer(self, request: AskUserRequest) -> Answer:
        if self.policy != "ask":
            return decide(request, self.policy)
        if self.terminal is not None:
            return await _HandlerAnswers(self.terminal, self.limit_sec, "terminal").answer(request)
        answer = decide(request, "allow")
        why = f"{answer.why}; " if answer.why else ""
        return attrs.evolve(answer, why=f"{why}{NOBODY_TO_ASK}")


@attrs.frozen
class _HandlerAnswers:
    handler: AskHandler
    limit_sec: float | None
    by: By = "handler"

    async def answer(self, request: AskUserRequest) -> Answer:
        option: object = None
        with anyio.move_on_after(self.limit_sec) as limit:
            try:
                with foreign():
                    option = await self._call(request)
            except Exception as error:
                return declined(request, self.by, f"the {self.by} raised {type(error).__name__}: {error}")
        if limit.cancelled_caught:
            return declined(request, self.by, f"the {self.by} did not answer within {self.limit_sec:g} s")
        if option is None:
            return declined(request, self.by, f"the {self.by} gave no answer")
        if not isinstance(option, str):
            return declined(request, self.by, f"the {self.by} answered {option!r}, which is no text")
        if request.options and option not in request.options:
            offered = ", ".join(request.options)
            return declined(request, self.by, f"the {self.by} answered {option!r}, which was not offered ({offered})")
        return Answer(option, self.by)

    async def _call(self, request: AskUserRequest) -> object:
        """A plain function runs in a thread, so that one which blocks can be left behind at its limit."""
        if inspect.iscoroutinefunction(self.handler) or inspect.iscoroutinefunction(type(self.handler).__call__):
            returned: Awaitable[str | None] | str | None = self.handler(request)
        else:
            # In a list, since trio refuses a thread's function that returns an awaitable.
            [returned] = await anyio.to_thread.run_sync(lambda: [self.handler(request)], abandon_on_cancel=True)
        return await returned if inspect.isawaitable(returned) else returned


@attrs.define(eq=False)
class Questions:
    """Answers the questions of every agent of one rollout.

    `policy` answers while no handler is bound: `allow` takes the option that allows once (or always), `deny` the one
    that rejects, `ask` asks on `terminal`; where there is none the default (allow) answers: the answer says so, and
    `note` is told the first time. A bound handler stays bound over role swaps. `limit_sec` is how long a handler or a
    person may take, None as long as the turn.

    Example:
        >>> questions = Questions("allow")
        >>> questions.bind(lambda request: request.options[0])
    """

    policy: Policy = "allow"
    limit_sec: float | None = ANSWER_SEC
    terminal: Callable[[AskUserRequest], str] | None = None
    note: Callable[[str], None] = lambda _text: None
    _answerer: Answerer = attrs.field(init=False)
    _noted: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.bind(None)

    def bind(self, handler: AskHandler | None) -> None:
        """Let `handler` (plain or async) answer from now on; None goes back to the policy."""
        if handler is None:
            self._answerer = _PolicyAnswers(self.policy, self.limit_sec, self.terminal)
        else:
            self._answerer = _HandlerAnswers(handler, self.limit_sec)

    async def answer(self, request: AskUserRequest) -> Answer:
        """Answer one question; waits as long as the handler may take, and never raises for what it does."""
        answer = await self._answerer.answer(request)
        if self.policy == "ask" and answer.by == "policy" and not self._noted:
            self._noted = True
            self.note(NOBODY_TO_ASK)
        return answer


def ask_on_terminal(request: AskUserRequest) -> str:
    """Ask a person: the question on stderr, the answer (an option's number, its id, or text) from stdin.

    For `Questions(terminal=...)`, by a program that owns its terminal. Raises `EOFError` when stdin ends.
    """
    numbered = [f"  {number}. {option}" for number, option in enumerate(request.options, 1)]
    sys.stderr.write("\n".join([request.prompt, *numbered, "> "]))
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError("stdin ended before the question was answered")
    given = line.strip()
    chosen = {str(number): option for number, option in enumerate(request.options, 1)}
    return chosen.get(given, given)
