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
from verifiers.v1.runtimes.subprocess import SubprocessConfig
from verifiers_local import DEMO, DemoTask, LocalRuntime

TRIALS = {
    "factory": ({"agent": "minimal"}, {}),
    "acp": ({"agent": "minimal-acp"}, {}),
    "scene": ({"scene": str(Path(__file__).parent / "scene.toml")}, {}),
    "late": ({"agent": "minimal"}, {"timeout": TimeoutConfig(rollout=LATE_SEC)}),
    "turns": ({"agent": "minimal"}, {"max_turns": 1}),
    "refused": ({"agent": "minimal"}, {}),
    "nobody": ({}, {}),
}


async def play(name: str, out: Path) -> None:
    harness, limits = TRIALS[name]
    config = vf.AgentConfig(
        harness={"id": "rollout-orchestrator", "out": out / "runs", **harness},
        runtime=SubprocessConfig(),
        model=name,
        client=EvalClientConfig(base_url=os.environ["SCRIPTED_BASE_URL"], api_key_var="SCRIPTED_API_KEY"),
        **limits,
    )
    runtime = LocalRuntime()
    await runtime.start()
    try:
        async with vf.Agent(config) as agent:
            trace = await agent.run(DemoTask(vf.TaskData(prompt=DEMO.instruction, workdir="/app")), runtime=runtime)
    finally:
        await runtime.stop()
    file = out / "traces" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(trace.model_dump_json())
    vf.WireTrace.model_validate_json(file.read_text())  # its own reader accepts it


async def main() -> None:
    out = Path(sys.argv[1])
    for name in sys.argv[2:] or TRIALS:
        await play(name, out)


asyncio.run(main())
