"""Hosts in environments of their own: the real packages from PyPI beside ours, made on first use and kept in the cache.

    python = host_python("harbor")   # skips where it cannot be made; fails when ROLLOUT_REQUIRE has `hosts`

An environment is one folder, named after everything that goes into it: another version, another dependency of ours or
another checkout is another folder. Processes (xdist's workers) that want the same one wait for the first to make it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio
import attrs
import pytest
from requirements import missing

from orchestrator.install import _candidates, _find_uv, _probe, cache_root

ROOT = Path(__file__).resolve().parent.parent
MAKE_SEC = 600


@attrs.frozen
class Host:
    """What is installed: requirements, what replaces a pin of theirs that cannot be met, the oldest Python."""

    packages: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    python: str = "3.12"


HOSTS = {
    "harbor": Host(("harbor==0.25.0",), overrides=("certifi",)),  # its floor on certifi is of the day of its release
    "inspect": Host(("inspect-ai==0.3.285", "openai", "anthropic")),  # the bridge serves these clients' formats
    "verifiers": Host(("verifiers==0.4.0",)),
    "benchflow": Host(("benchflow==0.7.11",), overrides=("certifi",)),  # the same floor
    "elsewhere": Host(("--editable", str(ROOT / "tests" / "elsewhere" / "tiny_agent")), python="3.11"),
}


def host_python(name: str) -> Path:
    """The interpreter of the environment of this host, with our package in it; made when it is not there yet."""
    try:
        return _ensured(name)
    except (OSError, subprocess.SubprocessError, LookupError) as error:
        missing("hosts", f"the environment of {name} cannot be made: {error}")


@functools.cache
def _ensured(name: str) -> Path:
    host = HOSTS[name]
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    digest = hashlib.sha256(json.dumps([attrs.asdict(host), ours, str(ROOT)]).encode()).hexdigest()[:12]
    folder = cache_root() / "hosts" / f"{name}-{digest}"
    python = folder / "bin" / "python"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _make(host, folder, python)
            (folder / "complete").touch()
    return python


def _make(host: Host, folder: Path, python: Path) -> None:
    uv = _find_uv()
    if uv is None:
        raise LookupError("uv is not installed")
    _run(uv, "venv", "--quiet", "--no-project", "--python", anyio.run(_base_python, host.python), str(folder))
    overrides = folder / "overrides.txt"
    overrides.write_text("".join(f"{line}\n" for line in host.overrides))
    install = [uv, "pip", "install", "--quiet", "--python", str(python), "--override", str(overrides)]
    _run(*install, *host.packages, "--editable", str(ROOT))


async def _base_python(oldest: str) -> str:
    """A Python that is new enough: the oldest such on this machine, else one that uv brings."""
    wanted = [int(part) for part in oldest.split(".")]
    for candidate in _candidates(oldest):
        found = await _probe(candidate)
        if found and found[0] >= wanted:
            return found[2]
    return f">={oldest}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=MAKE_SEC, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command[:3])} ended with {done.returncode}: {done.stderr[-2000:]}")


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, once in a test session, whichever of xdist's workers comes first."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / name
    with Path(f"{folder}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            folder.mkdir()
            make(folder)
            (folder / "complete").touch()
    assert (folder / "complete").exists(), f"{name} could not be made; see the first test that wanted it"
    return folder


def host_env(python: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The environment for a host's program: without anybody's keys, telemetry or look-ups at start."""
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    clean |= {"HARBOR_TELEMETRY": "off", "LITELLM_LOCAL_MODEL_COST_MAP": "True", **env}
    return {**clean, "PATH": f"{python.parent}{os.pathsep}{clean['PATH']}"}


def host_run(
    python: Path, program: str, *args: str, env: Mapping[str, str], cwd: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a program of a host's environment to its end. One that does not end fails the test with what it printed."""
    argv = [str(python.parent / program), *args]
    try:
        return subprocess.run(
            argv,
            cwd=cwd,
            env=host_env(python, env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = "\n".join((part or b"").decode(errors="replace")[-10_000:] for part in (error.stdout, error.stderr))
        pytest.fail(f"{program} {' '.join(args)[:200]} did not end in {timeout:g} s; it printed:\n{said}")


if __name__ == "__main__":  # make them all beforehand: python tests/hosts.py [NAME...]
    for wanted in sys.argv[1:] or HOSTS:
        sys.stdout.write(f"{_ensured(wanted)}\n")
