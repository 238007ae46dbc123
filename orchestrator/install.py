"""Agents get environments of their own: installed on first use, into one cache outside the tree.

An agent brings a Node or a Python, and hundreds of packages, that have nothing to do with ours, so they never share an
environment with us. Each `Install` gets one folder, `<cache>/agents/<name>-<hash of what is installed>`, which is
complete when its `installed.json` is there: that file is written last, by rename. The folder is built where it will
stay, since a virtual environment names its own path; a lock file beside it lets one process build while others wait,
and what a killed build has left is removed by the next. What went wrong is quoted, and in `<folder>.log`.

The folder is meant to be bound read-only at its own path into a sandbox; `Place.binds` lists what has to be.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import attrs

from orchestrator.registry import AgentConfig, Install, Place, names_placeholder
from states.errors import ConfigError

Progress = Callable[[str], None]
"""Is told what happens, a line at a time."""

AGENTS = Path(__file__).parent / "agents"
ADAPTERS = AGENTS / "adapters"

_MARKER = "installed.json"
_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc")  # every sandbox of ours shows these
_TAIL_LINES = 15
_NEWER_MINORS = 4  # 3.12 and the four after it: an older Python is likelier to have wheels of everything
_PROBE = "import json, sys; print(json.dumps([list(sys.version_info[:2]), sys.base_prefix, sys.executable]))"


def cache_root() -> Path:
    """The cache: `$ROLLOUT_CACHE`, or `rollout-orchestrator` in `$XDG_CACHE_HOME` (by default `~/.cache`)."""
    if own := os.environ.get("ROLLOUT_CACHE"):
        return Path(own).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).absolute() / "rollout-orchestrator"


def install_folder(config: AgentConfig) -> Path:
    """Where the packages of `config` lie, or would lie. Another set of packages is another folder."""
    spec = [attrs.asdict(config.install) if config.install else None, _arch()]
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:12]
    return cache_root() / "agents" / f"{config.name}-{digest}"


def installed(config: AgentConfig) -> Place | None:
    """Where `config` is installed; None when it has to be installed first. Starts nothing, changes nothing."""
    if config.install is None:
        return _place(config, python=_own_python())
    folder = install_folder(config)
    try:
        record = json.loads((folder / _MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    programs = [Path(record[name]) for name in ("python", "node") if record[name]]
    if not all(program.exists() for program in programs):  # the base interpreter has gone: the venv is a dead link
        return None
    return _place(config, folder=folder, **record)


async def ensure_installed(config: AgentConfig, progress: Progress | None = None) -> Place:
    """Where `config` is installed, installing it when it is not: minutes the first time, microseconds later.

    Safe to call from several tasks and processes at once: one installs, the others wait for it.

    Raises:
        ConfigError: a tool or an interpreter that is needed is not on this machine, or the packages do not install;
            the message ends with the tail of the output and the path of the log.
    """
    if (place := installed(config)) is not None:
        return place
    assert config.install is not None
    folder, tell = install_folder(config), progress or (lambda _line: None)
    folder.parent.mkdir(parents=True, exist_ok=True)
    async with locked(Path(f"{folder}.lock"), lambda: tell(f"waiting: another process installs {config.name}")):
        if (place := installed(config)) is not None:
            return place
        tell(f"installing {config.name} into {folder}")
        await anyio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))
        folder.mkdir()
        build = _Build(config.name, config.install, folder, Path(f"{folder}.log"), tell)
        record = await (build.npm() if config.install.kind == "npm" else build.python())
        draft = folder / f"{_MARKER}.draft"
        draft.write_text(json.dumps(record))
        draft.replace(folder / _MARKER)
        tell(f"installed {config.name}")
    place = installed(config)
    if place is None:
        raise ConfigError(
            f"agent {config.name}: what was installed in {folder} lacks its interpreter; see {folder}.log"
        )
    return place


def _place(
    config: AgentConfig, *, folder: Path | None = None, python: str = "", node: str = "", base: str | None = None
) -> Place:
    """The place of an agent, binding no more than its templates need."""
    binds = [str(folder)] if folder else []
    if python and (folder or names_placeholder(config, "python")):
        base = base or sys.base_prefix
        binds += [base, os.path.realpath(base)]
    if names_placeholder(config, "agents"):
        binds.append(str(AGENTS))
    if names_placeholder(config, "adapters"):
        binds.append(str(ADAPTERS))
    binds += [str(Path(bind).expanduser()) for bind in config.binds]
    outside = [path for path in dict.fromkeys(binds) if not path.startswith(tuple(f"{top}/" for top in _SYSTEM))]
    return Place(
        install=str(folder or ""),
        python=python,
        node=node,
        agents=str(AGENTS),
        adapters=str(ADAPTERS),
        arch=_arch(),
        binds=tuple(path for path in outside if path not in _SYSTEM),
    )


def _own_python() -> str:
    """Our own interpreter, outside of the virtual environment that we may run in."""
    return _base_python(sys.base_prefix, sys.version_info[:2], sys.executable)


def _base_python(prefix: str, version: Sequence[int], otherwise: str) -> str:
    program = Path(prefix, "bin", f"python{version[0]}.{version[1]}")
    return str(program) if program.exists() else otherwise


def _arch() -> str:
    machine = platform.machine()
    return {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64"}.get(machine, machine)


@asynccontextmanager
async def locked(path: Path, on_wait: Callable[[], None]) -> AsyncIterator[None]:
    """Hold a file lock against other tasks and processes; the system frees it with us.

    Polled, so that waiting can be cancelled on either backend.
    """
    import fcntl

    with path.open("w") as lock:
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    on_wait()
                    told = True
                await anyio.sleep(0.1)
        yield


@attrs.define(eq=False)
class _Build:
    """One installation into one empty folder."""

    name: str
    install: Install
    folder: Path
    log: Path
    tell: Progress

    async def npm(self) -> dict[str, Any]:
        """Install npm packages, and the Node that runs them as one more: no install script of anybody is run."""
        npm = self._need("npm", "install Node.js, any version that comes with npm")
        packages = [package.replace("${arch}", _arch()) for package in self.install.packages]
        node = ""
        if self.install.node:
            package = f"node-linux-{_arch()}"
            packages.append(f"{package}@{self.install.node}")
            node = str(self.folder / "node_modules" / package / "bin" / "node")
        quiet = ["--no-audit", "--no-fund", "--no-update-notifier", "--ignore-scripts", "--loglevel=http"]
        command = [npm, "install", f"--prefix={self.folder}", *quiet, *packages]
        await self._run(*self._dated(command, "--before"))
        return {"node": node, "python": "", "base": None}

    async def python(self) -> dict[str, Any]:
        """Install Python packages into a virtual environment, compiled, since the sandbox sees it read-only."""
        uv, venv = _find_uv(), self.folder / "venv"
        base = await self._base_interpreter(uv)
        python = str(venv / "bin" / "python")
        if uv is not None:
            command = [uv, "pip", "install", "--python", python, "--compile-bytecode"]
            if self.install.overrides:
                overrides = self.folder / "overrides.txt"
                overrides.write_text("".join(f"{line}\n" for line in self.install.overrides))
                command += ["--override", str(overrides)]
            await self._run([uv, "venv", "--no-project", "--python", base, str(venv)])
            await self._run(*self._dated([*command, *self.install.packages], "--exclude-newer"))
        elif self.install.overrides:
            raise ConfigError(f"agent {self.name}: its packages need overrides, which only uv can do: pip install uv")
        else:
            await self._run([base, "-m", "venv", str(venv)])
            await self._run([python, "-m", "pip", "install", "--no-input", *self.install.packages])
        _, prefix, _ = await _probe(python) or ([], "", "")
        return {"node": "", "python": python, "base": prefix}

    async def _base_interpreter(self, uv: str | None) -> str:
        """A Python that is new enough: the oldest such on this machine, else one that uv brings."""
        oldest = self.install.python or ".".join(map(str, sys.version_info[:2]))
        for candidate in _candidates(oldest):
            found = await _probe(candidate)
            if found and found[0] >= _version(oldest):
                return _base_python(found[1], found[0], found[2])
        if uv is None:
            raise ConfigError(f"agent {self.name}: needs Python {oldest} or newer; install one, or uv, which brings it")
        return f">={oldest}"

    def _dated(self, command: list[str], option: str) -> list[list[str]]:
        """The command as of the manifest's day, so that what it resolves to never changes; else as of today.

        A registry mirror that keeps no dates can serve only the second.
        """
        return [[*command, f"{option}={self.install.as_of}"], command] if self.install.as_of else [command]

    def _need(self, program: str, how: str) -> str:
        if (found := shutil.which(program)) is None:
            raise ConfigError(f"agent {self.name}: needs {program}, which is not on the PATH; {how}")
        return found

    async def _run(self, *attempts: list[str]) -> None:
        """Run these commands until one succeeds."""
        tail: list[str] | None = []
        for command in attempts:
            tail = await self._attempt(command)
            if tail is None:
                return
        quoted = "\n  ".join(tail or [])
        raise ConfigError(
            f"agent {self.name} cannot be installed: {Path(attempts[-1][0]).name} failed; log: {self.log}\n  {quoted}"
        )

    async def _attempt(self, command: list[str]) -> list[str] | None:
        """Run a command, its output line by line to the log and to `tell`: None, or the tail of it when it failed."""
        tail: list[str] = []
        with self.log.open("a", encoding="utf-8") as log:

            def say(line: str) -> None:
                log.write(line + "\n")
                self.tell(line)
                tail[:] = [*tail, line][-_TAIL_LINES:]

            say("$ " + " ".join(command))
            async with await anyio.open_process(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT
            ) as process:
                assert process.stdout is not None
                rest = b""
                async for chunk in process.stdout:
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        say(line.decode(errors="replace").rstrip())
                if rest:
                    say(rest.decode(errors="replace"))
                code = await process.wait()
            if code != 0:
                say(f"(exit code {code})")
        return tail if code != 0 else None


def _version(text: str) -> list[int]:
    return [int(part) for part in text.split(".")[:2]]


def _candidates(oldest: str) -> Iterator[str]:
    """Interpreters that may be there, the oldest that will do first."""
    major, minor = _version(oldest)
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    for name in (f"{major}.{number}" for number in range(minor, minor + 1 + _NEWER_MINORS)):
        if name == ".".join(map(str, sys.version_info[:2])):
            yield sys.executable
        if on_path := shutil.which(f"python{name}"):
            yield on_path
        yield from (str(found) for found in sorted(pyenv.glob(f"{name}.*/bin/python")))


async def _probe(python: str) -> tuple[list[int], str, str] | None:
    """Version, base prefix and path of an interpreter; None when it does not run, as a shim may not."""
    try:
        done = await anyio.run_process([python, "-I", "-c", _PROBE], check=False)
        version, prefix, program = json.loads(done.stdout)
    except (OSError, ValueError):
        return None
    return version, prefix, program


def _find_uv() -> str | None:
    beside_us = Path(sys.executable).parent / "uv"
    return shutil.which("uv") or (str(beside_us) if beside_us.exists() else None)
