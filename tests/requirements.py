"""What a test needs of the machine: where it is missing the test is skipped, or fails, as `ROLLOUT_REQUIRE` says.

`ROLLOUT_REQUIRE=agents,daytona,docker,hosts,sandbox`, which CI sets, makes a real agent, SDK, engine, host or
bubblewrap that is missing a failure.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Mapping
from typing import Final, NoReturn

import pytest

from orchestrator.sandboxes import _bwrap
from states.errors import SandboxError

PARTS: Final[Mapping[str, str]] = {
    "agents": "real agents, installed on first use, and the extras that some are",
    "benchflow": "BenchFlow's repository and a Debian mirror: not in CI, which asks no network for what it tests",
    "daytona": "the daytona-sdk extra",
    "docker": "the docker extra and an engine",
    "hosts": "Harbor, Inspect and verifiers, in environments of their own",
    "sandbox": "a bubblewrap that comes up",
}
"""What can be required, and what it is."""


def missing(part: str, why: str) -> NoReturn:
    """Skip this test saying why; fail it where `part` is required, or nobody could require it."""
    required = set(filter(None, os.environ.get("ROLLOUT_REQUIRE", "").split(",")))
    if unknown := {part, *required} - {*PARTS}:
        pytest.fail(f"ROLLOUT_REQUIRE takes {', '.join(PARTS)}, not {', '.join(sorted(unknown))}")
    if part in required:
        pytest.fail(f"{part} is required (ROLLOUT_REQUIRE): {why}")
    pytest.skip(why, allow_module_level=True)


def module(name: str, part: str) -> None:
    """For the top of a test module: what it imports must be installed."""
    if importlib.util.find_spec(name) is None:
        missing(part, f"{name} is not installed: make install-all")


def bubblewrap() -> None:
    """A bubblewrap that comes up."""
    try:
        done = subprocess.run([_bwrap.bwrap_path(), "--unshare-all", "--ro-bind", "/", "/", "true"], check=False)
    except SandboxError as error:
        missing("sandbox", str(error))
    if done.returncode:
        missing("sandbox", "bubblewrap does not come up here; see rollout doctor")
