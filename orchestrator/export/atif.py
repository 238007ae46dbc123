"""ATIF, the trajectory format that Harbor reads (`harbor.models.trajectories`, schema ATIF-v1.7), of any rollout.

One document a rollout. Roles take turns in one sandbox, so their steps stand in one sequence, in the order in which
they happened, and each says in `extra.role` whose it is: a scene is no delegation, and has no subagents. An agent's
step is one inference where that is known; its `metrics` are the usage of the calls behind it, and `llm_call_count` says
how many those are, so the metrics of all steps add up to `final_metrics`, but for what a director used: that stands in
its `extra.outside_turns`. What an agent asked, and what was answered,
are steps of the system. What a rollout ended as stands in `notes` and in `extra.outcome`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from orchestrator.export.common import DISTRIBUTION, iso, lean, own_version, sentence
from orchestrator.export.recorded import Act, Recorded, Source, Step, Turn, recorded, tool_result
from states.events import Usage

SCHEMA = "ATIF-v1.7"


def to_atif(source: Source) -> dict[str, Any]:
    """The rollout as an ATIF document (JSON values). Raises as `recorded` does."""
    rollout = recorded(source)
    told = [*_steps(rollout)] or [_nothing_happened(rollout)]
    steps = [{"step_id": number, **step} for number, step in enumerate(told, start=1)]
    return {
        "schema_version": SCHEMA,
        "session_id": rollout.id,
        "trajectory_id": rollout.id,
        "agent": _agent(rollout),
        "steps": steps,
        "notes": rollout.outcome,
        "final_metrics": {**_final(rollout), "total_steps": len(steps)},
        "extra": _about(rollout),
    }


def _agent(rollout: Recorded) -> dict[str, Any]:
    """The one agent that took turns; of a scene of several it is us, and `extra` lists them."""
    roles = rollout.roles
    extra = {"roles": {role: _role(rollout, role) for role in roles}}
    tools = {tool.name: tool for call in rollout.calls for tool in call.tools}
    functions = [
        {"name": t.name, "description": t.description, "parameters": dict(t.parameters)} for t in tools.values()
    ]
    known = {"tool_definitions": [{"type": "function", "function": function} for function in functions] or None}
    if len(roles) != 1:
        return lean({"name": DISTRIBUTION, "version": own_version(), **known, "extra": extra})
    (role,) = roles
    return lean(
        {
            "name": str(roles[role].get("agent")),
            "version": _version(rollout.agents.get(role, "")),
            "model_name": rollout.model_of(role) or None,
            **known,
            "extra": extra,
        }
    )


def _version(said: str) -> str:
    """The version in what an agent said it is, `name 1.2.3`."""
    last = said.rpartition(" ")[2].removeprefix("v")
    return last if last[:1].isdigit() else "unknown"


def _role(rollout: Recorded, role: str) -> dict[str, Any]:
    about = {key: rollout.roles[role].get(key) or None for key in ("agent", "protocol", "model")}
    return lean({**about, "said_it_is": rollout.agents.get(role) or None})


def _steps(rollout: Recorded) -> Iterator[dict[str, Any]]:
    for turn in rollout.turns:
        for number, entry in enumerate(turn.entries):
            about = {"role": turn.role, "turn": turn.number}
            if isinstance(entry, Act):
                yield _act(rollout, turn, entry, about)
            else:
                yield {**({"timestamp": iso(turn.began)} if number == 0 else {}), **_told(entry, about)}


def _told(step: Step, about: dict[str, Any]) -> dict[str, Any]:
    """What is no act of an agent: a prompt is the user's, all else is the system's."""
    if step.get("type") == "user_message":
        return {"source": "user", "message": str(step.get("text") or ""), "extra": about}
    return {"source": "system", "message": sentence(step), "extra": {**about, "step": dict(step)}}


def _act(rollout: Recorded, turn: Turn, act: Act, about: dict[str, Any]) -> dict[str, Any]:
    several = len({rollout.model_of(role) for role in rollout.roles}) > 1
    return lean(
        {
            "timestamp": iso(act.calls[-1].ended) if act.calls else None,
            "source": "agent",
            "model_name": (rollout.model_of(turn.role) or None) if several else None,
            "message": act.said,
            "reasoning_content": act.thought or None,
            "tool_calls": [_tool(act, step) for step in act.tools] or None,
            "observation": {"results": [_result(step) for step in act.tools]} if act.tools else None,
            "metrics": _metrics(act.usage) if act.calls else None,
            "llm_call_count": len(act.calls) or None,
            "extra": {**about, **({"late": True} if act.late else {})},
        }
    )


def _tool(act: Act, step: Step) -> dict[str, Any]:
    return {
        "tool_call_id": str(step.get("tool_call_id") or ""),
        "function_name": act.tool_name(step),
        "arguments": act.tool_arguments(step),
        "extra": {key: step.get(key) for key in ("title", "kind")},
    }


def _result(step: Step) -> dict[str, Any]:
    return {
        "source_call_id": str(step.get("tool_call_id") or ""),
        "content": tool_result(step),
        "extra": {"status": step.get("status")},
    }


def _metrics(used: Usage) -> dict[str, Any]:
    extra = {"cache_creation_tokens": used.cache_creation_input_tokens, "failed_calls": used.failed_calls}
    return lean(
        {
            "prompt_tokens": used.input_tokens,
            "completion_tokens": used.output_tokens,
            "cached_tokens": used.cache_read_input_tokens,
            "cost_usd": used.cost,
            "extra": {name: count for name, count in extra.items() if count} or None,
        }
    )


def _final(rollout: Recorded) -> dict[str, Any]:
    usage = rollout.result.usage
    if not rollout.metered:
        return {"extra": {"usage": "untracked", "reason": usage.reason}}
    total = usage.total
    return lean(
        {
            "total_prompt_tokens": total.input_tokens,
            "total_completion_tokens": total.output_tokens,
            "total_cached_tokens": total.cache_read_input_tokens,
            "total_cost_usd": total.cost,
            "extra": {
                "usage": attrs.asdict(total),
                "by_role": {role: attrs.asdict(used) for role, used in usage.by_role.items()},
                "outside_turns": attrs.asdict(sum((call.counted for call in rollout.other_calls), Usage())),
            },
        }
    )


def _about(rollout: Recorded) -> dict[str, Any]:
    result = rollout.result
    return {
        "task": result.task,
        "outcome": {
            "state": result.state,
            "ending": result.ending,
            "reward": result.reward,
            "rewards": dict(result.rewards),
            "ended_by": result.ended_by,
            "verdict": attrs.asdict(result.verdict),
            "trajectory_source": result.trajectory_source,
        },
        "path": [
            lean({"state": v.state, "seconds": round(v.seconds, 6), "event": v.event.name if v.event else None})
            for v in rollout.visits
        ],
        "written_by": f"{DISTRIBUTION} {own_version()}",
    }


def _nothing_happened(rollout: Recorded) -> dict[str, Any]:
    """A trajectory has at least one step: of a rollout without a turn it says why there was none."""
    return {"timestamp": iso(rollout.ended), "source": "system", "message": f"no turn was taken; {rollout.outcome}"}
