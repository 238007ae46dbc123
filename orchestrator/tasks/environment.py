"""Bringing a task's environment into a sandbox that builds no image."""

from __future__ import annotations

import posixpath

import attrs

from orchestrator.tasks.task import Task
from states.errors import SandboxError
from states.ports import Sandbox


@attrs.frozen
class Installed:
    """What was brought in. `missing` says, in sentences, what the task's environment lacks without a build."""

    files: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


async def install(task: Task, sandbox: Sandbox) -> Installed:
    """Upload what the Dockerfile's COPY and ADD lines name to where they say; without a Dockerfile, all to `cwd`.

    RUN lines and services need a build: they are not run, and `missing` lists each of them. A sandbox that runs the
    task's own image has no use for this. What the environment sets (`ENV`) is `task.env`, for every command.

    Raises:
        SandboxError: The sandbox takes no file at a place that the task names; says which line wants it there.
    """
    if task.environment is None:
        return Installed()
    if task.dockerfile is None:
        await sandbox.upload(task.environment, sandbox.cwd)
        return Installed((sandbox.cwd,))
    for copied in task.recipe.copied:
        target = posixpath.join(copied.target, copied.source.name) if copied.into else copied.target
        try:
            await sandbox.upload(copied.source, target)
        except SandboxError as error:
            name = copied.source.relative_to(task.path)
            raise SandboxError(f"task {task.name}: {name} cannot be brought to {target}: {error}") from error
    return Installed(tuple(copied.target for copied in task.recipe.copied), task.recipe.skipped)


WIDE = ("bridge", "host")
"""What of `RolloutConfig.network` reaches more than the model gateway."""


def network_not_kept(task: Task, network: str) -> str:
    """Where the sandbox's network is another one than the task asks for: how, in a sentence. Empty where it is kept."""
    hosts = ", ".join(task.allowed_hosts) or "no host"
    match task.network, network in WIDE:
        case "public", False:
            return f"the task asks for a public network; the sandbox has {network}"
        case "no-network", True:
            return f"the task asks for no network; the sandbox has the network {network}, which was asked for here"
        case "allowlist", True:
            return f"the task allows {hosts} alone; the sandbox has the network {network}, and reaches more than that"
        case "allowlist", False if task.allowed_hosts:
            return f"the task asks for {hosts}; the sandbox has the network {network}, and reaches none of it"
    return ""
