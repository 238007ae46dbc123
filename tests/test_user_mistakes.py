"""Mistakes that users make, found before anything is started; and what a stopped or killed process leaves behind."""

from __future__ import annotations

import attrs
import pytest
from harness import TRANSPORTS, build

from orchestrator import ConfigError, MissingExtra, Rollout, RolloutConfig
from orchestrator.metering import SOCKET, SOCKET_FOLDER, remove_socket
from orchestrator.registry import default_registry
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
