"""Agents whose budget is spent: they are cancelled, refused, and what they did until then is graded."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import anyio
import attrs
import pytest
from requirements import missing

from orchestrator import Budgets, Role, Rollout, RolloutConfig, Scene, Turn, Usage
from orchestrator.directors import model_user
from orchestrator.gateway.formats import LEAST_OUTPUT
from orchestrator.gateway.llm_log import expand
from orchestrator.gateway.prices import Prices
from orchestrator.gateway.scripted import DIALECTS, Say, ScriptedUpstream, Shell, Steps
from orchestrator.gateway.upstream import Upstream
from orchestrator.journal import read_journal
from orchestrator.show import story_of, tell
from orchestrator.tasks import demo_task
from orchestrator.world import LiveWorld
from states.journal import Transition

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox]

PRICES = Prices(3e-6, 15e-6, 3e-7, 3.75e-6)
SOLVE = "s=0; while read -r n; do s=$((s + n)); done < /app/numbers.txt; echo $s > /app/answer.txt"
ALL = {
    "minimal-acp": None,  # these two come with the package, so they run everywhere
    "minimal": None,
    "codex-acp": None,
    "claude-agent-acp": None,
    "opencode": None,
    "pydantic-ai": "pydantic_ai",
    "mini-swe-agent": "minisweagent",
}
AGENTS = [name if name.startswith("minimal") else pytest.param(name, marks=pytest.mark.agents) for name in ALL]


def for_ever(conversation):
    """A model that solves the task first and then never finds an end."""
    return (Shell(SOLVE) if not conversation.results else Shell(f"echo {len(conversation.results)}"))(conversation)


def calls_of(folder: Path):
    """The lines of `llm.jsonl`."""
    return [json.loads(line) for line in (folder / "llm.jsonl").read_text().splitlines()]


@pytest.fixture
def play(play):
    """The rollout of `conftest.py`, once the agent's extra is there."""

    async def checked(agent, script, **settings):
        extra = ALL[agent]
        if extra and importlib.util.find_spec(extra) is None:
            missing("agents", f"the extra {agent} is not installed")
        return await play(agent, script, **settings)

    return checked


@pytest.mark.parametrize("agent", AGENTS)
async def test_an_agent_whose_tokens_are_spent_is_stopped_and_its_work_is_graded(play, agent):
    """It would go on for ever; it ends by its budget, verified, and exceeds it by one call's input at most."""
    played = await play(agent, for_ever, budgets=Budgets(tokens=30_000), usage_tracking="required")
    result = played.result
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), (result.verdict, result.errors, result.notes)
    assert result.ended_by == "budget:tokens"
    assert played.total == played.provider
    [budget] = result.budgets
    inputs = [line["usage"]["input_tokens"] for line in calls_of(played.folder) if line["usage"]]
    assert budget.spent == result.usage.total.tokens >= 30_000
    assert budget.overshoot == budget.spent - 30_000 <= max(inputs) + LEAST_OUTPUT - 1
    assert [share.usage for share in result.usage.by_turn if share.turn] == [result.usage.total]
    assert "too much" in tell(story_of(played.folder))


@pytest.mark.parametrize("agent", AGENTS)
async def test_an_agent_understands_that_its_call_is_refused_and_does_not_try_again(play, agent, monkeypatch):
    """Nobody cancels its turn here: it ends in the agent's own words, no request comes twice, no provider failed.

    (Claude Code has a second conversation, about the session's title, which is refused on its own.)
    """
    monkeypatch.setattr(LiveWorld, "budget", lambda *_: ())
    played = await play(agent, for_ever, budgets=Budgets(tokens=100), usage_tracking="required")
    result, lines = played.result, calls_of(played.folder)
    assert (result.ended_by, result.verdict.owner) == ("error", "agent"), (result.verdict, result.errors)
    refused = [
        json.dumps(line["request"]["messages" if "messages" in line["request"] else "input"])
        for line in expand(lines)
        if line["via"] == "refused"
    ]
    assert len(refused) == len(lines) - len(played.calls) >= 1
    assert len(set(refused)) == len(refused), "one that was refused was sent again"
    assert played.total == played.provider
    assert result.usage.total.failed_calls == 0
    assert any("budget of 100 tokens is spent" in error["message"] for error in result.errors) or agent == "minimal-acp"


SCENES = {
    "ours": ("minimal-acp", "minimal"),
    "real": ("codex-acp", "pydantic-ai"),
}


@pytest.mark.parametrize("cast", ["ours", pytest.param("real", marks=pytest.mark.agents)])
async def test_a_role_spends_its_own_budget_and_the_others_theirs(tmp_path, require_agent, cast):
    """The first is stopped; a director lets the second go on. Who spent what adds up to the provider's count."""
    agents = SCENES[cast]
    for agent in agents:
        await require_agent(agent)
    scene = Scene(
        (Role("coder", agents[0], budgets=Budgets(tokens=20_000)), Role("reviewer", agents[1])),
        budgets=Budgets(cost=50.0),
    )
    told = []

    def lead(story):
        told.append(story.spent("coder"))
        return [Turn("coder"), Turn("reviewer", "REVIEW it."), None][len(story.turns)]

    def script(conversation):
        if "REVIEW" in conversation.user:
            return Steps(Shell("cat /app/answer.txt"), Say("It is right."))(conversation)
        return for_ever(conversation)

    async with ScriptedUpstream(script, apis=tuple(DIALECTS), prices=PRICES) as provider:
        upstream = Upstream("scripted", provider.url, tuple(DIALECTS), prices=PRICES)
        config = RolloutConfig(
            task=demo_task(), scene=scene, director=lead, upstream=upstream, out=tmp_path, turn_sec=120
        )
        with anyio.fail_after(300):
            result = await Rollout(config).run()
        counted = provider.usage
    assert (result.state, result.reward, result.turns) == ("closed/rewarded", 1.0, 2), (result.verdict, result.errors)
    assert told[0] == ""
    assert told[1].startswith("coder's budget of 20,000 tokens is spent")
    assert result.usage.total == counted == sum(result.usage.by_role.values(), Usage())
    assert sum((share.usage for share in result.usage.by_turn), Usage()) == counted
    spent = {(use.scope, use.kind): use for use in result.budgets}
    assert spent["role", "tokens"].spent == result.usage.by_role["coder"].tokens >= 20_000
    assert spent["scene", "cost"].spent == pytest.approx(counted.cost)
    assert spent["scene", "cost"].overshoot == 0
    assert result.usage.by_role["reviewer"].calls >= 2


@pytest.mark.parametrize("answer", ["Go on, please.", "TO nobody: go on"], ids=["between_asking", "while_asked"])
async def test_a_director_whose_budget_is_spent_ends_the_scene_and_the_work_is_graded(tmp_path, answer):
    """It is not asked again; what it was refused in the middle of an answer is a note, and nobody's failure."""

    def script(conversation):
        if not conversation.tools:
            return Say(answer)
        return Steps(Shell(SOLVE), Say("Done."))(conversation)

    led = model_user("scripted", persona="You are in a hurry.", name="user")
    led = attrs.evolve(led, role=attrs.evolve(led.role, budgets=Budgets(tokens=100)))
    scene = Scene((Role("coder", "minimal-acp"), Role("helper", "minimal")), (Turn("coder"),))
    scene = scene if answer.startswith("TO") else attrs.evolve(scene, roles=scene.roles[:1])
    async with ScriptedUpstream(script, apis=["openai-chat"], prices=PRICES) as provider:
        upstream = Upstream("scripted", provider.url, ["openai-chat"], prices=PRICES)
        config = RolloutConfig(task=demo_task(), scene=scene, director=led, upstream=upstream, out=tmp_path)
        with anyio.fail_after(100):
            result = await Rollout(config).run()
        counted = provider.usage
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), (result.verdict, result.errors, result.notes)
    assert result.turns == (1 if answer.startswith("TO") else 2)
    done = [
        record.event.why
        for record in read_journal(result.folder)
        if isinstance(record, Transition) and record.event.name == "PlanDone"
    ]
    assert done[0].startswith("user's budget of 100 tokens is spent")
    assert result.usage.total == counted
    assert result.usage.by_role["user"].calls == 1
    assert [share.turn for share in result.usage.by_turn if share.role == "user"] == [0]
    refused = [line["role"] for line in calls_of(result.folder) if line["via"] == "refused"]
    assert refused == (["user"] if answer.startswith("TO") else [])
