"""What sandboxes cost, each beside the bare thing that it is made of, in wall time of the same run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio

from orchestrator.sandboxes import _bwrap
from orchestrator.sandboxes.local import LocalHandle, LocalSandbox
from states.ports import Sandbox

LOADS = "import sys; sys.path.append('/run/rollout'); import ctypes, supervisor"
"""What PID 1 of a local sandbox's handle loads before it is ready."""


def _bare(handle: LocalHandle, *command: str) -> list[str]:
    """A bubblewrap with the view of this handle and nothing of ours around it."""
    argv = _bwrap.arguments(handle._view(), _bwrap.Fds(info=1, maps=0, control=2), "bench")
    for option in ("--userns-block-fd", "--info-fd"):
        if option in argv:
            at = argv.index(option)
            del argv[at : at + 2]
    at = argv.index("--as-pid-1")
    return [*argv[:at], "--", *(command or (argv[at + 2], "-I", "-S", "-c", LOADS))]


def _seconds(argv: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(argv, check=True, env={})
    return time.perf_counter() - began


def local_times_bare(*pid_1: str, count: int = 40) -> float:
    """A handle opened, one command, its end proven; times a bare spawn of the same view.

    With the same PID 1, a Python with what ours loads, which says what our code adds; or with `pid_1` as the only
    program, which says what the guarantees of a PID 1 of our own cost.
    """

    async def run() -> float:
        with tempfile.TemporaryDirectory() as name:
            sandbox = LocalSandbox(name="bench", root=Path(name, "sandbox"))
            await sandbox.start()
            first = sandbox.handle("first")
            await first.open()
            bare, ours = [], []
            for number in range(count):  # in pairs, so that both meet the same machine
                bare.append(_seconds(_bare(first, *pid_1)))
                handle = sandbox.handle(f"role-{number}")
                began = time.perf_counter()
                await handle.open()
                await handle.exec("true")
                await handle.end()
                ours.append(time.perf_counter() - began)
            await sandbox.stop()
            return statistics.median(ours) / statistics.median(bare)

    return anyio.run(run)


def command_times_bare(count: int = 60) -> float:
    """A command in a handle that is open, times a bare spawn of that command."""

    async def run() -> float:
        with tempfile.TemporaryDirectory() as name:
            sandbox = LocalSandbox(name="bench", root=Path(name, "sandbox"))
            await sandbox.start()
            handle = sandbox.handle("role")
            await handle.open()
            bare, ours = [], []
            for _ in range(count):
                bare.append(_seconds(_bare(handle, "/bin/true")))
                began = time.perf_counter()
                await handle.exec("true")
                ours.append(time.perf_counter() - began)
            await sandbox.stop()
            return statistics.median(ours) / statistics.median(bare)

    return anyio.run(run)


async def round_trip_ms(sandbox: Sandbox, count: int = 300) -> float:
    """Median milliseconds for a line of an ACP message's size to a process of this sandbox and back."""
    line = b'{"jsonrpc":"2.0","method":"session/update","params":"' + b"x" * 200 + b'"}\n'
    await sandbox.start()
    try:
        handle = sandbox.handle("role")
        await handle.open()
        channel = await handle.spawn(["cat"])
        spent = []
        for _ in range(count):
            began = time.perf_counter()
            await channel.send(line)
            back = b""
            while len(back) < len(line):
                back += await channel.receive()
            spent.append(time.perf_counter() - began)
        await handle.end()
        return statistics.median(spent) * 1000
    finally:
        await sandbox.stop()


def local_round_trip_ms() -> float:
    """Over a local channel."""

    async def run() -> float:
        with tempfile.TemporaryDirectory() as name:
            return await round_trip_ms(LocalSandbox(name="bench", root=Path(name, "sandbox")))

    return anyio.run(run)


def daytona_round_trip_ms(channel: str) -> float:
    """Over a channel of Daytona's real SDK, against the service of the tests on loopback: the protocol, no distance."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from daytona_server import DaytonaServer
    from daytona_stand import Service

    async def run() -> float:
        with tempfile.TemporaryDirectory() as name:
            async with DaytonaServer(Path(name)) as server:
                os.environ.update(DAYTONA_API_KEY=server.key, DAYTONA_API_URL=server.url)
                return await round_trip_ms(Service(server).sandbox("bench", channel=channel), count=60)

    return anyio.run(run)
