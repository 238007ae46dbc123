"""verifiers' traces: what its own reader reads of a line, as a graph of messages with calls, rewards and timing."""

from __future__ import annotations

import json

import pytest
from hosts import host_python, host_run

from orchestrator.export import export, recorded
from orchestrator.export.verifiers import to_verifiers


def episode_of(case):
    (episode,) = to_verifiers(case.folder)
    return episode


def test_each_role_is_an_agent_with_a_trace(two_roles):
    episode = episode_of(two_roles)
    assert [trace["agent"]["name"] for trace in episode["traces"]] == ["coder", "reviewer"]
    assert {trace["rewards"]["reward"]["score"] for trace in episode["traces"]} == {0.5}
    assert all(trace["metrics"] == {"style": 1.0} for trace in episode["traces"])


def test_each_message_is_one_node_and_what_a_model_said_is_sampled(one_role):
    """One conversation of three calls: one path, its sampled nodes those that the calls returned."""
    (trace,) = episode_of(one_role)["traces"]
    nodes = trace["nodes"]
    assert [node["parent"] for node in nodes] == [None, *range(len(nodes) - 1)]
    assert [node["message"]["role"] for node in nodes] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    sampled = [n for n, node in enumerate(nodes) if node["sampled"]]
    assert sampled == [call["node"] for call in trace["calls"]] == [1, 3, 5]


def test_nothing_of_a_rollout_that_was_not_metered_is_sampled(cases):
    """Its conversation is there, as its agent showed it; nobody saw a model say it."""
    (trace,) = episode_of(cases["end_turn-acp"])["traces"]
    assert [node["message"]["role"] for node in trace["nodes"]] == ["user", "assistant", "tool", "assistant"]
    assert not any(node["sampled"] for node in trace["nodes"])
    assert trace["calls"] == []


def test_the_flat_form_is_the_same_conversation(one_role):
    row = episode_of(one_role)
    assert row["prompt"] == [{"role": "user", "content": "Do it."}]
    assert [message["role"] for message in row["completion"]] == ["assistant", "tool", "assistant", "tool", "assistant"]
    (use,) = row["completion"][0]["tool_calls"]
    assert row["completion"][1]["tool_call_id"] == use["id"]
    assert json.loads(use["function"]["arguments"]) == {"command": "make it"}
    assert (row["reward"], row["metrics"]["style"]) == (0.5, 1.0)


def test_a_rollout_without_a_reward_has_none(cases):
    for name in ("void", "unverified", "cancelled_in_executing-acp"):
        row = episode_of(cases[name])
        assert row["reward"] is None
        assert all(trace["rewards"] == {"reward": None} for trace in row["traces"]), name


CHECK = """
import json, sys
from pathlib import Path
from verifiers.v1.trace import WireTrace
from verifiers.v1.utils.trace_store import read_episodes
answers = []
for episode in read_episodes(Path(sys.argv[1]), WireTrace):
    usage = episode.usage
    answers.append({
        "id": episode.id,
        "ok": episode.ok,
        "usage": [usage.input_tokens, usage.completion_tokens, usage.cost] if usage else None,
        "turns": episode.num_turns,
        "agents": sorted(episode.by_agent),
        "branches": [len(trace.branches) for trace in episode.traces],
        "rewards": [trace.reward for trace in episode.traces],
        "replies": [trace.last_reply for trace in episode.traces],
        "tools": [[tool.name for tool in trace.tools] for trace in episode.traces],
        "errors": len(episode.errors),
    })
print(json.dumps(answers))
"""


@pytest.mark.hosts
def test_verifiers_reads_every_rollout(cases, tmp_path):
    """One file of a line a rollout, through verifiers' own reader: usage is what the provider counted."""
    python = host_python("verifiers")
    lines = [export(case.folder, "verifiers-jsonl", tmp_path / f"{name}.jsonl") for name, case in cases.items()]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "traces.jsonl").write_bytes(b"".join(line.read_bytes() for line in lines))
    done = host_run(python, "python", "-c", CHECK, str(tmp_path / "run"), env={}, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = dict(zip(cases, json.loads(done.stdout), strict=True))
    for name, answer in answers.items():
        read = recorded(cases[name].folder)
        assert answer["ok"] == (read.result.ending in {"rewarded", "unverified"}), name
        assert set(answer["rewards"]) <= {read.result.reward or 0.0}, name
    two, counted = answers["two_roles"], cases["two_roles"].provider
    assert two["usage"] == [counted.input_tokens, counted.output_tokens, pytest.approx(counted.cost)]
    assert two["agents"] == ["coder", "reviewer"]
    assert two["turns"] == len(recorded(cases["two_roles"].folder).calls)
    assert two["branches"] == [1 + 1, 1], "the coder came back in a session of its own"
    assert two["tools"] == [["bash"], ["bash"]]
