"""Real agents in Docker: the demo task is solved as in the local sandbox, and its journal is the same."""

from __future__ import annotations

import re
import shutil

import pytest
import requirements
from docker_images import DEBIAN
from same_journal import comparable, said_and_done
from test_real_acp_agents import DEMO, SOLVE, assert_closed, assert_keys_stay_out, assert_metered

from orchestrator.gateway.scripted import ShellScript

pytestmark = [pytest.mark.anyio, pytest.mark.docker, pytest.mark.sandbox]

AGENTS = [
    "minimal-acp",
    *(pytest.param(name, marks=pytest.mark.agents) for name in ("codex-acp", "pydantic-ai", "omnigent")),
]


@pytest.fixture
def demo(tmp_path, docker_image):
    """The demo task on a base image that is here."""
    requirements.module("aiodocker", "docker")
    docker_image()
    folder = tmp_path / "demo"
    shutil.copytree(DEMO, folder)
    dockerfile = folder / "environment/Dockerfile"
    dockerfile.write_text(re.sub(r"^FROM .*", f"FROM {DEBIAN}", dockerfile.read_text()))
    return folder


@pytest.mark.parametrize("agent", AGENTS)
async def test_a_rollout_in_docker_is_the_one_in_the_local_sandbox(play, demo, agent, snapshot):
    """Reward 1.0, the upstream's own count, and the same journal but for ids, times, paths, ports and leases."""
    await play("oracle", ShellScript(""), task=demo, sandbox="docker")  # the image is built
    here, there = [await play(agent, ShellScript(SOLVE), task=demo, sandbox=kind) for kind in ("local", "docker")]
    for played in (here, there):
        assert_closed(played, "closed/rewarded", 1.0)
        assert_metered(played)
        assert_keys_stay_out(played)
    assert comparable(there.folder) == comparable(here.folder)
    assert said_and_done(there.folder) == said_and_done(here.folder)
    assert COUNTS.sub(r"\1N", "\n".join(comparable(there.folder))) == snapshot


COUNTS = re.compile(r'("(?:\w+_tokens|cost)": )[\d.]+')
"""What an agent's version puts into its prompts: compared with the local sandbox's and the upstream's, not kept."""
