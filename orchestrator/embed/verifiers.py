"""verifiers: any agent of ours, and scenes of several roles, as a harness of verifiers 0.4.

    uv run vf-eval TASKSET --env.agent.harness.id rollout-orchestrator --env.agent.harness.agent codex-acp
    vf.AgentConfig(harness=RolloutHarnessConfig(scene="rollout.toml"), model=...)

verifiers has the model, the runtime, the limits and the rewards. Every agent calls the interception server directly,
with the secret of its run, so what verifiers has in a trace (messages, usage, token ids where it trains) is all that
any role asked and got; there is no gateway of ours in between. The model is the run's, whatever a scene's roles name.
What the rollout says of itself is in `trace.info["rollout"]`.
"""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import anyio
import attrs
from pydantic import Field
from verifiers.v1.clients import ModelContext
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.harness import Harness
from verifiers.v1.runtimes import ProgramResult, Runtime
from verifiers.v1.task import TaskData
from verifiers.v1.trace import Trace
from verifiers.v1.types import ID

from orchestrator.config import RolloutConfig
from orchestrator.embed import controlled, hosted, refusal, summary
from orchestrator.gateway.formats import FORMATS
from orchestrator.gateway.upstream import Upstream
from orchestrator.install import ensure_installed
from orchestrator.registry import AgentConfig
from orchestrator.result import RolloutResult
from orchestrator.rollout import Rollout
from states.errors import ConfigError, SandboxError
from states.ports import ExecResult

__all__ = ["RolloutHarness"]

ENDS_SEC = 10.0
"""How long a runtime may take to end a command that is not wanted any more."""


class RolloutHarnessConfig(HarnessConfig):
    """Who takes turns. `--env.agent.harness.NAME` on the command line."""

    id: ID = "rollout-orchestrator"
    agent: str | None = None
    """A registered agent, or a manifest (.toml): one role, one turn."""
    scene: Path | None = None
    """A rollout.toml: roles, turns, limits."""
    roles: dict[str, str] = Field(default_factory=dict)
    """Agents by role, AGENT[:MODEL]."""
    turn_sec: float | None = None
    """Longest turn; the agent timeout of the run holds in any case."""
    idle_sec: float | None = None
    """Longest silence in a turn."""
    policy: Literal["allow", "deny"] | None = None
    """What answers an agent's questions."""
    out: Path | None = None
    """The folder under which journals are kept; without it none is."""


class RolloutHarness(Harness[RolloutHarnessConfig]):
    """A harness whose program is a rollout of ours."""

    SUPPORTS_RESUME = False
    NEEDS_CONTAINER = False  # the agents are what may need one: theirs is the runtime's choice

    async def setup(self, runtime: Runtime) -> None:  # noqa: ARG002 - verifiers' signature
        """Download the agents, on this machine."""
        config = self._config("", sandbox="fake")
        for role in config.the_scene().roles:
            await ensure_installed(config.registry.resolve(role.agent))

    async def launch(  # noqa: PLR0917 - verifiers' signature
        self,
        ctx: ModelContext,
        trace: Trace[Any, Any, Any],
        runtime: Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: TaskData,
    ) -> ProgramResult:
        """One rollout. An exit code of 1 says that it must not be graded; stderr says why."""
        if mcp_urls:
            raise ConfigError(
                f"tool servers ({', '.join(mcp_urls)}) cannot be given to agents here; use another harness"
            )
        _, prompt = self.resolve_text_prompt(data)
        out = self.config.out
        with nullcontext(str(out)) if out else tempfile.TemporaryDirectory(prefix="rollout-vf-") as folder:
            config = self._config(
                prompt or "",
                sandbox=await RuntimeSandbox.of(runtime, data.workdir),
                upstream=Upstream(ctx.model, endpoint, list(FORMATS), api_key=secret),
                out=Path(folder),
            )
            _check_reach(config, runtime)
            rollout = Rollout(config)
            try:
                async with controlled(rollout):
                    result = await rollout.run()
            finally:
                told = summary(rollout.result())
                trace.info["rollout"] = told if out else {**told, "folder": None}
        why = _why_not_graded(config, trace, result)
        return ProgramResult(1 if why else 0, "", why)

    def _config(self, prompt: str, **settings: Any) -> RolloutConfig:
        asked = self.config
        return hosted(
            prompt,
            agent=asked.agent,
            scene=asked.scene,
            roles=asked.roles,
            env=asked.resolved_env,
            variables=asked.resolved_env,
            turn_sec=asked.turn_sec,
            idle_sec=asked.idle_sec,
            policy=asked.policy,
            usage_tracking="off",  # the interception server counts
            **settings,
        )


def _callers(config: RolloutConfig) -> list[AgentConfig]:
    """The agents that call a model."""
    agents = [config.registry.resolve(role.agent) for role in config.the_scene().roles]
    return [agent for agent in agents if agent.calls_model]


def _why_not_graded(config: RolloutConfig, trace: Trace[Any, Any, Any], result: RolloutResult) -> str:
    """Why this run must not be rewarded, read off the rollout and off what the interception saw; empty: it may be."""
    if (error := refusal(result)) is not None:
        return str(error)
    last = trace.calls[-1] if trace.calls else None
    if last is not None and last.error is not None:
        return f"the provider failed: {last.error.message}"
    if last is None and _callers(config) and not result.tool_calls:
        return "nothing was done: no model call and no tool call"
    return ""


def _check_reach(config: RolloutConfig, runtime: Runtime) -> None:
    """Refuse an agent in our own process where the endpoint can only be seen from inside the runtime."""
    here = "http://127.0.0.1:9"
    for agent in _callers(config):
        if agent.calls_from == "host" and runtime.host_url(here) != here:
            raise ConfigError(
                f"agent {agent.name} calls its model from this process; a {runtime.type} runtime's endpoint is seen "
                "from inside only, so use an agent over ACP"
            )


@attrs.frozen
class RuntimeSandbox:
    """A runtime of verifiers as an `ExecSandbox`: it is up, and verifiers takes it down."""

    runtime: Runtime
    cwd: str

    @classmethod
    async def of(cls, runtime: Runtime, workdir: str | None) -> RuntimeSandbox:
        """The runtime, working where the task says, or else where its commands do."""
        done = await runtime.run(["/bin/sh", "-c", 'cd "$0" && pwd', workdir or "."], {})
        if done.exit_code:
            raise SandboxError(f"the {runtime.type} runtime has no folder {workdir or '.'}: {done.stderr.strip()}")
        return cls(runtime, done.stdout.strip())

    async def start(self) -> None:
        """It is up."""

    async def exec(self, command: str, *, timeout_sec: float | None = None) -> ExecResult:
        """Run a command to its end. It is cancelled once, as a runtime expects it, and waited for: then it is over."""
        running = asyncio.ensure_future(self.runtime.run(["/bin/sh", "-c", command], {}))
        try:
            with anyio.fail_after(timeout_sec):
                await asyncio.wait({running})
        finally:
            running.cancel()
            with anyio.move_on_after(ENDS_SEC, shield=True):
                await asyncio.wait({running})
        done = running.result()
        return ExecResult(done.stdout, done.stderr, done.exit_code)

    async def upload(self, source: Path, target: str) -> None:
        """Copy one file in."""
        await self.runtime.write(target, await anyio.Path(source).read_bytes())

    async def download(self, source: str, target: Path) -> None:
        """Copy one file out."""
        await anyio.Path(target).write_bytes(await self.runtime.read(source))
