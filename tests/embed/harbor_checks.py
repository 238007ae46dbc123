"""Run by the interpreter of Harbor's environment: what Harbor's own code says of ours, as one JSON document.

python harbor_checks.py TRAJECTORY...
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import anyio
import msgspec
from harbor.agents.options import AgentOptions
from harbor.models.agent.context import AgentContext
from harbor.models.task.config import TaskConfig
from harbor.models.task.task import Task
from harbor.utils.trajectory_validator import TrajectoryValidator
from pydantic import BaseModel

from orchestrator.embed.harbor import OrchestratorAgent
from orchestrator.sandboxes.local import LocalSandbox
from orchestrator.tasks import demo_task
from orchestrator.tasks.schema import Section, TaskToml

MISTAKES: dict[str, dict[str, Any]] = {
    "nobody": {},
    "unknown agent": {"agent": "no-such-agent"},
    "unknown option": {"agnet": "minimal"},
    "agent and roles": {"agent": "minimal", "roles": {"coder": "minimal"}},
    "no scene": {"scene": "no/such/rollout.toml"},
    "bad limit": {"agent": "minimal", "turn_sec": -1},
}


def complaint(trajectory: Path) -> list[str]:
    validator = TrajectoryValidator()
    validator.validate(trajectory)
    return validator.errors


def refused(kwargs: dict[str, Any], env: dict[str, str] | None = None) -> str:
    try:
        OrchestratorAgent.preflight(kwargs, env)
    except ValueError as error:
        return str(error)
    return ""


def missing(theirs: type[BaseModel], ours: type[Section], at: str = "") -> list[str]:
    """Keys that Harbor defines and our schema does not know."""
    known = {field.encode_name: field.type for field in msgspec.structs.fields(ours)}
    found = []
    for name, field in theirs.model_fields.items():
        if name not in known:
            found.append(at + name)
            continue
        inner = next((t for t in (field.annotation, *get_args(field.annotation)) if _is(t, BaseModel)), None)
        section = next((t for t in (known[name], *get_args(known[name])) if _is(t, Section)), None)
        if inner and section:
            found += missing(inner, section, f"{at}{name}.")
    return found


def _is(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


async def during(folder: Path) -> list[str]:
    """The states that Harbor's context named whenever a command ran in its environment."""
    sandbox = LocalSandbox(name=f"harbor-{folder.name}", root=folder / "sandbox", network="none")
    context, seen = AgentContext(), []

    class Environment:
        """As much of one as a rollout uses."""

        async def exec(self, command: str, timeout_sec: float | None = None) -> Any:
            seen.append((context.metadata or {}).get("state", ""))
            return await shell.exec(command, timeout_sec=timeout_sec)

        async def upload_file(self, source: Path, target: str) -> None:
            await shell.write_file(target, await anyio.Path(source).read_bytes())

        async def download_file(self, source: str, target: Path) -> None:
            await anyio.Path(target).write_bytes(await shell.read_file(source))

    await sandbox.start()
    shell = sandbox.handle("main", trusted=True)
    await shell.open()
    try:
        agent = OrchestratorAgent(logs_dir=folder / "logs", agent="scripted")
        agent.logs_dir.mkdir()
        await agent.run("Add up the numbers.", Environment(), context)
    finally:
        await sandbox.stop()
    return list(dict.fromkeys(seen))


def play() -> list[str]:
    with tempfile.TemporaryDirectory(prefix="harbor-during-") as folder:
        return asyncio.run(during(Path(folder)))


document = {
    "during": play(),
    "trajectories": {path: complaint(Path(path)) for path in sys.argv[1:]},
    "refused": {name: refused(kwargs) for name, kwargs in MISTAKES.items()},
    "key by --ae": refused({"agent": "minimal"}, {"OPENAI_API_KEY": "x"}),
    "accepted": refused({"agent": "minimal", "max_tokens": 1000}, {"TOKEN": "x"}),
    "missing keys": missing(TaskConfig, TaskToml),
    "demo": Task(demo_task()).name,
    "options": sorted(OrchestratorAgent.options_schema()["properties"]),
    "options of Harbor": sorted(AgentOptions.model_json_schema().get("properties", {})),
}
sys.stdout.write(json.dumps(document))
