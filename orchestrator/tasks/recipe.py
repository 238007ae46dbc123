"""What a task's Dockerfile says, for a sandbox that builds no image.

Files that COPY and ADD bring, ENV and WORKDIR can be had without a build; RUN, services and other images cannot, and
each such line is listed, so that a result can say what its environment lacked. Only the last build stage counts, as
in the image that Docker would make of it.
"""

from __future__ import annotations

import json
import posixpath
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import attrs

from orchestrator.dockerfile import expand, has_heredoc, instructions
from orchestrator.tasks.files import inside, read_text
from orchestrator.tasks.task import Copied, Recipe
from states.errors import TaskError

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""What `$PATH` stands for in a Dockerfile whose base image we do not look into."""

_QUIET = frozenset({"LABEL", "MAINTAINER", "EXPOSE", "STOPSIGNAL", "VOLUME", "SHELL", "ONBUILD", "ARG"})
"""Instructions without an effect on what a command in the sandbox sees."""

_DOLLAR = "\0"  # what an escaped dollar is while words are split, which would take its backslash away


@attrs.define(eq=False)
class _Stage:
    """The stage that is being read."""

    base: str
    cwd: str
    workdir: str | None = None
    env: dict[str, str] = attrs.Factory(dict)
    args: dict[str, str] = attrs.Factory(dict)
    copied: list[Copied] = attrs.Factory(list)
    skipped: list[str] = attrs.Factory(list)

    def at(self, target: str) -> str:
        """Where a relative path of this stage leads."""
        return posixpath.normpath(posixpath.join(self.workdir or self.cwd, target))

    def child(self) -> _Stage:
        """A stage that starts from this one: it has all that this one has, but its arguments."""
        return _Stage(self.base, self.cwd, self.workdir, dict(self.env), {}, list(self.copied), list(self.skipped))

    def expand(self, text: str) -> str:
        """`text` with `$NAME` and `${NAME:-default}` replaced; an unknown name is empty, as in Docker."""
        known = {"PATH": DEFAULT_PATH, **self.args, **self.env}
        return expand(text, known).replace(_DOLLAR, "$")


def read_recipe(dockerfile: Path, root: Path, cwd: str) -> Recipe:
    """Read a Dockerfile. `cwd` is where relative targets go as long as no WORKDIR was said.

    Raises:
        TaskError: A line is no instruction, or COPY names a file that is not there or lies outside; with its line.
    """
    stage = _Stage("", cwd)
    stages: dict[str, _Stage] = {}
    arguments: dict[str, str] = {}
    for found in instructions(read_text(dockerfile, root), dockerfile):
        line, word, rest = found.line, found.word, found.rest
        where = f"{dockerfile}:{line}"
        match word:
            case "FROM":
                stage = _next_stage(_Stage("", cwd, args=arguments).expand(rest), stages, where, cwd)
            case "ARG":
                name, _, default = rest.partition("=")
                known = stage.args if stage.base else arguments
                known[name.strip()] = stage.expand(_unquoted(default)) or arguments.get(name.strip(), "")
            case "ENV":
                stage.env.update(_pairs(rest, stage, where))
            case "WORKDIR":
                stage.workdir = stage.at(stage.expand(_unquoted(rest)))
            case "COPY" | "ADD":
                _copy(rest, stage, dockerfile.parent, root, where)
            case _ if word not in _QUIET:
                stage.skipped.append(f"{dockerfile.name}:{line}: {word} {_short(rest)}")
    if (dockerfile.parent / ".dockerignore").exists():
        stage.skipped.append(".dockerignore: not applied")
    if not stage.base:
        raise TaskError(f"{dockerfile}: expected a FROM line")
    return Recipe(stage.base, stage.workdir, tuple(stage.copied), stage.env, tuple(stage.skipped))


def _next_stage(rest: str, stages: dict[str, _Stage], where: str, cwd: str) -> _Stage:
    """The stage that a FROM begins, noted by its name."""
    base, *alias = _words(rest, where) or [""]
    if not base:
        raise TaskError(f"{where}: FROM: expected an image, found {_short(rest)!r}")
    known = stages.get(base.lower())  # names of stages are the same in either case
    stage = known.child() if known else _Stage(base, cwd)
    stages[alias[-1].lower() if alias else str(len(stages))] = stage
    return stage


# --- words ---------------------------------------------------------------------------------------------------


def _words(rest: str, where: str) -> list[str]:
    """The arguments, in JSON form or in words, without `--flags`."""
    if rest.startswith("["):
        try:
            words = json.loads(rest)
        except json.JSONDecodeError as error:
            raise TaskError(f"{where}: not a valid JSON list: {_short(rest)}") from error
    else:
        try:
            words = shlex.split(rest.replace("\\$", _DOLLAR))
        except ValueError as error:
            raise TaskError(f"{where}: {error}: {_short(rest)}") from error
    return [word for word in map(str, words) if not word.startswith("--")]


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _pairs(rest: str, stage: _Stage, where: str) -> Mapping[str, str]:
    """`A=1 B="x y"`, or the old form `A the rest`."""
    name, _, value = rest.partition(" ")
    if "=" not in name:
        return {name: stage.expand(value.strip())}
    pairs = (word.partition("=") for word in _words(rest, where))
    return {name: stage.expand(value) for name, _, value in pairs}


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


# --- COPY ----------------------------------------------------------------------------------------------------


def _copy(rest: str, stage: _Stage, context: Path, root: Path, where: str) -> None:
    """Note the files of one COPY or ADD; what does not come from `environment/` is only listed."""
    name = f"{Path(where).name}: COPY {_short(rest)}"
    words = [stage.expand(word) for word in _words(_without_flags(rest), where)]
    if "--from=" in rest or has_heredoc(rest) or any("://" in word for word in words):
        stage.skipped.append(name)
        return
    if len(words) < 2:
        raise TaskError(f"{where}: COPY needs a source and a target, found {_short(rest)!r}")
    *sources, last = words
    target = stage.at(last)
    found = [path for source in sources for path in _matches(source, context, root, where)]
    into = last.endswith(("/", "/.")) or last in {".", ".."} or len(found) > 1 or target in {stage.at("."), "/"}
    stage.copied += [Copied(path, target, into and path.is_file()) for path in found]
    if "--chown=" in rest or "--chmod=" in rest:
        stage.skipped.append(f"{name} (the files are copied, their owner and mode are not set)")


def _without_flags(rest: str) -> str:
    return re.sub(r"^(?:--\S+\s+)+", "", rest)


def _matches(source: str, context: Path, root: Path, where: str) -> list[Path]:
    """The files and folders of the build context that `source` names; it may be a pattern."""
    relative = posixpath.normpath(source.lstrip("/"))
    if relative.startswith(".."):
        raise TaskError(f"{where}: COPY {_short(source)}: expected a path inside environment/")
    pattern = any(letter in relative for letter in "*?[")
    try:
        found = sorted(context.glob(relative)) if pattern else [context / relative]
        if not found or not inside(found[0], root).exists():
            raise TaskError(f"{where}: COPY {_short(source)}: environment/ has no such file")
        return [inside(path, root) for path in found]
    except (OSError, ValueError, NotImplementedError) as error:
        raise TaskError(f"{where}: COPY {_short(source)}: no path that can be: {error}"[:400]) from error
