"""Whole rollouts in Docker: what they leave when their orchestrator is killed, and what each failure is called."""
# What is imported below needs what is asked for first.
# ruff: noqa: E402

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import anyio
import attrs
import pytest
import requirements
from docker_images import BARE, DEBIAN, ask
from test_resume import STATES, config_of, killed_in, went_on

requirements.module("aiodocker", "docker")

from orchestrator import Rollout, RolloutConfig
from orchestrator.capture import read_trajectory
from orchestrator.journal import read_journal
from orchestrator.recovery import reap, take
from orchestrator.sandboxes.docker import LABEL, sweep
from orchestrator.tasks import demo_task
from states.journal import LeaseRecord, Transition

pytestmark = pytest.mark.docker

IMAGES = {"debian:stable-slim": DEBIAN}
BARELY = {"debian:stable-slim": BARE}
ROLLOUT_SEC = 120
ROOT = Path(__file__).resolve().parents[1]
PID = f"{LABEL}owner-pid"


@pytest.fixture(autouse=True)
def engine(docker_image):
    """A Debian to run the demo task on."""
    return docker_image()


def play(agent: str = "oracle", *, script: list | None = None, **settings):
    """A rollout of the demo task in Docker, driven to its close."""
    env = {"ROLLOUT_SCRIPT": json.dumps({"turns": [script]})} if script else {}
    base = {"task": demo_task(), "sandbox": "docker", "image_map": IMAGES, "env": env}

    async def driven():
        with anyio.fail_after(ROLLOUT_SEC):
            return await Rollout(RolloutConfig(agent=agent, **{**base, **settings})).run()

    return anyio.run(driven)


def left_by(folder: Path) -> int:
    """What the engine says of the container of a rollout: 404 when there is none."""
    return ask("GET", f"/containers/rollout-{folder.name}/json")[0]


# --- good ones -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("agent", "reward"), [("oracle", 1.0), ("noop", 0.0)])
@pytest.mark.parametrize("image", [DEBIAN, BARE])
def test_the_demo_task_is_sound_in_docker(tmp_path, docker_image, agent, reward, image):
    """The oracle gets all and noop nothing, on an image with and one without Python."""
    result = play(agent, out=tmp_path, image_map={"debian:stable-slim": docker_image(image)})
    assert (result.state, result.reward) == ("closed/rewarded", reward), (result.verdict, result.errors)
    assert any(f"the image {image} stands for debian:stable-slim" in note for note in result.notes)
    assert left_by(Path(result.folder)) == 404


def test_eight_at_once_share_one_image(tmp_path):
    """All of them are rewarded, the image is built once, and nothing is left."""
    folder = tmp_path / "task"
    shutil.copytree(demo_task(), folder)
    (folder / "environment/salt").write_text(uuid.uuid4().hex)
    results = []

    async def one() -> None:
        config = RolloutConfig(agent="oracle", task=folder, sandbox="docker", image_map=IMAGES, out=tmp_path / "runs")
        results.append(await Rollout(config).run())

    async def main() -> None:
        with anyio.fail_after(ROLLOUT_SEC * 2):
            async with anyio.create_task_group() as tasks:
                for _ in range(8):
                    tasks.start_soon(one)

    anyio.run(main)
    assert [result.reward for result in results] == [1.0] * 8, [result.errors for result in results]
    assert sum(note.startswith("built the image") for result in results for note in result.notes) == 1
    assert [left_by(Path(result.folder)) for result in results] == [404] * 8


def test_an_answer_that_comes_after_the_deadline_is_worth_nothing(tmp_path):
    """An agent out of time left a process that would write the right answer while the tests run: it is dead by then."""
    folder = tmp_path / "task"
    shutil.copytree(demo_task(), folder)
    test = folder / "tests/test.sh"
    test.write_text(test.read_text().replace("\nexpected=0\n", "\ntouch /app/now\nsleep 2\nexpected=0\n"))
    solve = (folder / "solution/solve.sh").read_text().partition("\n")[2]
    waits = "while [ ! -e /app/now ]; do sleep 0.05; done"
    late = f"cat > late.sh <<'END'\n{solve}\nEND\nsetsid sh -c '{waits}; sh late.sh' >/dev/null 2>&1 & sleep 1000"
    settings = {"task": folder, "out": tmp_path / "runs", "turn_sec": 1, "deadlines": {"cancelling": 0.5}}
    result = play("scripted", script=[{"shell": late}], **settings)
    assert (result.state, result.reward, result.ended_by) == ("closed/rewarded", 0.0, "deadline"), result.errors
    output = Path(result.folder, "verifier/run-1/stdout.txt").read_text()
    assert "found ''" in output


def test_what_a_rollout_asked_the_engine_is_the_same_for_long_and_short_ones(tmp_path, monkeypatch):
    """Six requests, with one tool call or with thirty."""
    from orchestrator.sandboxes import docker

    calls = []
    real = docker.DockerSandbox.stop

    async def stop(self):
        await real(self)
        calls.append(self.engine_calls)

    monkeypatch.setattr(docker.DockerSandbox, "stop", stop)
    play(out=tmp_path)
    calls.clear()
    for many in (1, 30):
        result = play("scripted", script=[{"shell": "date"}] * many, out=tmp_path)
        assert result.tool_calls == many
    assert calls == [6, 6]


# --- BenchFlow's own task ------------------------------------------------------------------------------------

HELLO = "tests/examples/hello-world-task"


@pytest.fixture(scope="module")
def hello_world(tmp_path_factory):
    """BenchFlow's hello-world task as it is: from a clone at `ROLLOUT_BENCHFLOW`, else fetched now."""
    place = tmp_path_factory.mktemp("benchflow")
    repository = os.environ.get("ROLLOUT_BENCHFLOW")
    try:
        if repository is None:
            repository = str(place / "clone")
            clone = ["git", "clone", "-q", "--bare", "--depth=1", "https://github.com/benchflow-ai/benchflow"]
            subprocess.run([*clone, repository], check=True, capture_output=True, timeout=120)
        archive = ["git", "-C", repository, "archive", "HEAD", HELLO]
        packed = subprocess.run(archive, check=True, capture_output=True, timeout=60).stdout
        subprocess.run(["tar", "-x", "-C", str(place)], input=packed, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        requirements.missing("benchflow", f"give a clone of BenchFlow in ROLLOUT_BENCHFLOW; it cannot be had: {error}")
    return place / HELLO


@pytest.mark.slow
@pytest.mark.parametrize(("agent", "reward"), [("oracle", 1.0), ("noop", 0.0)])
def test_benchflows_own_hello_world_runs_as_it_is(tmp_path, hello_world, agent, reward):
    """Its base image is mapped to one that is here, its Dockerfile is built, its tests are run."""
    result = play(agent, task=hello_world, image_map={"ubuntu:24.04": DEBIAN}, out=tmp_path)
    if any("apt-get" in error["message"] for error in result.errors):
        requirements.missing("benchflow", "its Dockerfile installs a Debian package, and no mirror is within reach")
    assert (result.state, result.reward) == ("closed/rewarded", reward), (result.verdict, result.errors)
    assert f"the image {DEBIAN} stands for ubuntu:24.04 (image map)" in result.notes


# --- the orchestrator is killed ------------------------------------------------------------------------------

TRANSPORT = {"session/acp": "acp"}
"""Which transport leads to a state; the other one to all others."""

KILLED_IN = ("session/acp", *(state.replace("session", "session/factory") for state in STATES))


def there(state: str) -> dict:
    """Where those are that are killed; turns are as long as they need to be there."""
    return {"sandbox": "docker", "image_map": IMAGES, "turn_sec": 1.0 if state == "releasing" else 2.0}


def killed(state: str, out: Path, **where) -> Path:
    """The folder of a rollout whose orchestrator was killed as it entered `state`, a leaf of the machine."""
    transport = TRANSPORT.get(state, "session-factory")
    word = "session" if state.startswith("session/") else state
    return killed_in(word, transport, out, **{**there(state), **where})


@pytest.mark.parametrize("state", KILLED_IN)
def test_a_killed_rollout_leaves_nothing_once_it_is_reaped(state, tmp_path):
    """What ran in the container ends by itself; reaping captures, closes and removes."""
    folder = killed(state, tmp_path)
    assert left_by(folder) == 200
    status, answer = ask("POST", f"/containers/rollout-{folder.name}/wait")
    assert (status, json.loads(answer)["StatusCode"]) == (200, 3)
    assert_reaped(folder, state)


def assert_reaped(folder: Path, state: str) -> None:
    """It is closed, each prompt has its capture, nothing is held, and there is no container."""
    result = anyio.run(reap, folder)
    assert result.state == ("closed/rewarded" if state == "releasing" else "closed/failed")
    names = [record.event.name for record in read_journal(folder) if isinstance(record, Transition)]
    assert names.count("Prompted") == names.count("Captured")
    assert not result.leaked
    assert left_by(folder) == 404
    assert not any(record.lease.kind == "sandbox" for record in _open_leases(folder))


INTENDED = """
import json, os, sys
from pathlib import Path
import anyio
from orchestrator import Rollout, RolloutConfig
from orchestrator.sandboxes import docker
from orchestrator.tasks.authoring import demo_task

real = docker._accepted
async def accepted(listener):
    await real(listener)
    os.kill(os.getpid(), 9)
docker._accepted = accepted
config = RolloutConfig(
    task=demo_task(), agent="oracle", sandbox="docker", out=Path(sys.argv[1]), new_id=lambda: sys.argv[2],
    image_map=json.loads(sys.argv[3]),
)
anyio.run(Rollout(config).run)
"""


def test_a_container_whose_lease_was_only_intended_is_found_by_its_name(tmp_path):
    """Its orchestrator was killed in the moment in which the container came up."""
    folder = tmp_path / f"intended-{uuid.uuid4().hex[:8]}"
    argv = [sys.executable, "-c", INTENDED, str(tmp_path), folder.name, json.dumps(IMAGES)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=ROLLOUT_SEC)
    assert done.returncode == -9, done.stderr
    assert left_by(folder) == 200
    assert_reaped(folder, "provisioning")


@pytest.mark.parametrize("state", ["session/acp", "executing", "checking", "verifying"])
def test_a_killed_rollout_goes_on_in_its_container(state, tmp_path):
    """With the files as they were: it is rewarded, and nothing is left."""
    folder = killed(state, tmp_path)
    config = config_of(TRANSPORT.get(state, "session-factory"), tmp_path, folder.name, state)
    result = anyio.run(went_on, folder, attrs.evolve(config, **there(state)))
    assert (result.state, result.reward, result.leaked) == ("closed/rewarded", 1.0, ()), result.errors
    assert left_by(folder) == 404


def test_a_stop_of_the_command_line_leaves_no_connection_open_and_can_be_closed(tmp_path):
    """After ^C nobody complains of an unclosed session on stderr, and what was stopped is reaped."""
    script = json.dumps({"turns": [[{"say": "working"}, {"wait_cancel": 60}]]})
    argv = [sys.executable, "-m", "orchestrator", "run", "demo", "--agent", "scripted", "--sandbox", "docker"]
    argv += [f"--image-map={name}={image}" for name, image in IMAGES.items()]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "default::ResourceWarning"}
    process = subprocess.Popen(
        [*argv, "--env", f"ROLLOUT_SCRIPT={script}"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    said = ""
    while "-> executing" not in said and (line := process.stderr.readline()):
        said += line.decode()
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=ROLLOUT_SEC)[1].decode()
    assert process.returncode == 5, said
    assert "SIGINT: stopping" in said
    assert not [word for word in ("Unclosed", "ResourceWarning", "Traceback") if word in said], said
    (folder,) = (tmp_path / "runs").iterdir()
    assert left_by(folder) == 200
    assert anyio.run(reap, folder).state == "closed/cancelled"
    assert left_by(folder) == 404


def test_a_rollout_that_was_stopped_and_let_go_of_can_be_cancelled_in_its_process(tmp_path):
    """Whoever has the object still gives everything back with it."""
    config = RolloutConfig(agent="noop", task=demo_task(), sandbox="docker", image_map=IMAGES, out=tmp_path)

    async def main() -> Rollout:
        rollout = Rollout(config)
        rollout.stop("test")
        await rollout.run()
        await rollout.detach()
        await rollout.detach()
        assert left_by(rollout.folder) == 200
        await rollout._world.sandbox.stop()
        return rollout

    assert left_by(anyio.run(main).folder) == 404


def _open_leases(folder: Path) -> list[LeaseRecord]:
    found = {}
    for record in read_journal(folder):
        if isinstance(record, LeaseRecord):
            found[record.lease.kind, record.lease.name] = record
    return [record for record in found.values() if record.action != "returned"]


def test_what_was_killed_is_found_without_its_journal(tmp_path, dockerd):
    """By label, in an engine where nobody else is killed; afterwards its journal can still be closed."""
    engine = dockerd()
    engine.load(BARE)
    folder = killed("executing", tmp_path, image_map=BARELY, sandbox_options={"engine": engine.url})
    (left,) = engine.containers()
    told = anyio.run(sweep, {"engine": engine.url})
    assert told == (f"removed container rollout-{folder.name} of process {left['Labels'][PID]}, which is gone",)
    assert engine.containers() == []
    assert anyio.run(reap, folder).state == "closed/failed"


def test_what_another_process_goes_on_with_is_no_dead_ones(tmp_path, dockerd):
    """Its labels name who was killed; no sweep takes it from who resumed it, nor while that is still on its way."""
    engine = dockerd()
    engine.load(BARE)
    where = {**there("executing"), "image_map": BARELY, "sandbox_options": {"engine": engine.url}}
    folder = killed("executing", tmp_path, **where)
    swept = []

    async def look(moved) -> None:
        if moved.dest in ("executing", "verifying"):
            swept.extend([moved.dest, *await sweep({"engine": engine.url})])

    taken = take(folder)
    assert anyio.run(sweep, {"engine": engine.url}) == ()
    taken.sink.close()
    config = config_of("session-factory", tmp_path, folder.name, "executing")
    result = anyio.run(went_on, folder, attrs.evolve(config, **where, hooks=(look,)))
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), result.errors
    assert swept == ["executing", "verifying"]
    assert engine.containers() == []


# --- what goes wrong -----------------------------------------------------------------------------------------


def failed(result, *words: str) -> None:
    """It failed, the sandbox is to blame, and its errors say these words."""
    text = "\n".join(error["message"] for error in result.errors)
    assert (result.state, result.reward, result.verdict.owner) == ("closed/failed", None, "sandbox"), text
    for word in words:
        assert word in text


def _task(tmp_path: Path, dockerfile: str) -> Path:
    folder = tmp_path / "task"
    shutil.copytree(demo_task(), folder)
    (folder / "environment/Dockerfile").write_text(dockerfile)
    return folder


def test_a_dockerfile_that_fails_is_the_sandboxes_failure(tmp_path):
    """With the end of the build's log."""
    task = _task(tmp_path, f"FROM {DEBIAN}\nRUN echo these are the last words; exit 7\n")
    failed(play(task=task, out=tmp_path), "these are the last words", "cannot be built")


def test_a_base_image_that_is_not_there_is_the_sandboxes_failure(tmp_path):
    """With what to do about it."""
    task = _task(tmp_path, "FROM registry.invalid/base:1\n")
    failed(play(task=task, out=tmp_path), "registry.invalid/base:1 is not here", "--image-map")


def test_no_engine_is_the_sandboxes_failure(tmp_path):
    """With what to do about it."""
    result = play(sandbox_options={"engine": f"unix://{tmp_path}/none"}, out=tmp_path)
    failed(result, "no engine answers", "start dockerd")


REFUSED = """
import ctypes, sys
from orchestrator.sandboxes import container
bits = (0xFFFFFFFF & ~0b110).to_bytes(4, "little")  # all capabilities but those that see past a file's mode
header = (0x20080522).to_bytes(4, "little") + bytes(4)
known = int(open("/proc/self/status").read().partition("CapEff:")[2].split()[0], 16) & ~0b110
low, high = (known & 0xFFFFFFFF).to_bytes(4, "little"), (known >> 32).to_bytes(4, "little")
container.call("capset", ctypes.create_string_buffer(header),
               ctypes.create_string_buffer(low + low + bytes(4) + high + high + bytes(4)))
import anyio
from orchestrator import Rollout, RolloutConfig
from orchestrator.tasks.authoring import demo_task
config = RolloutConfig(task=demo_task(), agent="oracle", sandbox="docker", out=None,
                       sandbox_options={"engine": "unix://" + sys.argv[1]})
result = anyio.run(Rollout(config).run)
print(result.state, result.verdict.owner, result.errors[0]["message"])
"""


def test_a_socket_that_is_closed_to_us_is_the_sandboxes_failure(tmp_path):
    """With what to do about it."""
    import socket

    path = tmp_path / "shut.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        path.chmod(0)
        if os.geteuid() == 0:
            os.chown(path, 65_534, 65_534)
        argv = [sys.executable, "-c", REFUSED, str(path)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=ROLLOUT_SEC)
    assert done.stdout.startswith("closed/failed sandbox "), done.stderr
    assert "permission denied; join the group" in done.stdout


def test_an_engine_that_goes_away_in_mid_turn_is_the_sandboxes_failure(tmp_path, dockerd):
    """The turn is sealed with all that was captured, nothing runs on, and what is left goes when the engine is back."""
    engine = dockerd()
    engine.load(BARE)

    def kill_it(moved) -> None:
        if moved.dest == "executing":
            engine.kill()

    script = [{"say": "hello"}, {"shell": "sleep 1000"}]
    settings = {"sandbox_options": {"engine": engine.url}, "image_map": {"debian:stable-slim": BARE}}
    result = play("scripted", script=script, out=tmp_path, hooks=(kill_it,), **settings)
    failed(result, "went away")
    folder = Path(result.folder)
    segment = read_trajectory(folder)[0]
    assert [step.data["type"] for step in segment.steps][:2] == ["user_message", "agent_message"]
    assert segment.sealed["complete"] is False
    assert result.leaked == (f"sandbox rollout-{folder.name}",)
    engine.start_again()
    assert not anyio.run(reap, folder).leaked
    assert engine.containers() == []


@pytest.mark.parametrize("state", ["executing", "capturing/whole", "quiescing", "verifying"])
def test_a_container_that_vanishes_is_the_sandboxes_failure(state, tmp_path):
    """Somebody removed it: nothing is graded, what was said is kept, whoever finds out first."""
    name = f"gone-{uuid.uuid4().hex[:8]}"

    def vanish(moved) -> None:
        if moved.dest == state:
            ask("DELETE", f"/containers/rollout-{name}?force=1")

    script = [{"say": "words"}, *([{"shell": "sleep 1000"}] if state == "executing" else [])]
    result = play("scripted", script=script, out=tmp_path, new_id=lambda: name, hooks=(vanish,))
    failed(result)
    (segment,) = read_trajectory(Path(result.folder))
    assert segment.sealed is not None
    assert segment.steps[1].data["text"] == "words"
    assert not any(lease.startswith("sandbox ") for lease in result.leaked)
    assert left_by(Path(result.folder)) == 404


def test_a_disk_that_is_full_is_the_sandboxes_failure(tmp_path, dockerd):
    """An agent that fills the engine's disk cannot be verified; what it did is on record."""
    engine = dockerd(megabytes=64)
    engine.load(BARE)
    script = [{"shell": "cat /dev/zero > /app/all; echo full"}]
    settings = {"sandbox_options": {"engine": engine.url}, "image_map": {"debian:stable-slim": BARE}}
    result = play("scripted", script=script, out=tmp_path, **settings)
    failed(result, "No space left on device")
    assert result.tool_calls == 1
    assert engine.containers() == []
