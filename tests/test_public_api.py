"""The names that embedders import are pinned: one that goes, or comes, is a decision."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import orchestrator

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text(encoding="utf-8")
    for package in ("orchestrator", "states")
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8") and path.parent.name != "embed"  # these need their host's packages
}
"""The modules whose docstrings have examples, and their text."""

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


def examples(name):
    """The docstrings of a module that have examples, and its own names for them."""
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples]


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_of_a_docstring_shows_what_is_so(name, monkeypatch, tmp_path):
    """It is run, in a folder and with a default registry of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("orchestrator.registry._default", None)
    said = []
    for test in examples(name):
        doctest.DocTestRunner().run(test, out=said.append)
    assert "".join(said) == ""


def test_every_public_name_is_used_in_an_example_that_is_run():
    """Of a docstring, or a block of the README (tests/test_readme.py runs those). Errors say what to do instead."""
    shown = [
        example.source
        for name in EXAMPLES
        for test in examples(name)
        for example in test.examples
        if not example.options.get(doctest.SKIP)
    ]
    shown += re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    used = set(re.findall(r"\w+", "\n".join(shown)))
    classes = {name: kind for name in NAMES if inspect.isclass(kind := getattr(orchestrator, name))}
    errors = {name for name, kind in classes.items() if issubclass(kind, Exception)}
    assert sorted(set(NAMES) - errors - used) == []


def test_every_error_has_one_root():
    errors = [getattr(orchestrator, name) for name in NAMES if inspect.isclass(getattr(orchestrator, name))]
    raised = [error for error in errors if issubclass(error, Exception)]
    assert all(issubclass(error, orchestrator.OrchestratorError) for error in raised)
    assert len(raised) == 17
