"""An episode of verifiers 0.4, one line of its `traces.jsonl` (`verifiers.v1`: `read_episodes`), from a rollout.

A role is an agent of the episode, with a trace: the messages that its model was sent and gave, as the graph that
verifiers keeps (each message once, linked to the one before it), its model calls with usage, rewards, timing, errors.
`sampled` is true of what a metered call returned and of nothing else: of a rollout that was not metered the
conversation is there as its agent showed it, and nothing in it can be trained on. The reward is the scene's, so every
role's trace bears it; a rollout that was not verified has rewards of None, which is verifiers' word for that.

The same line says it flat, too, as trainers read rows: `prompt`, `completion`, `reward`, `metrics`, `info`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from orchestrator.export import chat
from orchestrator.export.common import DISTRIBUTION, lean, own_version
from orchestrator.export.recorded import Call, Recorded, Source, Turn, recorded
from states.events import Usage

JSON = dict[str, Any]
STOPS = {"end_turn": "agent_completed", "DeadlinePassed": "agent_timeout", "IdlePassed": "agent_timeout"}
"""Words of verifiers for what ended a turn; others stand as they are."""


def to_verifiers(source: Source) -> list[JSON]:
    """The rollout as lines: one episode (JSON values). Raises as `recorded` does."""
    rollout = recorded(source)
    ok = rollout.result.ending in {"rewarded", "unverified"}
    roles = dict.fromkeys([*(turn.role for turn in rollout.turns), *(call.role for call in rollout.calls if call.role)])
    traces = [_trace(rollout, role, ok=ok, first=number == 0) for number, role in enumerate(roles)]
    episode = {
        "id": rollout.id,
        "env": {"id": DISTRIBUTION},
        "task": _task(rollout),
        "ok": ok,
        "is_timeout": any(trace["is_timeout"] for trace in traces),
        "errors": _errors(rollout),
        "traces": traces,
    }
    return [{**episode, **_flat(rollout)}]


def _task(rollout: Recorded) -> JSON:
    prompts = [message.text for turn in rollout.turns for message in turn.messages if message.role == "user"]
    data = {
        "name": rollout.result.task or None,
        "id": rollout.about.get("task_digest"),
        "prompt": next(iter(prompts), None),
    }
    return lean({"type": "Rollout", "data": lean(data), "hash": rollout.about.get("task_digest")})


def _flat(rollout: Recorded) -> JSON:
    """The scene as one conversation: what stands before the first word of an agent, and the rest."""
    messages = [_openai(message) for turn in rollout.turns for message in turn.messages]
    spoken = next((n for n, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    return {
        "prompt": messages[:spoken],
        "completion": messages[spoken:],
        "reward": rollout.result.reward,
        "metrics": {**_metrics(rollout), "turns": rollout.result.turns, "tool_calls": rollout.result.tool_calls},
        "info": _info(rollout),
    }


def _openai(message: chat.Message) -> JSON:
    uses = [
        {"id": use.id, "type": "function", "function": {"name": use.name, "arguments": use.arguments}}
        for use in message.uses
    ]
    return lean(
        {
            "role": message.role,
            "content": message.text,
            "tool_calls": uses or None,
            "tool_call_id": message.use if message.role == "tool" else None,
        }
    )


def _metrics(rollout: Recorded) -> dict[str, float]:
    return {name: value for name, value in rollout.result.rewards.items() if name != "reward"}


def _info(rollout: Recorded) -> JSON:
    result = rollout.result
    return {
        "outcome": rollout.outcome,
        "state": result.state,
        "ended_by": result.ended_by,
        "verdict": attrs.asdict(result.verdict),
        "trajectory_source": result.trajectory_source,
        "usage": attrs.asdict(result.usage.total) if rollout.metered else None,
        "written_by": f"{DISTRIBUTION} {own_version()}",
    }


def _errors(rollout: Recorded) -> list[JSON]:
    return [{"type": str(error["error"]), "message": str(error["message"])} for error in rollout.result.errors]


# --- a role's trace --------------------------------------------------------------------------------------------


def _trace(rollout: Recorded, role: str, *, ok: bool, first: bool) -> JSON:
    turns = [turn for turn in rollout.turns if turn.role == role]
    calls = [call for call in rollout.calls if call.role == role or (first and not call.role)]
    graph = _Graph()
    recorded_calls = [_call(call, graph) for call in calls]
    if not calls:
        for turn in turns:
            graph.conversation(turn.messages, turn.began)
    ended_by = turns[-1].ended_by if turns else ""
    stop = STOPS.get(ended_by, ended_by)
    tools = {tool.name: tool for call in calls for tool in call.tools}
    return {
        "version": 1,
        "id": f"{rollout.id}-{role}",
        "task": _task(rollout),
        "agent": {"config": {"harness": {"id": DISTRIBUTION}, "model": rollout.model_of(role) or None}, "name": role},
        "tools": [_tool(tool) for tool in tools.values()],
        "nodes": graph.nodes,
        "calls": recorded_calls,
        "rewards": {
            "reward": None if rollout.result.reward is None else {"score": rollout.result.reward, "weight": 1.0}
        },
        "metrics": _metrics(rollout),
        "info": _info(rollout),
        "is_completed": rollout.result.ending is not None,
        "ok": ok,
        "stop_condition": stop or None,
        "is_timeout": stop == "agent_timeout",
        "errors": _errors(rollout),
        "timing": _timing(rollout, turns),
    }


@attrs.define(eq=False)
class _Graph:
    """Messages as nodes, each once below the one before it."""

    nodes: list[JSON] = attrs.field(factory=list)
    _places: dict[tuple[int | None, Any], int] = attrs.field(factory=dict)

    def add(self, parent: int | None, message: chat.Message, at: float, *, sampled: bool = False) -> int:
        """The node of a message: the one that is there, or a new one."""
        key = (parent, _same(message))
        if key not in self._places:
            self._places[key] = len(self.nodes)
            node = {"parent": parent, "message": _message(message), "sampled": sampled, "timestamp": at}
            self.nodes.append(node)
        self.nodes[self._places[key]]["sampled"] |= sampled
        return self._places[key]

    def conversation(self, messages: Iterable[chat.Message], at: float) -> int | None:
        """The node of the last of these messages."""
        last: int | None = None
        for message in messages:
            last = self.add(last, message, at)
        return last


def _same(message: chat.Message) -> Any:
    """What two messages have in common that are one: a client may write a call's arguments with other spaces."""
    uses = tuple((use.id, use.name, json.dumps(use.parsed(), sort_keys=True)) for use in message.uses)
    return (message.role, message.text, message.thought, uses, message.use)


def _message(message: chat.Message) -> JSON:
    if message.role == "tool":
        return {"role": "tool", "tool_call_id": message.use, "content": message.text}
    if message.role != "assistant":
        return {"role": message.role, "content": message.text}
    uses = [{"id": use.id, "name": use.name, "arguments": use.arguments} for use in message.uses]
    said = {"content": message.text or None, "reasoning_content": message.thought or None}
    return lean({"role": "assistant", **said, "tool_calls": uses or None})


def _call(call: Call, graph: _Graph) -> JSON:
    sent = graph.conversation(call.asked, call.began)
    reply = call.answered
    node = graph.add(sent, reply, call.ended, sampled=True) if reply is not None else None
    return lean(
        {
            "node": node,
            "model": call.model or None,
            "endpoint": call.api,
            "finish_reason": call.finish if call.finish in {"stop", "length", "tool_calls"} else None,
            "usage": _usage(call.counted) if call.counted.tokens else None,
            "time": {"start": call.began, "end": call.ended},
            "error": {"type": "ProviderError", "message": call.error, "status_code": call.status}
            if call.error
            else None,
        }
    )


def _usage(used: Usage | None) -> JSON | None:
    """Verifiers counts cached tokens beside `prompt_tokens`, we within."""
    if used is None:
        return None
    cached = used.cache_read_input_tokens
    tokens = {"prompt_tokens": used.input_tokens - cached, "completion_tokens": used.output_tokens}
    return lean({**tokens, "cached_input_tokens": cached, "cost": used.cost})


def _tool(tool: chat.Tool) -> JSON:
    return {"name": tool.name, "description": tool.description, "parameters": dict(tool.parameters)}


def _timing(rollout: Recorded, turns: Sequence[Turn]) -> JSON:
    """Verifiers' stages, from the states: seconds since the epoch."""

    def span(*states: str) -> JSON:
        stays = [visit for visit in rollout.visits if visit.state in states]
        if not stays:
            return {}
        return {"start": stays[0].entered, "end": stays[-1].entered + stays[-1].seconds}

    began, ended = (turns[0].began, turns[-1].ended) if turns else (rollout.result.started, rollout.ended)
    model = sum(call.ended - call.began for call in itertools.chain.from_iterable(turn.calls for turn in turns))
    return {
        "start": rollout.result.started,
        "boot": span("provisioning"),
        "setup": span("connecting"),
        "agent": {
            "start": began,
            "end": ended,
            "model": {"duration": model},
            "harness": {"duration": max(0.0, ended - began - model)},
        },
        "finalize": span("quiescing"),
        "scoring": span("verifying"),
    }
