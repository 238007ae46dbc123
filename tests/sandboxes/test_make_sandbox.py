"""Which sandbox a name means."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from orchestrator import Rollout, RolloutConfig
from orchestrator.sandboxes import SandboxSpec, check_sandbox, make_sandbox, reaper, sweep
from orchestrator.sandboxes.fake import FakeSandbox
from orchestrator.sandboxes.local import GatewayReach, Limits, LocalSandbox
from orchestrator.tasks import demo_task
from states.deadlines import BOUNDED_BY_ROLLOUT, DAY, DEADLINES
from states.errors import ConfigError, SandboxError


def custom(spec):
    """A sandbox of a user's own."""
    return FakeSandbox(name=f"custom-{spec.name}")


def test_local_gets_what_the_spec_says(tmp_path):
    """Gateway, limits and binds arrive; what was not asked for has its default."""
    spec = SandboxSpec(
        "local", "r1", gateway_port=4000, gateway_socket=tmp_path / "s", cpus=2, memory_mb=512, binds=("/opt/x",)
    )
    sandbox = make_sandbox(spec)
    assert isinstance(sandbox, LocalSandbox)
    assert sandbox.gateway == GatewayReach(tmp_path / "s", 4000)
    assert sandbox.gateway_url == "http://127.0.0.1:4000"
    assert sandbox.limits == Limits(cpus=2, memory_mb=512)
    assert sandbox.binds == ((Path("/opt/x"), "/opt/x"),)
    assert not sandbox.root.exists()
    unmetered = make_sandbox(SandboxSpec("local", "r2", storage_mb=100))
    assert (unmetered.gateway_url, unmetered.limits) == (None, Limits(disk_mb=100))


def test_fake_and_sandboxes_of_ones_own():
    """By name, as an object, as a callable, as `module:callable`."""
    assert make_sandbox(SandboxSpec("fake", "r1", gateway_port=1)).gateway_url == "http://127.0.0.1:1"
    mine = FakeSandbox(name="mine")
    assert make_sandbox(SandboxSpec(mine, "r1")) is mine
    assert make_sandbox(SandboxSpec(custom, "r1")).name == "custom-r1"


def test_named_sandbox_is_imported(monkeypatch):
    """`module:callable` is imported and called with the spec."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert make_sandbox(SandboxSpec("test_make_sandbox:custom", "r1")).name == "custom-r1"


@pytest.mark.parametrize("name", ["kubernetes", "no_such_module:x", "orchestrator.sandboxes:nothing", "os:name"])
def test_name_that_means_nothing_is_a_mistake(name):
    """One line that says which name and why."""
    with pytest.raises(ConfigError, match=name.split(":", maxsplit=1)[0]):
        make_sandbox(SandboxSpec(name, "r1"))


def needs_two(_spec, _another):
    """Not to be called with one argument."""


def test_a_sandbox_of_ones_own_that_takes_no_spec_is_a_mistake(monkeypatch):
    """Found before anything is begun: it is called with one `SandboxSpec`, and the sentence says so."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    wanted = "sandbox 'test_make_sandbox:needs_two' is the function needs_two, which cannot be called with one Sandbox"
    with pytest.raises(ConfigError, match=wanted):
        check_sandbox("test_make_sandbox:needs_two", {})


def test_a_spec_is_shown_shortly(tmp_path):
    """It stands in messages of what is called with it: what was asked for, and no path, label or function."""
    bare = SandboxSpec("fake", "rollout-1", labels={"a": "b" * 500}, binds=("/opt",), gateway_socket=tmp_path / "s")
    assert repr(bare) == "<SandboxSpec rollout-1: fake>"
    asked = SandboxSpec(custom, "rollout-2", cpus=2, image="x" * 500, options={"user": "root"}, note=print)
    assert repr(asked).startswith("<SandboxSpec rollout-2: the function custom, cpus=2, image='xxx")
    assert len(repr(asked)) < 200


def test_an_option_that_a_kind_does_not_have_is_a_mistake():
    """Before anything exists, naming the option and those that there are."""
    with pytest.raises(ConfigError, match="sandbox local has no option 'gpu'; it has none"):
        check_sandbox("local", {"gpu": "1"})
    with pytest.raises(ConfigError, match="not for one that is brought"):
        check_sandbox(FakeSandbox(), {"gpu": "1"})


def test_a_kind_that_nobody_can_reap_is_said():
    """A lease that no code here can give back is an error of the sandbox, and stays open."""
    with pytest.raises(SandboxError, match="nobody knows how to reap a sandbox of the kind 'theirs'"):
        reaper("theirs")


@pytest.mark.parametrize("given", [{}, {"verifying": 5000.0, "paused": 60.0, "executing": 10.0}], ids=str)
def test_a_sandbox_may_live_for_as_long_as_its_rollout_may_take(tmp_path, given):
    """Its own limit, then each state that this does not bound: the task's verifier, and a pause, among them."""
    task = tmp_path / "task"
    shutil.copytree(demo_task(), task)
    text = (task / "task.toml").read_text()
    (task / "task.toml").write_text(text.replace("[verifier]\ntimeout_sec = 30.0", "[verifier]\ntimeout_sec = 7200.0"))
    specs = []

    def kept(spec):
        specs.append(spec)
        return FakeSandbox(name=spec.name)

    config = RolloutConfig(task=task, agent="oracle", sandbox=kept, timeout=600.0, deadlines=given, out=None)
    rollout = Rollout(config)
    world = rollout._world
    assert world.sandbox.name == specs[0].name
    beyond = {
        state: world.deadline(state, None, rollout.facts).seconds
        for state in DEADLINES
        if state not in BOUNDED_BY_ROLLOUT
    }
    assert beyond["verifying"] == given.get("verifying", 7260.0)
    assert beyond["paused"] == given.get("paused", DAY)
    assert specs[0].ttl_sec == 600.0 + sum(beyond.values())


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["local", "fake"])
async def test_kinds_that_leave_nothing_to_sweep_say_so(kind):
    """What to do instead is said."""
    with pytest.raises(ConfigError, match="sandbox"):
        await sweep(kind, {})
