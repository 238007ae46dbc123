"""Embedding: rollouts inside Harbor, Inspect and verifiers. One module a host; nothing else of ours imports them.

What the three have in common is here. A host owns the task, the sandbox, the verifier and the clock; what is told to
us is who takes turns. So a rollout in a host has the host's instruction as its prompt, the host's sandbox, no verifier
(it closes as `closed/unverified`), and limits only where somebody set them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import attrs

from orchestrator.config import RolloutConfig, Scene, Turn
from orchestrator.control import serve
from orchestrator.result import RolloutResult
from orchestrator.rollout import Rollout
from orchestrator.scenes import load_rollout, roles_in_turn, with_model
from states.errors import (
    AgentError,
    ConfigError,
    OrchestratorError,
    Owner,
    ProviderError,
    SandboxError,
    VerifierError,
)

NO_LIMIT_SEC = 7 * 24 * 3600.0
"""A turn's limit where nobody set one: the host has a deadline of its own, and cancels us when it passes."""

OWNERS: Mapping[Owner, type[OrchestratorError]] = {
    "agent": AgentError,
    "provider": ProviderError,
    "sandbox": SandboxError,
    "verifier": VerifierError,
}


def hosted(
    prompt: str,
    *,
    sandbox: Any,
    agent: str | None = None,
    scene: Scene | Path | str | None = None,
    roles: Mapping[str, str] | None = None,
    model: str = "",
    env: Mapping[str, str] | None = None,
    variables: Mapping[str, str] | None = None,
    **settings: Any,
) -> RolloutConfig:
    """The config of one rollout in a host: who takes turns, and what the host brings.

    Args:
        prompt: the host's instruction, for turns that have no prompt of their own.
        sandbox: the host's, as `RolloutConfig.sandbox` takes one.
        agent: one role, one turn: a registered agent or a manifest (`.toml`).
        scene: a `Scene`, or a `rollout.toml` whose settings hold unless `settings` says otherwise. A task or a prompt
            in it is left out, as the host has its own.
        roles: agents by role, `AGENT[:MODEL]`: with a scene they say who plays, without one each takes a turn.
        model: for roles that name none.
        env: for every role's agent, over what the file says.
        variables: what `${NAME}` in the file stands for.
        settings: further keywords of `RolloutConfig`; those that are None are left out.

    Raises:
        ConfigError: nobody takes turns, or something else cannot work.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    played, written = _played(agent, scene, roles, variables)
    written["env"] = {**written.get("env", {}), **(env or {})}
    own = {"verifier": None, "turn_sec": NO_LIMIT_SEC}
    return RolloutConfig(prompt=prompt, scene=with_model(played, model), sandbox=sandbox, **(own | written | given))


def _played(
    agent: str | None,
    scene: Scene | Path | str | None,
    roles: Mapping[str, str] | None,
    variables: Mapping[str, str] | None,
) -> tuple[Scene, dict[str, Any]]:
    """Who takes turns, and what a file says beside that."""
    if agent and roles:
        raise ConfigError("give agent for one role, or roles for several, not both")
    if isinstance(scene, str | Path):
        written = load_rollout(scene, roles or agent, variables=variables)
        played: Scene = written.pop("scene")
        return played, {name: value for name, value in written.items() if name not in ("task", "prompt")}
    if scene is not None:
        if agent or roles:
            raise ConfigError("a Scene has its own agents: give it alone, or roles with a rollout.toml")
        return scene, {}
    if roles:
        return roles_in_turn(roles), {}
    if not agent:
        raise ConfigError("who shall do it? Give agent, roles, or a scene")
    (role,) = roles_in_turn({"agent": agent}).roles
    return Scene((role,), (Turn(role.name),)), {}


@asynccontextmanager
async def controlled(rollout: Rollout) -> AsyncIterator[None]:
    """Hear a second terminal (`rollout cancel FOLDER`), where a socket can be made in the rollout's folder."""
    async with AsyncExitStack() as stack:
        with suppress(ConfigError):  # without it everything else works
            await stack.enter_async_context(serve(rollout))
        yield


def refusal(result: RolloutResult) -> OrchestratorError | None:
    """The error with which a host should hear that this rollout must not be graded; None when it may be.

    It may be when the work is what the agents made of it. It may not when a provider, a sandbox or we failed, when
    nothing was done, and when an agent could not be proven dead.
    """
    if result.ending in ("unverified", "rewarded"):
        return None
    kind = OWNERS.get(result.verdict.owner, OrchestratorError)
    return kind(f"{result.state}: {result.verdict.reason}")


def summary(result: RolloutResult) -> dict[str, Any]:
    """What a host keeps beside its own record: JSON values, the result without what is only in its folder."""
    document = result.to_json()
    kept = ("rollout", "state", "ended_by", "trajectory_source", "turns", "steps", "tool_calls", "notes", "folder")
    return {name: document[name] for name in kept} | {
        "verdict": document["verdict"],
        "errors": list(document["errors"]),
        "usage": attrs.asdict(result.usage),
        "leaked": list(result.leaked),
    }
