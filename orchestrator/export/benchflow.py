"""A rollout's folder as BenchFlow 0.7 writes one, so that what reads those reads ours: viewer, metrics, training data.

    config.json  result.json  timing.json  prompts.json  rewards.jsonl
    trajectory/acp_trajectory.jsonl   steps, whatever the transport, with an `agent_timeout` where time ran out
    trajectory/llm_trajectory.jsonl   model calls, whole: BenchFlow keeps each request as it was sent
    verifier/                         what the last run of the tests said and left

Several roles are one trajectory, as in BenchFlow's scenes. A reward that is None is `rewards: null` with an `error`
that says why, in the words by which BenchFlow sorts errors; one that is there stands whatever ended the last turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from orchestrator.export.common import iso
from orchestrator.export.recorded import Call, Recorded, Source, Turn, recorded
from orchestrator.journal import encode_any
from states.events import DeadlinePassed, IdlePassed

JSON = dict[str, Any]
PATHS = {
    "openai-chat": "/v1/chat/completions",
    "openai-responses": "/v1/responses",
    "anthropic-messages": "/v1/messages",
}
TIMES = {"environment_setup": "provisioning", "agent_setup": "connecting", "agent_execution": "executing"}
SIDECARS = {
    "reward.txt": "logs/reward.txt",
    "ctrf.json": "logs/ctrf.json",
    "test-stdout.txt": "stdout.txt",
    "test-stderr.txt": "stderr.txt",
}
"""BenchFlow's names of what a verifier leaves, and where a run of ours has it."""


def to_benchflow(source: Source) -> dict[str, bytes]:
    """The bytes of BenchFlow's files by their path. Raises as `recorded` does."""
    rollout = recorded(source)
    prompts = [str(turn.steps[0].get("text") or "") for turn in rollout.turns if turn.steps]
    timing = _timing(rollout)
    files: dict[str, bytes] = {
        "config.json": _json(_config(rollout)),
        "result.json": _json(_result(rollout, timing, len(prompts))),
        "timing.json": _json(timing),
        "prompts.json": _json(prompts),
        "trajectory/acp_trajectory.jsonl": _lines(_events(rollout)),
        **_verifier(rollout),
    }
    if rollout.calls:
        files["trajectory/llm_trajectory.jsonl"] = _lines(map(_exchange, rollout.calls))
    if rollout.result.reward is not None:
        files["rewards.jsonl"] = _lines([_reward_event(rollout)])
    return files


def _json(value: Any) -> bytes:
    return encode_any(value) + b"\n"


def _lines(values: Iterable[Any]) -> bytes:
    return b"".join(map(_json, values))


def _time(seconds: float) -> str:
    """As BenchFlow writes times: `str` of a datetime."""
    return str(datetime.fromisoformat(iso(seconds)))


# --- the trajectory --------------------------------------------------------------------------------------------


def _events(rollout: Recorded) -> Iterable[JSON]:
    for turn in rollout.turns:
        yield from (dict(step) for step in turn.steps if step.get("type") != "session_update")
        if isinstance(turn.left_by, DeadlinePassed | IdlePassed):
            yield {
                "type": "agent_timeout",
                "reason": _TIMEOUTS[type(turn.left_by)],
                "timeout_sec": turn.left_by.seconds,
                "pending_tool_call_ids": _pending(turn),
                "terminal_trajectory_complete": turn.complete,
            }


_TIMEOUTS = {DeadlinePassed: "timeout", IdlePassed: "idle_timeout"}


def _pending(turn: Turn) -> list[str]:
    tools = [step for step in turn.steps if step.get("type") == "tool_call"]
    return [str(step.get("tool_call_id")) for step in tools if step.get("status") not in {"completed", "failed"}]


def _exchange(call: Call) -> JSON:
    headers = {"content-type": "application/json"}
    request = {"timestamp": iso(call.began), "method": "POST", "path": PATHS.get(call.api, ""), "headers": headers}
    response = {"timestamp": iso(call.ended), "status_code": call.status or 0, "headers": headers}
    said = dict(call.response) if call.response else ({"error": {"message": call.error}} if call.error else {})
    return {
        "request": {**request, "body": dict(call.request)},
        "response": {**response, "body": said},
        "duration_ms": round((call.ended - call.began) * 1000, 3),
        "metadata": {"role": call.role, "model": call.upstream_model, "cost_usd": call.counted.cost},
    }


# --- the result ------------------------------------------------------------------------------------------------


def _result(rollout: Recorded, timing: Mapping[str, float], prompts: int) -> JSON:
    result = rollout.result
    usage = _usage(rollout, prompts)
    error, category = _error(rollout)
    verifier_error, verifier_category = _verifier_error(rollout)
    partial = result.trajectory_source.startswith("partial")
    return {
        "task_name": result.task or rollout.id,
        "rollout_name": rollout.id,
        "rewards": {**result.rewards, "reward": result.reward} if result.reward is not None else None,
        "agent": _agents(rollout),
        "agent_name": _agents(rollout),
        "model": _model(rollout),
        "n_tool_calls": result.tool_calls,
        "n_skill_invocations": 0,
        "n_prompts": prompts,
        "agent_result": usage,
        "final_metrics": {
            "total_prompt_tokens": usage["n_input_tokens"],
            "total_completion_tokens": usage["n_output_tokens"],
            "total_cached_tokens": usage["n_cache_read_tokens"],
            "total_cost_usd": usage["cost_usd"],
        },
        "trajectory_summary": _summary(rollout, partial=partial),
        "usage_tracking": {"mode": rollout.about.get("usage_tracking"), "reason": result.usage.reason},
        "error": error,
        "error_category": category,
        "verifier_error": verifier_error,
        "verifier_error_category": verifier_category,
        "export_error": None,
        "partial_trajectory": partial,
        "trajectory_source": result.trajectory_source or None,
        "started_at": _time(result.started),
        "finished_at": _time(rollout.ended),
        "timing": timing,
        "scenes": _scenes(rollout),
        "task_digest": rollout.about.get("task_digest"),
        "rollout_orchestrator": {"state": result.state, "outcome": rollout.outcome, "ended_by": result.ended_by},
    }


def _config(rollout: Recorded) -> JSON:
    limits = [float(role["turn_sec"]) for role in rollout.roles.values() if role.get("turn_sec")]
    return {
        "task_path": rollout.result.task,
        "agent": _agents(rollout),
        "model": _model(rollout),
        "environment": rollout.about.get("sandbox"),
        "timeout_sec": max(limits, default=None),
        "started_at": _time(rollout.result.started),
        "agent_env": {},
        "scenes": _scenes(rollout),
        "task_digest": rollout.about.get("task_digest"),
    }


def _agents(rollout: Recorded) -> str:
    return "+".join(dict.fromkeys(str(role.get("agent")) for role in rollout.roles.values()))


def _model(rollout: Recorded) -> str | None:
    models = filter(None, (rollout.model_of(role) for role in rollout.roles))
    return "+".join(dict.fromkeys(models)) or None


def _scenes(rollout: Recorded) -> list[JSON]:
    roles = [
        {
            "name": name,
            "agent": about.get("agent"),
            "model": about.get("model") or None,
            "timeout_sec": about.get("turn_sec"),
            "idle_timeout_sec": about.get("idle_sec"),
            "env_keys": about.get("env") or [],
        }
        for name, about in rollout.roles.items()
    ]
    turns = [{"role": turn.role, "has_prompt": True} for turn in rollout.turns]
    return [{"name": "scene", "roles": roles, "turns": turns}]


def _usage(rollout: Recorded, prompts: int) -> JSON:
    used, metered = rollout.result.usage.total, rollout.metered
    return {
        "n_tool_calls": rollout.result.tool_calls,
        "n_skill_invocations": 0,
        "n_prompts": prompts,
        "n_input_tokens": used.input_tokens,
        "n_output_tokens": used.output_tokens,
        "n_cache_read_tokens": used.cache_read_input_tokens,
        "n_cache_creation_tokens": used.cache_creation_input_tokens,
        "total_tokens": used.tokens,
        "cost_usd": used.cost if metered else None,
        "usage_source": "provider_response" if metered else "unavailable",
        "price_source": None,
    }


def _summary(rollout: Recorded, *, partial: bool) -> JSON:
    events = list(_events(rollout))
    kinds = Counter(str(event.get("type") or "unknown") for event in events)
    known = ("tool_call", "user_message", "agent_message", "agent_thought")
    return {
        "steps": len(events),
        **{f"{kind}_steps": kinds[kind] for kind in known},
        "other_steps": len(events) - sum(kinds[kind] for kind in known),
        "event_type_counts": dict(kinds),
        "tool_call_status_counts": dict(
            Counter(str(event.get("status") or "unknown") for event in events if event.get("type") == "tool_call")
        ),
        "partial_trajectory": partial,
        "trajectory_source": rollout.result.trajectory_source or None,
    }


def _timing(rollout: Recorded) -> dict[str, float]:
    spent = rollout.result.state_seconds
    times = {name: round(spent[state], 3) for name, state in TIMES.items() if state in spent}
    verified = {"verifier": round(spent["verifying"], 3)} if "verifying" in spent else {}
    return {**times, **verified, "total": round(rollout.result.seconds, 3)}


def _reward_event(rollout: Recorded) -> JSON:
    result = rollout.result
    return {
        "ts": iso(rollout.ended),
        "type": "terminal",
        "source": "verifier",
        "value": result.reward,
        "tag": "reward",
        "step_index": None,
        "space": "output",
        "granularity": "terminal",
        "meta": {name: value for name, value in result.rewards.items() if name != "reward"},
    }


# --- what went wrong, in BenchFlow's words ---------------------------------------------------------------------


def _error(rollout: Recorded) -> tuple[str | None, str | None]:
    """What ended the last turn or the rollout, and its category: BenchFlow tells them by such words."""
    result = rollout.result
    left = rollout.turns[-1].left_by if rollout.turns else None
    if isinstance(left, DeadlinePassed):
        return f"agent prompt exceeded wall-clock budget of {left.seconds:g}s", "timeout"
    if isinstance(left, IdlePassed):
        return f"Agent idle for {left.seconds:g}s", "idle_timeout"
    if result.ending in {"rewarded", "unverified"} or result.verdict.owner == "verifier":
        return None, None
    if result.verdict.owner == "provider":
        return f"provider API error: {result.verdict.reason}", "api_error"
    if result.verdict.owner == "sandbox":
        came_up = "provisioning" not in {error["state"] for error in result.errors}
        what, category = (
            ("connection lost", "infra_failure") if came_up else ("sandbox startup failed", "sandbox_setup")
        )
        return f"{what}: {result.verdict.reason}", category
    return rollout.outcome, "other"


def _verifier_error(rollout: Recorded) -> tuple[str | None, str | None]:
    result = rollout.result
    if result.reward is not None or result.ending is None or result.verdict.owner != "verifier":
        return None, None
    if result.verdict.reason.startswith("DeadlinePassed"):
        return f"verifier timed out: {result.verdict.reason}", "verifier_timeout"
    return f"verifier crashed: {result.verdict.reason}", "verifier_failure"


def _verifier(rollout: Recorded) -> dict[str, bytes]:
    """What the last run of the tests left. Agents write none of these files, and links are not followed."""
    runs = [path for path in (rollout.folder / "verifier").glob("run-*") if re.fullmatch(r"run-\d+", path.name)]
    if not runs:
        return {}
    last = max(runs, key=lambda path: int(path.name.removeprefix("run-")))
    found = {f"verifier/{name}": last / place for name, place in SIDECARS.items()}
    return {name: path.read_bytes() for name, path in found.items() if path.is_file() and not path.is_symlink()}
