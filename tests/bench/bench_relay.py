"""What the relay adds to a call: a request there and back over an open connection, with and without it.

And what a line costs over the channel of a sandbox that can only exec.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_sandboxes import round_trip_ms
from exec_boxes import Box

from orchestrator.gateway.relay_host import GatewayRelay
from orchestrator.sandboxes.exec_only import ExecOnlySandbox
from orchestrator.sandboxes.local import LocalSandbox
from states.ports import Sandbox

REQUEST = b"x" * 2000


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
    writer.close()


async def _median_ms(port: int, count: int) -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    taken = []
    for _ in range(count + 5):
        began = time.perf_counter()
        writer.write(REQUEST)
        await reader.readexactly(len(REQUEST))
        taken.append(time.perf_counter() - began)
    writer.close()
    return statistics.median(taken[5:]) * 1000


async def _added_ms(sandbox: Sandbox, count: int) -> float:
    async with await asyncio.start_server(_echo, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        await sandbox.start()
        relay = GatewayRelay(sandbox, port)
        await relay.start()
        try:
            relayed = await _median_ms(int(relay.url.rpartition(":")[2]), count)
            direct = await _median_ms(port, count)
        finally:
            await relay.stop()
            await sandbox.stop()
    return relayed - direct


def local_added_ms() -> float:
    """Milliseconds that the relay adds to a round trip, over a local channel."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_added_ms(LocalSandbox(name="b", root=Path(folder, "b"), network="host"), 300))


def exec_only_round_trip_ms() -> float:
    """Milliseconds of an ACP line there and back where the sandbox can only exec: two calls of its host."""

    async def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return await round_trip_ms(ExecOnlySandbox(Box(LocalSandbox(name="b", root=Path(folder, "b")))), count=20)

    return asyncio.run(run())


if __name__ == "__main__":
    print(f"relay {local_added_ms():.2f} ms, exec-only line {exec_only_round_trip_ms():.0f} ms")  # noqa: T201 - its purpose
