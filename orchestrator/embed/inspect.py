"""Inspect: any agent of ours, and scenes of several roles, as an agent (or solver) of Inspect 0.3.285.

    from inspect_ai import Task
    from orchestrator.embed.inspect import rollout_agent

    Task(dataset=..., solver=rollout_agent("codex-acp"), scorer=..., sandbox="docker")

Inspect has the model, the sandbox, the limits and the scorer. Model calls of every role, wherever it runs, go through
our gateway to Inspect's own bridge, so usage, limits and model events are in its log; `rollout_agent` needs its
asyncio backend for that. Each state is a span of the transcript, each tool call a tool event, and what was said are
the messages of the sample: turn by turn, so that whatever ends it, a limit or an operator, they are there to be
scored. `store().get("rollout")` holds the outcome.

A rollout that must not be graded (the provider failed, the sandbox died, an agent could not be proven dead) raises,
and the sample has an error instead of a score.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import importlib.util
import math
import secrets
import socket
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import anyio
import attrs
from aiohttp import web
from inspect_ai.agent import Agent, AgentState, agent, agent_bridge
from inspect_ai.event import ToolEvent
from inspect_ai.log import transcript
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageTool,
    ChatMessageUser,
    Content,
    ContentReasoning,
    ContentText,
    get_model,
)
from inspect_ai.tool import ToolCall, ToolCallError
from inspect_ai.util import LimitExceededError, SandboxEnvironment, sandbox, span, store

from orchestrator.capture import RecordedSegment, fold_trajectory
from orchestrator.config import RolloutConfig, Scene
from orchestrator.embed import controlled, hosted, refusal, summary
from orchestrator.export.recorded import tool_result
from orchestrator.gateway.formats import FORMATS, Api
from orchestrator.gateway.retold import as_stream
from orchestrator.gateway.upstream import Upstream
from orchestrator.rollout import Rollout
from states.errors import ConfigError, MissingExtra, SandboxError, said
from states.events import Captured
from states.journal import Transition
from states.ports import ExecResult

JSON = dict[str, Any]


@agent
def rollout_agent(
    agent: str | None = None,
    *,
    scene: Scene | Path | str | None = None,
    roles: Mapping[str, str] | None = None,
    model: str = "",
    sandbox_name: str | None = None,
    out: Path | str | None = None,
    **settings: Any,
) -> Agent:
    """An agent of Inspect that plays a rollout in the sample's sandbox.

    Args:
        agent: a registered agent, or a manifest (`.toml`): one role, one turn.
        scene: a `Scene` or a `rollout.toml`: roles, turns, limits.
        roles: agents by role, `AGENT[:MODEL]`.
        model: an Inspect model for roles that name none; empty: the model that is evaluated.
        sandbox_name: which of the sample's sandboxes; None: its default.
        out: the folder under which journals are kept; None keeps none, what matters is in Inspect's log.
        settings: further keywords of `RolloutConfig`, such as `turn_sec`, `idle_sec`, `policy`, `director`.

    Example:
        >>> Task(dataset, solver=rollout_agent(scene="rollout.toml"), sandbox="docker")  # doctest: +SKIP
    """
    asked: dict[str, Any] = {"agent": agent, "scene": scene, "roles": roles, "model": model, **settings}

    async def execute(state: AgentState) -> AgentState:
        """Play the rollout; what was said is added to the messages."""
        prompt = "\n\n".join(message.text for message in state.messages if message.role in ("system", "user"))
        async with (
            _folder(out) as folder,
            agent_bridge(AgentState(messages=list(state.messages))),
            _serving() as models,
        ):
            config = hosted(
                prompt,
                sandbox=await InspectSandbox.of(sandbox(sandbox_name)),
                upstream=models.upstream,
                out=folder,
                **asked,
            )
            rollout = SampleRollout(config, models, state)
            models.on_limit = rollout.cancel
            try:
                async with controlled(rollout):
                    await rollout.run()
            finally:
                rollout.tell()  # what no seal was written for
                result = rollout.result()
                store().set("rollout", summary(result) if out else {**summary(result), "folder": None})
        if models.limit is not None:
            raise models.limit
        if (error := refusal(result)) is not None:
            raise error from models.failure
        return state

    return execute


@asynccontextmanager
async def _folder(out: Path | str | None) -> AsyncIterator[Path]:
    """Where journals are kept, or a folder of our own that goes afterwards."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="rollout-inspect-") as folder:
        yield Path(folder)


# --- what was done, in Inspect's words ---------------------------------------------------------------------------


class SampleRollout(Rollout):
    """A rollout that tells a sample of Inspect's what it does: a span for each state, and each turn once it is sealed.

    That is so on every way out: a limit or an operator of Inspect's cancels the task, and the way to the close is then
    taken by the same steps.
    """

    def __init__(self, config: RolloutConfig, models: ModelEndpoint, sample: AgentState) -> None:
        super().__init__(config)
        self._models, self._sample = models, sample
        self._spans: dict[str, str] = {}  # of the state that runs, and of the turn whose events are still to be told
        self._told = 0  # how much of the trajectory the sample knows

    async def step(self) -> Transition:
        """One state in a span of its own. One that a cancellation broke off has had its span."""
        state = self.state
        begun = state in self._spans
        self._spans.setdefault(state, uuid.uuid4().hex)
        async with nullcontext() if begun else span(state, type="rollout", id=self._spans[state]):
            self._models.context = contextvars.copy_context()
            moved = await super().step()
            if isinstance(moved.event, Captured):
                self.tell()
        if state != "executing":
            self._spans.pop(state, None)
        return moved

    def tell(self) -> None:
        """The messages and tool calls that were written since the last time, without what came late."""
        turn = self._spans.pop("executing", None)
        for segment in fold_trajectory(self._appended()):
            for event in _tool_events(segment, turn):
                transcript()._event(event)  # noqa: SLF001 - there is no other way to add one
            self._sample.messages.extend(messages_of(segment, asked=self.config.prompt or ""))
        self._sample.output = AgentState(messages=self._sample.messages).output  # which it reads off its last message

    def _appended(self) -> list[bytes]:
        assert self.folder is not None, "hosted in Inspect, a rollout has a folder"
        file = self.folder / "trajectory.jsonl"
        if not file.exists():
            return []
        with file.open("rb") as written:
            written.seek(self._told)
            lines = written.readlines()
            self._told = written.tell()
        return [line.rstrip() for line in lines if b'"late":true' not in line]


def _tool_events(segment: RecordedSegment, span_id: str | None) -> Iterator[ToolEvent]:
    """The tool calls of one turn, in the span in which they were made."""
    for data in (step.data for step in segment.steps if step.data.get("type") == "tool_call"):
        call = _call(data)
        error = _failed(data)
        yield ToolEvent(
            id=call.id,
            function=call.function,
            arguments=call.arguments,
            result=tool_result(data),
            error=error,
            failed=error is not None,
            span_id=span_id,
            metadata={"role": segment.about.get("role"), "title": str(data.get("title", ""))},
        )


def messages_of(segment: RecordedSegment, *, asked: str = "") -> Iterator[ChatMessage]:
    """The messages of one turn, without what came late; `asked` is what Inspect has among its own already."""
    about = {"role": segment.about.get("role")}
    content: list[Content] = []
    for data in (step.data for step in segment.steps if not step.late):
        text = str(data.get("text", ""))
        match data.get("type"):
            case "user_message" if not (segment.number == 1 and text == asked):
                yield ChatMessageUser(content=text, metadata=about)
            case "agent_thought":
                content.append(ContentReasoning(reasoning=text))
            case "agent_message":
                content.append(ContentText(text=text))
            case "tool_call":
                call = _call(data)
                yield ChatMessageAssistant(content=content, tool_calls=[call], source="generate", metadata=about)
                content = []
                result = tool_result(data)
                yield ChatMessageTool(
                    content=result, tool_call_id=call.id, function=call.function, error=_failed(data), metadata=about
                )
    if content:
        yield ChatMessageAssistant(content=content, source="generate", metadata=about)


def _call(data: Mapping[str, Any]) -> ToolCall:
    given = data.get("raw_input")
    arguments = dict(given) if isinstance(given, Mapping) else {"title": str(data.get("title", ""))}
    return ToolCall(id=str(data.get("tool_call_id", "")), function=str(data.get("kind") or "tool"), arguments=arguments)


def _failed(data: Mapping[str, Any]) -> ToolCallError | None:
    return ToolCallError("unknown", tool_result(data)) if data.get("status") == "failed" else None


# --- the model ---------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class ModelEndpoint:
    """Inspect's model as an endpoint on loopback: a call to it is a call of Inspect's bridge.

    The bridge works on the clients of `openai` and `anthropic`, so the formats that are served are those whose package
    is installed. Calls run in the context of the state that the rollout is in (`context`), so that their events are in
    its span. A limit that a call exceeds ends the rollout (`on_limit`) and is raised when that is closed.
    """

    url: str
    _key: str = attrs.field(factory=lambda: secrets.token_urlsafe(24), repr=False)
    context: contextvars.Context = attrs.field(factory=contextvars.copy_context)
    on_limit: Callable[[str, str], Any] = lambda _by, _why: None
    limit: LimitExceededError | None = None
    failure: Exception | None = None
    _served: dict[str, str] = attrs.field(factory=dict)

    def upstream(self, model: str) -> Upstream:
        """Where a role that names this model calls it. Raises `ConfigError` when no format can be served."""
        name = model or get_model().name
        self._served[name] = f"inspect/{model}" if model else "inspect"
        apis = [api for api, package in PACKAGES.items() if importlib.util.find_spec(package)]
        if not apis:
            raise MissingExtra("Inspect's bridge works on the clients openai and anthropic; neither is installed")
        return Upstream(name, self.url, apis, api_key=self._key)

    async def answer(self, api: Api, request: web.Request) -> web.StreamResponse:
        """One model call."""
        key = request.headers.get("x-api-key") or request.headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(key.encode(), self._key.encode()):
            return web.json_response(FORMATS[api].error(401, "wrong key"), status=401)
        body: JSON = await request.json()
        streamed = bool(body.pop("stream", False))
        body.pop("stream_options", None)
        body["model"] = self._served.get(str(body.get("model")), "inspect")
        try:
            reply = await asyncio.get_running_loop().create_task(CALLS[api](body), context=self.context)
        except LimitExceededError as error:
            self.limit = error
            self.on_limit("Inspect", str(error))
            return web.json_response(FORMATS[api].error(429, str(error)), status=429)
        except Exception as error:
            self.failure = error
            return web.json_response(FORMATS[api].error(502, f"{type(error).__name__}: {said(error)}"), status=502)
        self.failure = None
        if not streamed:
            return web.json_response(reply)
        return web.Response(body=b"".join(as_stream(api, reply)), content_type="text/event-stream")


@asynccontextmanager
async def _serving() -> AsyncIterator[ModelEndpoint]:
    """Serve Inspect's model on a free port. A client that goes away cancels its call. Raises `ConfigError` on trio."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigError("rollouts in Inspect need its asyncio backend: the model gateway does") from None
    app = web.Application(client_max_size=64 * 1024 * 1024)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    listener = socket.create_server(("127.0.0.1", 0))
    models = ModelEndpoint(f"http://127.0.0.1:{listener.getsockname()[1]}")
    for api, form in FORMATS.items():
        app.router.add_post(form.path, functools.partial(models.answer, api))
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        yield models
    finally:
        with anyio.CancelScope(shield=True):
            await runner.cleanup()


async def _by_chat(body: JSON) -> JSON:
    from openai.types.chat import ChatCompletion

    for tool in body.get("tools") or ():
        tool["function"].setdefault("description", "")
        tool["function"].setdefault("parameters", {"type": "object", "properties": {}})
    async with _openai() as client:
        reply = await client.post("/chat/completions", cast_to=ChatCompletion, body=body)
    told: JSON = reply.model_dump(mode="json", exclude_none=True)
    return told


async def _by_responses(body: JSON) -> JSON:
    from openai.types.responses import Response

    async with _openai() as client:
        reply = await client.post("/responses", cast_to=Response, body=body)
    told: JSON = reply.model_dump(mode="json")
    if used := told.get("usage"):  # the bridge leaves cached tokens out here, and in the total has them in
        used["input_tokens"] = used["total_tokens"] - used["output_tokens"]
    return told


async def _by_messages(body: JSON) -> JSON:
    from anthropic import AsyncAnthropic
    from anthropic.types import Message

    async with AsyncAnthropic(api_key="inspect", base_url=NOWHERE, max_retries=0) as client:
        reply = await client.post("/v1/messages", cast_to=Message, body=body)
    told: JSON = reply.model_dump(mode="json", exclude_none=True)
    return told


def _openai() -> Any:
    from openai import AsyncOpenAI

    return AsyncOpenAI(api_key="inspect", base_url=NOWHERE, max_retries=0)


NOWHERE = "http://inspect.invalid"
"""Where a call would go that Inspect's bridge did not take: to nobody."""

PACKAGES: Mapping[Api, str] = {"openai-chat": "openai", "openai-responses": "openai", "anthropic-messages": "anthropic"}
CALLS = {"openai-chat": _by_chat, "openai-responses": _by_responses, "anthropic-messages": _by_messages}


# --- the sandbox -------------------------------------------------------------------------------------------------


@attrs.frozen
class InspectSandbox:
    """A sandbox of Inspect's as an `ExecSandbox`: it is up, and Inspect takes it down."""

    environment: SandboxEnvironment
    cwd: str

    @classmethod
    async def of(cls, environment: SandboxEnvironment) -> InspectSandbox:
        """The environment, working where its commands do."""
        done = await environment.exec(["pwd"], timeout=60)
        if not done.success:
            raise SandboxError(f"Inspect's sandbox cannot say where it works: {done.stderr or done.stdout}")
        return cls(environment, done.stdout.strip())

    async def start(self) -> None:
        """It is up."""

    async def exec(self, command: str, *, timeout_sec: float | None = None) -> ExecResult:
        """Run a command to its end."""
        timeout = None if timeout_sec is None else math.ceil(timeout_sec)
        argv = ["/bin/sh", "-c", command]
        done = await self.environment.exec(argv, timeout=timeout, timeout_retry=False, concurrency=False)
        return ExecResult(done.stdout, done.stderr, done.returncode)

    async def upload(self, source: Path, target: str) -> None:
        """Copy one file in."""
        await self.environment.write_file(target, await anyio.Path(source).read_bytes())

    async def download(self, source: str, target: Path) -> None:
        """Copy one file out."""
        await anyio.Path(target).write_bytes(await self.environment.read_file(source, text=False))
