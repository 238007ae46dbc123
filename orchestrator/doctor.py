"""What this machine can and cannot do, found out by trying, and how to fix what it cannot.

What the local sandbox needs is its own to say (`orchestrator.sandboxes.local.probe`). Each other check is a function of
a `Machine`, the only way in which it looks at the world, so that a test can take any part away. A check that fails says
in one sentence what is wrong and in another what to do about it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs

from states.errors import OrchestratorError

Status = Literal["ok", "missing", "broken"]
"""`missing`: something optional is not there. `broken`: rollouts in the local sandbox cannot work."""


@attrs.frozen
class Finding:
    """What one check found. `fix` is empty when there is nothing to do."""

    name: str
    status: Status
    says: str
    fix: str = ""


@attrs.frozen
class Ran:
    """What a command printed, and how it ended; code 127 when it could not be started."""

    code: int
    said: str


@attrs.define(eq=False)
class Machine:
    """The machine as checks see it."""

    env: Mapping[str, str] = attrs.field(factory=lambda: os.environ)
    version: tuple[int, ...] = tuple(sys.version_info[:3])

    def which(self, program: str) -> str | None:
        """Where a program is, on this environment's PATH."""
        return shutil.which(program, path=self.env.get("PATH", os.defpath))

    def run(self, *argv: str, seconds: float = 20.0) -> Ran:
        """Run a command to its end."""
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=seconds, check=False, env=dict(self.env), errors="replace"
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return Ran(127, str(error))
        return Ran(done.returncode, (done.stdout + done.stderr).strip())

    def uv(self) -> str | None:
        """The program uv, from the PATH or beside the Python that runs us."""
        beside = Path(sys.executable).parent / "uv"
        return self.which("uv") or (str(beside) if beside.exists() else None)

    def pythons(self, oldest: tuple[int, int]) -> list[str]:
        """Other interpreters on the PATH that are new enough, and start."""
        names = [f"python{oldest[0]}.{minor}" for minor in range(oldest[1], oldest[1] + 5)]
        return [name for name in names if self.which(name) and self.run(name, "-c", "").code == 0]

    def has_module(self, name: str) -> bool:
        """Whether a module could be imported. Imports nothing but the packages above it."""
        from importlib.util import find_spec

        try:
            return find_spec(name) is not None
        except (ImportError, ValueError):
            return False

    def sandbox(self) -> list[Finding]:
        """What the local sandbox needs, tried: Linux, bubblewrap, namespaces, and which limits hold."""
        from orchestrator.sandboxes.local import probe

        return [
            Finding(
                name=found.name,
                status="ok" if found.ok else "broken" if found.required else "missing",
                says=found.found,
                fix="" if found.ok else found.advice,
            )
            for found in probe()
        ]

    def docker(self) -> tuple[bool, str]:
        """Whether a Docker engine answers here, and what it or its absence says."""
        import anyio

        from orchestrator.sandboxes.docker import probe

        try:
            return True, anyio.run(probe)
        except OrchestratorError as error:
            return False, str(error)

    def cache(self) -> Path:
        """Where agents are installed."""
        from orchestrator.install import cache_root

        return cache_root()

    def writable(self, folder: Path) -> str:
        """Why nothing can be written there, having tried; empty when it can."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return ""
        except OSError as error:
            return error.strerror or str(error)

    def free_mb(self, folder: Path) -> int:
        """Free space there, in MiB."""
        return shutil.disk_usage(folder).free >> 20


# --- the checks ----------------------------------------------------------------------------------------------


def check_python(machine: Machine) -> Finding:
    """The Python that runs us."""
    said = ".".join(map(str, machine.version))
    if machine.version < (3, 11):
        return Finding("python", "broken", f"this is Python {said}", "install Python 3.11 or newer and reinstall there")
    return Finding("python", "ok", f"Python {said}")


def check_cache(machine: Machine) -> Finding:
    """Agents are installed into one cache."""
    folder = machine.cache()
    if why := machine.writable(folder):
        return Finding("cache", "broken", f"{folder}: {why}", "set ROLLOUT_CACHE to a folder that can be written")
    free = machine.free_mb(folder)
    if free < 2048:
        return Finding(
            "cache", "missing", f"{folder} has {free} MiB left", "free some space: an agent takes up to 2 GiB"
        )
    return Finding("cache", "ok", f"{folder}, {free >> 10} GiB free")


def check_newer_python(machine: Machine) -> Finding:
    """Some agents need a newer Python than ours may be; uv brings one, too."""
    if machine.version >= (3, 12):
        return Finding("newer python", "ok", "the Python that runs this is new enough for every agent")
    if found := machine.pythons((3, 12)):
        return Finding("newer python", "ok", f"{found[0]}, for agents that need 3.12 or newer")
    if machine.uv():
        return Finding("newer python", "ok", "uv brings one where an agent needs it")
    return Finding(
        "newer python",
        "missing",
        "no Python 3.12 or newer and no uv: fast-agent, deepagents and omnigent cannot be installed",
        "pip install uv",
    )


def check_npm(machine: Machine) -> Finding:
    """Agents from npm bring their own Node, but somebody has to fetch it."""
    npm = machine.which("npm")
    if npm is None:
        return Finding(
            "npm",
            "missing",
            "there is none: codex-acp, claude-agent-acp and opencode cannot be installed",
            "install Node.js, any version that comes with npm",
        )
    ran = machine.run(npm, "--version")
    if ran.code != 0:
        return Finding("npm", "missing", f"{npm} does not start: {one_line(ran.said)}", "reinstall Node.js")
    return Finding("npm", "ok", f"npm {ran.said.splitlines()[-1]} ({npm})")


EXTRAS: Mapping[str, tuple[str, str]] = {
    "litellm": ("litellm", "models whose wire format is not their agent's, and every other provider"),
    "daytona-sdk": ("daytona", "the Daytona sandbox"),
    "docker": ("aiodocker", "the Docker sandbox"),
    "pydantic-ai": ("pydantic_ai", "the agent pydantic-ai"),
    "mini-swe-agent": ("minisweagent", "the agent mini-swe-agent"),
}
"""Extras of our distribution: the module that shows it is installed, and what it is for."""


def check_extra(machine: Machine, name: str) -> Finding:
    """One optional dependency."""
    module, purpose = EXTRAS[name]
    if machine.has_module(module):
        return Finding(f"extra {name}", "ok", f"installed: {purpose}")
    return Finding(
        f"extra {name}", "missing", f"not installed: {purpose}", f"pip install 'rollout-orchestrator[{name}]'"
    )


def check_docker(machine: Machine) -> Finding:
    """The Docker sandbox wants an engine on this machine."""
    if not machine.has_module(EXTRAS["docker"][0]):
        fix = "pip install 'rollout-orchestrator[docker]'"
        return Finding("docker", "missing", "its extra is not installed, so that no engine was looked for", fix)
    answers, said = machine.docker()
    if answers:
        return Finding("docker", "ok", said)
    return Finding("docker", "missing", said, "start dockerd, or say where it listens with DOCKER_HOST")


def check_daytona(machine: Machine) -> Finding:
    """The Daytona sandbox wants a key of its service; nothing is sent there."""
    if not machine.has_module(EXTRAS["daytona-sdk"][0]):
        fix = "pip install 'rollout-orchestrator[daytona-sdk]'"
        return Finding("daytona", "missing", "its extra is not installed", fix)
    if not machine.env.get("DAYTONA_API_KEY"):
        return Finding("daytona", "missing", "DAYTONA_API_KEY is not set", "export DAYTONA_API_KEY=...")
    where = machine.env.get("DAYTONA_API_URL") or "the service's own address"
    return Finding("daytona", "ok", f"DAYTONA_API_KEY is set, for {where}; it was not tried")


def check_keys(machine: Machine) -> Finding:
    """Which providers have a key here: their names, never a key."""
    from orchestrator.gateway.upstream import PROVIDERS

    found = [name for name, provider in PROVIDERS.items() if any(machine.env.get(key) for key in provider.keys)]
    if found:
        return Finding("model keys", "ok", f"set for {', '.join(found)}")
    return Finding(
        "model keys",
        "missing",
        "no provider's key is set: only agents without a model, and --upstream-url without a key, can run",
        "export OPENAI_API_KEY=..., ANTHROPIC_API_KEY=... or that of another provider",
    )


CHECKS: tuple[Callable[[Machine], Finding], ...] = (
    check_python,
    check_cache,
    check_newer_python,
    check_npm,
    *(lambda machine, name=name: check_extra(machine, name) for name in EXTRAS),
    check_docker,
    check_daytona,
    check_keys,
)


def examine(machine: Machine | None = None) -> list[Finding]:
    """Every check, in order. Nothing is changed but for the cache's folder, which is made."""
    machine = machine or Machine()
    python, *others = CHECKS
    return [python(machine), *machine.sandbox(), *(check(machine) for check in others)]


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether rollouts in the local sandbox can work; what is merely missing does not count."""
    return all(finding.status != "broken" for finding in findings)


def report(findings: Sequence[Finding], style: Callable[..., str]) -> str:
    """The findings as text."""
    looks: dict[str, dict[str, Any]] = {"ok": {"fg": "green"}, "missing": {"fg": "yellow"}, "broken": {"fg": "red"}}
    lines = []
    for finding in findings:
        mark = style(f"{finding.status:<8}", **looks[finding.status])
        lines.append(f"{mark} {finding.name:<20} {one_line(finding.says)}")
        if finding.fix:
            lines.append(f"{'':<29} fix: {finding.fix}")
    return "\n".join(lines) + "\n"


def one_line(text: str, width: int = 300) -> str:
    """What a program printed, as one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[:width] + " ..."
