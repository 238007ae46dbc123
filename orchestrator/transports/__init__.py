"""Transports: how a session is opened and driven. Two of them, with one method a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.metering import Cast
from orchestrator.questions import Questions
from orchestrator.registry import Place, resolve_factory
from states.ports import Transport

HOME = "/home/agent"
"""An agent's HOME, one per handle, in every sandbox whose handles do not say another (`home`)."""


def make_transport(
    member: Cast,
    place: Place,
    *,
    questions: Questions,
    cwd: str,
    home: str = HOME,
    base_url: str | None,
    sandbox_base_url: str | None,
    api_key: str | None,
    task: Any,
    keep_stderr: Callable[[str], None],
    note: Callable[[str], None],
) -> Transport:
    """The transport that a role's agent speaks, pointed at its model.

    `base_url` is the gateway as the agent's model calls see it, `sandbox_base_url` as something in the sandbox does.
    `keep_stderr` gets what an agent that is a process wrote there, when its session is closed; `note` the traceback of
    what one in our own process raised.
    """
    launch = member.agent.render(
        place, cwd=cwd, home=home, model=member.model, base_url=base_url, api_key=api_key, env=member.env
    )
    if member.agent.protocol == "acp":
        from orchestrator.transports.acp import AcpLaunch, AcpTransport

        return AcpTransport(
            AcpLaunch(
                argv=launch.argv,
                env=launch.env,
                cwd=cwd,
                files=launch.files,
                mode=launch.mode,
                config_options=launch.config_options,
                fs=member.agent.fs,
                terminal=member.agent.terminal,
                exit_sec=member.agent.exit_sec,
            ),
            questions,
            keep_stderr,
        )
    from orchestrator.transports.session_factory import SessionFactoryTransport

    inside = {"ROLLOUT_SANDBOX_BASE_URL": sandbox_base_url} if sandbox_base_url else {}
    if member.upstream is not None:
        inside["ROLLOUT_API"] = next((api for api in member.agent.api if api in member.upstream.apis), "openai-chat")
    env = {**launch.env, **inside}
    at_home = member.agent.calls_from == "host"  # then nothing in the sandbox needs the key
    return SessionFactoryTransport(
        resolve_factory(member.agent.session_factory),
        questions,
        env,
        cwd,
        offered={"task": task, "model": member.model, "env": env},
        exec_env={name: value for name, value in env.items() if not (at_home and value == api_key)},
        note=note,
    )
