"""What is required and missing is a failure, never a skip that nobody sees."""

from __future__ import annotations

import ast
import re
import stat
from pathlib import Path

import pytest
import requirements

from orchestrator.sandboxes import _bwrap

HERE = Path(__file__).parent
OF_THE_MACHINE = {
    "requirements.py": 1,  # where `ROLLOUT_REQUIRE` is asked
    "daytona_stand.py": 1,  # the live service, which has a marker of its own
    "agents/test_daytona_rollouts.py": 1,  # tests that would break the live service
    "sandboxes/test_daytona.py": 1,
    "test_daytona_recovery.py": 1,
    "sandboxes/test_local.py": 3,  # limits that need root's control groups; a Python that everybody may run
}
"""Files that skip by themselves, and at how many places: what cannot be required of a machine that runs the rest."""


@pytest.fixture
def broken_bwrap(tmp_path, monkeypatch):
    """A bubblewrap that is there and does not come up."""
    program = tmp_path / "bwrap"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(stat.S_IRWXU)
    monkeypatch.setattr(_bwrap, "bwrap_path", lambda: str(program))


@pytest.mark.parametrize("required", ["sandbox", "docker,sandbox"])
def test_a_bubblewrap_that_is_required_and_does_not_come_up_is_a_failure(broken_bwrap, monkeypatch, required):
    """With the part in `ROLLOUT_REQUIRE` nothing is skipped."""
    monkeypatch.setenv("ROLLOUT_REQUIRE", required)
    with pytest.raises(pytest.fail.Exception, match="sandbox is required"):
        requirements.bubblewrap()


@pytest.mark.parametrize("required", ["", "docker"])
def test_a_bubblewrap_that_nobody_requires_is_a_skip(broken_bwrap, monkeypatch, required):
    """Saying why."""
    monkeypatch.setenv("ROLLOUT_REQUIRE", required)
    with pytest.raises(pytest.skip.Exception, match="does not come up"):
        requirements.bubblewrap()


@pytest.mark.parametrize(("part", "required"), [("nobody", ""), ("sandbox", "sandboxes")])
def test_a_part_that_is_misspelt_is_a_failure(monkeypatch, part, required):
    """In a test or in the environment: it would never be required."""
    monkeypatch.setenv("ROLLOUT_REQUIRE", required)
    with pytest.raises(pytest.fail.Exception, match=r"nobody|sandboxes"):
        requirements.missing(part, "it is not there")


def test_ci_requires_all_that_it_can_have():
    """All parts but BenchFlow's repository."""
    (required,) = re.findall(r"^export ROLLOUT_REQUIRE=(.*)$", (HERE.parent / ".ci/run").read_text(), re.MULTILINE)
    assert {*required.split(",")} == {*requirements.PARTS} - {"benchflow"}


def test_no_other_test_skips_by_itself():
    """What a test needs is asked of `requirements`, which can be told to insist."""
    found = {}
    for path in HERE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        if skips := sum(ast.unparse(call) == "pytest.skip" for call in calls):
            found[path.relative_to(HERE).as_posix()] = skips
    assert found == OF_THE_MACHINE
