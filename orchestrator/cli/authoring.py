"""`agents`, `validate` and `init`: what rollouts are made of, listed, checked, and begun."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.base import cli, json_option, print_json
from orchestrator.cli.options import agent_named
from states.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.config import Role, Scene
    from orchestrator.registry import Registry


@cli.command(short_help="List the agents, or install one.")
@click.option("--install", "wanted", multiple=True, metavar="NAME", help="Install this one now; may be repeated.")
@json_option
def agents(wanted: tuple[str, ...], *, as_json: bool) -> int:
    """The agents that can be named: those that ship, and those of installed packages.

    An agent with packages of its own is installed on first use, into a cache outside your project; --install does
    that beforehand.
    """
    from orchestrator.registry import default_registry

    registry = default_registry()
    if wanted:
        return _install(registry, wanted, as_json=as_json)
    rows = [_agent_row(registry, name) for name in registry.names()]
    if as_json:
        print_json(rows)
        return 0
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        known = ", ".join(row["api"]) or ("no model" if not row["calls_model"] else "not metered")
        click.echo(f"{click.style(row['name'].ljust(width), bold=True)}  {row['protocol']:<15}  {known}")
        click.echo(f"{'':<{width}}  {row['description']}")
        click.echo(f"{'':<{width}}  {click.style(row['status'], dim=True)}")
    return 0


def _agent_row(registry: Registry, name: str) -> dict[str, Any]:
    """What is known of one agent; of one that cannot work, why."""
    from orchestrator.install import installed

    row: dict[str, Any] = {"name": name, "protocol": "", "api": [], "calls_model": True, "description": ""}
    try:
        config = registry.get(name)
    except ConfigError as error:
        return {**row, "status": f"cannot work: {error}"}
    if config.install is None:
        status = "nothing to install"
    else:
        status = "installed" if installed(config) else f"installed on first use, or by: rollout agents --install {name}"
    return {
        **row,
        "protocol": config.protocol,
        "api": list(config.api),
        "calls_model": config.calls_model,
        "description": config.description,
        "status": status,
    }


def _install(registry: Registry, wanted: Sequence[str], *, as_json: bool) -> int:
    import anyio

    from orchestrator.install import ensure_installed

    places = {}
    for config in [registry.get(name) for name in wanted]:
        place = anyio.run(ensure_installed, config, lambda line: click.echo(line, err=True))
        places[config.name] = place.install
        if not as_json:
            click.echo(f"{config.name}: {place.install or 'nothing to install'}")
    if as_json:
        print_json(places)
    return 0


@cli.command(short_help="Check a task, a scene or an agent's manifest.")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def validate(path: Path, *, as_json: bool) -> int:
    """Check a task, a folder of tasks, a rollout.toml, or an agent's manifest (.toml) before anybody runs it.

    What cannot work is an error, and the exit code 1; what is likely to be a surprise is a note. So is an agent of a
    task that is not known here: --role replaces it.
    """
    errors, notes = _findings(path)
    if as_json:
        print_json({"path": str(path), "ok": not errors, "errors": errors, "notes": notes})
    else:
        for error in errors:
            click.echo(f"{click.style('error', fg='red')}  {error}")
        for note in notes:
            click.echo(f"{click.style('note', fg='yellow')}   {note}")
        if not errors:
            click.echo(f"{click.style('ok', fg='green')}     {path}")
    return 1 if errors else 0


def _findings(path: Path) -> tuple[list[str], list[str]]:
    """What cannot work, and what is worth knowing."""
    if path.suffix == ".toml" and path.name != "task.toml":
        try:
            if _is_scene(path):
                return [], _scene_findings(path)
            agent_named(str(path), _nobody())
        except ConfigError as error:
            return [str(error)], []
        return [], []
    from orchestrator.scenes import director_of, scene_of
    from orchestrator.tasks import load_tasks
    from orchestrator.tasks import validate as validate_task

    folder = path.parent if path.name in {"task.toml", "task.md"} else path
    strangers: list[str] = []
    try:
        for task in load_tasks(folder):
            if (scene := scene_of(task)) is not None:
                strangers += _strangers(scene, director_of(task, scene), task.path)
    except ConfigError as error:
        errors = str(error).splitlines()
        return errors, [*strangers, *(finding for finding in validate_task(folder) if finding not in errors)]
    return [], [*strangers, *validate_task(folder)]


def _strangers(scene: Scene, director: object, task: Path) -> list[str]:
    """Roles of a task that are played by an agent of another harness: whoever runs it says by whom instead.

    Raises `ConfigError` for an agent that is known, and cannot work.
    """
    from orchestrator.registry import default_registry

    roles, known = _players_of(scene, director), default_registry().names()
    strange = [role for role in roles if isinstance(role.agent, str) and role.agent not in known]
    _check_players([role for role in roles if role not in strange], task / "task.md")
    return [
        f"{task / 'task.md'}: role {role.name!r}: the agent {role.agent!r} is not known here (see `rollout agents`); "
        f"give another one: rollout run {task} --role {role.name}=AGENT"
        for role in strange
    ]


def _is_scene(path: Path) -> bool:
    """Whether this is a `rollout.toml`, by its name or by what it holds, and not an agent's manifest."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return path.name == "rollout.toml" or any(line.startswith(("[[roles]]", "[[turns]]")) for line in text.splitlines())


def _scene_findings(path: Path) -> list[str]:
    """Check a `rollout.toml`, its agents among it. Raises `ConfigError` for what cannot work."""
    from orchestrator.scenes import load_rollout
    from orchestrator.tasks import load_task

    sys.path.insert(0, str(path.resolve().parent))
    config = load_rollout(path, variables=os.environ)
    _check_players(_players_of(config["scene"], config.get("director")), path)
    if "task" in config:
        load_task(config["task"])
    elif "prompt" not in config and any(turn.prompt is None for turn in config["scene"].turns):
        return [f"{path}: a turn has no prompt and the file names no task; `rollout run` will need one"]
    return []


def _players_of(scene: Scene, director: object) -> list[Role]:
    """All roles, the director's among them."""
    from orchestrator.config import DirectorRole

    return [*scene.roles, *([director.role] if isinstance(director, DirectorRole) else [])]


def _check_players(roles: Sequence[Role], path: Path) -> None:
    """Raise `ConfigError` when a role of the file `path` is played by an agent that there is not."""
    from orchestrator.registry import default_registry

    for role in roles:
        try:
            default_registry().resolve(role.agent)
        except ConfigError as error:
            raise ConfigError(f"{path}: role {role.name!r}: {error}") from error


def _nobody() -> Registry:
    from orchestrator.registry import Registry

    return Registry()


@cli.group(short_help="Write a new task, an agent's manifest, or a scene.")
def init() -> None:
    """Write a new task, the manifest of a new agent, or a scene (a rollout.toml), with comments, to start from."""


@init.command("task")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def init_task(path: Path, *, as_json: bool) -> int:
    """Write a new task into the folder PATH. As it is, `--agent oracle` solves it."""
    from orchestrator.tasks import scaffold_task

    return _written(
        scaffold_task(path), f"rollout validate {path} && rollout run {path} --agent oracle", as_json=as_json
    )


@init.command("agent")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--protocol",
    type=click.Choice(["acp", "session-factory"]),
    default="acp",
    show_default=True,
    help="A program that speaks ACP, or a Python callable.",
)
@json_option
def init_agent(path: Path, *, protocol: str, as_json: bool) -> int:
    """Write an agent's manifest to PATH (a .toml file; for a session factory, a Python module beside it)."""
    from orchestrator.scaffold import scaffold_agent

    files = scaffold_agent(path, protocol)
    model = " --model openai/gpt-5" if protocol == "acp" else ""
    then = f"rollout validate {files[0]} && rollout run demo --agent {files[0]}{model}"
    return _written(files, then, as_json=as_json)


@init.command("scene")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default=Path("rollout.toml"), metavar="[FILE]")
@json_option
def init_scene(path: Path, *, as_json: bool) -> int:
    """Write a scene of two roles to FILE (by default rollout.toml). As it is, it runs without a model."""
    from orchestrator.scaffold import scaffold_scene

    file = scaffold_scene(path)
    return _written([file], f"rollout validate {file} && rollout run demo --scene {file}", as_json=as_json)


def _written(files: Sequence[Path], then: str, *, as_json: bool) -> int:
    if as_json:
        print_json({"written": [str(file) for file in files], "next": then})
    else:
        for file in files:
            click.echo(f"wrote {file}")
        click.echo(f"next: {then}")
    return 0
