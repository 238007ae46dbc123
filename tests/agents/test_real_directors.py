"""Real agents led by a real agent: pydantic-ai directs codex-acp, through one gateway, in the local sandbox."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

import orchestrator.tasks
from orchestrator import DirectorRole, Role, Rollout, RolloutConfig, Scene
from orchestrator.capture import read_trajectory
from orchestrator.directors import model_user
from orchestrator.gateway.script import Say, Shell, Steps
from orchestrator.gateway.scripted import DIALECTS, ScriptedUpstream
from orchestrator.gateway.upstream import Upstream
from orchestrator.show import story_of, tell

pytestmark = [pytest.mark.anyio, pytest.mark.agents, pytest.mark.sandbox]

DEMO = Path(orchestrator.tasks.__file__).parent / "demo"
KEY = "provider-key-123456"
SOLVE = "s=0; while read -r n; do s=$((s + n)); done < /app/numbers.txt; echo $s > /app/answer.txt"
LINES = ["WRITE a first answer.", "MEND it: sum all lines.", "That is it.\nDONE"]


def script(conversation):
    """The director's model knows its brief; the worker's does what the director's words ask for."""
    if "You lead." in conversation.user or (conversation.prompts > 1 and "What do you say to" in conversation.user):
        return Say(LINES[conversation.prompts - 1])
    if "MEND" in conversation.user:
        return Steps(Shell(SOLVE), Say("It is mended."))(conversation)
    return Steps(Shell("echo 1 > /app/answer.txt"), Say("I wrote an answer."))(conversation)


@pytest.mark.parametrize(
    "led",
    [
        DirectorRole(Role("lead", "pydantic-ai"), "You lead."),
        model_user("", persona="You lead.", name="lead"),
    ],
    ids=["pydantic-ai", "model-user"],
)
async def test_a_real_agent_directs_a_real_agent(tmp_path, require_agent, led):
    """Its words are codex's prompts in one session; its calls come with its own key; the work is verified."""
    await require_agent("codex-acp")
    await require_agent("pydantic-ai")
    async with ScriptedUpstream(script, apis=tuple(DIALECTS), api_key=KEY) as provider:
        upstream = Upstream("scripted", provider.url, tuple(DIALECTS), api_key=KEY)
        scene = Scene((Role("coder", "codex-acp"),))
        config = RolloutConfig(task=DEMO, scene=scene, director=led, upstream=upstream, out=tmp_path, turn_sec=120)
        with anyio.fail_after(300):
            result = await Rollout(config).run()
    assert (result.state, result.reward, result.turns) == ("closed/rewarded", 1.0, 2), (result.verdict, result.notes)
    segments = read_trajectory(result.folder)
    assert [segment.steps[0].data["text"] for segment in segments] == LINES[:2]
    asked = read_trajectory(result.folder / "director.jsonl")
    assert [segment.sealed["complete"] for segment in asked] == [True] * 3
    heard = asked[1].steps[0].data["text"]
    assert heard.startswith("coder said:\n")
    assert "I wrote an answer." in heard
    assert result.usage.total == provider.usage
    assert result.usage.by_role["lead"].calls == 3
    assert "lead: directs, asked 3 times; 3 model calls" in tell(story_of(result.folder))
    kept = b"".join(path.read_bytes() for path in result.folder.rglob("*") if path.is_file())
    assert KEY.encode() not in kept
