"""What the machine itself costs: CPU of a rollout that does nothing, holds of the loop, memory while many wait."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator import AgentConfig, Rollout, RolloutConfig
from orchestrator.agents.scripted import ScriptedAgent
from orchestrator.sandboxes.fake import FakeSandbox

SAY = ScriptedAgent({"turns": [[{"say": "done"}]]})
WAIT = ScriptedAgent({"turns": [[{"say": "working"}, {"wait_cancel": True}]]})


def say() -> ScriptedAgent:
    """A session factory."""
    SAY.sessions.clear()
    return SAY


def wait() -> ScriptedAgent:
    """A session factory whose sessions work until they are cancelled."""
    WAIT.sessions.clear()
    return WAIT


def rollout(factory: str = "say", **settings: Any) -> Rollout:
    """A no-op rollout: the fake sandbox, a scripted session in process, nothing verified, nothing on disk."""
    agent = AgentConfig(factory, "session-factory", session_factory=f"bench_kernel:{factory}", calls_model=False)
    return Rollout(
        RolloutConfig(prompt="go", agent=agent, sandbox=FakeSandbox(), verifier=None, **{"out": None, **settings})
    )


def noop_cpu_ms(count: int = 300) -> float:
    """Milliseconds of CPU for one no-op rollout, its construction included."""

    async def run() -> float:
        for _ in range(20):
            await rollout().run()
        start = time.process_time()
        for _ in range(count):
            await rollout().run()
        return (time.process_time() - start) * 1000 / count

    return asyncio.run(run())


def stall_ms(count: int = 500) -> float:
    """The longest that the loop was held between two turns while `count` rollouts ran at once.

    In CPU time of the loop's thread: what we do to the loop, not what the rest of the machine does to us.
    """

    async def run() -> float:
        await rollout().run()
        longest, ticking = 0.0, True

        async def tick() -> None:
            nonlocal longest
            last = time.thread_time()
            while ticking:
                await asyncio.sleep(0)
                now = time.thread_time()
                longest, last = max(longest, now - last), now

        ticker = asyncio.create_task(tick())
        await asyncio.sleep(0)
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(rollout().run())
                if number % 10 == 0:
                    await asyncio.sleep(0)
        ticking = False
        await ticker
        return longest * 1000

    gc.collect()
    return asyncio.run(run())


def waiting_mb(count: int = 1000) -> float:
    """Megabytes above the import while `count` rollouts are in `executing`; then all are cancelled and close."""

    async def run() -> float:
        await rollout().run()
        gc.collect()
        before = _rss()
        rollouts = [rollout("wait") for _ in range(count)]
        tasks = [asyncio.create_task(one.run()) for one in rollouts]
        while not all(one.state == "executing" for one in rollouts):  # noqa: ASYNC110 - what is measured takes no hooks
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        gc.collect()
        held = _rss() - before
        for one in rollouts:
            one.cancel()
        await asyncio.gather(*tasks)
        assert all(one.state == "closed/cancelled" for one in rollouts)
        return held

    return asyncio.run(run())


def _rss() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def start_cpu(code: str, runs: int = 7) -> float:
    """Median CPU seconds of `python -c code` above those of a bare interpreter, as an installed program starts.

    That has its bytecode, whatever the environment says of writing any, as those of containers often do: the first run
    is not counted, and leaves it in a folder of its own.
    """
    with tempfile.TemporaryDirectory() as bytecode:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = bytecode

        def median(argv: list[str]) -> float:
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=env)
            spent = sorted(_cpu_of(argv, env) for _ in range(runs))
            return spent[runs // 2]

        return median([sys.executable, "-c", code]) - median([sys.executable, "-c", "pass"])


def _cpu_of(argv: list[str], env: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)  # finer than the hundredths of `os.times`
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def heavy_imports(code: str) -> list[str]:
    """Which of the heavy libraries `code` loads."""
    heavy = ["litellm", "daytona", "aiohttp", "rich"]
    tail = f"\nimport sys; print(*[m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code + tail], check=True, capture_output=True, text=True)
    return shown.stdout.split("\n")[-2].split()


def heavy_count(code: str) -> int:
    """How many of the heavy libraries `code` loads."""
    return len(heavy_imports(code))
