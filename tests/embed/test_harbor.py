"""Rollouts in Harbor: real trials of its own program, in an environment of its own, verified by its own verifier."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import anyio
import attrs
import pytest
from hosts import host_env, host_python, host_run, once
from late import LATE_SEC, WORDS
from trials import HERE, KEY, TRIAL_SEC, counted, left_in, passed, provider, run_counted, scratch

from orchestrator.journal import read_journal
from orchestrator.tasks import demo_task
from states.events import Usage
from states.journal import fold

pytestmark = [pytest.mark.hosts, pytest.mark.sandbox]

TRIALS = {
    "factory": {"kwargs": {"agent": "minimal"}},
    "acp": {"kwargs": {"agent": "minimal-acp"}},
    "scene": {"kwargs": {"scene": str(HERE / "scene.toml")}},
    "late": {"kwargs": {"agent": "minimal"}, "override_timeout_sec": LATE_SEC},
    "refused": {"kwargs": {"agent": "minimal"}},
}
"""Harbor's agent configs. The model's name is the trial's."""


def job(folder: Path, **agents) -> str:
    """A job of Harbor: the demo task, once for each of these agents."""
    path = "orchestrator.embed.harbor:OrchestratorAgent"
    config = {
        "job_name": "job",
        "jobs_dir": str(folder),
        "n_concurrent_trials": 2,
        "environment": {"import_path": "harbor_local:LocalEnvironment"},
        "tasks": [{"path": str(demo_task())}],
        "agents": [{"import_path": path, "model_name": f"openai/{name}", **each} for name, each in agents.items()],
    }
    file = folder / "job.json"
    file.write_text(json.dumps(config))
    return str(file)


def models_at(url: str) -> dict[str, str]:
    """How the model's provider is found: by the environment in which harbor runs."""
    return {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": KEY}


@attrs.frozen
class Trial:
    """One trial as Harbor recorded it, and what the provider counted for its models."""

    folder: Path
    result: dict
    provider: Usage

    @property
    def context(self) -> dict:
        return self.result["agent_result"]

    @property
    def reward(self) -> float | None:
        return ((self.result["verifier_result"] or {}).get("rewards") or {}).get("reward")

    @property
    def passed(self) -> list[str]:
        (journal,) = self.folder.glob("rollout/*/journal.jsonl")
        return passed(journal)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One job with every trial, in one process of Harbor's: its start-up is most of what they cost."""
    python = host_python("harbor")

    def run(folder: Path) -> None:
        run_counted(folder, python, "harbor", "run", "-c", job(folder, **TRIALS), "--yes", "--quiet", env=models_at)

    return once(tmp_path_factory, "harbor", run)


@pytest.fixture(scope="module")
def trials(folder) -> dict[str, Trial]:
    found = {}
    for file in (folder / "job").glob("*/result.json"):
        result = json.loads(file.read_text())
        name = result["config"]["agent"]["model_name"].removeprefix("openai/")
        found[name] = Trial(
            file.parent, result, counted(folder, *(("coder", "reviewer") if name == "scene" else (name,)))
        )
    assert set(found) == set(TRIALS), (folder / "output.txt").read_text()
    return found


@pytest.fixture(scope="module")
def harbor_says(folder, trials) -> dict:
    """What Harbor's own code says of ours."""
    written = [str(trial.folder / "agent" / "trajectory.json") for trial in trials.values()]
    checks = str(HERE / "harbor_checks.py")
    done = host_run(host_python("harbor"), "python", checks, *written, env={}, cwd=folder, timeout=TRIAL_SEC)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["factory", "acp", "scene"])
def test_a_trial_is_rewarded_by_harbors_own_verifier_and_counted_to_the_token(name, trials):
    """An agent in our process, one over ACP, and two roles in one environment, of which the second mends the first."""
    trial = trials[name]
    assert (trial.reward, trial.result["exception_info"]) == (1.0, None)
    context = trial.context
    assert (context["n_input_tokens"], context["n_output_tokens"], context["n_cache_tokens"]) == (
        trial.provider.input_tokens,
        trial.provider.output_tokens,
        trial.provider.cache_read_input_tokens,
    )
    assert context["metadata"]["state"] == "closed/unverified"
    assert context["metadata"]["usage"]["total"]["calls"] == trial.provider.calls > 0
    assert "verifying" not in trial.passed


def test_roles_take_turns_in_harbors_environment(trials):
    """Each was connected, ended and proven dead before the next; each is counted by itself."""
    trial = trials["scene"]
    assert [state for state in trial.passed if state.startswith("session/") or state == "quiescing"] == [
        *("session/acp", "session/acp", "quiescing"),
        *("session/factory", "session/factory", "quiescing"),
    ]
    assert set(trial.context["metadata"]["usage"]["by_role"]) == {"coder", "reviewer"}


def test_harbors_context_is_filled_while_the_rollout_runs(harbor_says):
    """At each move, not only at the end: whoever looks while a command runs sees in which state that is."""
    assert harbor_says["during"][0] == "", "nothing has moved yet"
    assert "executing" in harbor_says["during"]
    assert harbor_says["during"][-1] == "releasing"


def test_harbors_schema_lists_our_settings(harbor_says):
    """What `--ak` takes is what `harbor agent schema` prints."""
    ours = {"agent", "scene", "roles", "policy", "usage_tracking", "turn_sec", "idle_sec", "timeout"}
    limits = {"max_tokens", "max_cost", "max_tool_calls"}
    assert set(harbor_says["options"]) - set(harbor_says["options of Harbor"]) == ours | limits


def test_harbors_timeout_keeps_the_context_and_ends_the_agent(trials):
    """Its agent was at work when Harbor's own timeout passed: what it used is kept, what it wanted to write is not."""
    trial = trials["late"]
    assert trial.result["exception_info"]["exception_type"] == "AgentTimeoutError"
    assert trial.context["n_input_tokens"] == trial.provider.input_tokens > 0
    assert trial.context["metadata"]["state"] == "closed/cancelled"
    assert trial.reward == 0.0
    assert trial.passed[-5:] == ["cancelling", "capturing/whole", "quiescing", "releasing", "closed/cancelled"]


def test_what_was_said_before_harbors_timeout_is_in_its_trajectory_and_its_context(trials):
    """Words and command of the one call that was made, its tokens, and that it was a whole turn that was cut off."""
    trial = trials["late"]
    trajectory = json.loads((trial.folder / "agent" / "trajectory.json").read_text())
    asked, acted = trajectory["steps"]
    assert (asked["source"], acted["message"]) == ("user", WORDS)
    assert [call["function_name"] for call in acted["tool_calls"]] == ["bash"]
    assert acted["metrics"]["prompt_tokens"] == trial.provider.input_tokens
    told = trial.context["metadata"]
    assert (told["turns"], told["tool_calls"], told["ended_by"]) == (1, 1, "cancelled")
    assert trial.context["n_output_tokens"] == trial.provider.output_tokens > 0


def test_what_must_not_be_graded_has_no_reward_in_harbor_either(trials):
    """The provider refused every call: that is no 0.0, and the name of the error says who it was."""
    trial = trials["refused"]
    assert trial.result["exception_info"]["exception_type"] == "ProviderError"
    assert "closed/void" in trial.result["exception_info"]["exception_message"]
    assert trial.reward is None


def test_no_key_of_the_provider_is_in_what_a_trial_leaves(folder):
    """Neither in our files nor in Harbor's."""
    held = [path for path in (folder / "job").rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert held == []


def test_nothing_is_left_when_harbor_has_ended(folder, trials):
    """No sandbox of a trial, no socket of a gateway, nothing owed in any journal."""
    assert left_in(folder, "harbor-local") == []
    assert all(trial.context["metadata"]["leaked"] == [] for trial in trials.values())


def test_harbors_validator_accepts_each_trajectory(harbor_says, trials):
    """ATIF, as Harbor's own models read it; every model call of the provider is in its totals."""
    assert len(harbor_says["trajectories"]) == len(TRIALS)
    assert {path: said for path, said in harbor_says["trajectories"].items() if said} == {}
    for trial in trials.values():
        totals = json.loads((trial.folder / "agent" / "trajectory.json").read_text())["final_metrics"]
        assert totals["total_prompt_tokens"] == trial.provider.input_tokens


def test_settings_that_cannot_work_are_refused_before_a_trial(harbor_says):
    """One sentence each, from Harbor's own preflight."""
    said = harbor_says["refused"]
    assert "who shall do it?" in said["nobody"]
    assert "unknown agent 'no-such-agent'" in said["unknown agent"]
    assert "Unknown option 'agnet'" in said["unknown option"]
    assert "give agent for one role, or roles" in said["agent and roles"]
    assert "no/such/rollout.toml" in said["no scene"]
    assert "turn_sec must be seconds > 0" in said["bad limit"]
    assert "OPENAI_API_KEY is given with --ae" in harbor_says["key by --ae"]
    assert harbor_says["accepted"] == ""


def test_every_key_that_harbor_defines_for_a_task_is_known_here(harbor_says):
    """Else a task of Harbor's would be refused for a key that means something there."""
    assert harbor_says["missing keys"] == []
    assert harbor_says["demo"] == "rollout/sum-of-numbers"


def test_a_host_that_is_interrupted_gets_everything_back(tmp_path):
    """^C in the middle of a turn: the rollout is captured, told, released and closed before Harbor ends."""
    python = host_python("harbor")

    async def main() -> None:
        async with provider() as model:
            late = {"kwargs": {"agent": "minimal-acp"}}
            argv = [str(python.parent / "harbor"), "run", "-c", job(tmp_path, late=late), "--yes", "--quiet"]
            env = {"PYTHONPATH": str(HERE), "TMPDIR": str(scratch(tmp_path)), **models_at(f"{model.url}/v1")}
            with (tmp_path / "output.txt").open("wb") as output:
                process = await anyio.open_process(
                    argv,
                    env=host_env(python, env),
                    cwd=tmp_path,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            async with process:
                with anyio.move_on_after(TRIAL_SEC):
                    while not model.calls:  # its turn is in flight
                        assert process.returncode is None, f"Harbor ended before it was at work: {told(tmp_path)}"
                        await anyio.sleep(0.05)
                    os.kill(process.pid, signal.SIGINT)
                    await process.wait()
                assert process.returncode is not None, f"Harbor did not end in {TRIAL_SEC} s: {told(tmp_path)}"

    anyio.run(main)
    (journal,) = tmp_path.glob("job/*/rollout/*/journal.jsonl")
    folded = fold(read_journal(journal))
    assert folded.position.state == "closed/cancelled", told(tmp_path)
    assert folded.leases == {}
    (trajectory,) = tmp_path.glob("job/*/agent/trajectory.json")
    assert WORDS in [step["message"] for step in json.loads(trajectory.read_text())["steps"]]
    assert left_in(tmp_path, "harbor-local") == []


def told(folder: Path) -> str:
    """What Harbor printed, and what it and the rollout wrote down of how its trial ended."""
    parts = [folder / "output.txt", *folder.glob("job/*/exception.txt"), *folder.glob("job/*/rollout/*/result.json")]
    return "\n".join(f"--- {part.name}\n{part.read_text(errors='replace')[-5000:]}" for part in parts if part.exists())
