"""BenchFlow's folder, read by BenchFlow: its metrics, its viewer, its trajectories, its own export of training data."""

from __future__ import annotations

import json

import pytest
from hosts import host_python, host_run

from orchestrator.export import export, files_of, recorded
from orchestrator.export.benchflow import to_benchflow


def result_of(case):
    return json.loads(to_benchflow(case.folder)["result.json"])


def events_of(case):
    return [json.loads(line) for line in to_benchflow(case.folder)["trajectory/acp_trajectory.jsonl"].splitlines()]


def test_steps_are_those_of_the_trajectory_in_one_file(two_roles):
    events = events_of(two_roles)
    steps = [step for turn in recorded(two_roles.folder).turns for step in turn.steps]
    assert events == [json.loads(json.dumps(dict(step))) for step in steps]
    summary = result_of(two_roles)["trajectory_summary"]
    assert summary["steps"] == len(events)
    assert summary["tool_call_status_counts"] == {"completed": 5}


@pytest.mark.parametrize(
    ("case", "category", "verifier", "reward"),
    [
        ("one_role", None, None, 0.5),
        ("unverified", None, None, None),
        ("void", "api_error", None, None),
        ("deadline_settled-acp", "timeout", None, 1.0),
        ("idle-acp", "idle_timeout", None, 1.0),
        ("verifier_fails_twice-acp", None, "verifier_failure", None),
        ("sandbox_never_comes_up-acp", "sandbox_setup", None, None),
        ("sandboxfailed_in_executing-acp", "infra_failure", None, None),
        ("cancelled_in_executing-acp", "other", None, None),
        ("killed_10", "other", None, None),
    ],
)
def test_what_went_wrong_is_said_in_benchflows_words(case, category, verifier, reward, cases):
    """A reward stands whatever ended the last turn; none is `null` with an error that says why."""
    result = result_of(cases[case])
    assert (result["error_category"], result["verifier_error_category"]) == (category, verifier)
    assert (result["error"] is None, result["verifier_error"] is None) == (category is None, verifier is None)
    assert result["rewards"] is None if reward is None else result["rewards"]["reward"] == reward


def test_a_turn_that_ran_out_of_time_ends_in_its_trajectory_with_that(cases):
    *_, last = events_of(cases["deadline_unresponsive-acp"])
    assert (last["type"], last["reason"], last["terminal_trajectory_complete"]) == ("agent_timeout", "timeout", False)
    *_, last = events_of(cases["deadline_settled-acp"])
    assert last["terminal_trajectory_complete"] is True


def test_requests_are_whole(two_roles):
    """`llm.jsonl` refers to what it has said before; BenchFlow's file does not."""
    lines = to_benchflow(two_roles.folder)["trajectory/llm_trajectory.jsonl"].splitlines()
    for line, call in zip(lines, recorded(two_roles.folder).calls, strict=True):
        assert len(json.loads(line)["request"]["body"]["messages"]) == len(call.asked)
        assert b"sha256" not in line


def test_a_link_where_a_verifiers_file_should_be_is_not_followed(one_role, tmp_path):
    (tmp_path / "secret").write_text("mine")
    folder = tmp_path / "run"
    (folder / "verifier" / "run-1").mkdir(parents=True)
    for name in ("journal.jsonl", "trajectory.jsonl", "llm.jsonl"):
        (folder / name).write_bytes((one_role.folder / name).read_bytes())
    (folder / "verifier" / "run-1" / "stdout.txt").symlink_to(tmp_path / "secret")
    (folder / "verifier" / "run-1" / "stderr.txt").write_text("said")
    files = files_of(folder, "benchflow")
    assert "verifier/test-stdout.txt" not in files
    assert files["verifier/test-stderr.txt"] == b"said"


CHECK = """
import json, sys
from pathlib import Path
from benchflow.continue_run.run_folder import load_llm_exchanges
from benchflow.metrics import collect_metrics
from benchflow.trajectories.export_prime_sft import load_llm_trajectory_jsonl
from benchflow.trajectories.results import build_rollout_results_record
from benchflow.trajectories.types import Trajectory
from benchflow.trajectories.viewer import _build_acp_payload, _is_acp_rollout_dir, render_rollout
answers = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    (folder / "one").mkdir()
    result = json.loads((folder / "result.json").read_text())
    (task,) = collect_metrics(folder).tasks
    payload = _build_acp_payload(folder, None)
    calls = folder / "trajectory" / "llm_trajectory.jsonl"
    total = Trajectory(session_id="x", exchanges=load_llm_exchanges(calls)) if calls.exists() else None
    events = [json.loads(line) for line in (folder / "trajectory" / "acp_trajectory.jsonl").read_text().splitlines()]
    row = build_rollout_results_record(
        folder, trajectory=events, prompts=json.loads((folder / "prompts.json").read_text()), timing=result["timing"],
        **{key: result[key] for key in ("task_name", "rollout_name", "agent", "agent_name", "model", "n_tool_calls",
           "partial_trajectory", "rewards", "error", "verifier_error", "agent_result")})
    answers[folder.name] = {
        "outcome": task.outcome,
        "reward": task.reward,
        "tokens": [task.input_tokens, task.output_tokens, task.cost_usd],
        "viewer": [step.kind for step in payload.steps],
        "page": len(render_rollout(folder)),
        "counted": total and [total.total_input_tokens, total.total_output_tokens, total.total_cache_read_tokens],
        "row": [row["reward"], row["error"], len(row["trajectory"])],
        "is_one": _is_acp_rollout_dir(folder),
    }
print(json.dumps(answers))
"""


@pytest.mark.hosts
def test_benchflow_reads_every_rollout(cases, tmp_path):
    """Its metrics sort each into its bucket, its viewer shows each step, its training rows are made of its calls."""
    python = host_python("benchflow")
    (tmp_path / "jobs").mkdir()
    for name, case in cases.items():
        export(case.folder, "benchflow", tmp_path / "jobs" / name)
    done = host_run(python, "python", "-c", CHECK, str(tmp_path / "jobs"), env={}, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert set(answers) == set(cases)
    for name, answer in answers.items():
        read = recorded(cases[name].folder)
        assert answer["is_one"], name
        assert answer["reward"] == read.result.reward, name
        bucket = {None: {"errored", "verifier_errored"}, 1.0: {"passed"}}.get(read.result.reward, {"failed"})
        assert answer["outcome"] in bucket, name
        steps = [event for turn in read.turns for event in turn.steps if event["type"] != "session_update"]
        assert len(answer["viewer"]) >= len(steps), name
    two, counted = answers["two_roles"], cases["two_roles"].provider
    assert two["tokens"] == [counted.input_tokens, counted.output_tokens, pytest.approx(counted.cost)]
    assert two["counted"] == [counted.input_tokens, counted.output_tokens, counted.cache_read_input_tokens]
    assert two["row"] == [0.5, None, len(recorded(cases["two_roles"].folder).calls)]
