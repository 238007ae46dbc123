"""An evaluation log of Inspect (`inspect_ai.log.EvalLog`, version 2, as `.json`) with the rollout as its one sample.

`inspect view` and `read_eval_log` open it. Each stay in a state is a span; within a turn the role is a span of type
`agent`, with model events as the gateway saw them and tool events as the agent showed them. A step has no time of its
own, so a tool event bears that of the model call which asked for it. What models were sent is written once and
referred to (`events_data`), so a log grows linearly. The rewards are scores. A rollout that was cancelled, failed or is
void is a log with that status and error, and one that is not over has the status `started`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from orchestrator.export import chat
from orchestrator.export.common import DISTRIBUTION, iso, lean, own_version, sentence
from orchestrator.export.recorded import Act, Call, Recorded, Source, Step, Turn, recorded, tool_result
from orchestrator.visits import Visit
from states.events import Checked, Usage, Verified

JSON = dict[str, Any]
STATUS = {"rewarded": "success", "unverified": "success", "cancelled": "cancelled", None: "started"}
STOPS = {"length": "max_tokens", "": "unknown"}
JSON_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")


def to_inspect(source: Source) -> JSON:
    """The rollout as an `EvalLog` (JSON values). Raises as `recorded` does."""
    rollout = recorded(source)
    status = STATUS.get(rollout.result.ending, "error")
    error = {"message": rollout.outcome, "traceback": "", "traceback_ansi": ""} if status == "error" else None
    usage = {"model_usage": _by_model(rollout), "role_usage": _by_role(rollout)}
    times = {"started_at": iso(rollout.result.started), "completed_at": iso(rollout.ended)}
    return lean(
        {
            "version": 2,
            "status": status,
            "eval": _spec(rollout),
            "plan": {"name": "rollout", "steps": [{"solver": DISTRIBUTION, "params": {}}]},
            "results": _results(rollout),
            "stats": {**times, **usage},
            "error": error,
            "samples": [lean({**_sample(rollout), **times, **usage, "error": error})],
        }
    )


def _spec(rollout: Recorded) -> JSON:
    about = rollout.about
    return {
        "created": iso(rollout.result.started),
        "eval_id": rollout.id,
        "run_id": rollout.id,
        "task": rollout.result.task or "rollout",
        "task_id": str(about.get("task_digest") or rollout.id),
        "dataset": {"name": rollout.result.task or None, "samples": 1, "sample_ids": [rollout.id], "shuffled": False},
        "solver": DISTRIBUTION,
        "model": next(filter(None, (rollout.model_of(role) for role in rollout.roles)), "none"),
        "config": {"epochs": 1},
        "packages": {DISTRIBUTION: own_version()},
        "metadata": {"outcome": rollout.outcome, "roles": rollout.roles},
    }


def _results(rollout: Recorded) -> JSON | None:
    if rollout.result.ending is None:
        return None
    scores = [
        {
            "name": name,
            "scorer": "verifier",
            "scored_samples": 1,
            "unscored_samples": 0,
            "metrics": {"mean": {"name": "mean", "value": value}},
        }
        for name, value in _rewards(rollout).items()
    ]
    return {"total_samples": 1, "completed_samples": int(rollout.result.ending != "cancelled"), "scores": scores}


def _rewards(rollout: Recorded) -> dict[str, float]:
    """The rewards that count, the one called `reward` first; none before they are proven."""
    result = rollout.result
    return {"reward": result.reward, **result.rewards} if result.reward is not None else {}


def _score(rollout: Recorded, value: float) -> JSON:
    return {"value": value, "explanation": rollout.outcome, "answer": _last_words(rollout) or None}


def _last_words(rollout: Recorded) -> str:
    said = [act.said for turn in rollout.turns for act in turn.acts if act.said and not act.late]
    return said[-1] if said else ""


def _sample(rollout: Recorded) -> JSON:
    pool = _Pool()
    events = list(_events(rollout, pool))
    messages = [message for turn in rollout.turns for message in _messages(rollout, turn)]
    prompts = [message["content"] for message in messages if message["role"] == "user"]
    scores = {name: _score(rollout, value) for name, value in _rewards(rollout).items()}
    return {
        "id": rollout.id,
        "epoch": 1,
        "uuid": rollout.id,
        "input": prompts[0] if prompts else "",
        "target": "",
        "sandbox": {"type": str(rollout.about.get("sandbox") or "unknown")},
        "messages": messages,
        "output": _last_output(rollout, messages),
        "scores": scores or None,
        "metadata": {
            "outcome": rollout.outcome,
            "state": rollout.result.state,
            "ended_by": rollout.result.ended_by,
            "verdict": attrs.asdict(rollout.result.verdict),
            "trajectory_source": rollout.result.trajectory_source,
        },
        "events": events,
        "events_data": {"messages": pool.messages, "calls": []},
        "total_time": rollout.result.seconds,
        "turn_count": sum(len(turn.calls) or len(turn.acts) for turn in rollout.turns),
    }


def _last_output(rollout: Recorded, messages: Sequence[JSON]) -> JSON:
    said = [message for message in messages if message["role"] == "assistant"]
    if not said:
        return {"model": "", "choices": []}
    calls = [call for turn in rollout.turns for call in turn.calls]
    stop = _stop(calls[-1]) if calls else "stop"
    return {"model": said[-1].get("model", ""), "choices": [{"message": said[-1], "stop_reason": stop}]}


# --- messages --------------------------------------------------------------------------------------------------


def _messages(rollout: Recorded, turn: Turn) -> Iterator[JSON]:
    """A turn as the agent showed it: prompt, what it said and did, what its tools gave back."""
    for number, entry in enumerate(turn.entries):
        name = f"{rollout.id}-{turn.number}-{number}"
        about = {"metadata": {"role": turn.role}}
        if isinstance(entry, Act):
            if not entry.late:
                yield from _act_messages(rollout, turn, entry, name)
        elif entry.get("type") == "user_message":
            yield {"id": name, "role": "user", "content": str(entry.get("text") or ""), "source": "input", **about}


def _act_messages(rollout: Recorded, turn: Turn, act: Act, name: str) -> Iterator[JSON]:
    about = {"metadata": {"role": turn.role}}
    uses = [chat.ToolUse(_id(step), act.tool_name(step), json.dumps(act.tool_arguments(step))) for step in act.tools]
    said = _message(chat.Message("assistant", act.said, act.thought, tuple(uses)), name, rollout.model_of(turn.role))
    yield {**said, "source": "generate", **about}
    for number, (step, use) in enumerate(zip(act.tools, uses, strict=True)):
        result = {"role": "tool", "content": tool_result(step), "tool_call_id": use.id, "function": use.name}
        yield lean({"id": f"{name}-{number}", **result, "error": _tool_error(step), **about})


def _message(message: chat.Message, name: str, model: str) -> JSON:
    """A message in Inspect's form."""
    if message.role == "tool":
        return {"id": name, "role": "tool", "content": message.text, "tool_call_id": message.use}
    if message.role != "assistant":
        return {"id": name, "role": message.role, "content": message.text}
    thought = [{"type": "reasoning", "reasoning": message.thought}] if message.thought else []
    text = [{"type": "text", "text": message.text}] if message.text else []
    uses = [{"id": u.id, "function": u.name, "arguments": u.parsed(), "type": "function"} for u in message.uses]
    content = [*thought, *text] if thought else message.text
    return lean(
        {"id": name, "role": "assistant", "content": content, "tool_calls": uses or None, "model": model or None}
    )


def _id(step: Step) -> str:
    return str(step.get("tool_call_id") or "")


def _tool_error(step: Step) -> JSON | None:
    return {"type": "unknown", "message": tool_result(step)} if step.get("status") == "failed" else None


# --- events ----------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Pool:
    """Every message that a model was sent, once."""

    messages: list[JSON] = attrs.field(factory=list)
    _places: dict[chat.Message, int] = attrs.field(factory=dict)

    def refs(self, call: Call) -> list[list[int]]:
        """Where the messages of a call stand, as ranges."""
        ranges: list[list[int]] = []
        for message in call.asked:
            at = self._places.get(message)
            if at is None:
                at = self._places[message] = len(self.messages)
                self.messages.append(_message(message, f"m{at}", call.model if message.role == "assistant" else ""))
            if ranges and ranges[-1][1] == at:
                ranges[-1][1] = at + 1
            else:
                ranges.append([at, at + 1])
        return ranges


def _events(rollout: Recorded, pool: _Pool) -> Iterator[JSON]:
    """Every stay in a state as a span, and in it what happened; numbered, so that the same log comes out each time."""
    turns = iter(rollout.turns)
    start = rollout.result.started
    for number, visit in enumerate(rollout.visits):
        span = f"{rollout.id}-{number}"
        ended = visit.entered + visit.seconds
        happened = [_begin(span, visit.state, "state", visit.entered)]
        if visit.state == "executing" and (turn := next(turns, None)) is not None:
            happened += _turn_events(rollout, turn, span, pool)
        happened += [
            _model_event(call, span, pool) for call in rollout.other_calls if visit.entered <= call.began <= ended
        ]
        happened += _ways_out(rollout, visit, span, ended)
        happened.append({"event": "span_end", "id": span, "span_id": span, "timestamp": iso(ended)})
        for place, event in enumerate(happened):
            event.setdefault("working_start", max(0.0, round(visit.entered - start, 6)))
            yield {"uuid": f"{span}-{place}", **event}


def _begin(span: str, name: str, kind: str, at: float, parent: str | None = None) -> JSON:
    begin = {"event": "span_begin", "id": span, "name": name, "type": kind, "parent_id": parent}
    return lean({**begin, "span_id": span, "timestamp": iso(at)})


def _turn_events(rollout: Recorded, turn: Turn, parent: str, pool: _Pool) -> Iterator[JSON]:
    span = f"{parent}-agent"
    yield _begin(span, turn.role, "agent", turn.began, parent)
    at = turn.began
    for number, entry in enumerate(turn.entries):
        if isinstance(entry, Act):
            yield from (_model_event(call, span, pool) for call in entry.calls)
            at = entry.calls[-1].ended if entry.calls else at
            message = f"{rollout.id}-{turn.number}-{number}"
            yield from (_tool_event(entry, step, span, at, f"{message}-{n}") for n, step in enumerate(entry.tools))
            if not entry.calls and (entry.said or entry.thought):
                yield _info(span, at, {"said": entry.said, "thought": entry.thought})
        elif entry.get("type") != "user_message":
            yield _info(span, at, {"said": sentence(entry), "step": dict(entry)})
    yield {"event": "span_end", "id": span, "span_id": span, "timestamp": iso(turn.ended)}


def _info(span: str, at: float, data: JSON) -> JSON:
    return {"event": "info", "span_id": span, "timestamp": iso(at), "source": DISTRIBUTION, "data": data}


def _model_event(call: Call, span: str, pool: _Pool) -> JSON:
    reply = call.answered
    message = _message(reply, f"reply-{call.number}", call.model) if reply else None
    output = {
        "model": call.upstream_model or call.model,
        "choices": [{"message": {**message, "source": "generate"}, "stop_reason": _stop(call)}] if message else [],
        "usage": _usage(call.counted) if call.counted.tokens else None,
        "time": round(call.ended - call.began, 6),
    }
    return lean(
        {
            "event": "model",
            "span_id": span,
            "timestamp": iso(call.began),
            "completed": iso(call.ended),
            "model": call.upstream_model or call.model,
            "role": call.role or None,
            "input": [],
            "input_refs": pool.refs(call),
            "tools": [_tool(tool) for tool in call.tools],
            "tool_choice": "auto",
            "config": {},
            "output": lean(output),
            "error": call.error,
        }
    )


def _stop(call: Call) -> str:
    return STOPS.get(call.finish, call.finish)


def _tool(tool: chat.Tool) -> JSON:
    """A tool with as much of its parameters as Inspect's own schema knows; the whole stands in `options`."""
    given = tool.parameters.get("properties")
    properties = given if isinstance(given, dict) else {}
    named = tool.parameters.get("required")
    required = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    return {
        "name": tool.name,
        "description": tool.description,
        "parameters": {"properties": {str(k): _parameter(v) for k, v in properties.items()}, "required": required},
        "options": {"parameters": dict(tool.parameters)},
    }


def _parameter(schema: Any) -> JSON:
    about = schema if isinstance(schema, dict) else {}
    kind, description = about.get("type"), about.get("description")
    known = {"type": kind if kind in JSON_TYPES else None}
    return lean({**known, "description": description if isinstance(description, str) else None})


def _tool_event(act: Act, step: Step, span: str, at: float, message: str) -> JSON:
    return lean(
        {
            "event": "tool",
            "span_id": span,
            "timestamp": iso(at),
            "id": _id(step),
            "function": act.tool_name(step),
            "arguments": act.tool_arguments(step),
            "result": tool_result(step),
            "error": _tool_error(step),
            "message_id": None if act.late else message,
            "metadata": {"title": step.get("title"), "status": step.get("status"), "late": act.late},
        }
    )


def _ways_out(rollout: Recorded, visit: Visit, span: str, at: float) -> Iterator[JSON]:
    """What led out of a state: a score, feedback, or the event as it stands in the journal."""
    for event in (*visit.stayed, *([visit.event] if visit.event else [])):
        if isinstance(event, Verified):
            score = {"value": event.reward, "explanation": rollout.outcome}
            yield {"event": "score", "span_id": span, "timestamp": iso(at), "scorer": "verifier", "score": score}
        elif isinstance(event, Checked) and event.feedback:
            score = {"value": dict(event.feedback)}
            checked = {"event": "score", "scorer": "verifier", "score": score, "intermediate": True}
            yield {**checked, "span_id": span, "timestamp": iso(at)}
        else:
            failure = getattr(event, "failure", None)
            about = attrs.asdict(failure) if failure is not None else {}
            yield _info(span, at, lean({"event": event.name, "cause": visit.cause, "failure": about or None}))


# --- usage -----------------------------------------------------------------------------------------------------


def _usage(used: Usage) -> JSON:
    """Inspect counts cached tokens beside `input_tokens`, we within."""
    cached = used.cache_read_input_tokens + used.cache_creation_input_tokens
    return lean(
        {
            "input_tokens": max(0, used.input_tokens - cached),
            "output_tokens": used.output_tokens,
            "total_tokens": used.tokens,
            "input_tokens_cache_read": used.cache_read_input_tokens,
            "input_tokens_cache_write": used.cache_creation_input_tokens,
            "total_cost": used.cost,
        }
    )


def _by_model(rollout: Recorded) -> JSON:
    sums: dict[str, Usage] = {}
    for call in rollout.calls:
        model = call.upstream_model or call.model
        sums[model] = sums.get(model, Usage()) + call.counted
    return {model: _usage(used) for model, used in sums.items()}


def _by_role(rollout: Recorded) -> JSON:
    return {role: _usage(used) for role, used in rollout.result.usage.by_role.items()} if rollout.metered else {}
