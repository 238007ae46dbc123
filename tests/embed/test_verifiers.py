"""Rollouts in verifiers: real runs of its own agent in an environment of its own, rewarded by its own task."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
from hosts import host_python, once
from late import WORDS
from trials import HERE, KEY, alive, counted, left_in, passed, run_counted

from states.events import Usage

pytestmark = [pytest.mark.hosts, pytest.mark.sandbox]


@attrs.frozen
class Traced:
    """A trace as verifiers wrote it, and what the provider counted."""

    trace: dict
    provider: Usage

    @property
    def reward(self) -> float | None:
        return next((reward["score"] for reward in self.trace["rewards"].values()), None)

    @property
    def rollout(self) -> dict:
        return self.trace["info"]["rollout"]

    @property
    def counted(self) -> tuple[int, int, int]:
        """Calls, input tokens (cached ones included) and output tokens, of its interception."""
        used = [call["usage"] for call in self.trace["calls"] if call["usage"]]
        given = sum(one["prompt_tokens"] + one["cached_input_tokens"] for one in used)
        return len(used), given, sum(one["completion_tokens"] for one in used)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every run, in one process."""
    python = host_python("verifiers")

    return once(tmp_path_factory, "verifiers", lambda folder: run(folder, python))


def run(folder: Path, python: Path, *names: str, **env: str) -> None:
    """Play the trials of these names, or all that need no Docker."""
    checks = (str(HERE / "verifiers_checks.py"), str(folder), *names)
    models = lambda url: {"SCRIPTED_BASE_URL": url, "SCRIPTED_API_KEY": KEY, **env}  # noqa: E731
    run_counted(folder, python, "python", *checks, env=models)


@pytest.fixture(scope="module")
def traced(folder) -> dict[str, Traced]:
    return read(folder)


def read(folder: Path) -> dict[str, Traced]:
    """What was traced, by name."""
    found = {}
    for file in (folder / "traces").glob("*.json"):
        found[file.stem] = Traced(json.loads(file.read_text()), counted(folder, file.stem))
    assert found, (folder / "output.txt").read_text()
    return found


@pytest.mark.parametrize("name", ["factory", "acp", "scene"])
def test_a_run_is_rewarded_by_its_task_and_traced_to_the_token(name, traced):
    """An agent in our process, one over ACP, and two roles: each call of any of them is in the trace."""
    one = traced[name]
    assert (one.trace["ok"], one.trace["errors"], one.reward) == (True, [], 1.0)
    used = one.provider
    assert one.counted == (used.calls, used.input_tokens, used.output_tokens)
    assert used.calls > 0
    assert one.rollout["state"] == "closed/unverified"


@pytest.mark.parametrize("name", ["subprocess-acp", "subprocess-scene", "subprocess-scripted"])
def test_rollouts_run_in_the_subprocess_runtime_of_verifiers(name, traced):
    """A folder of this machine, where nobody buries orphans: what an agent left behind is found and ended there too."""
    assert_rewarded_and_nothing_left(name, traced[name])


@pytest.mark.docker
def test_rollouts_run_in_the_docker_runtime_of_verifiers(tmp_path, docker_image):
    """A container that verifiers starts, whose PID 1 is a `sleep`: agents over ACP call the model from in there."""
    run(tmp_path, host_python("verifiers"), "docker-acp", "docker-roles", DOCKER_IMAGE=docker_image())
    traced = read(tmp_path)
    assert set(traced) == {"docker-acp", "docker-roles"}
    for name, one in traced.items():
        assert_rewarded_and_nothing_left(name, one)
    assert "Exception ignored" not in (tmp_path / "output.txt").read_text()


def assert_rewarded_and_nothing_left(name: str, one: Traced) -> None:
    """Rewarded for what is in its runtime, every call in the trace, and no process of the agent's alive."""
    assert (one.trace["ok"], one.trace["errors"], one.reward) == (True, [], 1.0)
    used = one.provider
    assert one.counted == (used.calls, used.input_tokens, used.output_tokens)
    assert one.rollout["state"] == "closed/unverified"
    assert alive(name) == []


def test_a_trace_holds_what_was_said_to_the_model(traced):
    """Its nodes are the prompt, the call, its result and the last words: its interception saw them."""
    said = [node["message"]["role"] for node in traced["factory"].trace["nodes"]]
    assert said[-3:] == ["assistant", "tool", "assistant"]


def test_two_roles_are_branches_of_one_trace(traced, folder):
    """The second role began anew, in the same sandbox."""
    one = traced["scene"]
    journal = folder / "runs" / one.rollout["rollout"] / "journal.jsonl"
    assert [state for state in passed(journal) if state.startswith("session/")] == [
        *("session/acp", "session/acp", "session/factory", "session/factory"),
    ]


def test_a_timeout_of_verifiers_ends_the_rollout_and_its_agent(traced):
    """Captured, released and closed before it is rewarded, with what it got done by then: nothing."""
    one = traced["late"]
    assert (one.trace["is_timeout"], one.trace["stop_condition"]) == (True, "agent_timeout")
    assert one.rollout["state"] == "closed/cancelled"
    assert one.reward == 0.0
    assert one.counted == (1, one.provider.input_tokens, one.provider.output_tokens)


def test_what_was_said_before_a_timeout_of_verifiers_is_in_its_trace(traced):
    """The prompt, and the words and the tool call of the one call that was made."""
    said = [node["message"] for node in traced["late"].trace["nodes"]]
    assert [message["role"] for message in said][-2:] == ["user", "assistant"]
    assert said[-1]["content"] == WORDS
    assert len(said[-1]["tool_calls"]) == 1
    told = traced["late"].rollout
    assert (told["turns"], told["tool_calls"], told["ended_by"]) == (1, 1, "cancelled")


def test_a_limit_of_turns_is_verifiers_own(traced):
    """Its interception refuses the second call; what was done by then is rewarded."""
    one = traced["turns"]
    assert (one.trace["ok"], one.trace["stop_condition"]) == (True, "max_turns")
    assert one.trace["nodes"][-1]["message"]["role"] == "assistant"
    assert one.provider.calls == 1
    assert one.reward == 1.0


def test_what_must_not_be_graded_has_no_reward_in_verifiers_either(traced):
    """The provider refused every call: an error of the run, not a reward of 0."""
    one = traced["refused"]
    assert one.trace["ok"] is False
    assert one.trace["errors"][-1]["type"] == "ProviderError"
    assert "this key is of no use" in one.trace["errors"][-1]["message"]
    assert one.reward is None


def test_settings_that_cannot_work_are_an_error_of_the_run(traced):
    """One sentence, before anything is asked."""
    one = traced["nobody"]
    assert "who shall do it?" in one.trace["errors"][-1]["message"]
    assert one.provider.calls == 0


def test_no_key_is_in_what_a_run_leaves(folder):
    """Neither in traces nor in journals."""
    files = [path for part in ("runs", "traces") for path in (folder / part).rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_nothing_is_left_when_verifiers_has_ended(folder, traced):
    """No sandbox of a run, nothing owed in any journal."""
    assert left_in(folder, "verifiers-local") == []
    assert all(one.rollout["leaked"] == [] for name, one in traced.items() if name != "nobody")
