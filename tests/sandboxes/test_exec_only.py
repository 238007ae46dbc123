"""A sandbox that can only exec does what a sandbox has to do, but for what one disk and one namespace cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import anyio
import pytest
from exec_boxes import Box

import orchestrator
from orchestrator import Rollout, RolloutConfig
from orchestrator.conformance import CLAUSE_SEC, SANDBOX_CLAUSES
from orchestrator.gateway.scripted import ScriptedUpstream, ShellScript
from orchestrator.gateway.upstream import Upstream
from orchestrator.sandboxes.exec_only import ExecOnlySandbox
from orchestrator.sandboxes.local import LocalSandbox
from orchestrator.tasks import DEMO_COMMAND, demo_task

pytestmark = [pytest.mark.anyio, pytest.mark.sandbox]

CANNOT = {
    "home_and_tmp_are_private": "`/tmp` is one for all: there is one disk, and no namespace to be had",
    "processes_have_private_homes": "the same, for commands; HOME and TMPDIR are each handle's own",
    "agents_cannot_reach_the_tests": "commands see the whole disk; the tests are there only while no agent lives",
}
"""Clauses that do not hold, and why not."""


@pytest.fixture
def make(tmp_path):
    """Makes sandboxes over hosts of their own."""
    made = []

    def make():
        made.append(Box(LocalSandbox(name=f"box-{len(made)}", root=tmp_path / str(len(made)))))
        return ExecOnlySandbox(made[-1])

    return make


@pytest.mark.parametrize("clause", [clause for clause in SANDBOX_CLAUSES if clause.name not in CANNOT], ids=str)
async def test_exec_only_sandbox_conforms(clause, make, tmp_path):
    """The clause holds, with what its host can do and nothing else; nothing is left behind."""
    with anyio.fail_after(CLAUSE_SEC):
        await clause.check(make)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def box(tmp_path):
    """A host's sandbox, to be handed over as it is."""
    programs = [Path(sys.base_prefix), Path(orchestrator.__file__).parent / "agents"]  # its image has them
    binds = tuple((path, str(path)) for path in programs if not path.is_relative_to("/usr"))
    return Box(LocalSandbox(name="box", root=tmp_path / "box", network="host", binds=binds), has_environment=False)


async def test_an_acp_agent_solves_the_demo_task_in_it(box, tmp_path):
    """The object goes into the config as it is; journal, trajectory and reward are those of any sandbox."""
    result = await Rollout(RolloutConfig(task=demo_task(), agent="scripted-acp", sandbox=box, out=tmp_path)).run()
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), (result.verdict, result.errors, result.notes)
    assert result.trajectory_source == "acp"
    assert result.tool_calls > 0


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("agent", ["minimal-acp", "minimal"])
async def test_model_calls_come_back_over_the_same_execs_and_are_counted(box, tmp_path, agent):
    """An agent in it calls its model by a relay that speaks through a channel of its own; one here calls directly."""
    async with ScriptedUpstream(
        ShellScript(DEMO_COMMAND), apis=["openai-chat"], api_key="key-of-the-provider"
    ) as model:
        upstream = Upstream("scripted", model.url, ["openai-chat"], api_key="key-of-the-provider")
        config = RolloutConfig(
            task=demo_task(), agent=agent, upstream=upstream, sandbox=box, out=tmp_path, usage_tracking="required"
        )
        result = await Rollout(config).run()
    assert (result.state, result.reward) == ("closed/rewarded", 1.0), (result.verdict, result.errors, result.notes)
    assert result.usage.total.tokens == model.usage.tokens > 0
