"""Whole rollouts in Docker beside their own engine calls replayed bare, in wall time of the same run.

The calls that one rollout makes are recorded, then sent again with nothing of ours around them: no agent, no prompt, no
verifier, no journal. What is more than that is what we add.
"""

from __future__ import annotations

import asyncio
import functools
import json
import resource
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).parent.parent))

import docker_images

from orchestrator import Rollout, RolloutConfig
from orchestrator.tasks import Task, demo_task, load_task

ACP, IN_PROCESS = "scripted-acp", "scripted"
"""The same script: played by a process in the container, over ACP; and by a session in this process."""

Recorded = list[tuple[str, str, dict[str, Any], Any]]


@functools.cache
def _task() -> tuple[Task, dict[str, str]]:
    """The demo task, loaded once as by whoever runs it many times, and what its base image is here."""
    task = load_task(demo_task())
    assert task.recipe.base, "the demo task has a Dockerfile"
    return task, {task.recipe.base: docker_images.make(docker_images.DEBIAN)}


async def _rollout(out: Path, agent: str = ACP) -> None:
    """One rollout of the demo task: a scripted agent, verified, everything given back."""
    task, base = _task()
    config = RolloutConfig(task=task, agent=agent, sandbox="docker", image_map=base, out=out)
    result = await Rollout(config).run()
    if result.reward != 1.0:
        raise AssertionError(f"{result.state}: {result.verdict.reason}")


async def _recorded(out: Path) -> Recorded:
    """The engine calls of one rollout."""
    calls: Recorded = []
    plain = aiohttp.ClientSession._request

    async def spying(self: Any, method: str, url: Any, **named: Any) -> Any:
        calls.append((method, str(url).split("/", 3)[3], dict(named.get("params") or {}), named.get("data")))
        return await plain(self, method, url, **named)

    aiohttp.ClientSession._request = spying  # type: ignore[method-assign]
    try:
        await _rollout(out)
    finally:
        aiohttp.ClientSession._request = plain  # type: ignore[method-assign]
    return calls


async def _replayed(calls: Recorded, session: aiohttp.ClientSession, scratch: Path) -> None:
    """The same calls for a container of another name, in which nothing but `sleep` runs."""
    name, made = f"bench-{uuid.uuid4().hex[:8]}", ""
    (scratch / name).mkdir()
    for method, recorded, params, data in calls:
        creates = recorded.endswith("containers/create")
        sent = {"data": _bare_body(data, scratch / name), "params": {"name": name}} if creates else {"params": params}
        async with session.request(
            method, f"http://engine/{_renamed(recorded, made)}", headers={"Content-Type": "application/json"}, **sent
        ) as answer:
            said = await answer.read()
            if answer.status >= 400:
                raise AssertionError(f"{method} {recorded}: {said!r}")
            made = json.loads(said)["Id"] if creates else made


def _bare_body(data: str, folder: Path) -> str:
    """What the container is made from, with nothing of ours in it."""
    body = json.loads(data) | {"Entrypoint": ["/bin/sleep"], "Cmd": ["1000"]}
    for mount in body["HostConfig"]["Mounts"]:
        if not mount.get("ReadOnly"):
            mount["Source"] = str(folder)
    return json.dumps(body)


def _renamed(path: str, container: str) -> str:
    """The path of a call, for another container."""
    before, found, rest = path.partition("containers/")
    return f"{before}{found}{container}/{rest.partition('/')[2]}".rstrip("/") if container and found else path


async def _timed(count: int, one: Callable[[], Awaitable[None]]) -> float:
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())  # type: ignore[arg-type]
    return time.perf_counter() - began


def _with_calls(measure: Callable[[Recorded, aiohttp.ClientSession, Path], Awaitable[float]]) -> float:
    async def run() -> float:
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            await _rollout(scratch)  # the image, the kit and the imports are there
            calls = [call for call in await _recorded(scratch) if "/wait" not in call[1] and "/events" not in call[1]]
            connector = aiohttp.UnixConnector(docker_images.engine_path(), limit=0)
            async with aiohttp.ClientSession(connector=connector) as session:
                return await measure(calls, session, scratch)

    return asyncio.run(run())


def times_bare(count: int, agent: str = IN_PROCESS) -> float:
    """Wall time of `count` rollouts at once, times that of their engine calls replayed bare, `count` at once.

    Medians of several rounds, of more where few are at once. What an agent over ACP has beside: a Python of its own
    that starts in the container.
    """
    rounds = max(3, 16 // count)

    async def measure(calls: Recorded, session: aiohttp.ClientSession, scratch: Path) -> float:
        ours, bare = [], []
        for _ in range(rounds):  # in pairs, so that both meet the same machine
            bare.append(await _timed(count, lambda: _replayed(calls, session, scratch)))
            ours.append(await _timed(count, lambda: _rollout(scratch, agent)))
        return statistics.median(ours) / statistics.median(bare)

    return _with_calls(measure)


def cpu_of_a_further_one(count: int = 32) -> float:
    """CPU seconds of this process for one more rollout among many: the difference of `count` and one, a rollout."""

    def spent() -> float:
        return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])

    async def measure(_calls: Recorded, _session: aiohttp.ClientSession, scratch: Path) -> float:
        await _rollout(scratch)
        began = spent()
        await _timed(1, lambda: _rollout(scratch))
        one = spent() - began
        began = spent()
        await _timed(count, lambda: _rollout(scratch))
        return (spent() - began - one) / (count - 1)

    return _with_calls(measure)


def calls_of_one() -> float:
    """How many requests the engine gets for a rollout."""

    async def measure(calls: Recorded, _session: aiohttp.ClientSession, _scratch: Path) -> float:
        return float(len(calls))

    return _with_calls(measure)


def docker_round_trip_ms() -> float:
    """Over a docker channel."""
    from bench_sandboxes import round_trip_ms

    from orchestrator.sandboxes.docker import DockerSandbox

    name = f"bench-{uuid.uuid4().hex[:8]}"
    return asyncio.run(round_trip_ms(DockerSandbox(name=name, image=docker_images.make(docker_images.DEBIAN))))
