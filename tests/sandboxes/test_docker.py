"""The docker sandbox, against a real engine: what it is made of, what an agent in it cannot do, what it leaves."""

# What is imported below needs what is asked for first.
# ruff: noqa: E402

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import socket
import threading
from pathlib import Path

import anyio
import attrs
import docker_images
import pytest
import requirements
from docker_images import BARE, DEBIAN, ask

requirements.module("aiodocker", "docker")

from orchestrator.conformance import CLAUSE_SEC, SANDBOX_CLAUSES, ClauseError
from orchestrator.owners import owner, started_at
from orchestrator.sandboxes import SandboxSpec, docker, make_sandbox
from orchestrator.sandboxes.docker import LABEL, DockerSandbox, GatewayReach, Limits, reap, sweep
from states.errors import ConfigError, SandboxError

pytestmark = [pytest.mark.anyio, pytest.mark.docker]


@pytest.fixture
def anyio_backend():
    """The engine's client is asyncio only."""
    return "asyncio"


def containers(**labels: str) -> list[dict]:
    """What the engine has of ours with these labels."""
    wanted = json.dumps({"label": [f"{LABEL}{key}={value}" for key, value in labels.items()]})
    return json.loads(ask("GET", f"/containers/json?all=1&filters={wanted.replace(' ', '')}")[1])


@pytest.fixture
async def box(docker_image, tmp_path):
    """`box(...)`: a sandbox of the Debian image, which is stopped in the end; none of them leaves anything."""
    image = docker_image()
    run = f"{tmp_path.parent.name}-{tmp_path.name}-{os.getpid()}"
    made: list[DockerSandbox] = []
    numbers = itertools.count()

    def make(**settings) -> DockerSandbox:
        base = {"image": image, "labels": {"test": run}} if "build" not in settings else {"labels": {"test": run}}
        number = next(numbers)
        sandbox = DockerSandbox(name=f"{run}-{number}", root=tmp_path / f"root-{number}", **{**base, **settings})
        made.append(sandbox)
        return sandbox

    yield make
    for sandbox in made:
        await sandbox.stop()
        assert not sandbox.root.exists()
    assert containers(test=run) == []


@pytest.fixture
async def up(box):
    """The same, to be awaited: started, with a handle of an agent."""

    async def make(**settings):
        sandbox = box(**settings)
        await sandbox.start()
        handle = sandbox.handle("solver")
        await handle.open()
        return sandbox, handle

    return make


async def said(handle, command, **how) -> str:
    """What a command prints; it has to succeed."""
    result = await handle.exec(command, timeout_sec=60, **how)
    assert result.return_code == 0, result
    return result.stdout


# --- the contract --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clause", SANDBOX_CLAUSES, ids=str)
async def test_docker_sandbox_conforms(box, clause):
    """The clause holds for a container of an ordinary image."""
    with anyio.fail_after(CLAUSE_SEC):
        await clause.check(box)


@pytest.mark.slow
@pytest.mark.parametrize("clause", SANDBOX_CLAUSES, ids=str)
async def test_docker_sandbox_conforms_without_anything_in_the_image(box, docker_image, clause):
    """It holds for an image with a static busybox and no Python too."""
    image = docker_image(BARE)
    with anyio.fail_after(CLAUSE_SEC):
        await clause.check(lambda: box(image=image))


HOMES = {"home_and_tmp_are_private", "processes_have_private_homes"}
"""Clauses that do not hold of root, whose HOME is the image's own."""


@pytest.mark.slow
@pytest.mark.parametrize("clause", [clause for clause in SANDBOX_CLAUSES if clause.name not in HOMES], ids=str)
async def test_docker_sandbox_conforms_with_agents_that_are_root(box, clause):
    """Whoever is root shares its HOME with whoever is, which is asked for; all else holds."""
    with anyio.fail_after(CLAUSE_SEC):
        await clause.check(lambda: box(user="root"))


@pytest.mark.slow
@pytest.mark.parametrize("clause", [clause for clause in SANDBOX_CLAUSES if clause.name in HOMES], ids=str)
async def test_agents_that_are_root_share_their_home(box, clause):
    """Else the list of exceptions would outlive its reason."""
    with pytest.raises(ClauseError):
        await clause.check(lambda: box(user="root"))


async def test_a_rollout_costs_six_requests_whatever_it_does(box, tmp_path):
    """The engine is asked for its version, the image, and to make, start, watch and remove a container."""
    calls = []
    for much in (1, 20):
        sandbox = box()
        await sandbox.start()
        for number in range(much):
            handle = sandbox.handle(f"role-{number}")
            await handle.open()
            await handle.write_file("/app/file", b"x")
            await handle.exec("cat file")
            await handle.end()
            await sandbox.upload(Path(__file__), "/app/uploaded")
            await sandbox.download("/app", tmp_path / "app")
        await sandbox.stop()
        calls.append(sandbox.engine_calls)
    assert calls == [6, 6]


async def test_a_containers_own_layer_stays_small_whatever_the_image_holds(box, tmp_path):
    """The task's folder is made the agents' once, for all containers: each costs six requests and copies nothing."""
    folder = _context(tmp_path, "RUN mkdir /app && head -c 30000000 /dev/urandom > /app/data && chmod 600 /app/data")
    for sandbox in (box(build=folder), box(build=folder)):
        await sandbox.start()
        handle = sandbox.handle("solver")
        await handle.open()
        assert await said(handle, "wc -c < data && echo x >> data && stat -c %U data") == "30000000\nagent\n"
        await handle.end()
        await sandbox.stop()
    assert sandbox.engine_calls == 6
    sandbox = box(build=folder)
    await sandbox.start()
    found = json.loads(ask("GET", f"/containers/{sandbox.name}/json?size=true")[1])
    assert found["SizeRw"] < 1_000_000


async def test_many_who_want_the_same_prebuilt_image_make_its_folder_theirs_once(box, tmp_path):
    """Four at once run one image that was made of it, under the name of a sandbox, and leave no other container."""
    notes: list[str] = []
    await box(
        build=_context(tmp_path, f"RUN echo {os.urandom(8).hex()} > /built"), user="root", note=notes.append
    ).start()
    image = next(note.split()[3] for note in notes if note.startswith("built the image"))
    boxes = [box(image=image) for _ in range(4)]
    async with anyio.create_task_group() as tasks:
        for sandbox in boxes:
            tasks.start_soon(sandbox.start)
    found = [json.loads(ask("GET", f"/containers/{sandbox.name}/json")[1]) for sandbox in boxes]
    assert len({one["Image"] for one in found}) == 1
    assert all(one["Image"] != one["Config"]["Labels"][f"{LABEL}image"] for one in found)
    labels = json.loads(ask("GET", f"/images/{found[0]['Image']}/json")[1])["Config"]["Labels"]
    assert set(labels.values()) == {""}, "a sweep is not to take what anybody runs of it for what that sandbox left"


def test_it_says_that_it_needs_asyncio(docker_image):
    """On trio it is a mistake that says so, before anything is asked."""
    sandbox = DockerSandbox(name="never", image=docker_image())
    with pytest.raises(ConfigError, match="needs asyncio"):
        anyio.run(sandbox.start, backend="trio")
    assert not sandbox.root.exists()


def test_it_is_made_from_what_a_config_asks_for(tmp_path):
    """Options, limits, binds and labels arrive; without an image there is nothing to run."""
    spec = SandboxSpec(
        "docker",
        "r1",
        image="debian",
        cpus=1.5,
        memory_mb=64,
        gateway_port=4000,
        gateway_socket=tmp_path / "s",
        binds=("/opt/x",),
        labels={"rollout": "r1"},
        options={"engine": "unix:///nowhere", "user": "root"},
    )
    sandbox = make_sandbox(spec)
    assert isinstance(sandbox, DockerSandbox)
    assert (sandbox.engine, sandbox.user, sandbox.labels) == ("unix:///nowhere", "root", {"rollout": "r1"})
    assert sandbox.limits == Limits(cpus=1.5, memory_mb=64)
    assert sandbox.binds == ((Path("/opt/x"), "/opt/x"),)
    assert sandbox.gateway_url == "http://127.0.0.1:4000"
    with pytest.raises(ConfigError, match="needs an image"):
        make_sandbox(SandboxSpec("docker", "r2"))


# --- what an agent cannot do ---------------------------------------------------------------------------------

ESCAPES = {
    "a user namespace": "unshare --user true",
    "a mount namespace": "unshare --mount true",
    "a mount": "mount -t tmpfs none /mnt",
    "seeing the tests again": "umount /tests",
    "the sysctls": "echo 1 > /proc/sys/kernel/core_pattern",
    "the control socket": "ls /run/rollout/private/host",
    "another user": "python3 -c 'import os; os.setuid(33)'",
    "another group": "python3 -c 'import os; os.setgroups([0])'",
    "the image's system": "echo x > /usr/bin/planted",
    "a process beside it": "kill -9 2 3 4 5 6 7 8 9",
}
ROOT_MAY = {"another user", "another group", "the image's system"}


@pytest.mark.parametrize("user", ["agent", "root"])
async def test_an_agent_stays_where_it_is(up, user):
    """Neither the agent nor an agent that is root gets out of its namespaces, whatever the container's PID 1 may."""
    _, handle = await up(user=user)
    for what, command in ESCAPES.items():
        got = (await handle.exec(command, timeout_sec=60)).return_code == 0
        assert got == (user == "root" and what in ROOT_MAY), what


async def test_no_set_uid_program_helps_an_agent(up):
    """A shell that is set-uid root, made by a trusted handle, runs as the agent."""
    sandbox, handle = await up()
    ours = sandbox.handle("ours", trusted=True)
    await ours.open()
    await said(ours, "cp /bin/dash /usr/bin/rootly; chmod 4755 /usr/bin/rootly")
    assert await said(handle, "rootly -p -c 'id -u'") == "1000\n"


async def test_an_agent_sees_only_its_own_processes(up):
    """Its /proc holds its own, and its PID 1 can neither be killed nor traced."""
    sandbox, handle = await up()
    other = sandbox.handle("other")
    await other.open()
    await other.spawn(["sleep", "1234"])
    assert "1234" not in await said(handle, "cat /proc/[0-9]*/cmdline")
    await handle.exec("kill -9 1; kill -9 -1")
    assert await said(handle, "echo alive") == "alive\n"
    assert (await handle.exec("cat /proc/1/environ; ls /proc/1/fd")).return_code != 0


async def test_secrets_are_on_no_command_line(up):
    """What is handed over as env is neither in the engine's description nor in its list of processes."""
    sandbox, handle = await up()
    await handle.spawn(["sleep", "1000"], env={"KEY": "s3cret-value"})
    for question in (f"/containers/{sandbox.name}/json", f"/containers/{sandbox.name}/top?ps_args=axww"):
        status, answer = ask("GET", question)
        assert status == 200
        assert b"s3cret-value" not in answer


async def test_what_an_agent_left_is_dead_and_the_tasks_services_are_not(box, tmp_path):
    """Ending a role kills its daemons, and neither what the image's ENTRYPOINT started nor what others run."""
    (tmp_path / "Dockerfile").write_text(
        f"FROM {DEBIAN}\n"
        "RUN mkdir /srv/state\n"
        "RUN printf '#!/bin/sh\\nexec 9>/srv/state/lock; flock 9; echo up >/srv/state/up; exec \"$@\"\\n' >/entry\n"
        'RUN chmod 755 /entry && mkfifo -m 666 /srv/state/wait\nENTRYPOINT ["/entry"]\n'
    )
    sandbox = box(build=tmp_path)
    await sandbox.start()
    ours = sandbox.handle("ours", trusted=True)
    await ours.open()
    await said(ours, "while [ ! -s /srv/state/up ]; do sleep 0.01; done")
    agent = sandbox.handle("solver")
    await agent.open()
    await said(agent, "(setsid sh -c 'exec 8>/app/lock; flock 8; echo >/app/held; exec sleep 100000' &) ")
    await said(ours, "while [ ! -e /app/held ]; do sleep 0.01; done")
    evidence = await agent.end()
    assert "was killed and is gone" in evidence[0]
    assert "none of" in evidence[1]
    await said(ours, "flock -n /app/lock true")
    assert (await ours.exec("flock -n /srv/state/lock true")).return_code != 0


# --- files ---------------------------------------------------------------------------------------------------


async def test_an_image_brings_the_work_and_the_agent_may_change_it(box, tmp_path):
    """What the Dockerfile put into the task's folder, as root, is the agent's; its ENV is there for everybody."""
    (tmp_path / "data.txt").write_text("as built")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {DEBIAN}\nENV FLAVOUR=vanilla LD_PRELOAD=/nowhere.so\nWORKDIR /app/deep\nCOPY data.txt .\n"
        "COPY data.txt /tmp/seed\n"
    )
    sandbox = box(build=tmp_path)
    await sandbox.start()
    handle = sandbox.handle("solver")
    await handle.open()
    assert (
        await said(handle, "cat deep/data.txt; echo changed > deep/data.txt; printf ' %s' $FLAVOUR")
        == "as built vanilla"
    )
    assert await said(handle, "cat /tmp/seed; echo mine > /tmp/seed") == "as built"
    other = sandbox.handle("other")
    await other.open()
    assert await said(other, "cat /tmp/seed deep/data.txt") == "as builtchanged\n"


async def test_an_upload_may_go_anywhere(up, tmp_path):
    """A folder that the image does not have is made, and the agent's; the system's stay root's."""
    sandbox, handle = await up()
    (tmp_path / "table.csv").write_text("1,2\n")
    await sandbox.upload(tmp_path / "table.csv", "/data/in/table.csv")
    await sandbox.upload(tmp_path / "table.csv", "/opt/table.csv")
    assert (
        await said(handle, "cat /data/in/table.csv; echo 3 >> /data/in/table.csv; cat /opt/table.csv") == "1,2\n1,2\n"
    )
    assert (await handle.exec("echo 3 >> /opt/table.csv")).return_code != 0


async def test_a_download_into_a_folder_that_is_there_is_one_request(up, tmp_path, monkeypatch):
    """Of a file as of a folder: only where there is none does it matter beforehand which of them it is."""
    sandbox, handle = await up()
    await said(handle, "mkdir logs; echo 1 > logs/one; echo 2 > two")
    asked, ask = [], docker.ask
    monkeypatch.setattr(
        docker, "ask", lambda control, do, *args, **words: asked.append(do) or ask(control, do, *args, **words)
    )
    (tmp_path / "home").mkdir()
    await sandbox.download("/app/logs", tmp_path / "home")
    await sandbox.download("/app/two", tmp_path / "home")
    assert asked == ["give", "give"]
    await sandbox.download("/app/two", tmp_path / "named")
    assert asked[2:] == ["look", "give"]
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["one", "two"]
    assert (tmp_path / "named").read_text() == "2\n"


async def test_folders_of_the_host_are_there_at_their_own_paths(up, tmp_path):
    """Read-only, and also where the image's folder above them is closed to the agent."""
    (tmp_path / "tool").write_text("#!/bin/sh\necho tool\n")
    (tmp_path / "tool").chmod(0o755)
    with pytest.raises(SandboxError, match="only its owner may read it"):
        await up(binds=((tmp_path, "/root/.cache/tools"),))
    tmp_path.chmod(0o755)
    sandbox, handle = await up(binds=((tmp_path, "/root/.cache/tools"), (tmp_path / "tool", "/opt/tool")))
    assert await said(handle, "/root/.cache/tools/tool; /opt/tool") == "tool\ntool\n"
    assert (await handle.exec("touch /root/.cache/tools/x")).return_code != 0
    ours = sandbox.handle("ours", trusted=True)
    await ours.open()
    assert await said(ours, "/root/.cache/tools/tool; ls -a /root | grep bashrc") == "tool\n.bashrc\n"
    assert (await ours.exec("touch /root/.cache/tools/x")).return_code != 0


async def test_trusted_commands_may_be_any_user_of_the_image(up):
    """Root by default, another one where asked for, and a stranger is named."""
    sandbox, _ = await up()
    ours = sandbox.handle("ours", trusted=True)
    await ours.open()
    assert await said(ours, "id -u") == "0\n"
    assert await said(ours, "id -un; cat", user="www-data") == "www-data\n"
    with pytest.raises(SandboxError, match=r"no user.*nobody-knows-me"):
        await ours.exec("true", user="nobody-knows-me")


async def test_an_agents_user_that_the_image_has_not_is_an_error_and_is_not_made(box):
    """`agent` alone is made; the sentence names those that there are. A user of the image is taken as it is."""
    with pytest.raises(SandboxError, match=r"did not come up: the image has no user 'bob'; give user=agent.*root"):
        await box(user="bob").start()
    sandbox = box(user="www-data")
    await sandbox.start()
    handle = sandbox.handle("solver")
    await handle.open()
    assert await said(handle, "id -un") == "www-data\n"


# --- limits and the network ----------------------------------------------------------------------------------


async def test_limits_are_the_engines(up):
    """Memory, processors and processes are limited, and a fork bomb or a hog ends without harm."""
    sandbox, handle = await up(limits=Limits(cpus=0.5, memory_mb=96, pids=50))
    found = json.loads(ask("GET", f"/containers/{sandbox.name}/json")[1])["HostConfig"]
    assert (found["NanoCpus"], found["Memory"], found["PidsLimit"]) == (500_000_000, 96 << 20, 50)
    hog = await handle.exec(["python3", "-c", "x = bytearray(300 << 20)"], timeout_sec=60)
    assert hog.return_code == -9
    bomb = await handle.exec("for i in $(seq 100); do sleep 1000 & done", timeout_sec=60)
    assert bomb.return_code != 0
    await handle.end()
    again = sandbox.handle("again")
    await again.open()
    assert await said(again, "echo well") == "well\n"


async def test_what_fills_the_disk_is_ended(up):
    """A handle whose folders hold more than they may is ended, and says why."""
    sandbox, handle = await up(limits=Limits(disk_mb=8))
    assert any(text.startswith("disk:") for text in sandbox.unenforced)
    with pytest.raises(SandboxError, match="disk limit of 8 MiB"):
        await handle.exec("head -c 64000000 /dev/urandom > big; sleep 1000", timeout_sec=100)


async def test_a_gpu_that_is_not_there_is_refused(box):
    """With a sentence, before a container is made."""
    with pytest.raises(SandboxError, match=r"asks for 1 GPU.*none to give"):
        await box(gpus=1).start()


@pytest.fixture
def gateway(tmp_path):
    """A server on a unix socket that answers every connection with `hello`."""
    path = tmp_path / "gateway.sock"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen(10)

    def serve() -> None:
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            with client:
                client.recv(100)
                client.sendall(b"hello")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield GatewayReach(path, 4321)
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


CALL = """import socket
s = socket.create_connection(("127.0.0.1", 4321)); s.send(b"hi"); print(s.recv(100).decode())"""


@pytest.mark.parametrize("network", ["gateway-only", "bridge"])
async def test_the_gateway_is_on_loopback(up, gateway, network):
    """In a network of its own, and on the engine's bridge."""
    sandbox, handle = await up(gateway=gateway, network=network)
    assert sandbox.gateway_url == "http://127.0.0.1:4321"
    for _ in range(3):
        assert await said(handle, ["python3", "-c", CALL]) == "hello\n"


async def test_without_a_network_there_is_not_even_the_gateway(up, gateway):
    """`none` has loopback, and nobody on it."""
    sandbox, handle = await up(gateway=gateway, network="none")
    assert sandbox.gateway_url is None
    assert "ConnectionRefused" in (await handle.exec(["python3", "-c", CALL])).stderr
    assert await said(handle, "ls /sys/class/net") == "lo\n"


async def test_the_hosts_network_is_the_hosts(up, gateway):
    """`host` sees the gateway where it listens on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reach = attrs.evolve(gateway, port=port)
        sandbox, handle = await up(gateway=reach, network="host")
        assert sandbox.gateway_url == f"http://127.0.0.1:{port}"
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 10)"
        assert await said(handle, ["python3", "-c", connect]) == ""


# --- what goes wrong -----------------------------------------------------------------------------------------


async def test_an_engine_that_is_not_there_is_named(box, tmp_path):
    """No socket, a socket of nobody's, and an engine elsewhere each have their sentence."""
    with pytest.raises(SandboxError, match=r"no engine answers at unix:///nowhere: there is no such socket"):
        await box(engine="unix:///nowhere").start()
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(dead))
    with pytest.raises(SandboxError, match="nobody listens"):
        await box(engine=f"unix://{dead}").start()
    with pytest.raises(ConfigError, match="cannot see this machine's folders"):
        await box(engine="tcp://127.0.0.1:2375").start()


async def test_an_image_that_cannot_be_had_is_named(box):
    """With the engine's words and what to do about it."""
    with pytest.raises(SandboxError, match=r"image no-such/image:1 is not here and cannot be pulled.*--image-map"):
        await box(image="no-such/image:1").start()


async def test_a_container_that_dies_takes_its_handles_along(up):
    """Channels end, use is a `SandboxError`, and the end is proven by what the engine says of the container."""
    sandbox, handle = await up()
    channel = await handle.spawn(["cat"])
    assert ask("POST", f"/containers/{sandbox.name}/kill")[0] == 204
    assert await channel.wait() == -9
    with pytest.raises(SandboxError):
        await handle.exec("true")
    assert (await handle.end())[0].startswith(f"PID 1 of container {sandbox.name} is gone, and with it all")


async def test_a_container_that_was_removed_is_gone_too(up):
    """Whoever removed it: the handles end, `stop` is fine."""
    sandbox, handle = await up()
    assert ask("DELETE", f"/containers/{sandbox.name}?force=1")[0] == 204
    with pytest.raises(SandboxError):
        await sandbox.upload(Path(__file__), "/app/x")
    assert "is gone" in (await handle.end())[0]
    await sandbox.stop()


async def test_whoever_asked_for_it_is_told_that_the_container_is_gone(up):
    """With its exit code, in the moment in which it goes; not when it is stopped as it should be."""
    told: list[str] = []
    gone = anyio.Event()

    def lost(why: str) -> None:
        told.append(why)
        gone.set()

    sandbox, _ = await up(lost=lost)
    assert ask("POST", f"/containers/{sandbox.name}/kill")[0] == 204
    with anyio.fail_after(30):
        await gone.wait()
    assert told[0].startswith(f"container {sandbox.name} ended, with exit code 137")
    quiet, _ = await up(lost=lost)
    await quiet.stop()
    assert len(told) == 1


async def test_a_start_that_is_cancelled_anywhere_leaves_nothing(box, tmp_path):
    """Whatever the engine was doing: its container is found by our fixture, or rather not."""
    for seconds in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5):
        sandbox = box()
        with anyio.move_on_after(seconds):
            await sandbox.start()
        await sandbox.stop()
        assert ask("GET", f"/containers/{sandbox.name}/json")[0] == 404


@pytest.fixture
async def between(docker_image, tmp_path):
    """An engine between us and the real one: it hangs up on what is in `cut`, and on `mute` it never answers."""
    docker_image()

    class Between:
        url = f"unix://{tmp_path}/between.sock"
        cut: tuple[bytes, ...] = ()
        mute: tuple[bytes, ...] = ()

    async def carry(reader, writer, heard) -> None:
        """What comes, as `heard` makes of it; None hangs up."""
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                data = heard(data)
                if data is None:
                    break
                writer.write(data)
        writer.close()

    async def serve(reader, writer) -> None:
        theirs, ours = await asyncio.open_unix_connection(docker_images.engine_path())
        muted = []

        def asked(data: bytes) -> bytes | None:
            muted.extend(word for word in Between.mute if word in data)
            return None if any(word in data for word in Between.cut) else data

        answers = asyncio.ensure_future(carry(theirs, writer, lambda data: b"" if muted else data))
        await carry(reader, ours, asked)
        answers.cancel()
        writer.close()

    server = await asyncio.start_unix_server(serve, f"{tmp_path}/between.sock")
    async with server:
        yield Between
        server.close()


async def test_what_a_failed_start_could_not_remove_is_removed_by_stop(box, between):
    """The engine went away before the container had started, and was back later: nothing is taken for given back."""
    sandbox = box(engine=between.url)
    between.cut = (b"/start ", b"DELETE ")
    with pytest.raises(SandboxError, match="cannot be started"):
        await sandbox.start()
    assert ask("GET", f"/containers/{sandbox.name}/json")[0] == 200
    with pytest.raises(SandboxError, match="cannot be removed"):
        await sandbox.stop()
    between.cut = ()
    await sandbox.stop()
    assert ask("GET", f"/containers/{sandbox.name}/json")[0] == 404


async def test_an_engine_that_never_answers_holds_nobody_up(box, between, monkeypatch):
    """It had made the container, whose id nobody heard, and does not remove it either: both are given up in time."""
    monkeypatch.setattr(docker, "CREATE_SEC", 1.0)
    monkeypatch.setattr(docker, "UNDO_SEC", 1.0)
    sandbox = box(engine=between.url)
    between.mute = (b"/containers/create", b"DELETE ")
    with pytest.raises(SandboxError, match="no answer from unix://"):
        await sandbox.start()
    between.mute = ()
    await sandbox.stop()
    assert ask("GET", f"/containers/{sandbox.name}/json")[0] == 404


async def test_a_name_that_is_taken_stays_with_whom_it_belongs_to(box, docker_image):
    """A stranger's container of that name, or the folder of another sandbox: refused, and left as it is."""
    name = f"stranger-{os.getpid()}-{os.urandom(3).hex()}"
    assert ask("POST", f"/containers/create?name={name}", {"Image": docker_image(), "Cmd": ["true"]})[0] == 201
    try:
        mine = box()
        mine.name = name
        with pytest.raises(SandboxError, match="in use"):
            await mine.start()
        await mine.stop()
        assert ask("GET", f"/containers/{name}/json")[0] == 200
    finally:
        assert ask("DELETE", f"/containers/{name}")[0] == 204
    first, second = box(), box()
    await first.start()
    second.root = first.root
    with pytest.raises(SandboxError, match=r"its folder .* exists"):
        await second.start()
    await second.stop()
    assert first.root.is_dir()


async def test_a_container_that_is_frozen_holds_nobody_up(up, monkeypatch):
    """Somebody paused it: a handle does not come up, which is said in time, and comes up when it goes on."""
    sandbox, _ = await up()
    monkeypatch.setattr(docker, "OPEN_SEC", 1.0)
    assert ask("POST", f"/containers/{sandbox.name}/pause")[0] == 204
    handle = sandbox.handle("late")
    try:
        with pytest.raises(SandboxError, match="did not come up in 1 s"):
            await handle.open()
    finally:
        assert ask("POST", f"/containers/{sandbox.name}/unpause")[0] == 204
    monkeypatch.undo()
    await handle.open()
    assert await said(handle, "echo here") == "here\n"


# --- builds --------------------------------------------------------------------------------------------------


def _context(tmp_path: Path, *lines: str, base: str = DEBIAN, **files: str) -> Path:
    folder = tmp_path / "environment"
    folder.mkdir(exist_ok=True)
    (folder / "Dockerfile").write_text("\n".join([f"FROM {base}", *lines, ""]))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


async def test_many_who_want_the_same_image_build_it_once(box, tmp_path):
    """Four at once, then one more: one build; its tag is there as long as anybody may want it."""
    folder = _context(tmp_path, f"RUN echo {os.urandom(8).hex()} > /built")
    notes: list[str] = []
    boxes = [box(build=folder, note=notes.append) for _ in range(4)]
    async with anyio.create_task_group() as tasks:
        for sandbox in boxes:
            tasks.start_soon(sandbox.start)
    assert len([note for note in notes if note.startswith("built the image")]) == 1
    tag = next(note.split()[3] for note in notes if note.startswith("built the image"))
    await boxes[0].stop()
    assert ask("GET", f"/images/{tag}/json")[0] == 200
    notes.clear()
    await box(build=folder, note=notes.append).start()
    assert notes == []
    (folder / "extra").write_text("another context is another image")
    await box(build=folder, note=notes.append).start()
    assert [note.split()[0] for note in notes] == ["building", "built"]


async def test_a_base_image_is_mapped_and_the_result_says_so(box, tmp_path):
    """FROM names what cannot be had; the map gives what is here, in builds and for prebuilt images."""
    folder = _context(tmp_path, "RUN true", base="registry.invalid/base:1 AS first")
    notes: list[str] = []
    images = {"registry.invalid/base:1": DEBIAN}
    await box(build=folder, image_map=images, note=notes.append).start()
    assert f"the image {DEBIAN} stands for registry.invalid/base:1 (image map)" in notes
    await box(image="registry.invalid/base:1", image_map=images).start()
    with pytest.raises(SandboxError, match=r"image registry.invalid/base:1 is not here and cannot be pulled"):
        await box(build=folder).start()


DOCKERFILES = {
    "a program with a line that begins with from": (
        'RUN python3 -c "\\',
        "import os; \\",
        'from os import path; print(1)"',
    ),
    "a stage's name in another case": ("RUN touch /built", "FROM build"),
    "a mount of its own": ("RUN --mount=type=cache,target=/cache touch /cache/x",),
    "files with their mode": ("COPY --chmod=755 script /script", "RUN /script"),
    "arguments that the builder gives": ("ARG TARGETARCH", 'RUN test -n "$TARGETARCH"'),
}


@pytest.mark.parametrize("lines", DOCKERFILES.values(), ids=DOCKERFILES)
async def test_dockerfiles_build_as_they_are(box, tmp_path, lines):
    """What docker build takes builds here too, and comes up."""
    folder = _context(tmp_path, *lines, base=f"{DEBIAN} AS Build", script="#!/bin/sh\ntrue\n")
    await box(build=folder).start()


async def test_a_here_document_builds_or_is_refused_with_its_line(box, tmp_path):
    """An engine whose builder does not know them is not asked: what to do is said instead."""
    folder = _context(tmp_path, "RUN <<EOF", "touch /built", "EOF")
    known = json.loads(ask("GET", "/version")[1])["ApiVersion"].split(".") >= ["1", "42"]
    refused = pytest.raises(ConfigError, match=rf"^{folder}/Dockerfile:2 has a here-document, .* --image$")
    with contextlib.nullcontext() if known else refused:
        await box(build=folder).start()


@pytest.mark.parametrize("kind", ["secret,id=key", "ssh"])
async def test_a_mount_that_nobody_gives_is_refused_with_its_line(box, tmp_path, kind):
    """The engine would say that there are no active sessions."""
    folder = _context(tmp_path, "RUN true", f"RUN --mount=type={kind} true")
    with pytest.raises(ConfigError, match=rf"^{folder}/Dockerfile:3 has a mount of type secret or ssh, .* --image$"):
        await box(build=folder).start()


async def test_a_dockerfile_that_fails_says_where(box, tmp_path):
    """The engine's words, the end of the log, and where the whole of it is."""
    folder = _context(tmp_path, "RUN echo the last words >&2; exit 3")
    with pytest.raises(SandboxError) as caught:
        await box(build=folder).start()
    text = str(caught.value)
    assert "cannot be built" in text
    assert "the last words" in text
    log = text.partition("log: ")[2].splitlines()[0]
    assert "the last words" in Path(log).read_text()  # noqa: ASYNC240 - a few lines


async def test_the_cause_of_a_failed_build_is_in_its_error_however_it_was_written(box, tmp_path):
    """In many small pieces, in the engine's colours, by a command that is long: its last lines are told, and whole."""
    noise = "; ".join(f": {number:060}" for number in range(200))
    script = "for i in 1 2 3 4 5 6 7 8; do for w in a b c d e f; do printf '%s ' $w >&2; sleep 0.002; done; echo >&2; "
    script += (
        "done; echo 'the cause is here' >&2; for i in 1 2 3 4 5 6; do printf '%s ' $i >&2; sleep 0.002; done; exit 3"
    )
    folder = _context(tmp_path, f"RUN {noise}; {script}")
    with pytest.raises(SandboxError) as caught:
        await box(build=folder).start()
    text = str(caught.value)
    assert len(text) < 5_000
    assert "\x1b" not in text
    assert text.splitlines().count("  a b c d e f") == 8
    assert "\n  the cause is here\n  1 2 3 4 5 6" in text
    assert "exit code: 3; log: " in text


async def test_what_is_ignored_is_neither_sent_nor_hashed(box, tmp_path):
    """`.dockerignore` holds, with its exceptions; odd files do not stop a build."""
    folder = _context(tmp_path, "COPY . /context/", keep="kept", secret="no")
    (folder / ".dockerignore").write_text("# notes\nsecret\n**/*.log\n!important.log\nlogs/\n")
    for name in ("a.log", "important.log"):
        (folder / name).write_text("log")
    (folder / "logs").mkdir()
    (folder / "logs/x").write_text("log")
    os.mkfifo(folder / "pipe")
    sandbox = box(build=folder)
    await sandbox.start()
    handle = sandbox.handle("solver")
    await handle.open()
    listed = (await said(handle, "cd /context && find . -type f | sort")).split()
    assert listed == ["./.dockerignore", "./Dockerfile", "./important.log", "./keep"]


# --- what the dead leave -------------------------------------------------------------------------------------


async def test_a_sandbox_is_reaped_by_its_handle_and_by_its_intended_name(box, docker_image):
    """Both ways remove container and folder; again is nothing; a stranger's container of that name is left alone."""
    first, second = box(), box()
    handle = await first.start()
    await second.start()
    await reap(handle)
    await reap(handle)
    await reap({"kind": "docker", "name": second.name, "root": str(second.root)})
    assert [ask("GET", f"/containers/{one.name}/json")[0] for one in (first, second)] == [404, 404]
    assert not first.root.exists()
    name = f"stranger-{os.getpid()}"
    assert ask("POST", f"/containers/create?name={name}", {"Image": docker_image(), "Cmd": ["true"]})[0] == 201
    try:
        with pytest.raises(SandboxError, match="not one of ours"):
            await reap({"kind": "docker", "name": name})
    finally:
        assert ask("DELETE", f"/containers/{name}")[0] == 204


async def test_sweeping_takes_what_the_dead_left_and_nothing_else(box, dockerd):
    """By labels: the owner's machine, process and start. The living, other machines and what was kept are left."""
    engine = dockerd()
    engine.load(BARE)
    mine = {f"owner-{key}": str(value) for key, value in owner().items()}
    assert mine["owner-started"] == started_at(os.getpid())
    dead = {**mine, "owner-started": "1"}
    labels = {
        "living": mine,
        "dead": dead,
        "kept": dead,
        "shut down": dead,
        "elsewhere": {**dead, "owner-host": "elsewhere"},
        "nobody": {},
    }
    boxes = {name: box(image=BARE, engine=engine.url, labels=of) for name, of in labels.items()}
    for sandbox in boxes.values():
        await sandbox.start()
    handle = await boxes["kept"].start()
    await boxes["kept"].leave()
    at = engine.url.removeprefix("unix://")
    assert ask("POST", f"/containers/{boxes['shut down'].name}/stop", at=at)[0] == 204  # as an engine does that ends
    told = await sweep({"engine": engine.url})
    gone = ("dead", "shut down")
    assert sorted(told) == sorted(
        f"removed container {boxes[name].name} of process {os.getpid()}, which is gone" for name in gone
    )
    left = {one["Names"][0].lstrip("/") for one in engine.containers()}
    assert left == {sandbox.name for name, sandbox in boxes.items() if name not in gone}
    assert not any(boxes[name].root.exists() for name in gone)
    await reap(handle)
    for sandbox in boxes.values():
        await sandbox.stop()


async def test_nothing_runs_on_when_the_orchestrator_is_gone(up):
    """The container's PID 1 ends when its socket does, and all that was started with it."""
    sandbox, handle = await up()
    await handle.exec("setsid sleep 100000 >/dev/null 2>&1 &")
    sandbox._control.sock.close()  # as the kernel does for a process that was killed
    status, answer = ask("POST", f"/containers/{sandbox.name}/wait")
    assert (status, json.loads(answer)["StatusCode"]) == (200, 3)


async def test_a_container_of_a_dead_orchestrator_can_be_attached_to(up, tmp_path):
    """As it was left: its folder is still there, and is used, whatever the one would be that a new process makes."""
    first, agent = await up()
    handle = await first.start()
    await said(agent, "echo work > /app/work")
    first._control.sock.close()  # as the kernel does for a process that was killed
    second = DockerSandbox(name=first.name, image="unused", root=tmp_path / "elsewhere")
    await second.attach(handle)
    again = second.handle("solver")
    await again.open()
    assert await said(again, "cat /app/work") == "work\n"
    await second.stop()


# --- one that is kept ----------------------------------------------------------------------------------------


async def test_a_container_that_is_left_can_be_attached_to(box, gateway):
    """Its files are there, those of each handle too, what ran in it is not; the way to the gateway is a new one."""
    first = box(gateway=gateway)
    handle = await first.start()
    agent = first.handle("solver-1")
    await agent.open()
    await said(agent, "echo work > /app/work; echo mine > ~/mine; echo scratch > /tmp/scratch")
    await agent.exec("setsid sleep 100000 >/dev/null 2>&1 &")
    await first.leave()
    second = DockerSandbox(name=first.name, image="unused", root=first.root, gateway=gateway)
    evidence = await second.attach(handle)
    assert "was not running" in evidence[0]
    again = second.handle("solver-1")
    await again.open()
    assert await said(again, "cat /app/work ~/mine /tmp/scratch; cat /proc/[0-9]*/comm | grep sleep || echo none") == (
        "work\nmine\nscratch\nnone\n"
    )
    assert await said(again, ["python3", "-c", CALL]) == "hello\n"
    with pytest.raises(SandboxError, match="started already"):
        await second.attach(handle)
    await second.stop()
    with pytest.raises(SandboxError, match="cannot be had again"):
        await DockerSandbox(name=first.name, image="unused", root=first.root).attach(handle)


async def test_the_services_of_an_image_start_again_with_a_container_that_was_left(box, tmp_path):
    """With the image's own ENTRYPOINT and ENV, though what runs is an image that was made of it."""
    lines = ("ENV KEY=value", """ENTRYPOINT ["/bin/sh", "-c", "echo $KEY >>/started; exec \\"$@\\"", "entry"]""")
    first = box(build=_context(tmp_path, *lines))
    handle = await first.start()
    started = "until [ $(wc -l </started) = {} ]; do sleep 0.01; done; tail -n 1 /started; echo $LD_PRELOAD"
    look = first.handle("look", trusted=True)
    await look.open()
    assert await said(look, started.format(1)) == "value\n\n"
    await first.leave()
    second = DockerSandbox(name=first.name, image="unused", root=first.root)
    await second.attach(handle)
    look = second.handle("look", trusted=True)
    await look.open()
    assert await said(look, started.format(2)) == "value\n\n"
    await second.stop()
