"""What a test needs of the machine: where it is missing the test is skipped, or fails, as `ROLLOUT_REQUIRE` says.

`ROLLOUT_REQUIRE=agents,daytona,docker,hosts`, which CI sets, makes a real agent, SDK, engine or host that is missing a
failure.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NoReturn

import pytest


def missing(part: str, why: str) -> NoReturn:
    """Skip this test saying why; fail it where `part` is required."""
    if part in os.environ.get("ROLLOUT_REQUIRE", "").split(","):
        pytest.fail(f"{part} is required (ROLLOUT_REQUIRE): {why}")
    pytest.skip(why, allow_module_level=True)


def module(name: str, part: str) -> None:
    """For the top of a test module: what it imports must be installed."""
    if importlib.util.find_spec(name) is None:
        missing(part, f"{name} is not installed: make install-all")
