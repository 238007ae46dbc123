"""The relay carries calls out of a sandbox that cannot see this host: its frames, both its ends, and hostile ones."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import socket
import subprocess
import sys

import aiohttp
import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.gateway import relay_child as rc
from orchestrator.gateway.relay_host import HANDLE, PROGRAM, STARTS, GatewayRelay
from orchestrator.gateway.scripted import Always, Say, ScriptedUpstream
from orchestrator.gateway.server import Gateway
from orchestrator.gateway.upstream import Upstream
from orchestrator.sandboxes.fake import FakeSandbox
from orchestrator.sandboxes.local import LocalSandbox
from states.errors import SandboxError

pytestmark = pytest.mark.anyio
needs_sandbox = pytest.mark.sandbox


@pytest.fixture
def anyio_backend():
    """The gateway is asyncio only."""
    return "asyncio"


# --- frames ----------------------------------------------------------------------------------------------------

FRAMES = st.lists(
    st.one_of(
        st.tuples(st.sampled_from([rc.OPEN, rc.END, rc.RESET]), st.integers(0, 2**32 - 1), st.just(b"")),
        st.tuples(st.just(rc.DATA), st.integers(0, 2**32 - 1), st.binary(min_size=1, max_size=300)),
        st.tuples(st.just(rc.CREDIT), st.integers(0, 2**32 - 1), st.binary(min_size=4, max_size=4)),
    ),
    max_size=30,
)


@given(FRAMES, st.lists(st.integers(1, 400), max_size=40))
def test_frames_come_out_as_they_went_in_however_they_are_cut(frames, cuts):
    """Any split of the bytes gives the same frames, in order, and none before it is whole."""
    data, reader, found = b"".join(rc.frame(*one) for one in frames), rc.Frames(), []
    for cut in [*cuts, len(data)]:
        found += reader.feed(data[:cut])
        data = data[cut:]
    assert found == frames


@given(st.binary(max_size=4000), st.integers(1, 1000))
def test_garbage_is_refused_or_kept_within_a_frame(garbage, size):
    """Whatever comes, it is frames, or a FrameError; what waits is never more than one frame and what just came."""
    reader = rc.Frames()
    with contextlib.suppress(rc.FrameError):
        for at in range(0, len(garbage), size):
            for kind, _, payload in reader.feed(garbage[at : at + size]):
                assert rc.OPEN <= kind <= rc.CREDIT
                assert len(payload) <= rc.CHUNK
            assert len(reader._rest) <= rc.HEADER.size + rc.CHUNK


@pytest.mark.parametrize(
    ("kind", "size"),
    [(0, 0), (6, 0), (255, 9), (rc.OPEN, 1), (rc.DATA, 0), (rc.DATA, rc.CHUNK + 1), (rc.CREDIT, 3), (rc.END, 2**31)],
)
def test_a_frame_that_cannot_be_is_refused_at_its_header(kind, size):
    """Nobody waits for the two gigabytes that it announces."""
    with pytest.raises(rc.FrameError):
        rc.Frames().feed(rc.HEADER.pack(kind, 1, size))


def test_the_child_is_one_file_for_any_python_from_3_6_on():
    """It parses as Python 3.6, and imports only what has been in the standard library since."""
    tree = ast.parse(PROGRAM.read_text(encoding="utf-8"), feature_version=(3, 6))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"argparse", "errno", "os", "select", "socket", "struct", "sys", "time"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


# --- the real child, in a sandbox that does not know the gateway -------------------------------------------------


@pytest.fixture
async def sandbox(tmp_path):
    """A local sandbox on this machine's network, which nobody told of a gateway."""
    sandbox = LocalSandbox(name="far", root=tmp_path / "far", network="host")
    assert sandbox.gateway_url is None
    await sandbox.start()
    yield sandbox
    await sandbox.stop()


@contextlib.asynccontextmanager
async def served(answer, path=None):
    """A server that is no gateway, on loopback or a socket: `answer(reader, writer)`; yields where it listens."""
    tasks = set()

    async def handle(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await answer(reader, writer)
        finally:
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    listening = asyncio.start_unix_server(handle, path) if path else asyncio.start_server(handle, "127.0.0.1", 0)
    async with await listening as server:
        yield path or server.sockets[0].getsockname()[1]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def echo(reader, writer):
    """What comes, until it ends, and then the end."""
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


@contextlib.asynccontextmanager
async def relay_to(port, sandbox, **told):
    """A relay that has started."""
    relay = GatewayRelay(sandbox, port, **told)
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()


def connected(relay):
    """A client's connection to it: reader, writer."""
    return asyncio.open_connection("127.0.0.1", int(relay.url.rpartition(":")[2]))


async def echoed(relay, data):
    """What comes back of `data`, sent while it is read, ended by half."""
    reader, writer = await connected(relay)

    async def send():
        writer.write(data)
        await writer.drain()
        writer.write_eof()

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(send())
        back = await reader.read(-1)
    writer.close()
    return back


@needs_sandbox
async def test_bytes_come_and_go_as_they_are_and_either_side_may_finish_first(sandbox):
    """Three megabytes of every byte there is, far beyond a window, through a half-closed connection."""
    data = bytes(range(256)) * 12_000
    async with served(echo) as port, relay_to(port, sandbox) as relay:
        with anyio.fail_after(60):
            assert await echoed(relay, data) == data
            assert await echoed(relay, b"") == b""
    assert (relay.counts.streams, relay.counts.up, relay.counts.down) == (2, len(data), len(data))


@needs_sandbox
async def test_64_streamed_calls_at_once_are_each_whole_and_all_counted(sandbox):
    """Through the real gateway: as many answers as calls, tokens equal to the provider's count."""
    words = "a few words of an answer " * 40
    async with (
        ScriptedUpstream(Always(Say(words)), apis=["openai-chat"], api_key="k") as provider,
        Gateway() as gateway,
    ):
        meter = gateway.open("r", upstream=Upstream("m", provider.url, ["openai-chat"], api_key="k"), sink=[].append)
        async with relay_to(gateway.port, sandbox) as relay, aiohttp.ClientSession() as client:

            async def call():
                body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "x" * 5000}]}
                headers = {"Authorization": f"Bearer {meter.key}"}
                async with client.post(f"{relay.url}/v1/chat/completions", json=body, headers=headers) as answer:
                    assert answer.status == 200
                    return (await answer.read()).endswith(b"data: [DONE]\n\n")

            with anyio.fail_after(100):
                assert all(await asyncio.gather(*(call() for _ in range(64))))
        assert (await meter.settle()).calls == 64
        assert meter.usage().tokens == provider.usage.tokens > 0
        meter.close()


@needs_sandbox
async def test_more_connections_than_fit_wait_until_one_is_free(sandbox):
    """The child leaves the 257th in its backlog; nobody is turned away."""
    async with served(echo) as port, relay_to(port, sandbox) as relay:
        held = [await connected(relay) for _ in range(rc.STREAMS)]
        with anyio.fail_after(100):
            for reader, writer in held:
                writer.write(b"x")
                assert await reader.read(1) == b"x"
            late_reader, late = await connected(relay)
            late.write(b"late")
            held[0][1].close()
            assert await late_reader.read(4) == b"late"
        for _, writer in [*held, (None, late)]:
            writer.close()


@needs_sandbox
async def test_who_does_not_read_holds_up_nobody_else(sandbox):
    """A server that never reads takes a few windows, then its client waits; another stream goes on."""
    stuck = asyncio.Event()

    async def first_is_deaf(reader, writer):
        if not stuck.is_set():
            stuck.set()
            await asyncio.Event().wait()
        await echo(reader, writer)

    async with served(first_is_deaf) as port, relay_to(port, sandbox) as relay:
        with anyio.fail_after(100):
            _, writer = await connected(relay)
            writer.write(b"x" * (64 << 20))
            await stuck.wait()
            with anyio.move_on_after(1) as waited:
                await writer.drain()
            assert waited.cancelled_caught
            assert await echoed(relay, b"still here") == b"still here"
            assert relay.counts.up < 32 << 20
            writer.transport.abort()


@needs_sandbox
async def test_a_client_that_does_not_read_holds_up_nobody_else(sandbox):
    """The server is not read either, beyond a window and what sockets hold; another stream goes on."""
    first = asyncio.Event()

    async def floods_the_first(reader, writer):
        if first.is_set():
            await echo(reader, writer)
            return
        first.set()
        while True:
            writer.write(bytes(1 << 20))
            await writer.drain()

    async with served(floods_the_first) as port, relay_to(port, sandbox) as relay:
        with anyio.fail_after(100):
            reader, writer = await connected(relay)
            await reader.read(1)
            assert await echoed(relay, b"still here") == b"still here"
            assert relay.counts.down < 32 << 20
            writer.transport.abort()


@needs_sandbox
async def test_a_side_that_breaks_off_is_gone_for_the_other_too(sandbox):
    """A server that resets, one that is not there, and a client that goes away while it is answered."""
    left = asyncio.Event()

    async def abort(_reader, writer):
        writer.transport.abort()

    async def talk(_reader, writer):
        try:
            while True:
                writer.write(b"word ")
                await writer.drain()
                await asyncio.sleep(0)  # drain alone lets nobody else on
        finally:
            left.set()

    with anyio.fail_after(100):
        async with served(abort) as port, relay_to(port, sandbox) as relay:
            reader, writer = await connected(relay)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
            writer.close()
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            async with relay_to(nobody.getsockname()[1], sandbox) as relay:
                reader, writer = await connected(relay)
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
        async with served(talk) as port, relay_to(port, sandbox) as relay:
            reader, writer = await connected(relay)
            await reader.readexactly(5)
            writer.transport.abort()
            await left.wait()


@needs_sandbox
async def test_an_answer_that_comes_before_the_question_is_over_arrives(sandbox):
    """A gateway that refuses a large request and hangs up is still heard, not only seen to hang up."""

    async def refuse(reader, writer):
        await reader.read(1)
        writer.write(b"too large")
        writer.write_eof()
        while await reader.read(65_536):
            pass

    async with served(refuse) as port, relay_to(port, sandbox) as relay:
        with anyio.fail_after(60):
            reader, writer = await connected(relay)
            writer.write(b"x" * (4 << 20))
            assert await reader.read(-1) == b"too large"
            writer.close()


async def killed(sandbox):
    """End the relay's process, as an agent might that runs as the same user."""
    (channel,) = (
        channel for channel in sandbox.handle(HANDLE, trusted=True)._channels if channel._started.code is None
    )
    await channel.kill()


@needs_sandbox
async def test_a_child_that_dies_is_started_again_at_the_same_place_once(sandbox):
    """Each death is a sentence in the notes, and the error that the verdict is to name; after the last, no more."""
    notes, errors, told = [], [], asyncio.Event()

    def note(text):
        notes.append(text)
        told.set()

    async with served(echo) as port, relay_to(port, sandbox, note=note, hindered=errors.append) as relay:
        with anyio.fail_after(100):
            url = relay.url
            reader, writer = await connected(relay)
            writer.write(b"hello")
            await reader.readexactly(5)
            await killed(sandbox)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""  # a call in flight breaks
            writer.close()
            await told.wait()
            assert await echoed(relay, b"again") == b"again"
            assert relay.url == url
            told.clear()
            await killed(sandbox)
            await told.wait()
            with pytest.raises(ConnectionError):
                await connected(relay)
    assert [note.rpartition("; ")[2] for note in notes] == [
        "it was started again",
        f"it had been started {STARTS} times and is left alone",
    ]
    assert [(type(error), error.owner) for error in errors] == [(SandboxError, "sandbox")] * 2


@needs_sandbox
async def test_after_stop_nothing_listens_and_nobody_is_told_of_a_death(sandbox):
    """Nor after a second one."""
    notes = []
    async with served(echo) as port, relay_to(port, sandbox, note=notes.append) as relay:
        assert await echoed(relay, b"x") == b"x"
        await relay.stop()
        with pytest.raises(ConnectionError):
            await connected(relay)
    assert notes == []


async def test_without_python_in_the_sandbox_the_error_says_what_to_do():
    """It is the sandbox's, and names the ways out."""
    sandbox = FakeSandbox(faults={"spawn": SandboxError("cannot start python3: no such program")})
    await sandbox.start()
    with pytest.raises(SandboxError, match=r"no such program; it needs Python 3\.6 .* gateway_reach a URL"):
        await GatewayRelay(sandbox, 1).start()


# --- a hostile child ---------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def hostile(child, port):
    """A relay whose child is a script of a test's; yields it with its notes."""
    sandbox = FakeSandbox(on_spawn=child)
    await sandbox.start()
    notes, over = [], asyncio.Event()

    def note(text):
        notes.append(text)
        if "left alone" in text:
            over.set()

    async with relay_to(port, sandbox, note=note) as relay:
        yield relay, notes, over
    await sandbox.stop()


GREETING = b"rollout-relay 4000\n"


@pytest.mark.parametrize("said", [b"", b"hello\n", b"rollout-relay 0\n", b"rollout-relay many\n", b"x" * 5000])
async def test_a_child_that_does_not_greet_is_none(said):
    """Whatever it says instead; its words are in the error."""

    async def child(process):
        await process.send(said)

    sandbox = FakeSandbox(on_spawn=child)
    await sandbox.start()
    relay = GatewayRelay(sandbox, 1)
    with anyio.fail_after(30), pytest.raises(SandboxError, match="does not start"):
        await relay.start()
    await relay.stop()


@pytest.mark.parametrize(
    ("frames", "why"),
    [
        (b"\xff" * 100, "a frame of kind 255"),
        (rc.HEADER.pack(rc.DATA, 1, 2**31), "a frame of kind 2"),
        (rc.frame(rc.OPEN, 1) * 2, "it opened stream 1"),
        (b"".join(rc.frame(rc.OPEN, n) for n in range(rc.STREAMS + 1)), "it opened stream 256 while 256 are open"),
        (
            rc.frame(rc.OPEN, 1) + rc.frame(rc.DATA, 1, b"x" * rc.CHUNK) * (rc.WINDOW // rc.CHUNK + 1),
            "more on stream 1 than it may",
        ),
        (
            rc.frame(rc.OPEN, 1) + rc.frame(rc.END, 1) + rc.frame(rc.DATA, 1, b"x"),
            "more on stream 1 than it may",
        ),
    ],
)
async def test_a_child_that_breaks_the_rules_is_ended(frames, why):
    """At once, with a note that says which; what it may have sent is bounded by a window a stream."""

    async def child(process):
        await process.send(GREETING + frames)
        await anyio.sleep_forever()

    async with served(echo) as port, hostile(child, port) as (_, notes, over):
        with anyio.fail_after(60):
            await over.wait()
    assert len(notes) == STARTS
    assert all(why in note for note in notes), notes


async def test_a_child_that_never_reads_is_not_waited_for_and_fills_nothing():
    """Its streams are answered by a server that floods: what is taken of it stays at a window each, and `stop` ends."""
    flooding = asyncio.Event()

    async def flood(_reader, writer):
        flooding.set()
        while True:
            writer.write(bytes(1 << 20))
            await writer.drain()

    async def child(process):
        streams = 40
        await process.send(GREETING + b"".join(rc.frame(rc.OPEN, n) + rc.credit(n, 2**32 - 1) for n in range(streams)))
        await anyio.sleep_forever()

    async with served(flood) as port, hostile(child, port) as (relay, notes, _):
        with anyio.fail_after(60):
            await flooding.wait()
            with anyio.move_on_after(0.5):
                await anyio.sleep_forever()
            assert relay.counts.down < 32 << 20
    assert notes == []


async def test_streams_that_come_and_go_by_the_thousand_do_not_pile_up():
    """A child that opens and resets without end is heard at the pace at which its streams are gone."""
    heard = asyncio.Event()

    async def child(process):
        await process.send(GREETING)
        for n in range(20_000):  # more than a pipe holds
            await process.send(rc.frame(rc.OPEN, n) + rc.frame(rc.RESET, n))
        heard.set()
        await anyio.sleep_forever()

    async with served(echo) as port, hostile(child, port) as (relay, notes, _):
        with anyio.fail_after(100):
            await heard.wait()
        assert relay.counts.streams > 1000
    assert notes == []


async def test_frames_for_streams_that_are_not_there_say_nothing():
    """They may be late ones; a stream that is opened afterwards works."""

    async def child(process):
        late = b"".join(rc.frame(kind, 7) for kind in (rc.END, rc.RESET)) + rc.frame(rc.DATA, 7, b"x") + rc.credit(7, 9)
        await process.send(GREETING + late + rc.frame(rc.OPEN, 8) + rc.frame(rc.DATA, 8, b"hi") + rc.frame(rc.END, 8))
        reader, found = rc.Frames(), []
        while not found or found[-1][0] != rc.END:
            found += reader.feed(await process.receive())
        assert found == [(rc.DATA, 8, b"hi"), (rc.END, 8, b"")]
        process.stderr(b"all as it should be")

    async with served(echo) as port, hostile(child, port) as (_, notes, over):
        with anyio.fail_after(60):
            await over.wait()
    assert all("all as it should be" in note for note in notes)


# --- the child beside a socket -----------------------------------------------------------------------------------


@pytest.fixture
async def forwarder(tmp_path):
    """`relay_child.py --unix` as a container would run it, before an echo on that socket; yields its port."""
    argv = [sys.executable, "-I", "-S", str(PROGRAM), "--port", "0", "--unix", str(tmp_path / "s")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:  # noqa: ASYNC220 - a test may block
        name, _, port = child.stdout.readline().decode().strip().partition(" ")
        assert name == "rollout-relay"
        async with served(echo, tmp_path / "s"):
            yield int(port)
        child.kill()


async def test_the_child_joins_loopback_with_a_socket(forwarder):
    """64 at once, a megabyte each, half-closed; then one to a gateway that has gone."""

    async def one(number):
        reader, writer = await asyncio.open_connection("127.0.0.1", forwarder)
        data = bytes([number]) * (1 << 20)

        async def send():
            writer.write(data)
            await writer.drain()
            writer.write_eof()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send())
            back = await reader.read(-1)
        writer.close()
        return back == data

    with anyio.fail_after(100):
        assert all(await asyncio.gather(*(one(number) for number in range(64))))


async def test_a_socket_that_is_not_there_breaks_the_connection_and_not_the_child(tmp_path):
    argv = [sys.executable, str(PROGRAM), "--unix", str(tmp_path / "nobody")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:  # noqa: ASYNC220 - as above
        port = int(child.stdout.readline().split()[1])
        with anyio.fail_after(30):
            for _ in range(2):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
                writer.close()
        child.kill()


def test_a_port_that_is_taken_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, PROGRAM, "--stdio", "--port", str(port)], capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
