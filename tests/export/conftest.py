"""The rollouts that every format is made of, recorded once a session and worker."""

from __future__ import annotations

import export_cases
import pytest


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """By name: each way out over both transports, metered scenes, and what kills left."""
    return export_cases.every(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="session")
def one_role(cases):
    """One agent, one turn, three model calls and two tools."""
    return cases["one_role"]


@pytest.fixture(scope="session")
def two_roles(cases):
    """A coder, a reviewer, and the coder again."""
    return cases["two_roles"]
