"""Run by the interpreter of Inspect's environment: evaluates the demo task with each kind of agent.

    python inspect_checks.py LOG_DIR [NAME...]     # the provider is at SCRIPTED_BASE_URL, its key in SCRIPTED_API_KEY

Each log is read back by Inspect's own reader, and written once more as `NAME.read.json`.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from inspect_ai import eval as evaluate
from inspect_ai.log import read_eval_log
from inspect_ai.log._samples import sample_active
from inspect_ai.model import Model, ModelOutput, ModelUsage, get_model
from inspect_ai.util import LimitExceededError
from inspect_local import demo, shipped
from late import LATE_SEC, WORDS

from orchestrator.agents.scripted import Backstage, ScriptedAgent
from orchestrator.config import Role, Scene, Turn
from orchestrator.embed.inspect import rollout_agent
from orchestrator.registry import register_agent

MODEL = "openai-api/scripted"
LOGS = Path(sys.argv[1])

SCENE = Scene(
    roles=(Role("coder", "minimal-acp", f"{MODEL}/coder"), Role("reviewer", "minimal", f"{MODEL}/reviewer")),
    turns=(Turn("coder"), Turn("reviewer", "Review what was done, and mend it.")),
)


def cancel(out: Path, moved: Any) -> None:
    """An operator at a second terminal, once the agent is at work."""
    if moved.dest == "executing":
        (folder,) = out.iterdir()
        subprocess.Popen([sys.executable, "-m", "orchestrator", "cancel", str(folder)])


def talker(env: dict[str, str]) -> ScriptedAgent:
    """An agent that says something, and then is cut off by Inspect in the way that its environment names."""
    script = [{"say": WORDS}, {"tool": "look", "kind": "read", "status": "completed"}, {"cue": env["HOW"]}]
    script.append({"wait_cancel": 300})
    return ScriptedAgent({"turns": [script]}, backstage=Backstage(cue=cut_off))


async def cut_off(how: str) -> None:
    """What an operator at Inspect's display does, and what its own monitor of working time does."""
    active = sample_active()
    assert active is not None
    if how == "working":
        active.limit_exceeded(LimitExceededError("working", value=1, limit=1))
    else:
        active.interrupt(how)


def talking() -> Model:
    """A model of Inspect's own that says something before each command; each call uses 70 tokens."""
    outputs = [ModelOutput.for_tool_call("mockllm", "bash", {"command": "echo found"}) for _ in range(5)]
    for output in outputs:
        output.message.content = WORDS
        output.usage = ModelUsage(input_tokens=60, output_tokens=10, total_tokens=70)
    return get_model("mockllm/model", custom_outputs=outputs)


register_agent("talker", protocol="session-factory", session_factory=f"{__name__}:talker", calls_model=False)
CUT_OFF = ("working", "score", "error", "cancel")
LIMITS = {"second-call": {"token_limit": 100}, "third-message": {"message_limit": 3}}

IN_TURNS = Scene(
    (Role("coder", "minimal-acp"), Role("reviewer", "minimal")), (Turn("coder"), Turn("reviewer", "Review."))
)
LOCAL = {
    "local-scripted": {"agent": "scripted-acp"},
    "local-acp": {"agent": "minimal-acp"},
    "local-scene": {"scene": IN_TURNS},
}
"""In the sandbox that Inspect ships."""

TRIALS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "factory": ({"agent": "minimal"}, {}),
    "acp": ({"agent": "minimal-acp"}, {}),
    "scene": ({"scene": SCENE}, {}),
    "late": ({"agent": "minimal"}, {"time_limit": LATE_SEC}),
    "tokens": ({"agent": "minimal"}, {"token_limit": 100}),
    "refused": ({"agent": "minimal"}, {}),
    "cancelled": ({"agent": "minimal", "out": LOGS / "runs", "hooks": (partial(cancel, LOGS / "runs"),)}, {}),
    **{name: (settings, {}) for name, settings in LOCAL.items()},
    **{how: ({"agent": "talker", "env": {"HOW": how}}, {}) for how in CUT_OFF},
    **{name: ({"agent": "minimal"}, limit) for name, limit in LIMITS.items()},
}

REAL = {"codex": ({"agent": "codex-acp"}, {}), "claude": ({"agent": "claude-agent-acp"}, {})}
"""Only when they are named."""

for name in sys.argv[2:] or TRIALS:
    settings, limits = {**TRIALS, **REAL}[name]
    (log,) = evaluate(
        (shipped if name in LOCAL else demo)(name, rollout_agent(**settings), **limits),
        model=talking() if name in LIMITS else f"{MODEL}/{name}",
        log_dir=str(LOGS / name),
        display="none",
        fail_on_error=False,
        max_retries=0,
    )
    (LOGS / f"{name}.read.json").write_text(read_eval_log(log.location).model_dump_json())
