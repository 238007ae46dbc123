"""Every mistake in a configuration is one clear sentence, before anything exists."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from orchestrator import AgentConfig, ConfigError, DirectorRole, Role, Rollout, RolloutConfig, Scene, Turn

SCRIPTED = AgentConfig("mine", "session-factory", session_factory="harness:build_agent", calls_model=False)
CALLER = AgentConfig("caller", "session-factory", session_factory="harness:build_agent", api=("openai-chat",))
UNMETERED = AgentConfig("unmetered", "session-factory", session_factory="harness:build_agent")
ONE = Scene.single(SCRIPTED, prompt="x")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({}, "give either a scene or an agent"),
        ({"agent": "noop", "scene": ONE, "prompt": "x"}, "give either a scene or an agent"),
        ({"scene": ONE, "model": "openai/gpt-5"}, "a scene's roles carry their own model"),
        ({"agent": "noop"}, "nothing to ask: give a task, or a prompt"),
        (
            {"agent": "noop", "prompt": "x", "deadlines": {"sleeping": 1}},
            "no state is called 'sleeping'; known are prov",
        ),
        ({"agent": "noop", "prompt": "x", "deadlines": {"executing": 0}}, "deadlines: executing must be seconds > 0"),
        (
            {"agent": "noop", "prompt": "x", "deadlines": {"executing": math.nan}},
            "deadlines: executing must be seconds",
        ),
        ({"agent": "noop", "prompt": "x", "timeout": -1}, "timeout must be seconds > 0 or None, not -1"),
    ],
)
def test_a_config_that_cannot_work_says_why(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        RolloutConfig(**config)


@pytest.mark.parametrize(
    ("setting", "least"), [("max_connects", 1), ("max_verifies", 1), ("max_turns", 1), ("max_checks", 0)]
)
@pytest.mark.parametrize("value", [-1, 1.5, "3", True, None])
def test_a_count_that_is_none_is_refused(setting, least, value):
    with pytest.raises(ConfigError, match=f"RolloutConfig: {setting} must be a whole number, {least} or more, not"):
        RolloutConfig(prompt="x", agent="noop", **{setting: value})
    assert getattr(RolloutConfig(prompt="x", agent="noop", **{setting: least}), setting) == least


@pytest.mark.parametrize(("setting", "value"), [("limit", 0), ("limit", 2.5), ("checks", -1), ("checks", None)])
def test_a_director_that_may_do_less_than_nothing_is_refused(setting, value):
    with pytest.raises(ConfigError, match=f"DirectorRole: {setting} must be a whole number"):
        DirectorRole(Role("lead", "noop"), **{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("network", "internet"), ("keep_sandbox", "perhaps"), ("usage_tracking", "sometimes"), ("policy", "maybe")],
)
def test_a_word_that_a_setting_does_not_know_is_refused_with_those_that_it_knows(setting, value):
    with pytest.raises(ConfigError, match=f"{setting}.*{value}"):
        RolloutConfig(prompt="x", agent="noop", **{setting: value})


@pytest.mark.parametrize(
    ("scene", "sentence"),
    [
        (lambda: Scene((), ()), "a scene needs at least one role"),
        (
            lambda: RolloutConfig(prompt="x", scene=Scene((Role("a", "noop"),))),
            "at least one turn, or a director that leads it",
        ),
        (lambda: Scene((Role("a", "noop"), Role("a", "noop")), (Turn("a"),)), "two roles of the scene are called 'a'"),
        (lambda: Scene((Role("a", "noop"),), (Turn("b"),)), "a turn names the role 'b'; the scene has a"),
    ],
)
def test_a_scene_that_cannot_be_played_says_why(scene, sentence):
    with pytest.raises(ConfigError, match=sentence):
        scene()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"agent": "nobody"}, "nobody"),
        ({"agent": AgentConfig("mine", "telepathy")}, "protocol 'telepathy' is not one of acp, session-factory"),
        ({"agent": AgentConfig("mine", "acp")}, "protocol acp needs launch"),
        ({"agent": AgentConfig("mine", "acp", launch=("no-such-program-here",))}, "is not on this machine"),
        ({"agent": UNMETERED, "usage_tracking": "required"}, "usage_tracking is required, but agent unmetered"),
        ({"agent": SCRIPTED, "usage_tracking": "required"}, "usage_tracking is required, but no role calls a model"),
        ({"agent": CALLER}, "agent caller calls a model: give model, for example openai/gpt-5"),
    ],
)
def test_what_cannot_be_run_is_refused_when_the_rollout_is_built(config, sentence, tmp_path):
    """And leaves no folder behind."""
    with pytest.raises(ConfigError, match=sentence):
        Rollout(RolloutConfig(prompt="x", sandbox="fake", out=tmp_path / "runs", verifier=None, **config))
    assert not (tmp_path / "runs").exists()


def test_the_environment_is_not_in_a_configs_repr():
    config = RolloutConfig(prompt="x", agent="noop", env={"API_KEY": "sk-secret-1"})
    assert "sk-secret" not in repr(config)
    assert "sk-secret" not in repr(Role("a", "noop", env={"API_KEY": "sk-secret-1"}))


def test_one_agent_is_a_scene_of_one_turn():
    config = RolloutConfig(prompt="x", agent="noop", model="m", out="runs")
    assert config.the_scene() == Scene((Role("agent", "noop", "m"),), (Turn("agent"),))
    assert config.out == Path("runs")


@pytest.mark.parametrize("name", ["", "../up", "a/b", "-x", "two words", "ü"])
def test_a_role_has_a_name_by_which_a_folder_can_be_called(name):
    """Handles and log files are named after roles: nothing that leads elsewhere is a name."""
    with pytest.raises(ConfigError, match="a role's name is letters, digits"):
        Role(name, "noop")
