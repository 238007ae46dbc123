"""A look into a sandbox that was kept: a command in it, as the verifier or as a role, and it is kept as it was."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest
from docker_images import DEBIAN

from orchestrator import Rollout, RolloutConfig, cli
from orchestrator.journal import read_journal
from orchestrator.kept import exec_in
from orchestrator.recovery import reap
from orchestrator.sandboxes import reopen
from orchestrator.sandboxes.fake import FakeSandbox
from orchestrator.tasks import demo_task
from states.errors import ConfigError, SandboxError
from states.journal import LeaseRecord

SCRIPT = [{"shell": "echo 41 > answer.txt; echo note > ~/note; mkdir /tmp/scratch"}]


@pytest.fixture(
    params=[
        pytest.param("local", marks=pytest.mark.sandbox),
        pytest.param("docker", marks=pytest.mark.docker),
        pytest.param("daytona", marks=[pytest.mark.sandbox, pytest.mark.daytona]),
    ]
)
def play(request, tmp_path):
    """`play(...)`: a rollout whose agent leaves a wrong answer by default, in a sandbox that is kept when it fails."""
    if request.param == "docker":
        request.getfixturevalue("docker_image")()
    if request.param == "daytona":
        request.getfixturevalue("daytona_apart")

    def play(reward=0.0, **settings) -> Path:
        base = {
            "task": demo_task(),
            "agent": "scripted",
            "env": {"ROLLOUT_SCRIPT": json.dumps({"turns": [SCRIPT]})},
            "sandbox": request.param,
            "image_map": {"debian:stable-slim": DEBIAN} if request.param == "docker" else {},
            "sandbox_options": {"snapshot": "prepared"} if request.param == "daytona" else {},
            "keep_sandbox": "on-failure",
            "out": tmp_path,
        }
        result = anyio.run(Rollout(RolloutConfig(**{**base, **settings})).run)
        assert (result.state, result.reward) == ("closed/rewarded", reward), result.errors
        return Path(result.folder)

    return play


def look(folder: Path, *command: str, **how):
    """Run a command in what was kept."""
    return anyio.run(lambda: exec_in(folder, command, **how))


def test_what_was_kept_is_looked_into_and_given_back(play, capfd):
    """Twice, from code and from the command line; what is changed stays; once it is reaped there is nothing to see."""
    folder = play()
    assert look(folder, "cat", "answer.txt").stdout == "41\n"
    assert look(folder, "sh", "-c", "echo 42 > answer.txt; exit 7").return_code == 7
    assert cli.main(["exec", str(folder), "--", "sh", "-c", "cat answer.txt; echo odd >&2; exit 3"]) == 3
    assert tuple(capfd.readouterr()) == ("42\n", "odd\n")
    assert cli.main(["exec", str(folder), "--json", "--", "id", "-u"]) == 0
    assert json.loads(capfd.readouterr().out)["exit_code"] == 0
    assert anyio.run(reap, folder).leaked == ()
    with pytest.raises(ConfigError, match="its sandbox was given back"):
        look(folder, "true")


def test_two_who_look_at_once_do_not_end_each_other(play):
    """The first one gets what it asked for, the other one a sentence, and then its turn."""
    folder = play()
    said: list[str] = []

    async def looks():
        try:
            said.append((await exec_in(folder, ["cat", "answer.txt"])).stdout)
        except ConfigError as error:
            said.append(str(error))

    async def both():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(looks)
            tasks.start_soon(looks)

    anyio.run(both)
    assert said == [f"{folder}: somebody else looks into this sandbox, or gives it back; wait until they have", "41\n"]
    assert look(folder, "cat", "answer.txt").stdout == "41\n"
    anyio.run(reap, folder)


def test_a_role_finds_its_own_things(play):
    """Its HOME and `/tmp` are as its agent left them; who never was there is named."""
    folder = play()
    assert look(folder, "sh", "-c", "cat ~/note; ls /tmp", role="agent").stdout == "note\nscratch\n"
    with pytest.raises(ConfigError, match="no role 'critic' was connected in this rollout; there was agent"):
        look(folder, "true", role="critic")
    anyio.run(reap, folder)


def test_a_sandbox_that_is_gone_is_named(play):
    """Removed behind our back: one sentence."""
    folder = play()
    journal = folder / "journal.jsonl"
    before = journal.read_bytes()
    anyio.run(reap, folder)
    journal.write_bytes(before)
    with pytest.raises(SandboxError, match=r"is gone|cannot be had again"):
        look(folder, "true")


def test_a_rollout_that_succeeded_kept_nothing(play):
    """`on-failure` keeps what failed: this one's sandbox was given back at once, and nothing can be looked into."""
    right = [{"shell": "s=0; while read -r n; do s=$((s + n)); done < numbers.txt; echo $s > answer.txt"}]
    folder = play(env={"ROLLOUT_SCRIPT": json.dumps({"turns": [right]})}, reward=1.0)
    (found,) = [
        record.lease.handle
        for record in read_journal(folder)
        if isinstance(record, LeaseRecord) and record.lease.kind == "sandbox" and record.action == "held"
    ]
    with pytest.raises(SandboxError, match=r"is gone|cannot be had again"):
        anyio.run(reopen, found)
    with pytest.raises(ConfigError, match="its sandbox was given back"):
        look(folder, "true")


class Stubborn(FakeSandbox):
    """One that cannot be let be."""

    async def leave(self):
        raise SandboxError("its engine is away")


@pytest.mark.anyio
async def test_a_kept_sandbox_that_cannot_be_let_be_is_kept_as_it_is():
    """The ending stands, and a note says what is still at work in it."""
    result = await Rollout(
        RolloutConfig(prompt="go", agent="scripted", sandbox=Stubborn(), verifier=None, out=None, keep_sandbox="always")
    ).run()
    assert result.state == "closed/unverified"
    assert any("was kept as it is: SandboxError: its engine is away" in note for note in result.notes)
