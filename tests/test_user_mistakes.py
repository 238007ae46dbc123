"""Mistakes that users make, found before anything is started; and what a stopped or killed process leaves behind."""

from __future__ import annotations

import attrs
import pytest
from harness import TRANSPORTS, build

from orchestrator import Budgets, ConfigError, DirectorRole, MissingExtra, Role, Rollout, RolloutConfig, Scene, Turn
from orchestrator.directors import until_approved, until_verified
from orchestrator.metering import SOCKET, SOCKET_FOLDER, remove_socket
from orchestrator.registry import default_registry
from orchestrator.sandboxes.fake import FakeSandbox
from orchestrator.tasks import demo_task, load_task
from states.errors import ConfigError as StatesConfigError
from states.events import Failure


@pytest.mark.parametrize(
    ("sandbox", "sentence"),
    [
        ("dokcer", "sandbox 'dokcer' is not known; give .*docker"),
        ("nowhere:Nothing", "sandbox 'nowhere:Nothing' cannot be imported"),
        ("math:pi", "sandbox 'math:pi' is a float, which cannot be called"),
    ],
)
def test_a_sandbox_that_there_is_not_is_refused_before_there_is_a_folder(tmp_path, sandbox, sentence):
    """One sentence, and nothing on disk."""
    with pytest.raises(ConfigError, match=sentence):
        Rollout(RolloutConfig(prompt="x", agent="noop", sandbox=sandbox, out=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_network_that_a_sandbox_cannot_give_is_refused_before_there_is_a_folder(tmp_path):
    """One sentence with those that it can, and nothing on disk; a sandbox that can is not refused."""
    wanted = RolloutConfig(prompt="x", agent="noop", network="bridge", out=tmp_path / "runs")
    with pytest.raises(ConfigError, match="network of a local sandbox is gateway-only, host, none, not 'bridge'"):
        Rollout(wanted)
    assert not (tmp_path / "runs").exists()
    Rollout(attrs.evolve(wanted, sandbox="fake"))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sandbox": "docker", "sandbox_options": {"engine": "unix:///here"}}, "a docker sandbox needs an image"),
        (
            {"sandbox": "docker", "image": "debian", "sandbox_options": {"engine": "tcp://there:2375"}},
            "the engine at tcp://there:2375 cannot see this machine's folders",
        ),
        ({"sandbox": "docker", "image": "debian"}, "the engine at ssh://there cannot see this machine's folders"),
        ({"sandbox": "daytona"}, "set DAYTONA_API_KEY"),
        ({"sandbox": "daytona", "sandbox_options": {"channel": "telepathy"}}, "channel is session or pty"),
        ({"sandbox": "fake", "agent": "oracle"}, "runs the solution of a task, and there is no task"),
    ],
)
def test_what_can_be_known_to_fail_without_asking_anybody_is_refused(tmp_path, monkeypatch, settings, sentence):
    """No rollout is begun for it, so there is no folder of one that failed."""
    monkeypatch.delenv("DAYTONA_API_KEY", raising=False)
    monkeypatch.setenv("DOCKER_HOST", "ssh://there")
    with pytest.raises(ConfigError, match=sentence):
        Rollout(RolloutConfig(**{"prompt": "x", "agent": "noop", **settings}, out=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("settings", [{"sandbox": "local"}, {"sandbox": "docker", "image": "debian"}])
def test_memory_under_which_no_sandbox_comes_up_is_refused(tmp_path, monkeypatch, settings):
    """The sentence has the task's word for it, and what it takes; a little more is not refused."""
    monkeypatch.setenv("DOCKER_HOST", "unix:///here")
    task = load_task(demo_task())
    small = attrs.evolve(task, limits=attrs.evolve(task.limits, memory_mb=15))
    wanted = RolloutConfig(task=small, agent="noop", out=tmp_path / "runs", **settings)
    with pytest.raises(ConfigError, match=r"the task's memory_mb = 15 is too little: a \w+ sandbox needs 16 MiB"):
        Rollout(wanted)
    assert not (tmp_path / "runs").exists()
    Rollout(attrs.evolve(wanted, task=attrs.evolve(task, limits=attrs.evolve(task.limits, memory_mb=16))))


def test_an_oracle_for_a_task_without_a_solution_is_refused():
    """It is no failure of an agent."""
    task = attrs.evolve(load_task(demo_task()), solution=None)
    with pytest.raises(ConfigError, match=r"agent oracle runs the solution of a task, and task \S+ has no solve\.sh"):
        Rollout(RolloutConfig(task=task, agent="oracle", sandbox="fake", out=None))


def test_an_agent_whose_library_is_not_installed_is_refused_before_there_is_a_folder(tmp_path):
    """The sentence names the extra."""
    agent = attrs.evolve(default_registry().get("noop"), requires=("json", "no_such_library"))
    with pytest.raises(MissingExtra, match=r"noop needs no_such_library, .*pip install 'rollout-orchestrator\[noop\]'"):
        Rollout(RolloutConfig(prompt="x", agent=agent, out=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path):
    """Not a traceback: it says which folder, and why."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made: Not a directory"):
        Rollout(RolloutConfig(prompt="x", agent="noop", out=tmp_path / "file"))


def test_a_mistake_of_configuration_is_not_tried_twice():
    """A second connect must fail in the same way."""
    assert not Failure.of(StatesConfigError("no such thing")).retryable


def test_the_socket_of_a_dead_gateway_is_removed_with_its_folder_and_nothing_else_is(tmp_path):
    """Only a folder of ours that holds only our socket goes; a second time nothing happens."""
    folder = tmp_path / f"{SOCKET_FOLDER}abc"
    folder.mkdir()
    (folder / SOCKET).touch()
    remove_socket({"socket": str(folder / SOCKET)})
    assert not folder.exists()
    remove_socket({"socket": str(folder / SOCKET)})
    remove_socket({})
    foreign = tmp_path / "theirs"
    foreign.mkdir()
    (foreign / SOCKET).touch()
    remove_socket({"socket": str(foreign / SOCKET)})
    assert (foreign / SOCKET).exists()


@pytest.mark.anyio
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_stopped_rollout_can_be_detached_with_its_leases_held(transport):
    """What cannot outlive the process is closed; the sandbox's lease stays open in the journal."""
    stand = build(transport)
    stand.rollout.stop("test")
    result = await stand.rollout.run()
    await stand.rollout.detach()
    assert (result.state, result.ending) == ("disconnected", None)
    assert [lease.kind for lease in stand.rollout._world.leases.open()] == ["sandbox"]
    stand.rollout.cancel()
    await stand.rollout._cancel_and_close()
    assert stand.rollout.state == "closed/cancelled"


# --- what is brought is looked at before anything starts ---------------------------------------------------------


class Bare:
    """A sandbox of a user's own that can do what it has to."""

    async def start(self): ...
    async def exec(self, command, *, timeout_sec=None): ...
    async def upload(self, source, target): ...
    async def download(self, source, target): ...


class Handles(Bare):
    """One that wants to be a whole `Sandbox`, and is not."""

    def handle(self, name, *, trusted=False): ...


class Scores:
    """A verifier."""

    async def verify(self): ...


def a_function(*_given): ...


def without_arguments(): ...


class HalfASandbox:
    """It starts, and that is all."""

    async def start(self): ...


BAD = [
    ({"director": "boss"}, "the director 'boss' must be one of the scene's roles, beside one that works; it has agent"),
    ({"director": "agent"}, "the director 'agent' must be one of the scene's roles, beside one that works"),
    ({"director": 5}, "director must be a function of the story, a DirectorRole, or the name of a role .*, not 5"),
    ({"director": Scores}, "director must be a function .*, not the class Scores"),
    ({"director": DirectorRole(Role("agent", "model-user"))}, "two roles of the scene are called 'agent'"),
    ({"sandbox": 5}, "sandbox must be a kind, module:Class, or an object with start, exec.*; 5 lacks start"),
    ({"sandbox": None}, "sandbox must be a kind, .*; None lacks start"),
    ({"sandbox": object()}, "sandbox must be a kind, .*; an object lacks start, exec, upload, download"),
    ({"sandbox": HalfASandbox()}, "sandbox must be .*; a HalfASandbox lacks exec, upload, download"),
    (
        {"sandbox": Handles()},
        "sandbox must be a Sandbox; a Handles lacks stop, name, cwd, gateway_url, has_environment",
    ),
    ({"sandbox": FakeSandbox}, r"sandbox is the class FakeSandbox, which cannot be called with one SandboxSpec .*Fake"),
    ({"sandbox": without_arguments}, "sandbox is the function without_arguments, which cannot be called with one"),
    ({"verifier": 5}, r"verifier must be an object with verify\(\); 5 lacks verify"),
    ({"verifier": "tasks"}, r"verifier must be an object with verify\(\); 'tasks' lacks verify"),
    ({"verifier": Scores}, r"verifier must be an object with verify\(\), not the class Scores itself"),
    ({"plan": 5}, r"plan must be an object with next\(\); 5 lacks next"),
    ({"journal": 5}, r"journal must be an object with write\(\) and close\(\); 5 lacks write, close"),
    ({"hooks": a_function}, r"hooks must be a tuple, such as \(on_transition,\), not the function a_function"),
    ({"hooks": (a_function, 5)}, "hooks holds 5; each must be like on_transition"),
    ({"on_ask_user": "yes"}, "on_ask_user must be a function, not 'yes'"),
    ({"budgets": 4}, r"budgets must be Budgets\(...\) or a mapping such as {'tokens': 1000}, not 4"),
    ({"budgets": {"tool_call": 4}}, "no budget is called 'tool_call'; did you mean tool_calls"),
    ({"task": 3}, "task must be a task's folder, a Task or None, not 3"),
    ({"prompt": 3}, "prompt must be text, not 3"),
    ({"agent": 3}, "agent must be the name of an agent, or an AgentConfig, not 3"),
    ({"agent": None, "scene": 3}, "scene must be a Scene, not 3"),
    ({"env": "A=1"}, "env must be a mapping of names to values, not 'A=1'"),
    ({"deadlines": {"executing": "1"}}, "deadlines: executing must be seconds > 0, not '1'"),
    ({"registry": {}}, "registry must be a Registry, not a dict"),
]


@pytest.mark.parametrize(("setting", "sentence"), BAD)
def test_what_is_brought_and_cannot_work_is_refused_before_there_is_a_folder(tmp_path, setting, sentence):
    """One sentence that names the setting, what it is and what it must be; nothing is dropped in silence."""
    usual = {"prompt": "x", "agent": "scripted", "sandbox": "fake"}
    with pytest.raises(ConfigError, match=sentence):
        Rollout(RolloutConfig(**{**usual, **setting, "out": tmp_path / "runs"}))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Scene((Role("a", "noop"),), ["a"]), r"Scene: turns holds 'a'; each must be like Turn\(.coder.\)"),
        (lambda: Scene((Role("a", "noop"),), "a"), "Scene: turns must be a tuple"),
        (lambda: Scene(("a",)), "Scene: roles holds 'a'; each must be like Role"),
        (lambda: Role(5, "noop"), "a role's name is letters"),
        (lambda: Role("a", 5), "Role: agent must be the name of an agent, or an AgentConfig, not 5"),
        (lambda: Turn("a", 5), "Turn: prompt must be text, not 5"),
        (lambda: DirectorRole("boss"), "DirectorRole: role must be a Role, not 'boss'"),
        (lambda: until_verified("coder", limit=0), "until_verified: limit must be a whole number, 1 or more, not 0"),
        (
            lambda: until_approved("a", "b", limit=1.5),
            "until_approved: limit must be a whole number, 1 or more, not 1.5",
        ),
    ],
)
def test_a_part_of_a_scene_that_is_something_else_is_refused_where_it_is_made(make, sentence):
    """A list of names is no list of turns, and a director that may take none directs nothing."""
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_budgets_are_taken_as_a_mapping_too():
    """As a task's and a scene's file write them."""
    config = RolloutConfig(prompt="x", agent="noop", budgets={"tool_calls": 4})
    assert config.budgets == Budgets(tool_calls=4)
    assert Turn("a", budgets={"tokens": 7}).budgets == Budgets(tokens=7)


@pytest.mark.parametrize("brought", [Bare(), lambda _spec: Bare(), lambda *_: Bare()])
def test_the_least_that_a_sandbox_must_do_is_enough(brought):
    """An object, or a function that makes one."""
    assert Rollout(RolloutConfig(prompt="x", agent="noop", sandbox=brought, out=None)).state == "provisioning"


@pytest.mark.anyio
async def test_a_function_that_makes_no_sandbox_is_said_to_be_that():
    """It is called when a sandbox is wanted, which is in the rollout: its verdict says what was made."""
    config = RolloutConfig(prompt="x", agent="noop", sandbox=lambda _spec: 5, out=None)
    result = await Rollout(config).run()
    assert "what the function <lambda> made must be" in result.verdict.reason
    assert "5 lacks start, exec, upload, download" in result.verdict.reason


def test_a_repr_is_short():
    """What a debugger or a failing test prints is for people: no registry, no world."""
    config = RolloutConfig(prompt="x", agent="noop", out=None, sandbox="fake", new_id=lambda: "r1")
    assert len(repr(config)) < 1_200
    assert repr(Rollout(config)) == "<Rollout r1: provisioning>"
