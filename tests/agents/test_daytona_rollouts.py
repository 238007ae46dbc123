"""Whole rollouts in a Daytona sandbox: the same agents, metered through the relay, as in the local one."""

from __future__ import annotations

import pytest

from orchestrator.gateway.scripted import ShellScript

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox, pytest.mark.daytona]

SOLVE = "s=0; while read -r n; do s=$((s + n)); done < /app/numbers.txt; echo $s > /app/answer.txt"
AGENTS = [
    "minimal-acp",
    "minimal",
    *(pytest.param(name, marks=pytest.mark.agents) for name in ("codex-acp", "pydantic-ai", "omnigent")),
]


@pytest.mark.parametrize("channel", ["session", "pty"])
@pytest.mark.parametrize("agent", AGENTS)
async def test_an_agent_solves_the_demo_task_in_daytona_and_its_usage_is_the_providers_count(
    play, daytona_service, agent, channel
):
    """Reward 1.0 over either transport and channel; tokens are those that the provider counted; nothing is left."""
    played = await play(
        agent, ShellScript(SOLVE), sandbox="daytona", sandbox_options={"channel": channel}, usage_tracking="required"
    )
    result = played.result
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), (result.verdict, result.errors, result.notes)
    assert played.total == played.provider
    assert played.total.input_tokens > 0
    assert await daytona_service.left() == []
