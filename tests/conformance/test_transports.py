"""Both transports that ship run the clauses of the conformance suite on both loops, and tell the same stories."""

from __future__ import annotations

import anyio
import pytest
from harness import FACTORIES, TRANSPORTS, agent_config
from scripted_peer import acp_agent

from orchestrator import Role
from orchestrator.agents.scripted import ScriptedAgent
from orchestrator.conformance import TRANSPORT_CLAUSES, TransportUnderTest, run_clauses

LACKS = {"acp": ("approvals",), "session-factory": ("lost",)}


def cast_acp(scripts, sandbox, backstage):
    """Agents that are processes of the fake sandbox."""

    def spawned(process):
        role = process.handle.name.rpartition("-")[0]
        return acp_agent(scripts[role], backstage=backstage(role))(process)

    sandbox.on_spawn = spawned
    return [Role(role, agent_config("acp"), env={"AGENT": role}) for role in scripts]


def cast_session_factory(scripts, sandbox, backstage):
    """Agents in our own process."""
    roles = []
    for role, script in scripts.items():
        name = f"{id(sandbox)}-{role}"
        FACTORIES[name] = ScriptedAgent(script, backstage=backstage(role))
        roles.append(Role(role, agent_config("session-factory"), env={"AGENT": name}))
    return roles


UNDER_TEST = {
    "acp": TransportUnderTest("acp", cast_acp),
    "session-factory": TransportUnderTest("session-factory", cast_session_factory),
}
BOTH = [clause for clause in TRANSPORT_CLAUSES if not clause.needs]


@pytest.mark.parametrize(
    ("transport", "clause"),
    [(t, clause) for t in TRANSPORTS for clause in TRANSPORT_CLAUSES if not clause.needs & set(LACKS[t])],
    ids=str,
)
def test_transport_conforms(transport, clause):
    """The clause holds for this transport on both loops, with the same journal and the same trajectory."""
    stories = {loop: anyio.run(clause.check, UNDER_TEST[transport], backend=loop) for loop in ("asyncio", "trio")}
    assert stories["asyncio"].splitlines() == stories["trio"].splitlines()


@pytest.mark.parametrize("clause", BOTH, ids=str)
def test_transports_agree(clause):
    """Journal and trajectory are equal but for ids, times, prose, and acp or factory in names."""
    stories = {t: anyio.run(clause.check, UNDER_TEST[t]) for t in TRANSPORTS}
    assert stories["acp"].splitlines() == stories["session-factory"].splitlines()


@pytest.mark.anyio
async def test_report_names_the_clause_that_a_transport_breaks():
    """A transport whose agents say something else fails by name, and nothing is raised."""

    def mute(scripts, sandbox, backstage):
        return cast_session_factory({role: {"turns": [[]]} for role in scripts}, sandbox, backstage)

    outcomes = await run_clauses(TRANSPORT_CLAUSES[:3], TransportUnderTest("mute", mute))
    assert [outcome.passed for outcome in outcomes] == [False, True, False]
    assert str(outcomes[0]).startswith("FAIL  a_turn_is_recorded_whole: ClauseError: steps")


def test_each_clause_says_what_it_asserts():
    """Thirty cases or more; names are unique and each clause has its sentence."""
    assert len({clause.name for clause in TRANSPORT_CLAUSES}) == len(TRANSPORT_CLAUSES) >= 30
    assert all(clause.asserts.endswith(".") for clause in TRANSPORT_CLAUSES)
