"""The names that embedders import are pinned: one that goes, or comes, is a decision."""

from __future__ import annotations

import inspect

import pytest

import orchestrator

NAMES = [
    "Agent",
    "AgentCapabilities",
    "AgentConfig",
    "AgentError",
    "AgentLost",
    "AskUserRequest",
    "Budgets",
    "ConfigError",
    "ConnectError",
    "DirectorError",
    "DirectorRole",
    "ExecResult",
    "ExecSandbox",
    "ExecTimeout",
    "HandleRevoked",
    "IllegalTransition",
    "JournalError",
    "MissingExtra",
    "OrchestratorError",
    "PathEscape",
    "ProviderError",
    "QuietError",
    "Registry",
    "Role",
    "Rollout",
    "RolloutConfig",
    "RolloutResult",
    "Sandbox",
    "SandboxError",
    "SandboxHandle",
    "Scene",
    "Session",
    "StopReason",
    "TaskError",
    "TrackedUsage",
    "Transition",
    "Turn",
    "Usage",
    "Verdict",
    "VerifierError",
    "register_agent",
    "run_sync",
]


def test_the_public_names_are_these():
    assert sorted(orchestrator.__all__) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_says_what_it_is(name):
    """Classes and functions by a docstring of their own."""
    value = getattr(orchestrator, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)
        assert "__doc__" in vars(value) if inspect.isclass(value) else True


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(getattr(orchestrator, name))])
def test_every_public_method_says_what_it_does(name):
    kind = getattr(orchestrator, name)
    silent = [
        member
        for member, value in vars(kind).items()
        if not member.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, property))
        and not inspect.getdoc(value)
    ]
    assert silent == []


def test_every_error_has_one_root():
    errors = [getattr(orchestrator, name) for name in NAMES if inspect.isclass(getattr(orchestrator, name))]
    raised = [error for error in errors if issubclass(error, Exception)]
    assert all(issubclass(error, orchestrator.OrchestratorError) for error in raised)
    assert len(raised) == 17
