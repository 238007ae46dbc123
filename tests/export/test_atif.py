"""ATIF: what Harbor's own validator accepts, and what its fields say."""

from __future__ import annotations

import json

import pytest
from hosts import host_python, host_run

from orchestrator.export.atif import to_atif
from orchestrator.export.recorded import recorded


def test_a_step_of_the_agent_is_an_inference_with_its_tool_its_result_and_its_metrics(one_role):
    steps = to_atif(one_role.folder)["steps"]
    assert [(step["step_id"], step["source"], step["message"]) for step in steps] == [
        (1, "user", "Do it."),
        (2, "agent", ""),
        (3, "agent", ""),
        (4, "agent", "Done."),
    ]
    first = steps[1]
    assert first["tool_calls"][0]["function_name"] == "bash"
    assert first["tool_calls"][0]["arguments"] == {"command": "make it"}
    (result,) = first["observation"]["results"]
    assert result["source_call_id"] == first["tool_calls"][0]["tool_call_id"]
    assert "did make it" in result["content"]
    assert all(step["llm_call_count"] == 1 for step in steps[1:])


def test_the_metrics_of_the_steps_add_up_to_what_the_provider_counted(two_roles):
    document = to_atif(two_roles.folder)
    metrics = [step["metrics"] for step in document["steps"] if step["source"] == "agent"]
    final, counted = document["final_metrics"], two_roles.provider
    for step_key, final_key, count in (
        ("prompt_tokens", "total_prompt_tokens", counted.input_tokens),
        ("completion_tokens", "total_completion_tokens", counted.output_tokens),
        ("cached_tokens", "total_cached_tokens", counted.cache_read_input_tokens),
    ):
        assert sum(metric[step_key] for metric in metrics) == final[final_key] == count > 0
    assert sum(metric["cost_usd"] for metric in metrics) == pytest.approx(final["total_cost_usd"])
    assert final["total_cost_usd"] == counted.cost


def test_roles_take_turns_in_one_sequence_and_each_step_says_whose_it_is(two_roles):
    document = to_atif(two_roles.folder)
    roles = [step["extra"]["role"] for step in document["steps"]]
    assert list(dict.fromkeys(zip(roles, (s["extra"]["turn"] for s in document["steps"]), strict=True))) == [
        ("coder", 1),
        ("reviewer", 2),
        ("coder", 3),
    ]
    assert document["agent"]["name"] == "rollout-orchestrator"
    assert set(document["agent"]["extra"]["roles"]) == {"coder", "reviewer"}


def test_a_question_of_the_agent_is_a_step_of_the_system(cases):
    names = [name for name, case in cases.items() if b'"question"' in (case.folder / "trajectory.jsonl").read_bytes()]
    assert names
    for name in names:
        told = [step for step in to_atif(cases[name].folder)["steps"] if step["source"] == "system"]
        assert any(step["message"].startswith("question: ") for step in told), name


def test_a_rollout_without_a_turn_says_why_there_was_none(cases):
    document = to_atif(cases["sandbox_never_comes_up-acp"].folder)
    (step,) = document["steps"]
    assert step["message"].startswith("no turn was taken; closed/failed: no reward; sandbox: SandboxError")
    assert document["extra"]["outcome"]["reward"] is None


def test_usage_that_was_not_metered_is_not_zero(cases):
    """Untracked: no number, and the reason."""
    final = to_atif(cases["end_turn-acp"].folder)["final_metrics"]
    assert final["extra"]["usage"] == "untracked"
    assert set(final) == {"extra", "total_steps"}


CHECK = """
import json, sys
from harbor.utils.trajectory_validator import TrajectoryValidator
answers = {}
for path in sys.argv[1:]:
    validator = TrajectoryValidator()
    answers[path] = [] if validator.validate(__import__("pathlib").Path(path)) else validator.get_errors()
print(json.dumps(answers))
"""


@pytest.mark.hosts
def test_harbors_own_validator_accepts_every_rollout(cases, tmp_path):
    """Each way out, each kill, metered and not: and it refuses one that we broke."""
    python = host_python("harbor")
    paths = []
    for name, case in cases.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(to_atif(case.folder)))
    broken = to_atif(cases["one_role"].folder)
    broken["steps"][1]["observation"]["results"][0]["source_call_id"] = "nobody"
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    files = [str(path) for path in (*paths, tmp_path / "broken.json")]
    done = host_run(python, "python", "-c", CHECK, *files, env={}, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert "which is not found" in answers.pop(str(tmp_path / "broken.json"))[0]
    assert {path: errors for path, errors in answers.items() if errors} == {}
    assert len(answers) == len(cases) > 60


def test_a_trajectory_is_of_the_rollout_as_far_as_it_came(cases):
    """What a kill left in the first turn has that turn's steps, and no reward."""
    killed = [case for name, case in cases.items() if name.startswith("killed_")]
    for case in killed:
        document, read = to_atif(case.folder), recorded(case.folder)
        assert document["notes"].startswith(read.result.state)
        assert document["extra"]["outcome"]["reward"] == read.result.reward
