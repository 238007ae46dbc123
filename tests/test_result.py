"""What came of a rollout: the verdict of each ending, and a document that its schema describes."""

from __future__ import annotations

import json
from pathlib import Path

import anyio
import jsonschema
import msgspec
import pytest
from harness import TRANSPORTS, build
from test_ways_out import NOT_THERE, WAYS, hooked

import orchestrator
from orchestrator.journal import encode_any
from orchestrator.result import verdict_of
from states.events import Failure, Share, Usage
from states.journal import Folded, Header
from states.machine import STATES, Facts, Position, Rules

SCHEMA = Path(orchestrator.__file__).parent / "result.schema.json"
VALIDATOR = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def document(result):
    """As it stands on disk."""
    return msgspec.json.decode(encode_any(result.to_json()))


def test_the_schema_is_one_and_knows_every_state():
    VALIDATOR.check_schema(VALIDATOR.schema)
    assert VALIDATOR.schema["properties"]["state"]["enum"] == list(STATES)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("way", sorted(WAYS))
def test_the_result_of_every_way_satisfies_the_schema(way, transport):
    """Closed whichever way, and at every moment before that."""
    if (way, transport) in NOT_THERE:
        return

    async def walk():
        stand = WAYS[way](transport)
        VALIDATOR.validate(document(stand.rollout.result()))
        hooked(stand, lambda _moved: VALIDATOR.validate(document(stand.rollout.result())))
        await stand.rollout.run()
        return stand.rollout.result()

    result = anyio.run(walk)
    VALIDATOR.validate(document(result))
    assert not any("a hook raised" in note for note in result.notes), result.notes
    assert result.verdict.reason


def test_a_result_on_disk_is_the_one_that_is_returned(tmp_path):
    stand = build("session-factory", out=tmp_path)
    result = anyio.run(stand.rollout.run)
    on_disk = json.loads((tmp_path / "r1" / "result.json").read_text())
    assert on_disk == document(result)
    assert on_disk["folder"] == str(tmp_path / "r1")


def test_a_result_that_cannot_be_written_is_still_returned(tmp_path):
    """The disk filled up at the very end: the reward stands, and the verdict says what is missing."""
    stand = build("session-factory", out=tmp_path)
    hooked(stand, lambda moved: moved.dest == "releasing" and (tmp_path / "r1" / "result.json").mkdir(exist_ok=True))
    result = anyio.run(stand.rollout.run)
    assert result.reward == 1.0
    assert result.verdict.owner == "harness"
    assert "result.json cannot be written" in result.verdict.reason


def turn(calls, failed):
    """A turn whose calls used nothing."""
    return Share("agent", 1, Usage(calls=calls, failed_calls=failed))


def verdict(**facts):
    return verdict_of(Folded(Header("r1", Rules(), 0.0), Position("closed/failed", Facts(**facts))))


@pytest.mark.parametrize(
    ("facts", "owner", "reason"),
    [
        ({"ending": "rewarded", "ended_by": "deadline"}, "agent", "verified; the last turn ended by deadline"),
        ({"ending": "rewarded"}, "agent", "none was taken"),
        ({"ending": "unverified"}, "agent", "its host has one of its own"),
        (
            {"ending": "void", "ledger": (turn(2, 2),)},
            "provider",
            "all 2 model calls failed",
        ),
        (
            {"ending": "void", "ledger": (turn(2, 1),)},
            "agent",
            "2 model calls, no tokens",
        ),
        ({"ending": "void"}, "agent", "0 model calls"),
        ({"ending": "cancelled"}, "operator", "cancelled"),
        ({"ending": "failed", "failure": Failure("sandbox", "SandboxError", "gone")}, "sandbox", "SandboxError: gone"),
        ({"ending": "failed"}, "harness", "failed"),
        ({}, "operator", "not over"),
    ],
)
def test_the_verdict_of_each_ending_names_its_owner(facts, owner, reason):
    found = verdict(**facts)
    assert found.owner == owner
    assert reason in found.reason


def test_seconds_by_state_add_up_to_the_whole():
    stand = build("acp")
    result = anyio.run(stand.rollout.run)
    assert sum(result.state_seconds.values()) == pytest.approx(result.seconds)
