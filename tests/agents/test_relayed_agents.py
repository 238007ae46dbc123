"""Agents in a sandbox that cannot see this host: their model calls come back over the channel that we hold."""

from __future__ import annotations

import contextlib
import functools
import socket
import tempfile
from pathlib import Path

import anyio
import pytest

from orchestrator.gateway.relay_host import HANDLE, GatewayRelay
from orchestrator.gateway.scripted import Say, Shell, ShellScript, Steps
from orchestrator.sandboxes import SandboxSpec
from orchestrator.sandboxes.local import LocalSandbox

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox]

SOLVE = "s=0; while read -r n; do s=$((s + n)); done < /app/numbers.txt; echo $s > /app/answer.txt"


def far(spec: SandboxSpec, kind: type[LocalSandbox] = LocalSandbox) -> LocalSandbox:
    """A sandbox that nobody tells where the gateway is."""
    return kind(
        name=spec.name,
        cwd=spec.cwd,
        root=Path(tempfile.gettempdir()) / spec.name,
        network="host",
        binds=tuple((Path(bind), bind) for bind in spec.binds),
    )


FAR = {"sandbox": far, "network": "host", "usage_tracking": "required"}


@pytest.fixture
def relays(monkeypatch):
    """The relays that were started."""
    started, start = [], GatewayRelay.start

    async def recorded(relay):
        started.append(relay)
        await start(relay)

    monkeypatch.setattr(GatewayRelay, "start", recorded)
    return started


@pytest.mark.parametrize(
    "agent",
    [
        "minimal-acp",
        *(pytest.param(name, marks=pytest.mark.agents) for name in ("codex-acp", "claude-agent-acp", "omnigent")),
    ],
)
async def test_an_agent_solves_the_demo_task_through_the_relay_and_its_usage_is_the_providers_count(
    play, relays, agent
):
    """Over both transports, streamed where the agent streams: all calls came by the relay, and each was counted."""
    played = await play(agent, ShellScript(SOLVE), **FAR)
    result = played.result
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), (result.verdict, result.errors, result.notes)
    assert result.usage.tracking == "metered"
    assert played.total == played.provider
    assert played.total.input_tokens > 0
    (relay,) = relays
    assert relay.counts.streams > 0
    assert relay.counts.down > 0
    assert not [note for note in result.notes if "relay" in note]
    assert {call.key for call in played.calls} == {"provider-key-that-no-sandbox-sees"}
    for path in played.folder.rglob("*"):
        assert path.is_dir() or b"provider-key-that" not in path.read_bytes(), path


async def test_an_agent_that_calls_from_this_process_needs_no_relay(play, relays):
    """Nothing is started in the sandbox for it."""
    played = await play("minimal", ShellScript(SOLVE), **FAR)
    assert (played.result.reward, relays) == (1.0, [])
    assert played.total == played.provider


def kill(relay):
    """End its process, as an agent might that runs as the same user."""
    for channel in relay._handles[0]._channels:
        channel._started.kill()


async def test_a_relay_that_dies_is_started_again_and_the_work_is_graded(play, relays):
    """Its death is a note; the calls that come afterwards are answered, counted, and forgive it."""

    async def kill_before_the_prompt(moved):
        if moved.dest == "session/acp" and moved.source == "connecting":
            again = anyio.Event()
            note = relays[0]._note
            relays[0]._note = lambda text: (note(text), again.set())
            kill(relays[0])
            await again.wait()

    played = await play("minimal-acp", ShellScript(SOLVE), hooks=(kill_before_the_prompt,), **FAR)
    assert (played.result.state, played.result.reward) == ("closed/rewarded", 1.0), played.result.errors
    [note] = [note for note in played.result.notes if "relay" in note]
    assert note.endswith("; it was started again")
    assert played.total == played.provider


async def test_a_relay_that_dies_in_mid_call_is_the_sandboxes_failure_and_not_the_agents(play, relays):
    """The agent gives up, as it may; nothing is graded, and the verdict says who spoilt it."""

    def kill_and_answer(_conversation):
        kill(relays[0])
        return Say("Nobody hears this.", delay=1.0)

    played = await play("minimal-acp", Steps(Shell(SOLVE), kill_and_answer), **FAR)
    assert (played.result.state, played.result.reward) == ("closed/failed", None), played.result.notes
    assert played.result.verdict.owner == "sandbox"
    assert "the relay to the model gateway" in played.result.verdict.reason


async def test_a_sandbox_in_which_no_relay_starts_fails_before_an_agent_does(play):
    """The verdict says what is missing and what to do; nobody runs unmetered by accident."""
    played = await play(
        "minimal-acp", ShellScript(SOLVE), sandbox=functools.partial(far, kind=WithoutPython), network="host"
    )
    assert (played.result.state, played.result.verdict.owner) == ("closed/failed", "sandbox")
    assert "gateway_reach a URL" in played.result.verdict.reason
    assert played.calls == ()


class NoPrograms:
    """A handle on which no program is found."""

    def __init__(self, handle):
        self.open, self.end, self._spawn = handle.open, handle.end, handle.spawn

    async def spawn(self, argv, **settings):
        return await self._spawn(["no-such-python3", *argv[1:]], **settings)


class WithoutPython(LocalSandbox):
    """A local sandbox that has no python3 to run a relay on."""

    def handle(self, name, *, trusted=False):
        """A relay's finds nothing."""
        made = super().handle(name, trusted=trusted)
        return NoPrograms(made) if name == HANDLE else made


async def test_a_url_that_is_exposed_is_where_agents_call(play, relays):
    """A tunnel of the user's ends at the port that they chose for the gateway; no relay is started."""
    passed = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def carry(client):
        passed.append(client)
        async with client, await anyio.connect_tcp("127.0.0.1", port) as gateway, anyio.create_task_group() as ways:
            ways.start_soon(pour, client, gateway)
            ways.start_soon(pour, gateway, client)

    async def pour(source, target):
        with contextlib.suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            while True:
                await target.send(await source.receive())
        with contextlib.suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await target.send_eof()

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as tunnel, anyio.create_task_group() as tasks:
        tasks.start_soon(tunnel.serve, carry)
        url = f"http://127.0.0.1:{tunnel.extra(anyio.abc.SocketAttribute.local_port)}/"
        played = await play("minimal-acp", ShellScript(SOLVE), gateway_reach=url, gateway_port=port, **FAR)
        tasks.cancel_scope.cancel()
    assert (played.result.state, played.result.reward) == ("closed/rewarded", 1.0), played.result.errors
    assert played.total == played.provider
    assert (len(passed) > 0, relays) == (True, [])
