"""Whether model calls are counted is decided before anything is started."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import anyio.from_thread
import attrs
import pytest

from orchestrator import AgentConfig, Budgets, ConfigError, Role, Rollout, RolloutConfig, Scene, Turn
from orchestrator.gateway.prices import Prices
from orchestrator.gateway.scripted import ScriptedUpstream, ShellScript
from orchestrator.gateway.upstream import Upstream
from orchestrator.sandboxes.fake import FakeSandbox
from orchestrator.sandboxes.local import LocalSandbox
from orchestrator.tasks import DEMO_COMMAND, demo_task

AGENT = AgentConfig("caller", "acp", launch=("caller",), in_image=True, api=("openai-chat",))


def rollout(**config):
    """A rollout of an agent that calls a model from the sandbox."""
    upstream = Upstream("m", "http://127.0.0.1:9", ["openai-chat"], api_key="nobody-elses-key")
    return Rollout(RolloutConfig(prompt="Do it.", agent=AGENT, upstream=upstream, out=None, **config))


def test_a_sandbox_that_cannot_reach_the_gateway_is_not_metered():
    """Else its agent, which never hears of the gateway, would be called idle."""
    usage = rollout(sandbox=FakeSandbox(), gateway_reach="none").result().usage
    assert (usage.tracking, usage.reason) == (
        "untracked",
        "agent caller calls its model from a sandbox that cannot reach the gateway: gateway_reach is none",
    )
    with pytest.raises(ConfigError, match="gateway_reach is none"):
        rollout(sandbox=FakeSandbox(), gateway_reach="none", usage_tracking="required")


def test_a_sandbox_that_does_not_see_the_gateway_is_metered_by_a_relay(tmp_path):
    """Unless each of its roles has a loopback interface of its own, where nobody would find the relay."""
    assert rollout(sandbox=FakeSandbox(gateway_url="http://here")).result().usage.tracking == "metered"
    assert rollout(sandbox=FakeSandbox()).result().usage.tracking == "metered"
    apart = rollout(sandbox=LocalSandbox(name="apart", root=tmp_path / "apart")).result().usage
    assert apart.tracking == "untracked"
    assert "a loopback interface of its own" in apart.reason
    shared = LocalSandbox(name="shared", root=tmp_path / "shared", network="host")
    assert rollout(sandbox=shared, network="host").result().usage.tracking == "metered"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"gateway_reach": "carrier pigeon"}, "gateway_reach is auto, relay, none, or the URL"),
        ({"gateway_reach": "ftp://here"}, "gateway_reach is auto, relay, none, or the URL"),
        ({"gateway_reach": "https://here.example"}, "give gateway_port"),
        ({"gateway_port": 70_000}, "gateway_port must be a port"),
        ({"gateway_port": 1, "gateway": object()}, "the one that is brought has its own"),
        ({"gateway_reach": "relay", "sandbox": "local"}, "leave it at auto"),
        ({"gateway_reach": "http://x", "gateway_port": 1, "sandbox": "local"}, "leave it at auto"),
    ],
)
def test_a_way_to_the_gateway_that_cannot_be_is_refused(settings, says):
    """In one sentence, before anything is started."""
    with pytest.raises(ConfigError, match=says):
        rollout(**{"sandbox": FakeSandbox(), **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"sandbox": "local"},
        {"sandbox": "docker", "image": "debian"},
        {"sandbox": "docker", "image": "debian", "gateway_reach": "relay"},
        {"sandbox": "local", "usage_tracking": "off"},
    ],
)
def test_an_agent_whose_sandbox_has_no_network_is_refused_its_model_before_anything_starts(settings):
    """Else it would be graded for calls that it could not make; the sentence says which network lets it."""
    with pytest.raises(ConfigError, match=r"caller calls its model from the sandbox.*--network gateway-only"):
        rollout(**settings, network="none")


def test_the_network_of_a_brought_sandbox_is_its_own_affair_and_an_agent_outside_needs_none():
    """Neither is concerned by what we would cut off."""
    assert rollout(sandbox=FakeSandbox(), network="none").result().usage.tracking == "untracked"
    upstream = Upstream("m", "http://127.0.0.1:9", ["openai-chat"], api_key="nobody-elses-key")
    config = RolloutConfig(
        prompt="x", agent="mini-swe-agent", model="m", upstream=upstream, network="none", sandbox="local", out=None
    )
    assert Rollout(config).result().usage.tracking == "metered"


def test_a_budget_of_cost_needs_a_price():
    """Else it would never be spent."""
    with pytest.raises(ConfigError, match="a budget of cost needs the price of m, which is not known"):
        rollout(sandbox=FakeSandbox(), budgets=Budgets(cost=0.1))
    scene = Scene((Role("coder", AGENT),), (Turn("coder", budgets=Budgets(cost=0.1)),))
    upstream = Upstream("m", "http://127.0.0.1:9", ["openai-chat"])
    base = {"prompt": "x", "scene": scene, "out": None, "sandbox": FakeSandbox()}
    with pytest.raises(ConfigError, match="needs the price of m"):
        Rollout(RolloutConfig(**base, upstream=upstream))
    priced = attrs.evolve(upstream, prices=Prices(1e-6, 1e-6))
    assert Rollout(RolloutConfig(**base, upstream=priced)).result().usage.tracking == "metered"
    with pytest.raises(ConfigError, match="kept by the gateway, but usage_tracking is off"):
        Rollout(RolloutConfig(**base, upstream=priced, usage_tracking="off"))


@pytest.mark.parametrize("budgets", [Budgets(tokens=1), Budgets(cost=0.1)])
def test_a_budget_that_nobody_would_keep_is_refused(budgets):
    """Tokens and cost are seen at the gateway; without it the limit would be silently none."""
    with pytest.raises(ConfigError, match="usage_tracking is off"):
        rollout(sandbox=FakeSandbox(), usage_tracking="off", budgets=budgets)


@pytest.mark.sandbox
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_temporary_folder_with_a_long_path_is_no_trouble(tmp_path, monkeypatch):
    """The path of a socket is short by the kernel's rule; TMPDIR's, in a batch job or a test, need not be."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    async with ScriptedUpstream(ShellScript(DEMO_COMMAND), apis=["openai-chat"]) as model:
        upstream = Upstream("scripted", model.url, ["openai-chat"])
        config = RolloutConfig(task=demo_task(), agent="minimal-acp", upstream=upstream, out=tmp_path / "runs")
        result = await Rollout(config).run()
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), (result.verdict, result.errors)
    assert result.usage.total.tokens == model.usage.tokens > 0
    (held,) = {
        lease["handle"]["socket"]
        for line in (result.folder / "journal.jsonl").read_text().splitlines()
        if "socket" in ((lease := json.loads(line).get("lease") or {}).get("handle") or {})
    }
    assert not Path(held).parent.exists()
    assert list(deep.iterdir()) == []


# --- an endpoint that is brought along ---------------------------------------------------------------------------

ENDPOINT_KEY = "key-of-the-endpoint"


@pytest.fixture
def endpoint():
    """A model endpoint of somebody's own, on a loop of its own: ours may be trio's."""
    served = ScriptedUpstream(ShellScript(DEMO_COMMAND), apis=["openai-chat"], api_key=ENDPOINT_KEY)
    with anyio.from_thread.start_blocking_portal("asyncio") as portal, portal.wrap_async_context_manager(served):
        yield served


@pytest.mark.sandbox
@pytest.mark.anyio
@pytest.mark.parametrize("agent", ["minimal-acp", "minimal"])
async def test_an_endpoint_that_is_brought_along_is_called_directly(agent, endpoint, tmp_path):
    """No gateway, so trio will do; its owner counts, we say that we did not, and its key is in no artifact."""
    upstream = Upstream("scripted", f"{endpoint.url}/v1", ["openai-chat"], api_key=ENDPOINT_KEY)
    config = RolloutConfig(
        task=demo_task(), agent=agent, upstream=upstream, usage_tracking="off", network="host", out=tmp_path
    )
    result = await Rollout(config).run()
    assert (result.state, result.reward) == ("closed/rewarded", 1.0)
    assert endpoint.usage.calls == 2
    assert (result.usage.tracking, result.usage.reason) == ("untracked", "usage_tracking is off")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert ENDPOINT_KEY.encode() not in written


@pytest.mark.parametrize(
    ("apis", "url", "mistake"),
    [
        (["anthropic-messages"], "http://127.0.0.1:9", "only the gateway translates"),
        (["openai-chat"], "http://127.0.0.1:9/openai", "must end in /v1"),
    ],
)
def test_an_endpoint_that_the_agent_cannot_call_is_refused(apis, url, mistake):
    """Without the gateway nobody translates, and nobody puts paths together."""
    with pytest.raises(ConfigError, match=mistake):
        Rollout(
            RolloutConfig(
                prompt="Do it.", agent=AGENT, upstream=Upstream("m", url, apis), usage_tracking="off", out=None
            )
        )


def test_each_role_can_have_an_endpoint_of_its_own():
    """A callable is asked for each role's model."""
    asked = []

    def find(model):
        asked.append(model)
        return Upstream(model, "http://127.0.0.1:9/v1", ["openai-chat"])

    scene = Scene((Role("a", AGENT, "one"), Role("b", AGENT, "two")), (Turn("a", "Do it."), Turn("b", "See it.")))
    Rollout(RolloutConfig(scene=scene, upstream=find, out=None))
    assert asked == ["one", "two"]
