"""Harbor: any agent of ours, and scenes of several roles, as an agent of Harbor 0.25.

    harbor run -p TASK -m openai/gpt-5 -a orchestrator.embed.harbor:OrchestratorAgent --ak agent=codex-acp
    harbor run -p TASK -a orchestrator.embed.harbor:OrchestratorAgent --ak scene=rollout.toml
    harbor agent schema orchestrator.embed.harbor:OrchestratorAgent

Harbor has the environment, the clock and the verifier; the rollout runs inside its agent phase, and its journal is in
`<trial>/rollout/`. Models are called through our gateway on Harbor's machine, with the keys of the environment in
which `harbor` runs, so that usage is counted and no key of a provider enters the sandbox. (`--ae` would put it there.)

What is written to Harbor's `AgentContext` is there from the first transition on, so a timeout keeps it. A rollout that
must not be graded (the provider failed, the sandbox died, an agent could not be proven dead) raises, and Harbor then
has no reward for it either; `--retry-include ProviderError` retries by the owner of the failure.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import attrs
from harbor.agents.base import BaseAgent
from harbor.agents.capabilities import AgentCapabilities
from harbor.agents.options import AgentOptions
from harbor.environments.base import BaseEnvironment
from harbor.models.agent.context import AgentContext
from pydantic import Field

from orchestrator.budgets import Budgets
from orchestrator.config import RolloutConfig
from orchestrator.embed import controlled, hosted, refusal, summary
from orchestrator.gateway.upstream import PROVIDERS
from orchestrator.install import ensure_installed
from orchestrator.result import RolloutResult
from orchestrator.rollout import Rollout
from states.errors import ConfigError, OrchestratorError, SandboxError

MODEL_VARIABLES = frozenset(key for provider in PROVIDERS.values() for key in provider.keys) | {
    f"{name.upper()}_BASE_URL" for name in PROVIDERS
}
"""Variables that say how a provider is called: for our gateway, never for agents."""


class OrchestratorOptions(AgentOptions):
    """What `--ak` can say; `harbor agent schema` prints it."""

    agent: str | None = Field(
        default=None, description="A registered agent, or a manifest (.toml): one role, one turn."
    )
    scene: Path | None = Field(default=None, description="A rollout.toml: roles, turns, limits.")
    roles: dict[str, str] | None = Field(
        default=None,
        description='Who plays which role: {"coder": "codex-acp", "reviewer": "pydantic-ai:openai/gpt-5"}.',
    )
    turn_sec: float | None = Field(default=None, description="Longest turn; Harbor's own timeout holds in any case.")
    idle_sec: float | None = Field(default=None, description="Longest silence in a turn.")
    timeout: float | None = Field(default=None, description="Seconds for all turns together.")
    max_tokens: int | None = Field(default=None, description="Budget of tokens, over all roles.")
    max_cost: float | None = Field(default=None, description="Budget in US dollars, over all roles.")
    max_tool_calls: int | None = Field(default=None, description="Budget of tool calls, over all roles.")
    policy: Literal["allow", "deny"] | None = Field(default=None, description="What answers an agent's questions.")
    usage_tracking: Literal["auto", "required", "off"] | None = Field(
        default=None, description="Whether model calls go through our gateway and are counted."
    )


@attrs.frozen
class HarborSandbox:
    """Harbor's environment as an `ExecSandbox`: it is up, commands run as the agent's user, Harbor takes it down."""

    environment: BaseEnvironment
    cwd: str

    @classmethod
    async def of(cls, environment: BaseEnvironment) -> HarborSandbox:
        """The environment, working where its commands do."""
        done = await environment.exec("pwd", timeout_sec=60)
        if done.return_code:
            raise SandboxError(f"Harbor's environment cannot say where it works: {done.stderr or done.stdout}")
        return cls(environment, (done.stdout or "/").strip())

    async def start(self) -> None:
        """It is up."""

    async def exec(self, command: str, *, timeout_sec: float | None = None) -> Any:
        """Run a command to its end."""
        return await self.environment.exec(command, timeout_sec=None if timeout_sec is None else math.ceil(timeout_sec))

    async def upload(self, source: Path, target: str) -> None:
        """Copy one file in."""
        await self.environment.upload_file(source, target)

    async def download(self, source: str, target: Path) -> None:
        """Copy one file out."""
        await self.environment.download_file(source, target)


class OrchestratorAgent(BaseAgent):
    """Harbor's agent that runs rollouts. Settings are those of `OrchestratorOptions`."""

    capabilities = AgentCapabilities(atif=True)
    options_model = OrchestratorOptions
    options: OrchestratorOptions

    @staticmethod
    def name() -> str:
        """As Harbor lists it."""
        return "rollout-orchestrator"

    def version(self) -> str:
        """Our package's."""
        return version("rollout-orchestrator")

    @classmethod
    def preflight(cls, kwargs: dict[str, Any] | None = None, env: Mapping[str, str] | None = None) -> None:
        """Refuse settings that cannot work before any trial is queued. Raises `ValueError`, as Harbor wants it."""
        super().preflight(kwargs, env)
        try:
            config = _config("", cls.parse_options(kwargs, env), env or {}, sandbox="fake", out=None)
            for role in config.the_scene().roles:
                config.registry.resolve(role.agent)
        except ConfigError as error:
            raise ValueError(str(error)) from error

    async def setup(self, environment: BaseEnvironment) -> None:  # noqa: ARG002 - Harbor's signature
        """Download the agents, on this machine."""
        config = self._config("", "fake")
        for role in config.the_scene().roles:
            await ensure_installed(config.registry.resolve(role.agent))

    async def run(self, instruction: str, environment: BaseEnvironment, context: AgentContext) -> None:
        """One rollout.

        Raises:
            OrchestratorError: it must not be graded; the class names the owner of the failure.
        """
        sandbox = await HarborSandbox.of(environment)
        hooks = (lambda _moved: _fill(context, rollout.result()),)
        rollout: Rollout = Rollout(self._config(instruction, sandbox, hooks=hooks))
        try:
            async with controlled(rollout):
                await rollout.run()
        finally:
            result = rollout.result()
            _fill(context, result)
            self._write_trajectory(result)
        if (error := refusal(result)) is not None:
            raise error

    def _config(self, instruction: str, sandbox: Any, **settings: Any) -> RolloutConfig:
        return _config(
            instruction,
            self.options,
            self.extra_env,
            sandbox=sandbox,
            out=self.logs_dir.parent / "rollout",  # beside the logs: those an agent can write, where they are mounted
            model=self.model_name or "",
            **settings,
        )

    def _write_trajectory(self, result: RolloutResult) -> None:
        """ATIF, in one move: where logs are mounted, an agent may have left a link of that name.

        What goes wrong is said in Harbor's log: the trial is not to fail for it.
        """
        from orchestrator.export.atif import to_atif

        assert result.folder is not None
        draft = result.folder / "trajectory.atif.json"
        try:
            draft.write_text(json.dumps(to_atif(result.folder), ensure_ascii=False), encoding="utf-8")
            draft.replace(self.logs_dir / "trajectory.json")
        except (OrchestratorError, OSError) as error:
            self.logger.warning("no trajectory of rollout %s: %s", result.rollout, error)


def _config(instruction: str, options: Any, env: Mapping[str, str], **settings: Any) -> RolloutConfig:
    """The rollout that these options ask for. Raises `ConfigError`."""
    if misplaced := sorted(MODEL_VARIABLES.intersection(env)):
        raise ConfigError(
            f"{misplaced[0]} is given with --ae, which Harbor passes into the sandbox; set it where harbor runs instead"
        )
    asked = options.model_dump(exclude={*AgentOptions.model_fields})
    limits = {name: asked.pop(f"max_{name}") for name in ("tokens", "cost", "tool_calls")}
    budgets = Budgets(**limits) if any(limit is not None for limit in limits.values()) else None
    return hosted(instruction, env=env, variables=os.environ, budgets=budgets, **asked, **settings)


def _fill(context: AgentContext, result: RolloutResult) -> None:
    """Write into Harbor's context what is known so far."""
    if result.usage.tracking == "metered":
        used = result.usage.total
        context.n_input_tokens, context.n_output_tokens = used.input_tokens, used.output_tokens
        context.n_cache_tokens, context.cost_usd = used.cache_read_input_tokens, used.cost
    context.metadata = summary(result)
