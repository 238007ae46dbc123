"""Run by the interpreter of verifiers' environment: plays the demo task with each kind of agent, a trace each.

python verifiers_checks.py OUT_DIR [NAME...]     # the provider is at SCRIPTED_BASE_URL, its key in SCRIPTED_API_KEY
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import verifiers.v1 as vf
from late import LATE_SEC
from verifiers.v1.clients import EvalClientConfig
from verifiers.v1.configs.agent import TimeoutConfig
from verifiers.v1.runtimes.docker import DockerConfig
from verifiers.v1.runtimes.subprocess import SubprocessConfig
from verifiers_local import DEMO, AnswerTask, DemoTask, LocalRuntime

SCENE = str(Path(__file__).parent / "scene.toml")

TRIALS = {
    "factory": ({"agent": "minimal"}, {}),
    "acp": ({"agent": "minimal-acp"}, {}),
    "scene": ({"scene": SCENE}, {}),
    "late": ({"agent": "minimal"}, {"timeout": TimeoutConfig(rollout=LATE_SEC)}),
    "turns": ({"agent": "minimal"}, {"max_turns": 1}),
    "refused": ({"agent": "minimal"}, {}),
    "nobody": ({}, {}),
}


SUBPROCESS = {
    "subprocess-scripted": {"agent": "scripted-acp"},
    "subprocess-acp": {"agent": "minimal-acp"},
    "subprocess-scene": {"scene": SCENE},
}
DOCKER = {
    "docker-acp": {"agent": "minimal-acp"},
    "docker-roles": {"roles": {"coder": "scripted-acp", "reviewer": "minimal-acp"}},
}
"""In runtimes that verifiers ships; those in Docker only when they are named, with their image in DOCKER_IMAGE."""


def config_of(name: str, out: Path, harness: dict, runtime=None, **limits) -> vf.AgentConfig:
    return vf.AgentConfig(
        harness={"id": "rollout-orchestrator", "out": out / "runs", **harness},
        runtime=runtime or SubprocessConfig(),
        model=name,
        client=EvalClientConfig(base_url=os.environ["SCRIPTED_BASE_URL"], api_key_var="SCRIPTED_API_KEY"),
        **limits,
    )


async def shipped(name: str, out: Path) -> vf.Trace:
    runtime = DockerConfig(image=os.environ["DOCKER_IMAGE"]) if name in DOCKER else SubprocessConfig()
    async with vf.Agent(config_of(name, out, {**SUBPROCESS, **DOCKER}[name], runtime)) as agent:
        return await agent.run(AnswerTask(vf.TaskData(prompt="Add up the numbers.")))


async def demo(name: str, out: Path) -> vf.Trace:
    harness, limits = TRIALS[name]
    runtime = LocalRuntime()
    await runtime.start()
    try:
        async with vf.Agent(config_of(name, out, harness, **limits)) as agent:
            return await agent.run(DemoTask(vf.TaskData(prompt=DEMO.instruction, workdir="/app")), runtime=runtime)
    finally:
        await runtime.stop()


async def play(name: str, out: Path) -> None:
    trace = await (demo if name in TRIALS else shipped)(name, out)
    file = out / "traces" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(trace.model_dump_json())
    vf.WireTrace.model_validate_json(file.read_text())  # its own reader accepts it


async def main() -> None:
    out = Path(sys.argv[1])
    for name in sys.argv[2:] or (*TRIALS, *SUBPROCESS):
        await play(name, out)


asyncio.run(main())
