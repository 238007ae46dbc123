"""Agents that others bring: in a package that declares an entry point, and written for BenchFlow's own contract."""

from __future__ import annotations

import enum
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from hosts import host_python, host_run

HERE = Path(__file__).parent


@pytest.mark.hosts
@pytest.mark.sandbox
@pytest.mark.parametrize("agent", ["tiny", "tiny-made"])
def test_an_agent_of_an_installed_package_is_run_by_its_name(agent, tmp_path):
    """The package is installed, and that is all: the demo task is solved."""
    python = host_python("elsewhere")
    done = host_run(python, "rollout", "run", "demo", "--agent", agent, "--json", env={}, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["reward"], result["trajectory_source"], result["tool_calls"]) == (1.0, "session", 1)


@pytest.mark.hosts
def test_a_broken_agent_of_a_package_is_an_error_for_whoever_asks_for_it_alone(tmp_path):
    python = host_python("elsewhere")
    listed = host_run(python, "rollout", "agents", "--json", env={}, cwd=tmp_path, timeout=60)
    assert listed.returncode == 0, listed.stderr
    status = {row["name"]: row["status"] for row in json.loads(listed.stdout)}
    assert status["tiny"] == "nothing to install"
    assert "tiny-broken needs a thing that is not there" in status["tiny-broken"]
    done = host_run(python, "rollout", "run", "demo", "--agent", "tiny-broken", env={}, cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert "agent 'tiny-broken', entry point 'tiny_agent:broken'" in done.stderr


@pytest.mark.hosts
@pytest.mark.sandbox
def test_an_agent_written_for_benchflow_runs_unchanged(tmp_path):
    """By BenchFlow's own seam and by ours: the same steps; here with questions answered, usage metered, a reward."""
    python = host_python("benchflow")
    script = str(HERE / "run_benchflow_agent.py")
    env = {"PYTHONPATH": str(HERE)}
    done = host_run(python, "python", script, str(tmp_path / "runs"), env=env, cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    theirs, ours = answer["theirs"], answer["ours"]
    assert theirs["kinds"] == ["user_message", "tool_call", "agent_message"]
    assert [kind for kind in ours["kinds"] if kind != "question"] == theirs["kinds"], ours
    assert ours["answers"] == ["yes"]
    assert (ours["state"], ours["reward"], ours["ended_by"]) == ("closed/rewarded", 1.0, "end_turn"), ours
    assert ours["usage"] == answer["counted"]
    assert ours["source"] == "session"


# --- the same contract, without BenchFlow ------------------------------------------------------------------------


class Stop(enum.StrEnum):
    """A foreign package's stop reasons."""

    END = "end_turn"


@attrs.define
class Asked:
    """A foreign question: kinds by option, and no word for what kind of question it is."""

    prompt: str
    options: list[str]
    option_kinds: dict[str, str]
    request_id: str = ""


class Foreign:
    """An agent of another harness: its environment is on the sandbox, its keywords are its constructor's own."""

    made: list[Any] = []  # noqa: RUF012 - what the test looks at

    def __init__(self, *, exec_user: str = "root") -> None:
        self.user = exec_user
        self.handler: Any = None
        self.steps: list[dict[str, Any]] = []
        self.on_change: Any = None
        Foreign.made.append(self)

    async def connect(self, sandbox, role):
        self.sandbox, self.env, self.cwd = sandbox, dict(sandbox.agent_env), sandbox.agent_cwd
        return self

    def capabilities(self):
        return None

    async def prompt(self, text):
        question = Asked("Which?", ["no", "yes"], {"no": "reject_once", "yes": "allow_once"})
        self.answers = [await self.handler(question), await self.handler(Asked("Left or right?", ["l", "r"], {}))]
        await self.sandbox.exec("make it", user=self.user, timeout_sec=5)
        return Stop.END

    async def cancel(self): ...

    def on_ask_user(self, handler):
        self.handler = handler


def build_foreign(**kwargs):
    """Hands what it gets to a constructor that knows nothing of us."""
    return Foreign(**kwargs)


@pytest.mark.anyio
async def test_a_session_factory_of_another_harness_finds_what_it_knows(monkeypatch):
    """Environment and folder on the sandbox, questions in its own class, its own enum; nothing it does not know."""
    import harness

    from orchestrator import AgentConfig

    monkeypatch.setattr(harness, "FOREIGN", build_foreign, raising=False)
    monkeypatch.setattr(Foreign, "made", [])
    stand = harness.build("session-factory")
    agent = AgentConfig("foreign", "session-factory", session_factory="harness:FOREIGN", calls_model=False)
    config = stand.rollout.config
    roles = tuple(attrs.evolve(role, agent=agent, model="m") for role in config.the_scene().roles)
    scene = attrs.evolve(config.the_scene(), roles=roles)
    result = await type(stand.rollout)(attrs.evolve(config, scene=scene)).run()
    assert (result.state, result.ended_by) == ("closed/rewarded", "end_turn"), result.errors
    (made,) = Foreign.made
    assert made.cwd == made.env["BENCHFLOW_AGENT_CWD"] == "/app"
    assert made.env["BENCHFLOW_PROVIDER_MODEL"] == "m"
    assert made.answers == ["yes", "l"], "the kinds by option say which allows; a choice without any takes the first"
