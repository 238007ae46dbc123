"""Inspect's log: what `read_eval_log` reads of it, and that its own tree of events can be built."""

from __future__ import annotations

import json

import pytest
from hosts import host_python, host_run

from orchestrator.export import export, recorded
from orchestrator.export.inspect_log import to_inspect


def sample_of(case):
    (sample,) = to_inspect(case.folder)["samples"]
    return sample


def test_each_stay_in_a_state_is_a_span_and_a_role_is_an_agent_in_it(two_roles):
    events = sample_of(two_roles)["events"]
    spans = [event for event in events if event["event"] == "span_begin"]
    states = [visit.state for visit in recorded(two_roles.folder).visits]
    assert [span["name"] for span in spans if span["type"] == "state"] == states
    agents = [span for span in spans if span["type"] == "agent"]
    assert [span["name"] for span in agents] == ["coder", "reviewer", "coder"]
    executing = [span["id"] for span in spans if span["name"] == "executing"]
    assert [span["parent_id"] for span in agents] == executing
    ended = [event["id"] for event in events if event["event"] == "span_end"]
    assert sorted(ended) == sorted(span["id"] for span in spans)


def test_what_models_were_sent_is_written_once(two_roles):
    """Each message of the pool differs from every other, and each model event refers to its own."""
    sample = sample_of(two_roles)
    pool = sample["events_data"]["messages"]
    assert len({json.dumps({k: v for k, v in m.items() if k != "id"}, sort_keys=True) for m in pool}) == len(pool)
    for event, call in zip(
        (event for event in sample["events"] if event["event"] == "model"),
        recorded(two_roles.folder).calls,
        strict=True,
    ):
        sent = [pool[n]["role"] for first, end in event["input_refs"] for n in range(first, end)]
        assert sent == [message.role for message in call.asked]


def test_a_tool_event_follows_the_model_event_that_asked_for_it(one_role):
    events = [e for e in sample_of(one_role)["events"] if e["event"] in {"model", "tool"}]
    assert [event["event"] for event in events] == ["model", "tool", "model", "tool", "model"]
    model, tool = events[:2]
    (use,) = model["output"]["choices"][0]["message"]["tool_calls"]
    assert (use["id"], use["function"], use["arguments"]) == (tool["id"], tool["function"], tool["arguments"])
    assert "did make it" in tool["result"]


def test_usage_is_what_the_provider_counted_cached_tokens_apart(two_roles):
    counted, usage = two_roles.provider, to_inspect(two_roles.folder)["stats"]["model_usage"]
    (used,) = usage.values()
    assert used["input_tokens"] + used["input_tokens_cache_read"] == counted.input_tokens
    assert used["input_tokens_cache_read"] == counted.cache_read_input_tokens > 0
    assert (used["output_tokens"], used["total_cost"]) == (counted.output_tokens, counted.cost)
    roles = to_inspect(two_roles.folder)["stats"]["role_usage"]
    assert sum(role["total_tokens"] for role in roles.values()) == counted.tokens


@pytest.mark.parametrize(
    ("case", "status"),
    [
        ("one_role", "success"),
        ("unverified", "success"),
        ("void", "error"),
        ("unquiet-acp", "error"),
        ("cancelled_in_executing-acp", "cancelled"),
        ("killed_1", "started"),
    ],
)
def test_the_status_is_that_of_the_ending(case, status, cases):
    log = to_inspect(cases[case].folder)
    assert log["status"] == status
    assert ("error" in log) == ("error" in log["samples"][0]) == (status == "error")
    assert ("scores" in log["samples"][0]) == (case == "one_role")


def test_each_reward_is_a_score(one_role):
    log = to_inspect(one_role.folder)
    assert {name: score["value"] for name, score in log["samples"][0]["scores"].items()} == {
        "reward": 0.5,
        "style": 1.0,
    }
    assert [score["name"] for score in log["results"]["scores"]] == ["reward", "style"]


CHECK = """
import json, sys
from inspect_ai.event import event_tree
from inspect_ai.log import read_eval_log
answers = {}
for path in sys.argv[1:]:
    log = read_eval_log(path, resolve_attachments=True)
    (sample,) = log.samples
    tree = event_tree(sample.events)
    models = [event for event in sample.events if event.event == "model"]
    answers[path] = {
        "status": log.status,
        "tree": [node.name for node in tree if hasattr(node, "name")],
        "inputs": [[message.role for message in event.input] for event in models],
        "usage": sum(event.output.usage.total_tokens for event in models if event.output.usage),
        "messages": [[message.role, message.text] for message in sample.messages],
        "score": sample.scores["reward"].as_float() if sample.scores else None,
        "summary": sample.summary().message_count,
    }
print(json.dumps(answers))
"""


@pytest.mark.hosts
def test_inspect_reads_every_rollout(cases, tmp_path):
    """Each way out, each kill, metered and not; inputs are whole, the tree of spans is the path through states."""
    python = host_python("inspect")
    paths = {str(export(case.folder, "inspect", tmp_path / f"{name}.json")): name for name, case in cases.items()}
    done = host_run(python, "python", "-c", CHECK, *paths, env={}, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    answers = {paths[path]: answer for path, answer in json.loads(done.stdout).items()}
    assert len(answers) == len(cases)
    for name, answer in answers.items():
        read = recorded(cases[name].folder)
        assert answer["tree"] == [visit.state for visit in read.visits], name
        sent = [[message.role for message in call.asked] for call in read.calls]
        assert sorted(answer["inputs"]) == sorted(sent), name
        assert answer["score"] == read.result.reward, name
    assert answers["two_roles"]["usage"] == cases["two_roles"].provider.tokens
    assert answers["rich-acp"]["messages"][1][0] == "assistant"


def test_a_cost_that_nobody_knows_is_left_out(monkeypatch, one_role):
    """None is no zero."""
    import attrs

    read = recorded(one_role.folder)
    calls = tuple(attrs.evolve(c, counted=attrs.evolve(c.counted, cost=None)) for c in read.calls)
    log = to_inspect(attrs.evolve(read, calls=calls))
    assert all("total_cost" not in used for used in log["stats"]["model_usage"].values())
