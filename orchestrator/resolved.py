"""What a config names, found and checked: the task, who plays each role, what is metered. Nothing of it exists yet."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from orchestrator import metering
from orchestrator._words import shown
from orchestrator.budgets import Limits
from orchestrator.config import DirectorRole, RolloutConfig, Scene, Turn
from orchestrator.directing import check_agent_of
from orchestrator.journal import encode_any
from orchestrator.metering import Cast, Metering
from orchestrator.redact import Redactor, secrets_of
from orchestrator.sandboxes import SandboxSpec, check_made, check_sandbox
from states.errors import ConfigError, MissingExtra
from states.machine import Rules

TURN_SEC = 900.0
ORACLE = "orchestrator.agents.oracle:Oracle"


@attrs.frozen
class Resolved:
    """A config with all that it names. `cast` are the roles with their agents; `led` is the director among them."""

    config: RolloutConfig
    task: Any
    scene: Scene
    led: DirectorRole | None
    cast: Mapping[str, Cast]
    limits: Limits
    tracking: Metering

    @property
    def instruction(self) -> str:
        """What a turn without a prompt of its own is asked."""
        if self.config.prompt is not None:
            return self.config.prompt
        return self.task.instruction if self.task is not None else ""

    def rules(self) -> Rules:
        """What the machine's guards read of it."""
        config = self.config
        return Rules(
            metered=self.tracking.tracked and all(self.cast[role.name].agent.calls_model for role in self.scene.roles),
            usage_required=config.usage_tracking == "required",
            has_verifier=config.verifier is not None and (self.task is not None or config.verifier != "task"),
            max_connects=config.max_connects,
            max_verifies=config.max_verifies,
        )

    def redactor(self) -> Redactor:
        """Who keeps its secrets out of every artifact."""
        redactor = Redactor()
        for member in self.cast.values():
            redactor.add(*secrets_of(member.env))
            if member.upstream is not None and member.upstream.api_key:
                redactor.add(member.upstream.api_key)
        return redactor

    def inputs(self) -> dict[str, Any]:
        """What the rollout is made from, as JSON values: what would make it another one, and no value of a variable."""
        config, task = self.config, self.task
        return {
            "task": task.name if task is not None else None,
            "task_digest": task.digest if task is not None else None,
            "roles": {
                member.name: {
                    "agent": member.agent.name,
                    "agent_digest": hashlib.sha256(encode_any(attrs.asdict(member.agent))).hexdigest()[:16],
                    "protocol": member.agent.protocol,
                    "model": member.model,
                    "env": sorted(member.env),
                    "turn_sec": member.turn_sec,
                    "idle_sec": member.idle_sec,
                }
                for member in self.cast.values()
            },
            "turns": [_turn(turn) for turn in self.scene.turns],
            "director": self.led.role.name if self.led is not None else None,
            "budgets": [attrs.asdict(limit) for limit in self.limits.all()],
            "sandbox": config.sandbox if isinstance(config.sandbox, str) else type(config.sandbox).__qualname__,
            "network": config.network,
            "image": config.image,
            "image_map": dict(config.image_map),
            "sandbox_options": dict(config.sandbox_options),
            "usage_tracking": config.usage_tracking,
            "gateway_reach": config.gateway_reach,
            "deadlines": dict(config.deadlines),
            "policy": config.policy,
            "prompt": config.prompt,
            "verifier": config.verifier if config.verifier in ("task", None) else type(config.verifier).__qualname__,
            "max_checks": config.max_checks,
        }


def _turn(turn: Turn) -> dict[str, Any]:
    own = turn.budgets.given()
    return {"role": turn.role, "prompt": turn.prompt, **({"budgets": own} if own else {})}


def resolve(config: RolloutConfig) -> Resolved:
    """Find and check what it names. Raises `ConfigError`, a `TaskError` for a malformed task."""
    check_sandbox(config.sandbox, config.sandbox_options, config.network)
    task, scene, led = _task(config), config.the_scene(), config.the_director()
    check_made(sandbox_of(config, task))
    roles = scene.roles if led is None else (*scene.roles, led.role)
    cast = {role.name: _cast(config, role, task) for role in roles}
    limits = config.limits()
    tracking = metering.decide(config, tuple(cast.values()), limits)
    if led is not None:
        _check_director(config, led, cast[led.role.name], tracking)
    return Resolved(config, task, scene, led, cast, limits, tracking)


def sandbox_of(config: RolloutConfig, task: Any) -> SandboxSpec:
    """The sandbox that is asked for, but for what only a rollout that runs knows: its name, gateway and labels."""
    limits = task.limits if task is not None else None
    return SandboxSpec(
        sandbox=config.sandbox,
        name="rollout",
        cwd=(task.workdir if task is not None else None) or "/app",
        network=config.network,
        cpus=limits.cpus if limits else None,
        memory_mb=limits.memory_mb if limits else None,
        storage_mb=limits.storage_mb if limits else None,
        gpus=limits.gpus if limits else None,
        image=config.image or (task.docker_image if task is not None else None),
        build=task.dockerfile.parent if task is not None and task.dockerfile else None,
        image_map=config.image_map,
        options=config.sandbox_options,
    )


def _check_director(config: RolloutConfig, led: DirectorRole, member: Cast, tracking: Metering) -> None:
    """Raise `ConfigError` for a director that cannot work."""
    check_agent_of(led, member.agent)
    given = any(name.endswith(("_BASE_URL", "_API_KEY")) for name in member.env)
    brought = given or (config.usage_tracking == "off" and member.upstream is not None)
    if member.agent.metered and not tracking.tracked and not brought:
        raise ConfigError(
            f"the director {member.name!r} ({member.agent.name}) calls a model through the gateway, but "
            f"{tracking.reason}; to go without, say usage_tracking=off and bring an upstream, "
            "or give OPENAI_BASE_URL and OPENAI_API_KEY in its role's env"
        )


def _task(config: RolloutConfig) -> Any:
    if config.task is None:
        return None
    from orchestrator.tasks.loading import load_task
    from orchestrator.tasks.task import Task

    if isinstance(config.task, str | Path):
        return load_task(config.task)
    if not isinstance(config.task, Task):
        raise ConfigError(f"RolloutConfig: task must be a task's folder, a Task or None, not {shown(config.task)}")
    return config.task


def _cast(config: RolloutConfig, role: Any, task: Any) -> Cast:
    agent = config.registry.resolve(role.agent)
    if missing := [module for module in agent.requires if importlib.util.find_spec(module) is None]:
        raise MissingExtra(
            f"agent {agent.name} needs {missing[0]}, which is not installed: pip install "
            f"'rollout-orchestrator[{agent.name}]'"
        )
    if agent.session_factory == ORACLE and (task is None or task.solution is None):
        what = "there is no task" if task is None else f"task {task.name} has no solve.sh"
        raise ConfigError(f"agent {agent.name} runs the solution of a task, and {what}; give another agent, or task")
    own = role.turn_sec or config.turn_sec or (task.agent_timeout_sec if task is not None else None)
    return Cast(
        role,
        agent,
        metering.upstream_for(config, role, agent),
        {**_task_env(config, task), **config.env, **role.env},
        turn_sec=own or TURN_SEC,
        idle_sec=role.idle_sec or config.idle_sec,
    )


def _task_env(config: RolloutConfig, task: Any) -> dict[str, str]:
    """What every command of the task should see. Raises `ConfigError` for a `${NAME}` that nobody gave."""
    if task is None:
        return {}
    from orchestrator.tasks.task import resolve_env

    resolve_env(task.verification.env, config.env, f"task {task.name}: verifier env")
    return resolve_env(task.env, config.env, f"task {task.name}: env")
