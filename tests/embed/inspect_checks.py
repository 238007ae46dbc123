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
from inspect_local import demo
from late import LATE_SEC

from orchestrator.config import Role, Scene, Turn
from orchestrator.embed.inspect import rollout_agent

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


TRIALS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "factory": ({"agent": "minimal"}, {}),
    "acp": ({"agent": "minimal-acp"}, {}),
    "scene": ({"scene": SCENE}, {}),
    "late": ({"agent": "minimal"}, {"time_limit": LATE_SEC}),
    "tokens": ({"agent": "minimal"}, {"token_limit": 100}),
    "refused": ({"agent": "minimal"}, {}),
    "cancelled": ({"agent": "minimal", "out": LOGS / "runs", "hooks": (partial(cancel, LOGS / "runs"),)}, {}),
}

REAL = {"codex": ({"agent": "codex-acp"}, {}), "claude": ({"agent": "claude-agent-acp"}, {})}
"""Only when they are named."""

for name in sys.argv[2:] or TRIALS:
    settings, limits = {**TRIALS, **REAL}[name]
    (log,) = evaluate(
        demo(name, rollout_agent(**settings), **limits),
        model=f"{MODEL}/{name}",
        log_dir=str(LOGS / name),
        display="none",
        fail_on_error=False,
        max_retries=0,
    )
    (LOGS / f"{name}.read.json").write_text(read_eval_log(log.location).model_dump_json())
