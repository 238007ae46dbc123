"""Loading a task: Harbor's folders and BenchFlow's `task.md` packages, checked to the last key.

A folder with a `task.md` is a BenchFlow package, one with a `task.toml` a Harbor task; where both stand, `task.md`
wins, as in BenchFlow. Whatever is wrong is a `TaskError` that names the file, the key, what was expected and what was
found; a feature that would change what the reward means (several steps, a verifier in a sandbox of its own, a model
as the judge) is refused; one that only takes something from the task (a user, a health check) is loaded with a note.
"""

from __future__ import annotations

import difflib
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from orchestrator.tasks import documents, files, recipe, schema
from orchestrator.tasks.task import Copied, Limits, Recipe, Solution, Task, Verification
from states.errors import TaskError

DEFAULT_CWD = "/app"
"""Where a relative COPY goes in a task that names no WORKDIR; the `cwd` of every sandbox unless told otherwise."""

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_HEADING = re.compile(r"^##\s+(prompt|role:[\w.-]+|scene:[\w.-]+|user-persona)\s*$", re.IGNORECASE | re.MULTILINE)
_ESCAPED = re.compile(r"^\\(##\s+(?:prompt|role:|scene:|user-persona))", re.IGNORECASE | re.MULTILINE)
_CANARY = re.compile(r"(?:<!--.*canary.*-->|#.*canary.*)", re.IGNORECASE)
_SIZES = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}


def load_task(path: Path | str) -> Task:
    """Load the task in the folder `path`.

    Raises:
        TaskError: There is no task, or it is malformed or asks for what cannot be given; says which file and key.

    >>> from orchestrator.tasks import demo_task
    >>> load_task(demo_task()).verification.command
    '/tests/test.sh'
    """
    root = _root(Path(path))
    if (root / "task.md").exists():
        return _benchflow(root)
    if (root / "task.toml").exists():
        return _harbor(root)
    raise TaskError(f"{root}: no task: expected a task.toml (and instruction.md) or a task.md in this folder")


def load_tasks(path: Path | str) -> tuple[Task, ...]:
    """Load one task, or every task in the folder `path`, by name.

    Raises:
        TaskError: As `load_task`, one line for each task that is malformed; no task is there; two have one name.
    """
    root = _root(Path(path))
    if is_task(root):
        return (load_task(root),)
    tasks: dict[str, Task] = {}
    problems: list[str] = []
    for folder in sorted(child for child in root.iterdir() if child.is_dir() and is_task(child)):
        try:
            task = load_task(folder)
        except TaskError as error:
            problems.append(str(error))
            continue
        if task.name in tasks:
            problems.append(f"{folder}: the name {task.name!r} is taken by {tasks[task.name].path}; rename one")
        tasks[task.name] = task
    if problems:
        raise TaskError("\n".join(problems))
    if not tasks:
        raise TaskError(f"{root}: no task: expected a task.toml or a task.md here, or in folders one level below")
    return tuple(tasks.values())


def is_task(folder: Path) -> bool:
    """Whether `folder` looks like a task of either format."""
    return (folder / "task.toml").exists() or (folder / "task.md").exists()


def _root(path: Path) -> Path:
    try:
        root = path.expanduser().resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise TaskError(f"{path}: expected the folder of a task, found nothing there") from error
    if not root.is_dir():
        raise TaskError(f"{path}: expected the folder of a task, found a file")
    return root


# --- the two formats -----------------------------------------------------------------------------------------


def _harbor(root: Path) -> Task:
    path = root / "task.toml"
    document = files.read_text(path, root)
    config = documents.parse_toml(document, path, schema.TaskToml)
    sections = (config.verifier, config.environment, config.solution)
    source = _Source(path, root, "harbor", config, *sections, lines=documents.toml_lines(document))
    _refuse(source)  # before what such a task has elsewhere is missed here
    text = files.read_text(root / "instruction.md", root)
    return _task(source, _without_canary(text), root / "instruction.md", {})


def _benchflow(root: Path) -> Task:
    path = root / "task.md"
    text, body = documents.front_matter(files.read_text(path, root), path)
    config = documents.parse_yaml(text, path, schema.TaskMd, first_line=2)
    for today, before in (("oracle", "solution"), ("sandbox", "environment")):
        if getattr(config, today) is not None and getattr(config, before) is not None:
            raise TaskError(f"{path}: both {today} and {before} are set, which are the same; keep {today}")
    paths = {
        key: value
        for key, value in (("verifier", config.verifier), ("oracle", config.oracle))
        if isinstance(value, str)
    }
    for key, name in paths.items():
        if posixpath.normpath(name).startswith(("/", "..")):
            raise TaskError(f"{path}: {key}: expected a folder inside the task, found {name!r}")
    source = _Source(
        path,
        root,
        "benchflow",
        config,
        config.verifier if isinstance(config.verifier, schema.Verifier) else schema.Verifier(),
        config.sandbox or config.environment or schema.Environment(),
        config.oracle if isinstance(config.oracle, schema.Solution) else config.solution or schema.Solution(),
        verifier_folder=paths.get("verifier", ""),
        solution_folder=paths.get("oracle", ""),
        name=config.name or "",
        image=config.image,
        lines=documents.yaml_lines(text, path, first_line=2),
    )
    _refuse(source)
    prompts = _prompts(body, path, root)
    extra = {key: getattr(config, key) for key in ("agents", "scenes", "user", "benchflow", "profile", "profiles")}
    task = _task(source, prompts.pop("prompt"), path, extra | {"prompts": prompts})
    return attrs.evolve(task, notes=(*task.notes, *_for_nobody(prompts, config, root)))


@attrs.frozen
class _Source:
    """The sections of one task file, whatever its format calls them."""

    path: Path
    root: Path
    format: Any
    config: schema.Common
    verifier: schema.Verifier
    environment: schema.Environment
    solution: schema.Solution
    verifier_folder: str = ""
    solution_folder: str = ""
    name: str = ""
    image: str | None = None
    lines: Mapping[str, int] = attrs.field(factory=dict)

    def at(self, key: str) -> str:
        """`task.toml:12: cpus`: where a key stands, be it written out or by its last name."""
        table = "sandbox" if "sandbox" in self.lines else "environment"
        dotted = next((known for known in (key, f"{table}.{key}") if known in self.lines), key)
        return f"{self.path}{documents.line_of(dotted, self.lines)}: {key}"

    def folder(self, named: str, *usual: str) -> Path | None:
        """The folder that the file names, or the first usual one that is there, or None."""
        for name in (named,) if named else usual:
            path = self.root / name
            if path.is_dir():
                return files.inside(path, self.root)
        if named:
            raise TaskError(f"{self.path}: expected a folder {named} in the task, found none")
        return None


def _task(source: _Source, instruction: str, written_in: Path, extra: Mapping[str, Any]) -> Task:
    """A task from its sections: what both formats have in common."""
    if not instruction.strip():
        raise TaskError(f"{written_in}: the instruction is empty; expected what the agent shall do")
    root, environment = source.root, source.environment
    solution = _solution(source)
    verification = _verification(source)
    folder = source.folder("", "environment")
    dockerfile = folder / "Dockerfile" if folder and (folder / "Dockerfile").exists() else None
    read = recipe.read_recipe(dockerfile, root, environment.workdir or DEFAULT_CWD) if dockerfile else Recipe()
    limits = _limits(source)
    _check_storage(source, limits, folder, read)
    parts = [written_in, source.path, verification.folder, root / "prompts"]
    parts += [part for part in (folder, solution.folder if solution else None) if part]
    package = source.config.task
    return Task(
        name=package.name if package else source.name or root.name,
        path=root,
        format=source.format,
        instruction=instruction,
        digest=files.digest([part for part in parts if part.exists()], root),
        verification=verification,
        solution=solution,
        environment=folder,
        dockerfile=dockerfile,
        docker_image=environment.docker_image or environment.image or source.image,
        recipe=read,
        env={**read.env, **_env(environment.env, source, "environment")},
        workdir=_absolute(environment.workdir, source) or read.workdir,
        limits=limits,
        network=_network(source),
        allowed_hosts=tuple(environment.allowed_hosts or ()),
        agent_timeout_sec=_finite(source.config.agent.timeout_sec, source, "agent.timeout_sec"),
        metadata=documents.plain(source.config.metadata),
        extra=documents.plain({key: value for key, value in ({**_unread(source), **extra}).items() if value}),
        notes=_notes(source, folder),
    )


# --- parts of a task -----------------------------------------------------------------------------------------


def _verification(source: _Source) -> Verification:
    folder = source.folder(source.verifier_folder, *_either(source, "verifier", "tests"))
    if folder is None:
        raise TaskError(f"{source.root}: no tests: expected tests/test.sh{_or(source, 'verifier/test.sh')}")
    document = folder / "verifier.md"
    command = _strategy(document, source.root) if source.format == "benchflow" and document.exists() else None
    if command is None:
        script = folder / "test.sh"
        if not files.inside(script, source.root).is_file():
            raise TaskError(f"{script}: missing; expected the script that writes the reward")
        command = "/tests/test.sh"
    return Verification(
        folder=folder,
        command=command,
        timeout_sec=_finite(source.verifier.timeout_sec, source, "verifier.timeout_sec") or 600.0,
        env=_env(source.verifier.env, source, "verifier"),
        range=_range(source),
    )


def _strategy(document: Path, root: Path) -> str:
    """The command of a `verifier.md`: its script strategy, run in the verifier's folder."""
    text, _ = documents.front_matter(files.read_text(document, root), document)
    verifier = documents.parse_yaml(text, document, schema.VerifierMd, first_line=2).verifier
    name = verifier.default_strategy or next(iter(verifier.strategies), "")
    strategy = verifier.strategies.get(name)
    if strategy is None:
        known = ", ".join(verifier.strategies) or "none"
        raise TaskError(f"{document}: verifier.default_strategy: expected one of {known}, found {name!r}")
    if strategy.type != "script":
        raise TaskError(f"{document}: verifier.strategies.{name}.type: only script is supported, found {strategy.type}")
    if not (strategy.command or "").strip():
        raise TaskError(
            f"{document}: verifier.strategies.{name}.command: missing; expected a command such as ./test.sh"
        )
    return f"cd /tests && {strategy.command}"


def _solution(source: _Source) -> Solution | None:
    folder = source.folder(source.solution_folder, *_either(source, "oracle", "solution"))
    if folder is None or not files.inside(folder / "solve.sh", source.root).is_file():
        return None
    timeout = _finite(source.solution.timeout_sec, source, "solution.timeout_sec")
    return Solution(folder, _env(source.solution.env, source, "solution"), timeout)


def _limits(source: _Source) -> Limits:
    environment = source.environment
    return Limits(
        cpus=_finite(environment.cpus, source, "cpus"),
        memory_mb=_size(environment.memory_mb, environment.memory, source, "memory"),
        storage_mb=_size(environment.storage_mb, environment.storage, source, "storage"),
        gpus=environment.gpus,
        build_timeout_sec=_finite(environment.build_timeout_sec, source, "build_timeout_sec") or 600.0,
    )


def _check_storage(source: _Source, limits: Limits, folder: Path | None, read: Recipe) -> None:
    """A task's own files have to fit beside an agent's work, or every agent is stopped, whatever it does."""
    if limits.storage_mb is None or folder is None or (folder / ".dockerignore").exists():
        return  # what is ignored of the files is known to who builds the image
    copied = read.copied if read.base is not None else (Copied(folder, DEFAULT_CWD),)
    sizes = {target: size for one in copied for target, size in _brought(one)}
    if (brought := sum(sizes.values())) >= limits.storage_mb << 20:
        raise TaskError(
            f"{source.at('storage_mb')}: the task's own files take {brought / (1 << 20):.1f} MB of the "
            f"{limits.storage_mb} MB that it allows, so that every agent would be over the limit; allow more"
        )


def _brought(copied: Copied) -> Iterator[tuple[str, int]]:
    """Where each file of a COPY ends up, and its bytes; a second one at the same place takes the first's."""
    if not copied.source.is_dir():
        name = posixpath.join(copied.target, copied.source.name) if copied.into else copied.target
        yield name, copied.source.stat().st_size
        return
    for place, _, names in os.walk(copied.source):
        for file in (Path(place, name) for name in names):
            yield posixpath.join(copied.target, file.relative_to(copied.source)), file.lstat().st_size


def _size(megabytes: int | None, text: str | None, source: _Source, key: str) -> int | None:
    """`memory_mb = 2048`, or the older `memory = "2G"`."""
    if text is None:
        return megabytes
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT])[Bb]?\s*", text, re.IGNORECASE)
    if match is None:
        raise TaskError(f"{source.at(key)}: expected a size such as '512M' or '2G', found {text[:60]!r}")
    size = max(1, int(float(match[1]) * _SIZES[match[2].upper()]))
    if megabytes not in {None, size}:
        raise TaskError(f"{source.at(key)} = {text!r} and {key}_mb = {megabytes} disagree; keep {key}_mb")
    return size


def _network(source: _Source) -> Any:
    """`network_mode`, or what the older `allow_internet` meant."""
    environment = source.environment
    mode = environment.network_mode
    if mode is None and environment.allow_internet is not None:
        mode = "public" if environment.allow_internet else "no-network"
    if environment.allowed_hosts and mode != "allowlist":
        raise TaskError(f'{source.at("allowed_hosts")}: expected network_mode = "allowlist" beside it, found {mode!r}')
    return mode


def _range(source: _Source) -> tuple[float, float] | None:
    declared = source.verifier.reward_range
    if declared is not None and (declared[0] > 0 or declared[1] < 1):
        wanted = "[low, high] with low <= 0 and high >= 1"
        raise TaskError(f"{source.at('verifier.reward_range')}: expected {wanted}, found {list(declared)}")
    return declared


def _env(env: Mapping[str, str], source: _Source, where: str) -> dict[str, str]:
    for name, value in env.items():
        if not _ENV_NAME.fullmatch(name) or "\0" in value:
            raise TaskError(f"{source.at(f'{where}.env')}: expected names of variables, found {name!r}")
    return dict(env)


def _finite(value: float | None, source: _Source, key: str) -> float | None:
    if value is not None and not value < float("inf"):
        raise TaskError(f"{source.at(key)}: expected a finite number, found {value}")
    return value


def _absolute(workdir: str | None, source: _Source) -> str | None:
    if workdir is not None and not workdir.startswith("/"):
        raise TaskError(f"{source.at('workdir')}: expected an absolute path, found {workdir!r}")
    return posixpath.normpath(workdir) if workdir else None


def _either(source: _Source, native: str, split: str) -> tuple[str, ...]:
    return (native, split) if source.format == "benchflow" else (split,)


def _or(source: _Source, native: str) -> str:
    return f" or {native}" if source.format == "benchflow" else ""


# --- prompts -------------------------------------------------------------------------------------------------


def _without_canary(text: str) -> str:
    """The instruction without the marker lines at its top, by which benchmarks are found in training data."""
    lines = text.split("\n")
    while lines and (not lines[0].strip() or _CANARY.fullmatch(lines[0].strip())):
        lines.pop(0)
    return "\n".join(lines)


def _prompts(body: str, path: Path, root: Path) -> dict[str, str]:
    """The sections of a `task.md`: `prompt`, and those of roles and scenes, which may lie in `prompts/` instead."""
    parts = _HEADING.split(body)
    prompts = {"prompt": parts[0]}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        kind, _, name = heading.partition(":")
        key = f"{kind.lower()}:{name}" if name else kind.lower()
        if key in prompts and key != "prompt":
            raise TaskError(f"{path}: the section '## {heading}' is there twice; keep one")
        prompts[key] = text
    if sum(heading.lower() == "prompt" for heading in parts[1::2]) > 1:
        raise TaskError(f"{path}: the section '## prompt' is there twice; keep one")
    prompts = {key: _ESCAPED.sub(r"\1", text).strip() for key, text in prompts.items()}
    prompts["prompt"] = _without_canary(prompts["prompt"])
    for file in sorted((root / "prompts").glob("*.md")):
        prompts[file.stem.replace(".", ":", 1)] = files.read_text(file, root).strip()
    return prompts


def _for_nobody(prompts: Mapping[str, str], config: schema.TaskMd, root: Path) -> list[str]:
    """Sections that name a role or a scene which the task does not have: nobody is ever asked them, as a sentence."""
    roles = config.agents.get("roles")
    scenes = [one.get("name") if isinstance(one, Mapping) else None for one in config.scenes]
    known = [f"role:{name}" for name in (roles if isinstance(roles, Mapping) else ())]
    known += [f"scene:{name or f'scene-{index}'}" for index, name in enumerate(scenes)]
    lines = files.read_text(root / "task.md", root).split("\n")
    notes = []
    for key in (key for key in prompts if ":" in key and key not in known):
        file = f"prompts/{key.replace(':', '.', 1)}.md"
        heading = next((n for n, line in enumerate(lines, 1) if _HEADING.match(line) and line.split()[1] == key), 0)
        where = file if (root / file).exists() else f"task.md:{heading}: ## {key}"
        near = difflib.get_close_matches(key, known, 1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(known) or 'none'}"
        notes.append(f"{where}: the task has no {key.partition(':')[0]} of that name, so nobody is asked this; {hint}")
    return notes


# --- what is refused, and what is only said ------------------------------------------------------------------


def _refuse(source: _Source) -> None:
    """Features without which the reward would not mean what the task's author meant."""
    verifier, environment = source.verifier, source.environment
    separate = "separate" in {verifier.environment_mode, verifier.sandbox_mode}
    refused = {
        "steps": (source.config.steps, "tasks of several steps"),
        "os": (environment.os.lower() != "linux", f"sandboxes with {environment.os}"),
        "verifier.type": (verifier.type != "test-script", "a verifier that asks a model"),
        "verifier.environment": (
            separate or verifier.environment is not None or verifier.sandbox is not None,
            "a verifier in a sandbox of its own",
        ),
        "verifier.service": (verifier.service != "main", "a verifier in another service"),
        "verifier.collect": (verifier.collect, "commands between the agent and the verifier"),
        "environment.setup_commands": (environment.setup_commands, "commands before the agent"),
    }
    if (source.root / "trajectory.json").exists():
        raise TaskError(
            f"{source.root / 'trajectory.json'}: an agent cannot be given a past here; remove it to do without"
        )
    for key, (asked, what) in refused.items():
        if asked:
            raise TaskError(f"{source.at(key)}: {what} cannot be run here; expected a task without")


def _unread(source: _Source) -> dict[str, Any]:
    """Sections and keys which the format defines and nothing here acts on."""
    environment, verifier, agent = source.environment, source.verifier, source.config.agent
    return {
        "artifacts": source.config.artifacts,
        "mcp_servers": environment.mcp_servers,
        "healthcheck": environment.healthcheck,
        "skills_dir": environment.skills_dir,
        "gpu_types": environment.gpu_types,
        "tpu": environment.tpu,
        "agent.user": agent.user,
        "agent.prompt_prefix": agent.prompt_prefix,
        "agent.network_mode": agent.network_mode,
        "verifier.user": verifier.user,
        "verifier.network_mode": verifier.network_mode,
    }


def _notes(source: _Source, environment: Path | None) -> tuple[str, ...]:
    """What the task asks for and will not get, as sentences."""
    notes = [f"{source.path.name}: {key} is not honoured" for key, value in _unread(source).items() if value]
    config = source.config
    if isinstance(config, schema.TaskMd) and (config.profile or config.profiles):
        notes.append(f"{source.path.name}: profile is not expanded; its presets do not apply")
    if isinstance(config, schema.TaskMd) and config.scenes:
        notes += [f"{source.path.name}: {key} is not honoured" for key in _unread_in_scenes(config)]
    if environment is not None:
        notes += [
            f"environment/{file.name}: its services are not started"
            for file in sorted(environment.glob("*compose.y*ml"))
        ]
    return tuple(notes)


def _unread_in_scenes(config: schema.TaskMd) -> list[str]:
    """Keys of roles and scenes that nothing here acts on. Whether the rest fits together is for `scene_of` to say."""
    roles = config.agents.get("roles")
    named = {f"agents.roles.{name}": role for name, role in (roles.items() if isinstance(roles, Mapping) else ())}
    named |= {f"scenes[{index}]": scene for index, scene in enumerate(config.scenes)}
    unread = ("reasoning_effort", "skills_dir")
    tables = {where: one for where, one in named.items() if isinstance(one, Mapping)}
    return [f"{where}.{key}" for where, one in tables.items() for key in unread if one.get(key)]
