"""Run the same agent by BenchFlow's own seam and by a rollout, against the same scripted model; say what came of both.

A script, in BenchFlow's environment: `python run_benchflow_agent.py FOLDER`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from benchflow.rollout.session_factory_runtime import connect_session_factory, execute_prompts_session_factory

from orchestrator import AgentConfig, ExecResult, Rollout, RolloutConfig
from orchestrator.capture import read_trajectory
from orchestrator.gateway.scripted import ScriptedUpstream, ShellScript
from orchestrator.gateway.upstream import Upstream
from orchestrator.tasks import DEMO_COMMAND, demo_task

ENTRYPOINT = "benchflow_agent:build"


class Environment:
    """What BenchFlow's seam asks of a sandbox."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    async def exec(self, command: str, *, user: str | None = None, timeout_sec: float | None = None) -> ExecResult:
        self.commands.append(command)
        return ExecResult("made\n", "", 0)


async def by_benchflow(url: str) -> dict[str, Any]:
    env = {
        "BENCHFLOW_PROVIDER_BASE_URL": f"{url}/v1",
        "BENCHFLOW_PROVIDER_API_KEY": "k",
        "BENCHFLOW_PROVIDER_MODEL": "scripted",
    }
    environment = Environment()
    settings = {"sandbox_user": None, "model": "scripted", "rollout_dir": None, "timeout": 30, "agent_cwd": "/app"}
    _, session, _, _ = await connect_session_factory(environment, "mine", ENTRYPOINT, env, **settings)
    steps, _ = await execute_prompts_session_factory(session, ["Do it."], 60)
    return {"kinds": [step["type"] for step in steps], "commands": environment.commands}


async def by_rollout(provider: ScriptedUpstream, out: Path) -> dict[str, Any]:
    agent = AgentConfig("mine", "session-factory", session_factory=ENTRYPOINT, api=("openai-chat",), calls_from="host")
    upstream = Upstream("scripted", provider.url, ["openai-chat"], api_key="provider-key-123456")
    rollout = Rollout(RolloutConfig(task=demo_task(), agent=agent, upstream=upstream, out=out))
    result = await rollout.run()
    (turn,) = read_trajectory(result.folder)
    return {
        "state": result.state,
        "reward": result.reward,
        "ended_by": result.ended_by,
        "source": result.trajectory_source,
        "kinds": [step.data["type"] for step in turn.steps],
        "answers": [step.data["answer"] for step in turn.steps if step.data["type"] == "question"],
        "usage": [result.usage.total.input_tokens, result.usage.total.output_tokens],
        "errors": [error["message"] for error in result.errors],
    }


async def main() -> None:
    async with ScriptedUpstream(ShellScript("make it"), apis=["openai-chat"]) as model:
        theirs = await by_benchflow(model.url)
    async with ScriptedUpstream(
        ShellScript(DEMO_COMMAND), apis=["openai-chat"], api_key="provider-key-123456"
    ) as model:
        ours = await by_rollout(model, Path(sys.argv[1]))
        counted = [model.usage.input_tokens, model.usage.output_tokens]
    sys.stdout.write(json.dumps({"theirs": theirs, "ours": ours, "counted": counted}) + "\n")


asyncio.run(main())
