"""From what was typed to the library's config, and back: a rollout can be asked for again."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.base import pairs
from states.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.config import RolloutConfig
    from orchestrator.registry import AgentConfig, Registry


def configured(context: click.Context) -> RolloutConfig:
    """The library's config of a `run` that was asked for, with what it takes to ask for it again."""
    import attrs

    default = click.core.ParameterSource.DEFAULT
    given = {name for name in context.params if context.get_parameter_source(name) is not default}
    options = {name: value for name, value in context.params.items() if name not in ("task", "quiet", "as_json")}
    config = _config(context.params["task"], given, **options)
    return attrs.evolve(config, made_from=_made_from(context, given))


def _made_from(context: click.Context, given: set[str]) -> dict[str, Any]:
    """What was asked for, without values that may be secret: those have to be given again."""
    from orchestrator.redact import secrets_of

    argv: list[str] = []
    variables = context.params["env"]
    hidden = [one.partition("=")[0] for one in variables if "=" in one]
    for parameter in context.command.params:
        name = str(parameter.name)
        elsewhere = name in ("quiet", "as_json", "out", "env")
        if name not in given or elsewhere or not isinstance(parameter, click.Option):
            continue
        value = context.params[name]
        for one in value if parameter.multiple else (value,):
            if name == "upstream_url" and secrets_of({name: one}):
                hidden.append("")
                continue
            argv += [parameter.opts[-1]] if parameter.is_flag else [parameter.opts[-1], str(one)]
    return {
        "task": context.params["task"],
        "argv": argv,
        "env": [one for one in variables if "=" not in one],
        "not_written_down": hidden,
        "cwd": str(Path.cwd()),
    }


def _config(
    task: str | None,
    given: set[str],
    *,
    agent: str | None,
    model: str,
    scene: Path | None,
    roles: tuple[str, ...],
    env: tuple[str, ...],
    sandbox_options: tuple[str, ...],
    image_map: tuple[str, ...],
    upstream_url: str | None,
    upstream_apis: tuple[str, ...],
    upstream_key_env: str | None,
    no_verify: bool,
    limits: tuple[str, ...],
    **options: Any,
) -> RolloutConfig:
    """The library's config of what was asked for; `given` are the options that were. Raises `ConfigError`."""
    import attrs

    from orchestrator.budgets import Budgets
    from orchestrator.config import RolloutConfig

    _finite({name: options[name] for name in ("timeout", "turn_timeout", "idle_timeout")})
    budgets = {name: options.pop(f"max_{name}") for name in ("tokens", "cost", "tool_calls", "turns")}
    variables = _variables(env)
    asked = {
        "task": _task(task),
        "verifier": None if no_verify else "task",
        "turn_sec": options.pop("turn_timeout"),
        "idle_sec": options.pop("idle_timeout"),
        "sandbox_options": pairs("--sandbox-option", sandbox_options),
        "image_map": pairs("--image-map", image_map),
        **options,
    }
    options_of = {"turn_sec": "turn_timeout", "idle_sec": "idle_timeout", "scene": ""}
    file = _scene_file(scene, agent, roles, variables)
    written = {key: value for key, value in file.items() if options_of.get(key, key) not in given}
    config = {**asked, **written}
    config["env"] = {**file.get("env", {}), **variables}
    spent = {name: limit for name, limit in budgets.items() if limit is not None}
    if "timeout" in given:
        spent["wall_sec"] = None  # its short word wins over the file's
    config["budgets"] = attrs.evolve(file.get("budgets", Budgets()), **spent)
    config |= _cast(config, agent, model, roles)
    if limits:
        config |= _budgeted(config, limits)
    config["upstream"] = _upstream(model, upstream_url, upstream_apis, upstream_key_env)
    if config.get("policy") == "ask" and sys.stdin.isatty():
        from orchestrator.questions import ask_on_terminal

        config["terminal"] = ask_on_terminal
    return RolloutConfig(**config)


def _finite(seconds: Mapping[str, float | None]) -> None:
    """Refuse what is no time, by the name of the option that it was given with."""
    for name, given in seconds.items():
        if given is not None and not 0 < given < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {given:g}: give seconds, a number above 0")


def _scene_file(
    path: Path | None, agent: str | None, roles: Sequence[str], variables: Mapping[str, str]
) -> dict[str, Any]:
    """The keywords of a config that a `rollout.toml` holds."""
    if path is None:
        return {}
    from orchestrator.scenes import load_rollout

    sys.path.insert(0, str(path.resolve().parent))  # for the module of a manifest, as in `_agent`
    return load_rollout(path, _players(roles) or agent, variables={**os.environ, **variables})


def _players(given: Sequence[str]) -> dict[str, str]:
    """Which agent plays a role, by the role's name."""
    players: dict[str, str] = {}
    for one in given:
        name, _, agent = one.partition("=")
        if not name or not agent or name in players:
            again = f"{name!r} is given twice" if name in players else "give NAME=AGENT or NAME=AGENT:MODEL"
            raise ConfigError(f"--role {one}: {again}")
        players[name] = agent
    return players


def _budgeted(config: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """Scene and director with these budgets, `ROLE.KIND=N`, for their roles, over those that they have."""
    import attrs

    from orchestrator.budgets import Budgets
    from orchestrator.config import DirectorRole

    scene, led = config.get("scene"), config.get("director")
    if scene is None:
        raise ConfigError(f"--budget {given[0]}: it is a role's; without roles give --max-tokens and the like")
    director = led.role if isinstance(led, DirectorRole) else None
    budgets = {role.name: role.budgets for role in (*scene.roles, *([director] if director else []))}
    for one in given:
        who, _, limit = one.partition("=")
        name, _, kind = who.rpartition(".")
        if name not in budgets:
            raise ConfigError(f"--budget {one}: give ROLE.KIND=N for one of {', '.join(budgets)}")
        try:
            budgets[name] = Budgets.of({**budgets[name].given(), kind: float(limit)})
        except ValueError:
            raise ConfigError(f"--budget {one}: give a number, as in coder.tokens=50000") from None
        except ConfigError as error:
            raise ConfigError(f"--budget {one}: {str(error).removeprefix('Budgets: ')}") from error
    roles = tuple(attrs.evolve(role, budgets=budgets[role.name]) for role in scene.roles)
    if led is not None and director is not None:
        led = attrs.evolve(led, role=attrs.evolve(director, budgets=budgets[director.name]))
    return {"scene": attrs.evolve(scene, roles=roles), "director": led}


SOLO = ("oracle", "noop")
"""Agents that stand for a whole scene: one turn, whatever roles the task has."""


def _cast(config: Mapping[str, Any], agent: str | None, model: str, roles: Sequence[str]) -> dict[str, Any]:
    """Who takes turns, and who leads, as keywords of a config."""
    from orchestrator import scenes
    from orchestrator.registry import default_registry

    players = _players(roles)
    if players and agent:
        raise ConfigError("give --agent for every role, or --role for each of them, not both")
    scene, director, task = config.get("scene"), config.get("director"), config["task"]
    if scene is None and task is not None and config.get("prompt") is None and agent not in SOLO:
        from orchestrator.tasks import load_task

        task = load_task(task)
        if task.extra.get("scenes") or (scenes.user_of(task) is not None and (players or agent)):
            brought = scenes.rollout_of(task, players or agent)
            task, scene, director = brought["task"], brought["scene"], brought["director"]
    if scene is None and players:
        scene = scenes.roles_in_turn(players)
    if scene is not None:
        scene, director = scenes.with_model(scene, model), scenes.led_with_model(director, model)
        return {"task": task, "scene": scene, "director": director}
    if agent is None:
        raise ConfigError(
            "who shall do it? Give --agent NAME (see `rollout agents`), --scene FILE or --role NAME=AGENT"
        )
    return {"agent": agent_named(agent, default_registry()), "model": model}


def _task(named: str | None) -> Path | None:
    """A task's folder; `demo` is the one that ships, unless there is a folder of that name."""
    if named == "demo" and not Path(named).exists():
        from orchestrator.tasks import demo_task

        return demo_task()
    return Path(named) if named is not None else None


def agent_named(named: str, registry: Registry) -> AgentConfig:
    """An agent by its name, or from a manifest of the user's own."""
    from orchestrator.registry import check_agent, load_manifest

    if named.endswith(".toml"):
        sys.path.insert(0, str(Path(named).resolve().parent))  # as for a script: its module may lie beside it
        return check_agent(load_manifest(named))
    return registry.get(named)


def _variables(given: Sequence[str]) -> dict[str, str]:
    """`K=V` as given; `K` with the value that it has here."""
    variables = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not name or (not equals and name not in os.environ):
            raise ConfigError(f"--env {one}: give NAME=VALUE, or the NAME of a variable that is set here")
        variables[name] = value if equals else os.environ[name]
    return variables


def _upstream(model: str, url: str | None, apis: Sequence[str], key_env: str | None) -> Any:
    """A server of the user's own, which serves every model that a role names; None: the provider, by its name."""
    if url is None:
        if apis or key_env:
            raise ConfigError("--upstream-api and --upstream-key-env belong to --upstream-url, which is not given")
        return None
    if key_env and key_env not in os.environ:
        raise ConfigError(f"--upstream-key-env {key_env}: no such variable is set")
    from orchestrator.gateway.upstream import Upstream

    # The choices of the option are the wire formats, and are checked once more there.
    spoken: Any = apis or ("openai-chat",)
    key = os.environ[key_env] if key_env else ""
    Upstream(model or "default", url, spoken, key)  # a mistake in them is said once, before there is any role
    return lambda named: Upstream(named or model or "default", url, spoken, key)
