"""One scene of three real agents over both transports: they take turns in one sandbox, and each is counted apart."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import pytest

import orchestrator.tasks
from orchestrator import Role, Rollout, RolloutConfig, Scene, Turn, Usage
from orchestrator.capture import read_trajectory
from orchestrator.export import recorded
from orchestrator.gateway.prices import Prices
from orchestrator.gateway.script import Say, Shell, Steps, Use
from orchestrator.gateway.scripted import DIALECTS, ScriptedUpstream
from orchestrator.gateway.upstream import Upstream
from orchestrator.journal import read_journal
from states.journal import Transition

pytestmark = [pytest.mark.anyio, pytest.mark.agents, pytest.mark.sandbox]

DEMO = Path(orchestrator.tasks.__file__).parent / "demo"
PRICES = Prices(3e-6, 15e-6, 3e-7, 3.75e-6)
QUESTION = {
    "question": "May I overwrite the answer?",
    "header": "Overwrite",
    "options": [{"label": "yes", "description": "overwrite it"}, {"label": "no", "description": "leave it"}],
    "multiSelect": False,
}
SOLVE = "s=0; while read -r n; do s=$((s + n)); done < /app/numbers.txt; echo $s > /app/answer.txt"
SCRIPTS = {
    "WRITE": Steps(Shell("echo 1 > /app/answer.txt"), Say("I wrote an answer.")),
    "REVIEW": Steps(Shell("cat /app/answer.txt"), Say("The answer is wrong.")),
    "FIX": Steps(Use("AskUserQuestion", {"questions": [QUESTION]}), Shell(SOLVE), Say("It is mended.")),
}
SCENE = Scene(
    (
        Role("coder", "codex-acp"),
        Role("reviewer", "pydantic-ai", env={"ROLLOUT_APPROVALS": "ask"}),
        Role("fixer", "claude-agent-acp"),
    ),
    (Turn("coder", "WRITE the answer."), Turn("reviewer", "REVIEW the answer."), Turn("fixer", "FIX the answer.")),
)


def script(conversation):
    """Each role's turn has its own script, told by the prompt's first word."""
    word = next((word for word in SCRIPTS if word in conversation.user), "WRITE")
    return SCRIPTS[word](conversation)


def allow(asked):
    """A person who allows everything, and remembers what was asked."""

    def answer(request):
        asked.append(request.kind)
        kinds = dict(zip(request.option_kinds, request.options, strict=False))
        return kinds.get("allow_once") or (request.options[0] if request.options else None)

    return answer


async def test_three_real_agents_take_turns_in_one_sandbox(tmp_path, require_agent):
    """Reward 1.0; one journal; usage by role adds up to the provider's count; each segment holds its own steps."""
    for role in SCENE.roles:
        await require_agent(role.agent)
    asked = []
    async with ScriptedUpstream(script, apis=tuple(DIALECTS), prices=PRICES, api_key="provider-key-123456") as provider:
        upstream = Upstream("scripted", provider.url, tuple(DIALECTS), api_key="provider-key-123456", prices=PRICES)
        config = RolloutConfig(
            task=DEMO, scene=SCENE, upstream=upstream, out=tmp_path, turn_sec=120, on_ask_user=allow(asked)
        )
        with anyio.fail_after(300):
            result = await Rollout(config).run()
        counted = provider.usage
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), (result.verdict, result.errors, result.notes)
    assert "approval" in asked
    assert "elicitation" in asked
    assert result.usage.total == counted
    assert sum(result.usage.by_role.values(), Usage()) == counted
    assert set(result.usage.by_role) == {"coder", "reviewer", "fixer"}
    segments = read_trajectory(result.folder)
    assert [segment.about["role"] for segment in segments] == ["coder", "reviewer", "fixer"]
    assert [segment.steps[0].data["text"].split()[0] for segment in segments] == ["WRITE", "REVIEW", "FIX"]
    approvals = [s.data for s in segments[1].steps if s.data["type"] == "question"]
    assert [(step["kind"], step["answer"], step["by"]) for step in approvals] == [("approval", "approve", "handler")]
    late = [step.data["type"] for segment in segments for step in segment.steps if step.late]
    assert set(late) <= {"session_update"}, "an agent may tell of its session when it likes"
    answers = [s.data for s in segments[2].steps if s.data["type"] == "question" and s.data["kind"] == "elicitation"]
    assert [(QUESTION["question"] in step["prompt"], step["answer"], step["by"]) for step in answers] == [
        (True, "yes", "handler"),
        (True, None, "handler"),  # the form's second field is for words of one's own, and has no default
    ]
    assert not any(s.data["type"] == "question" for s in segments[0].steps)
    held = [json.dumps([step.data for step in segment.steps[1:]]) for segment in segments]
    for number, words in enumerate((("echo 1 >", "I wrote"), ("cat /app", "is wrong"), ("while read", "is mended"))):
        assert [[word in text for word in words] for text in held] == [[n == number] * 2 for n in range(3)], held
    opened = [r.dest for r in read_journal(result.folder) if isinstance(r, Transition) and r.source == "connecting"]
    assert opened == ["session/acp", "session/factory", "session/acp"]
    acts = [act for turn in recorded(result.folder).turns for act in turn.acts]
    assert sum((act.usage for act in acts), Usage()) == counted, "three wire formats, each call in one act"
    tools = [act.tool_name(step) for act in acts for step in act.tools]
    assert tools == ["exec_command", "bash", "AskUserQuestion", "Bash"], "as each model called it"
