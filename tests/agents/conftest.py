"""Real agents: installed on first use, and one rollout of the demo task against a scripted provider."""

from __future__ import annotations

from pathlib import Path

import anyio
import attrs
import pytest
from requirements import missing

import orchestrator.tasks
from orchestrator.config import RolloutConfig
from orchestrator.gateway.prices import Prices
from orchestrator.gateway.scripted import DIALECTS, ScriptedUpstream
from orchestrator.gateway.upstream import Upstream
from orchestrator.install import ensure_installed
from orchestrator.registry import AgentConfig, default_registry
from orchestrator.result import RolloutResult
from orchestrator.rollout import Rollout
from states.errors import ConfigError
from states.events import Usage

DEMO = Path(orchestrator.tasks.__file__).parent / "demo"
PROVIDER_KEY = "provider-key-that-no-sandbox-sees"
PRICES = Prices(3e-6, 15e-6, 3e-7, 3.75e-6)


@attrs.frozen
class Played:
    """What came of a rollout, beside what the provider saw of it."""

    result: RolloutResult
    folder: Path
    provider: Usage
    calls: tuple

    @property
    def total(self) -> Usage:
        """What the rollout's own record says was used."""
        return self.result.usage.total


@pytest.fixture
def anyio_backend():
    """The gateway is asyncio only."""
    return "asyncio"


@pytest.fixture
def require_agent(monkeypatch):
    """`require_agent(name)`: installs it; where that cannot be, skips, or fails when `ROLLOUT_REQUIRE` has `agents`."""

    async def require(agent: str | AgentConfig) -> None:
        try:
            await ensure_installed(default_registry().resolve(agent))
        except ConfigError as error:
            missing("agents", f"{error}")

    return require


@pytest.fixture
def play(tmp_path, require_agent):
    """To be awaited, `play(agent, script, ...)`: the demo task in the local sandbox, through the gateway.

    `meet` is handed the rollout before it runs.
    """

    async def play(agent, script, *, apis=tuple(DIALECTS), meet=lambda rollout: None, **settings) -> Played:
        await require_agent(agent)
        async with ScriptedUpstream(script, apis=apis, prices=PRICES, api_key=PROVIDER_KEY) as provider:
            upstream = Upstream("scripted", provider.url, apis, api_key=PROVIDER_KEY, prices=PRICES)
            settings = {"task": DEMO, "out": tmp_path / "runs", "turn_sec": 120, **settings}
            config = RolloutConfig(agent=agent, upstream=upstream, **settings)
            rollout = Rollout(config)
            meet(rollout)
            with anyio.fail_after(200):
                result = await rollout.run()
            return Played(result, Path(result.folder), provider.usage, tuple(provider.calls))

    return play
