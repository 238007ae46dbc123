"""Scenes as data: from a `rollout.toml`, from a `task.md`, from the command line, and played as they are written."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import anyio
import attrs
import pytest
from anyio.from_thread import start_blocking_portal
from harness import TRANSPORTS, FakeVerifier, build, drive, trace

from orchestrator import Budgets, DirectorRole, ExecResult, Role, Rollout, RolloutConfig, Scene, Turn, cli
from orchestrator.capture import read_trajectory
from orchestrator.directors import Story, TurnTaken
from orchestrator.gateway.scripted import DIALECTS, Say, ScriptedUpstream, ShellScript
from orchestrator.gateway.upstream import Upstream
from orchestrator.registry import default_registry
from orchestrator.sandboxes.fake import FakeSandbox
from orchestrator.scenes import (
    User,
    director_of,
    led_with_model,
    load_rollout,
    load_scene,
    roles_in_turn,
    rollout_of,
    scene_of,
    tells_when_asked,
    user_of,
    with_model,
)
from orchestrator.show import story_of, tell
from orchestrator.tasks import load_task
from states.errors import ConfigError

GOOD = """\
timeout = 60
policy = "deny"

[[roles]]
name = "coder"
agent = "minimal-acp"

[[roles]]
name = "reviewer"
agent = "minimal"

[[turns]]
role = "coder"

[[turns]]
role = "reviewer"
prompt = '''
[[turns]]
role = "nobody: this is text"
'''
"""
ROLES = '[[roles]]\nname = "coder"\nagent = "a"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "rollout.toml"
    path.write_text(text)
    return path


# --- rollout.toml -----------------------------------------------------------------------------------------------


def test_a_file_gives_the_roles_the_turns_and_the_settings_beside_them(tmp_path):
    """What is left out is not there, so that the defaults of `RolloutConfig` hold."""
    (tmp_path / "review.md").write_text("Review it.\n")
    settings = (
        'task = "sum"\nusage_tracking = "off"\nnetwork = "none"\nturn_sec = 9\nidle_sec = 3\nenv = {A = "${B}"}\n'
    )
    role = GOOD.replace('agent = "minimal"', 'agent = "minimal"\nmodel = "openai/x"\nturn_sec = 5\nenv = {T = "1"}')
    more = '[[turns]]\nrole = "reviewer"\nprompt_file = "review.md"\n[budgets]\ntokens = 10\ncost = 1.5\n'
    config = load_rollout(written(tmp_path, settings + role + more), variables={"B": "secret"})
    scene = config.pop("scene")
    assert config == {
        "task": tmp_path / "sum",
        "timeout": 60,
        "policy": "deny",
        "usage_tracking": "off",
        "network": "none",
        "turn_sec": 9,
        "idle_sec": 3,
        "env": {"A": "secret"},
        "budgets": Budgets(tokens=10, cost=1.5),
    }
    assert scene.roles == (
        Role("coder", "minimal-acp"),
        Role("reviewer", "minimal", "openai/x", {"T": "1"}, turn_sec=5),
    )
    assert [turn.role for turn in scene.turns] == ["coder", "reviewer", "reviewer"]
    assert scene.turns[0].prompt is None
    assert scene.turns[2].prompt == "Review it."
    assert RolloutConfig(scene=scene, prompt="x", **{key: config[key] for key in ("timeout", "policy", "env")})


def test_every_budget_of_every_scope_can_be_written(tmp_path):
    """On the rollout, the scene, a role and a turn; what there is of them is what `Budgets` knows."""
    limits = {"tokens": 10, "cost": 1.5, "tool_calls": 3, "turns": 2, "wall_sec": 60.0, "idle_sec": 5.0}
    assert set(limits) == {field.name for field in attrs.fields(Budgets)}
    table = "\n".join(f"{kind} = {limit}" for kind, limit in limits.items())
    inline = ", ".join(f"{kind} = {limit}" for kind, limit in limits.items())
    text = GOOD.replace("timeout = 60", "")
    text = text.replace('agent = "minimal"', f'agent = "minimal"\nbudgets = {{ {inline} }}')
    text = text.replace('role = "coder"', 'role = "coder"\nbudgets = { tokens = 7 }')
    config = load_rollout(written(tmp_path, f"{text}[budgets]\n{table}\n[scene.budgets]\n{table}\n"))
    assert config["budgets"] == config["scene"].budgets == config["scene"].roles[1].budgets == Budgets(**limits)
    assert config["scene"].turns[0].budgets == Budgets(tokens=7)
    assert config["scene"].roles[0].budgets == config["scene"].turns[1].budgets == Budgets()


BAD = {
    "unknown_role": (
        GOOD.replace('role = "reviewer"', 'role = "reviever"'),
        "16: turns[1].role: no role is called 'reviever'; did you mean reviewer?",
    ),
    "quite_unknown_role": (
        ROLES + '[[turns]]\nrole = "x"\n',
        "5: turns[0].role: no role is called 'x'; there is coder",
    ),
    "no_turns": (ROLES, "turns: expected at least one turn ([[turns]]), found none: the scene is empty"),
    "no_roles": ('[[turns]]\nrole = "a"\n', "roles: expected at least one role"),
    "duplicate_names": (
        ROLES + ROLES + '[[turns]]\nrole = "coder"\n',
        "5: roles[1].name: 'coder' is the name of roles[0] already; rename one",
    ),
    "turn_to_nobody": (GOOD.replace('role = "coder"\n', ""), "12: turns[0].role is missing"),
    "turn_to_an_empty_name": (GOOD.replace('role = "coder"', 'role = ""'), "13: turns[0].role: expected str of length"),
    "unknown_key": (GOOD.replace('agent = "minimal"', 'agnt = "m"'), "10: roles[1].agnt is no key of this format; did"),
    "unknown_setting": ("timeuot = 5\n" + GOOD, "1: timeuot is no key of this format; did you mean timeout?"),
    "wrong_type": (GOOD.replace('name = "coder"', "name = 3"), "5: roles[0].name: expected str, found 3"),
    "wrong_word": (GOOD.replace('"deny"', '"never"'), "2: policy: expected one of allow, deny, ask, found 'never'"),
    "wrong_number": (GOOD.replace("timeout = 60", "timeout = 0"), "1: timeout: expected"),
    "unknown_budget": (
        GOOD + "[budgets]\ntokenz = 5\n",
        "22: budgets.tokenz: no budget is called 'tokenz'; did you mean tokens?",
    ),
    "half_a_token": (GOOD + "[budgets]\ntokens = 0.5\n", "22: budgets.tokens: tokens must be a whole number > 0"),
    "budget_of_a_role": (
        GOOD.replace('agent = "minimal"', 'agent = "minimal"\nbudgets = { cost = -1 }'),
        "11: roles[1].budgets.cost: cost must be a number > 0 or None, not -1",
    ),
    "turns_of_a_turn": (
        GOOD.replace('role = "coder"', 'role = "coder"\nbudgets = { turns = 1 }'),
        "14: turns[0].budgets.turns: a turn has no budget of turns: it is one",
    ),
    "time_twice": (GOOD + "[budgets]\nwall_sec = 5\n", "22: budgets.wall_sec: there is a timeout too"),
    "bad_name": (GOOD.replace('name = "coder"', 'name = "../x"'), "5: roles[0].name: expected str matching"),
    "nobody_plays_it": (
        GOOD.replace('agent = "minimal-acp"\n', ""),
        "4: roles[0].agent: nobody plays 'coder': name its agent here, or give one with --role coder=AGENT",
    ),
    "no_manifest": (GOOD.replace('"minimal-acp"', '"mine.toml"'), "6: roles[0].agent: "),
    "no_prompt_file": (
        GOOD + '[[turns]]\nrole = "coder"\nprompt_file = "x.md"\n',
        "23: turns[2].prompt_file: expected",
    ),
    "two_prompts": (
        GOOD + '[[turns]]\nrole = "coder"\nprompt = "a"\nprompt_file = "b"\n',
        "24: turns[2].prompt_file: there is a prompt too",
    ),
    "unknown_variable": ('env = {A = "${NO}"}\n' + GOOD, "1: env: A needs ${NO}; give it with --env NO=VALUE"),
    "no_toml": ("roles = [\n", "not valid TOML"),
    "unknown_director": ('director = "rewiever"\n' + GOOD, "1: director: no role is called 'rewiever'; did you mean"),
    "nobody_to_direct": ('director = "coder"\n' + ROLES, "1: director: 'coder' is the only role"),
    "director_with_a_turn": ('director = "coder"\n' + GOOD, "14: turns[0].role: 'coder' directs: it takes no turns"),
    "brief_and_persona": (
        ROLES + '[[roles]]\nname = "lead"\n[director]\nrole = "lead"\nbrief = "a"\npersona = "b"\n',
        "8: director.brief: there is a persona (or facts) too",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_file_is_one_error_with_file_line_and_key(tmp_path, name):
    """A single line, by `ConfigError`, for each mistake that there is."""
    text, said = BAD[name]
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_scene(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert said in message.removeprefix(f"{path}:").removeprefix(str(path)), message
    assert "\n" not in message


def test_a_file_names_its_director(tmp_path):
    """By name alone, or with a brief, or as a user with persona and facts; then turns may be left out."""
    roles = ROLES + '[[roles]]\nname = "lead"\nmodel = "openai/x"\n'
    config = load_rollout(written(tmp_path, 'director = "lead"\n' + roles))
    assert config["director"] == DirectorRole(Role("lead", "model-user", "openai/x"))
    assert config["scene"] == Scene((Role("coder", "a"),))
    table = '[director]\nrole = "lead"\nbrief = "You lead."\nlimit = 3\nchecks = 2\n'
    config = load_rollout(written(tmp_path, roles + '[[turns]]\nrole = "coder"\n' + table), {"lead": "mine:m"})
    assert config["director"] == DirectorRole(Role("lead", "mine", "m"), "You lead.", 3, 2)
    assert config["scene"].turns == (Turn("coder"),)
    user = '[director]\nrole = "lead"\npersona = "You are lost."\nfacts = {id = "7"}\n'
    config = load_rollout(written(tmp_path, roles + user), "noop")
    assert config["director"].role.agent == "model-user", "one agent for all is one for those who work"
    assert "- id: 7" in config["director"].brief
    assert led_with_model(config["director"], "y").role.model == "openai/x"
    assert led_with_model(DirectorRole(Role("lead", "mine")), "y").role.model == "y"
    assert RolloutConfig(prompt="x", **config)


def test_an_empty_prompt_file_and_a_missing_rollout_toml_are_errors(tmp_path):
    (tmp_path / "empty.md").touch()
    with pytest.raises(ConfigError, match=r"empty\.md is empty"):
        load_scene(written(tmp_path, GOOD + '[[turns]]\nrole = "coder"\nprompt_file = "empty.md"\n'))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_scene(tmp_path / "none.toml")


def test_the_caller_says_who_plays_a_role(tmp_path):
    """By name, or one agent for all; a model may follow a colon, and holds colons of its own."""
    path = written(tmp_path, GOOD)
    scene = load_scene(path, {"reviewer": "scripted:ollama/qwen:7b"})
    assert [(role.agent, role.model) for role in scene.roles] == [("minimal-acp", ""), ("scripted", "ollama/qwen:7b")]
    assert {role.agent for role in load_scene(path, "noop").roles} == {"noop"}
    with pytest.raises(ConfigError, match=r"given for 'rewiever', but no role .* did you mean reviewer\?"):
        load_scene(path, {"rewiever": "noop"})
    assert [role.model for role in with_model(scene, "m").roles] == ["m", "ollama/qwen:7b"]
    assert roles_in_turn({"a": "x", "b": "y:m"}) == Scene((Role("a", "x"), Role("b", "y", "m")), (Turn("a"), Turn("b")))


def test_a_director_of_a_file_has_a_budget_of_its_own(tmp_path):
    """Of what it can spend: it takes no turns."""
    user = '[director]\nrole = "user"\n[[roles]]\nname = "user"\nbudgets = { tokens = 500 }\n'
    config = load_rollout(written(tmp_path, GOOD + user))
    assert config["director"].role.budgets == Budgets(tokens=500)
    assert RolloutConfig(prompt="x", **config).limits().directors == {"user": Budgets(tokens=500)}


# --- task.md ----------------------------------------------------------------------------------------------------

TASK = """\
---
schema_version: "1.3"
sandbox: {workdir: /app}
agents:
  roles:
    planner:
      agent: scripted
      timeout_sec: 7
      env: {LEVEL: 3}
    executor: {agent: scripted-acp, model: openai/x}
    reviewer: {agent: scripted}
scenes:
  - name: plan
    turns: [planner]
  - name: implement
    turns:
      - role: executor
      - role: executor
        prompt: Now the tests.
  - name: review
    roles: [reviewer, planner]
user:
  model: scripted
  stop_rule: satisfied-or-6-rounds
  private_facts: {order_id: BF-1042}
---
Mend it.

## role:planner

You plan.

## scene:implement

Apply the plan.

## user-persona

You are impatient.
"""


def task_md(folder: Path, text: str = TASK):
    (folder / "verifier").mkdir(exist_ok=True)
    (folder / "verifier" / "test.sh").write_text("#!/bin/sh\necho 1 > /logs/verifier/reward.txt\n")
    (folder / "task.md").write_text(text)
    return load_task(folder)


def test_the_scenes_of_a_task_are_played_one_after_the_other(tmp_path):
    """A turn's own prompt goes before the scene's, the role's and the task's; without turns each role takes one."""
    scene = scene_of(task_md(tmp_path))
    assert scene.turns == (
        Turn("planner", "You plan."),
        Turn("executor", "Apply the plan."),
        Turn("executor", "Now the tests."),
        Turn("reviewer"),
        Turn("planner", "You plan."),
    )
    assert scene.roles[0] == Role("planner", "scripted", "", {"LEVEL": "3"}, turn_sec=7)
    assert scene.roles[1] == Role("executor", "scripted-acp", "openai/x")
    assert {role.agent for role in scene_of(load_task(tmp_path), "noop").roles} == {"noop"}


def test_prompts_are_appended_where_the_task_asks_for_it(tmp_path):
    """`benchflow.prompt`: base, role, scene, turn, in this order unless it names another."""
    text = TASK.replace("user:\n", "benchflow: {prompt: {composition: append}}\nuser:\n")
    prompts = [turn.prompt for turn in scene_of(task_md(tmp_path, text)).turns]
    assert prompts[0] == "Mend it.\n\nYou plan."
    assert prompts[2] == "Mend it.\n\nApply the plan.\n\nNow the tests."
    assert prompts[3] is None
    text = text.replace("composition: append", "composition: append, order: [turn, base]")
    assert scene_of(task_md(tmp_path, text)).turns[2].prompt == "Now the tests.\n\nMend it."


def test_a_task_may_have_budgets_too(tmp_path):
    """Its roles and its turns; a scene where it is the only one, since several are played as one."""
    text = TASK.replace("timeout_sec: 7\n", "timeout_sec: 7\n      budgets: {tokens: 10, idle_sec: 2.5}\n")
    text = text.replace("prompt: Now the tests.", "prompt: Now the tests.\n        budgets: {cost: 0.5}")
    scene = scene_of(task_md(tmp_path, text))
    assert scene.roles[0].budgets == Budgets(tokens=10, idle_sec=2.5)
    assert [turn.budgets for turn in scene.turns][2] == Budgets(cost=0.5)
    assert scene.budgets == Budgets()
    one = "---\nagents: {roles: {a: {agent: x}}}\nscenes: [{name: s, turns: [a], budgets: {turns: 3}}]\n---\nDo it.\n"
    assert scene_of(task_md(tmp_path, one)).budgets == Budgets(turns=3)


def test_what_a_scene_asks_for_and_will_not_get_is_a_note(tmp_path):
    """Skills and effort of a role, and the skills of a scene."""
    text = TASK.replace("timeout_sec: 7", "skills_dir: s\n      reasoning_effort: high").replace(
        "name: plan", "name: plan\n    skills_dir: x"
    )
    assert [note for note in task_md(tmp_path, text).notes if "not honoured" in note] == [
        "task.md: agents.roles.planner.reasoning_effort is not honoured",
        "task.md: agents.roles.planner.skills_dir is not honoured",
        "task.md: scenes[0].skills_dir is not honoured",
    ]
    assert scene_of(load_task(tmp_path)) is not None


def test_a_task_without_scenes_has_none(tmp_path):
    task = task_md(tmp_path, "---\nschema_version: '1.3'\n---\nDo it.\n")
    assert scene_of(task) is None
    assert user_of(task) is None


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "turns: [planner]",
            "turns: [planer]",
            ":14: scenes[0].turns[0].role: no role is called 'planer'; did you mean",
        ),
        ("- role: executor\n      -", "- role: nobody\n      -", ":17: scenes[1].turns[0].role: no role is called"),
        ("roles: [reviewer, planner]", "roles: [x]", ":21: scenes[2].roles[0]: no role is called 'x'"),
        ("turns: [planner]", "turns: [planner]\n    roles: [reviewer]", "'planner' is not one of the scene's roles"),
        ("agent: scripted\n      timeout", "timeout", ":6: agents.roles.planner.agent: nobody plays 'planner'"),
        (
            "timeout_sec: 7",
            "timeout_secs: 7",
            ":8: agents.roles.planner.timeout_secs is no key of this format; did you",
        ),
        ("timeout_sec: 7", "timeout_sec: x", ":8: agents.roles.planner.timeout_sec: expected float, found 'x'"),
        ("turns: [planner]", "turn: [planner]", ":14: scenes[0].turn is no key of this format; did you mean turns?"),
        ("timeout_sec: 7", "budgets: {tokens: -1}", ":8: agents.roles.planner.budgets.tokens: tokens must be a whole"),
        ("prompt: Now the tests.", "budgets: {turns: 1}", ":19: scenes[1].turns[1].budgets.turns: a turn has no"),
        ("name: plan\n", "name: plan\n    budgets: {turns: 3}\n", ":14: scenes[0].budgets: a task's scenes are played"),
    ],
)
def test_what_is_wrong_with_a_tasks_scenes_is_one_error_with_its_line(tmp_path, old, new, said):
    assert old in TASK
    with pytest.raises(ConfigError) as caught:
        scene_of(task_md(tmp_path, TASK.replace(old, new)))
    assert f"{tmp_path / 'task.md'}" in str(caught.value)
    assert said in str(caught.value), caught.value


def test_a_scene_without_turns_and_a_rule_that_stops_nothing_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"task\.md:\d+: scenes: .*the scene is empty"):
        scene_of(
            task_md(tmp_path, "---\nagents: {roles: {a: {agent: x}}}\nscenes: [{name: s, roles: []}]\n---\nDo it.\n")
        )
    with pytest.raises(ConfigError, match=r"task\.md:24: user\.stop_rule: expected a rule such as"):
        user_of(task_md(tmp_path, TASK.replace("satisfied-or-6-rounds", "whenever")))


def test_a_task_describes_its_user(tmp_path):
    """Who it is, what it knows, and for how many rounds it stays; the facts are not in its repr."""
    task = task_md(tmp_path)
    user = user_of(task)
    assert user == User("You are impatient.", {"order_id": "BF-1042"}, "scripted", 6)
    assert "BF-1042" not in repr(user)
    assert director_of(task, scene_of(task)) is not None
    played = task_md(tmp_path, TASK.replace("model: scripted", "model: gpt-5"))
    assert user_of(played).model == "gpt-5"


def a_story(*turns: TurnTaken):
    return Story("Help.", turns)


def taken(role: str, said: str, prompt: str = "", ended_by: str = "end_turn") -> TurnTaken:
    return TurnTaken(role, prompt, ended_by, steps=({"type": "agent_message", "text": said},))


def test_a_scripted_user_tells_a_fact_once_it_is_asked_for():
    """Beside the scene's turns, then as turns of their own; never twice, and never before somebody asks."""
    scene = Scene((Role("a", "x"),), (Turn("a"), Turn("a", "Finish.")))
    decide = tells_when_asked(scene, User("", {"order_id": "BF-1"}, limit=4))
    assert decide(a_story()) == Turn("a")
    told = "The user says: the order id is BF-1."
    assert decide(a_story(taken("a", "It is mended."))) == Turn("a", "Finish.")
    asking = taken("a", "What is your order ID?")
    assert decide(a_story(asking)) == Turn("a", f"Finish.\n\n{told}")
    assert decide(a_story(taken("a", "hm"), asking)) == Turn("a", told)
    assert decide(a_story(asking, taken("a", "Which order id?", told))) is None
    assert decide(a_story(*[asking] * 4)) is None
    assert decide(a_story(taken("a", "order id?", ended_by="crash"))) is None


# --- a user that a model plays ----------------------------------------------------------------------------------

PLAYED = TASK.replace("model: scripted", "model: claude-haiku")


def test_a_user_that_names_a_model_is_played_by_it(tmp_path):
    """With its persona, its facts and its limit; a provider that is plain to see is filled in."""
    task = task_md(tmp_path, PLAYED)
    led = director_of(task, scene_of(task))
    assert (led.role, led.limit, led.checks) == (Role("user", "model-user", "anthropic/claude-haiku"), 6, 0)
    assert "You are impatient." in led.brief
    assert "- order id: BF-1042" in led.brief


def test_the_caller_says_who_plays_the_user(tmp_path):
    """Over the model that is written, and over a script; an agent for every role is not one for the user."""
    task = task_md(tmp_path, PLAYED)
    scene = scene_of(task, {"user": "pydantic-ai"})
    assert director_of(task, scene, {"user": "pydantic-ai"}).role == Role(
        "user", "pydantic-ai", "anthropic/claude-haiku"
    )
    assert director_of(task, scene, "noop").role.agent == "model-user"
    scripted = task_md(tmp_path)
    assert director_of(scripted, scene, {"user": "model-user:openai/x"}).role == Role("user", "model-user", "openai/x")
    with pytest.raises(ConfigError, match="given for 'usr', but no role is called 'usr'; did you mean user"):
        scene_of(task, {"usr": "noop"})


PACKAGE = """\
---
schema_version: "1.3"
metadata: {category: office-knowledge-work, difficulty: hard}
agent: {timeout_sec: 1200}
verifier: {timeout_sec: 240}
sandbox: {cpus: 2, memory_mb: 4096}
agents:
  roles:
    planner: {agent: claude-agent-acp, model: claude-sonnet-4-6, capabilities: [tool-use]}
    executor: {agent: codex-acp, model: gpt-5.5, reasoning_effort: high}
scenes:
  - name: plan
    turns: [{role: planner}]
  - name: implement
    turns: [{role: executor}]
user:
  model: claude-haiku
  stop_rule: satisfied-or-5-rounds
  private_facts: {hidden_need: Use the quarterly file.}
benchflow:
  nudges: {mode: simulated-user, branchable: true, nudge_budget: 4, confirmation_policy: {destructive_actions: human}}
---

## prompt

Split the service.

## scene:plan

Write a plan.

## user-persona

You are impatient.
"""


def test_a_package_of_benchflow_names_its_agents_models_and_user_and_each_finds_its_provider(tmp_path, monkeypatch):
    """As it is written: nothing has to be given but the keys."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key-of-anthropic")
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-openai")
    keywords = rollout_of(task_md(tmp_path, PACKAGE))
    assert (keywords["task"].limits.cpus, keywords["director"].limit) == (2, 4)
    rollout = Rollout(RolloutConfig(**keywords, out=None))
    assert {(name, member.agent.name, member.upstream.model) for name, member in rollout._world.cast.items()} == {
        ("planner", "claude-agent-acp", "claude-sonnet-4-6"),
        ("executor", "codex-acp", "gpt-5.5"),
        ("user", "model-user", "claude-haiku"),
    }
    assert [turn.prompt for turn in keywords["scene"].turns] == ["Write a plan.", None]


def test_a_role_with_the_name_of_the_user_is_refused_when_somebody_shall_play_the_user(tmp_path):
    text = PLAYED.replace("planner", "user")
    task = task_md(tmp_path, text)
    with pytest.raises(ConfigError, match=r"task\.md:\d+: user: a role of the scene is called 'user' too"):
        director_of(task, scene_of(task))
    assert callable(director_of(task_md(tmp_path, text.replace("claude-haiku", "scripted")), scene_of(task)))


def test_a_task_its_scene_and_its_user_are_the_keywords_of_one_config(tmp_path):
    """The same from code as from the command line."""
    task_md(tmp_path, PLAYED)
    keywords = rollout_of(tmp_path, "noop")
    assert set(keywords) == {"task", "scene", "director"}
    assert keywords["scene"].turns == scene_of(load_task(tmp_path)).turns
    assert RolloutConfig(**keywords).the_director() == keywords["director"]
    alone = tmp_path / "alone"
    alone.mkdir()
    single = rollout_of(task_md(alone, "---\nuser: {model: gpt-5}\n---\nDo it.\n"), "noop:m")
    assert single["scene"] == Scene.single("noop", model="m")
    assert single["director"].role.model == "openai/gpt-5"
    by_role = rollout_of(load_task(alone), {"coder": "noop", "user": "scripted"})
    assert [role.name for role in by_role["scene"].roles] == ["coder"]
    assert by_role["director"].role.agent == "scripted"
    with pytest.raises(ConfigError, match="has no scenes: say which agent shall do it"):
        rollout_of(alone)


def test_a_user_that_nobody_can_play_is_a_note(tmp_path):
    """Scripted, with nothing to tell: the turns are taken as they are written, and that is said."""
    task_md(tmp_path, TASK.replace("  private_facts: {order_id: BF-1042}\n", ""))
    keywords = rollout_of(tmp_path, "noop")
    assert keywords["director"] is None
    assert keywords["task"].notes[-1].startswith("task.md: its user is scripted and knows no fact")


async def play_the_user(folder, script, **config):
    """A task's own roles and user, one provider for all models, in memory."""
    async with ScriptedUpstream(script) as provider:
        served = Upstream("scripted", provider.url, tuple(DIALECTS), api_key="sk-none-at-all")
        base = {
            "sandbox": FakeSandbox(on_exec=lambda _: ExecResult("ok\n", "", 0)),
            "verifier": FakeVerifier(),
            "upstream": served,
            "out": folder / "runs",
        }
        return await Rollout(RolloutConfig(**{**base, **config})).run()


def test_a_model_plays_the_user_beside_the_scenes_own_turns(tmp_path):
    """It adds what it is asked for to the next turn, then leads, to the limit of its rounds."""
    roles = ("planner", "executor", "reviewer")
    answers = iter(["It is BF-1042.", "DONE", "DONE", "DONE", "Did you test it?"])

    def script(conversation):
        return Say("What is the order id?" if conversation.tools else next(answers))

    task_md(tmp_path, PLAYED)
    keywords = rollout_of(tmp_path, dict.fromkeys(roles, "minimal"))
    result = anyio.run(functools.partial(play_the_user, tmp_path, script, **keywords))
    assert (result.state, result.turns) == ("closed/rewarded", 6), result.verdict
    segments = read_trajectory(result.folder)
    prompts = [segment.steps[0].data["text"] for segment in segments]
    assert prompts[:3] == ["You plan.", "Apply the plan.\n\nIt is BF-1042.", "Now the tests."]
    assert [segment.about["role"] for segment in segments] == [
        "planner",
        "executor",
        "executor",
        "reviewer",
        "planner",
        "planner",
    ]
    lines = [json.loads(line) for line in (result.folder / "llm.jsonl").read_text().splitlines()]
    assert [line["role"] for line in lines].count("user") == 5


# --- the patterns -----------------------------------------------------------------------------------------------


PATTERNS = {
    "single": (("agent",), None),
    "coder_reviewer": (("coder", "reviewer"), (Turn("coder"), Turn("reviewer", "Review."), Turn("coder", "Mend."))),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_trace_of_a_scene(pattern, transport, snapshot):
    """Every swap is a walk through `quiescing` and `disconnected`; the same on both loops."""
    roles, turns = PATTERNS[pattern]

    async def played() -> str:
        return trace((await drive(build(transport, roles=roles, turns=turns))).rollout)

    traces = {anyio.run(played, backend=backend) for backend in ("asyncio", "trio")}
    assert len(traces) == 1
    assert traces.pop() == snapshot


# --- played from a file -----------------------------------------------------------------------------------------


@pytest.fixture
def rollout(tmp_path, capfd, monkeypatch):
    """The command line, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(list(arguments))
        said = capfd.readouterr()
        return code, said.out, said.err

    return go


def script(folder: Path, name: str, actions: list, transport: str = "session-factory") -> str:
    """The manifest of an agent that plays a script; its file's name."""
    text = json.dumps({"turns": [actions]})
    factory = f"session_factory = \"orchestrator.agents.scripted:from_env\"\n[env]\nROLLOUT_SCRIPT = '''{text}'''\n"
    launch = (
        'launch = ["${python}", "${agents}/scripted_acp.py", "${home}/script.json"]\n'
        f"[files]\n\"${{home}}/script.json\" = '''{text}'''\n"
    )
    head = f'protocol = "{transport}"\ncalls_model = false\n'
    (folder / f"{name}.toml").write_text(head + (launch if transport == "acp" else factory))
    return f"{name}.toml"


@pytest.mark.sandbox
def test_a_scene_from_a_file_is_played_over_both_transports_in_one_sandbox(rollout, tmp_path, bwrap):
    """What the coder leaves is there for the reviewer; each segment holds its own role's steps; show tells by role."""
    ask = {"permission": {"title": "May I approve?", "options": ["allow", "reject"]}}
    coder = script(tmp_path, "c", [{"shell": "echo 42 > answer.txt"}, {"say": "written"}], "acp")
    reviewer = script(tmp_path, "r", [ask, {"shell": "cat answer.txt"}, {"say": "APPROVED"}])
    text = GOOD.replace('"minimal-acp"', f'"{coder}"').replace('"minimal"', f'"{reviewer}"').replace("deny", "allow")
    written(tmp_path, 'prompt = "Write it."\n' + text)
    assert rollout("validate", "rollout.toml")[0] == 0
    code, out, err = rollout("run", "--scene", "rollout.toml", "--json")
    assert code == 0, out + err
    document = json.loads(out)
    assert document["turns"] == 2
    folder = Path(document["folder"])
    first, second = read_trajectory(folder)
    assert [(s.about["role"], s.about["protocol"]) for s in (first, second)] == [
        ("coder", "acp"),
        ("reviewer", "session-factory"),
    ]
    assert "written" in json.dumps([step.data for step in first.steps])
    assert "APPROVED" not in json.dumps([step.data for step in first.steps])
    reviewed = json.dumps([step.data for step in second.steps])
    assert "42" in reviewed
    assert "written" not in reviewed
    told = tell(story_of(folder))
    assert (
        "Scene\n  coder: turn 1; 1 tool calls\n  reviewer: turn 2; 2 tool calls\n    ? May I approve? -> allow" in told
    )


@pytest.mark.sandbox
def test_usage_by_role_adds_up_to_what_the_upstream_counted(tmp_path, bwrap):
    """Two minimal agents, one over each transport, through one gateway; the sums are the provider's own."""

    async def played():
        async with ScriptedUpstream(ShellScript("echo hi"), apis=["openai-chat"]) as provider:
            served = Upstream("scripted", provider.url + "/v1", ("openai-chat",), api_key="sk-none-at-all")
            config = load_rollout(written(tmp_path, 'prompt = "Say it."\n' + GOOD))
            result = await Rollout(RolloutConfig(**config, upstream=served, out=tmp_path / "runs")).run()
            return result, provider.usage

    result, counted = anyio.run(played)
    assert (result.state, result.turns) == ("closed/unverified", 2), result.verdict
    roles = result.usage.by_role
    assert set(roles) == {"coder", "reviewer"}
    for name in ("calls", "input_tokens", "output_tokens"):
        assert all(getattr(usage, name) > 0 for usage in roles.values())
        assert sum(getattr(usage, name) for usage in roles.values()) == getattr(counted, name)
    told = tell(story_of(result.folder))
    assert f"coder: turn 1; 1 tool calls; {roles['coder'].calls} model calls, {roles['coder'].tokens:,} tokens" in told


# --- the command line -------------------------------------------------------------------------------------------


def test_roles_of_the_command_line_take_one_turn_each(rollout, tmp_path):
    """`--role` without a file: in the order given."""
    one, two = script(tmp_path, "one", [{"say": "1"}]), script(tmp_path, "two", [{"say": "2"}])
    run = ("run", "--prompt", "Go.", "--sandbox", "fake", "--json", "--quiet")
    code, out, err = rollout(*run, "--role", f"coder={one}", "--role", f"reviewer={two}")
    assert code == 0, err
    assert [s.about["role"] for s in read_trajectory(Path(json.loads(out)["folder"]))] == ["coder", "reviewer"]


def test_budgets_of_the_command_line_hold_beside_those_of_the_file(rollout, tmp_path):
    """Options are the rollout's; `--budget` is a role's, over what the file gives it; the result says which held."""
    one = script(tmp_path, "one", [{"say": "1"}])
    text = 'prompt = "Go."\n[budgets]\nturns = 9\nwall_sec = 90\n' + GOOD.partition("\n\n")[2]
    text = text.replace('agent = "minimal"', 'agent = "minimal"\nbudgets = { turns = 3, tool_calls = 4 }')
    written(tmp_path, text)
    run = ("run", "--scene", "rollout.toml", "--agent", one, "--sandbox", "fake", "--json", "--quiet", "--no-verify")
    more = ("--timeout", "60", "--max-turns", "1", "--budget", "reviewer.turns=2", "--budget", "coder.wall_sec=1.5")
    code, out, err = rollout(*run, *more)
    assert code == 0, err
    document = json.loads(out)
    assert document["turns"] == 1
    held = {(use["scope"], use["of"], use["kind"]): use["limit"] for use in document["budgets"]}
    assert held == {
        ("rollout", "", "turns"): 1,
        ("rollout", "", "wall_sec"): 60,
        ("role", "coder", "wall_sec"): 1.5,
        ("role", "reviewer", "tool_calls"): 4,
        ("role", "reviewer", "turns"): 2,
    }
    told = tell(story_of(Path(document["folder"])))
    assert "budget    the rollout's budget of 1 turn: 1 spent\n" in told
    assert "budget    reviewer's budget of 4 tool calls: 0 spent\n" in told


def test_the_command_line_goes_before_the_file(rollout, tmp_path):
    """An option that is given wins over the file; one that is not leaves what the file says."""
    one = script(tmp_path, "one", [{"say": "1"}])
    written(tmp_path, 'prompt = "From the file."\n[budgets]\ntool_calls = 5\n' + GOOD.partition("\n\n")[2])
    run = ("run", "--scene", "rollout.toml", "--agent", one, "--sandbox", "fake", "--json", "--quiet", "--no-verify")
    code, out, err = rollout(*run, "--prompt", "From the command line.", "--policy", "deny")
    assert code == 0, err
    folder = Path(json.loads(out)["folder"])
    assert read_trajectory(folder)[0].steps[0].data["text"] == "From the command line."
    about = json.loads((folder / "config.json").read_text())
    assert about["policy"] == "deny"
    document = json.loads(rollout(*run)[1])
    assert document["turns"] == 2
    folder = Path(document["folder"])
    assert read_trajectory(folder)[0].steps[0].data["text"] == "From the file."


@pytest.mark.sandbox
def test_a_task_with_scenes_and_a_user_runs_as_it_is_written(rollout, tmp_path, bwrap):
    """Its own roles, turns and prompts; the scripted user tells what was asked for; the task's verifier rewards."""
    (tmp_path / "task").mkdir()
    asks = script(tmp_path, "asks", [{"say": "What is the order id?"}])
    text = TASK.replace("    turns: [planner]", "    turns: [planner]", 1)
    task_md(tmp_path / "task", text)
    code, out, err = rollout("run", "task", "--agent", asks, "--json", "--quiet")
    assert code == 0, out + err
    document = json.loads(out)
    assert (document["state"], document["reward"]) == ("closed/rewarded", 1.0)
    segments = read_trajectory(Path(document["folder"]))
    assert [s.about["role"] for s in segments] == ["planner", "executor", "executor", "reviewer", "planner"]
    prompts = [s.steps[0].data["text"] for s in segments]
    assert prompts[:3] == ["You plan.", "Apply the plan.\n\nThe user says: the order id is BF-1042.", "Now the tests."]
    oracle = rollout("run", "task", "--agent", "noop", "--json", "--quiet")
    assert json.loads(oracle[1])["turns"] == 1


@pytest.mark.sandbox
def test_a_task_with_a_persona_runs_as_it_is_written(rollout, tmp_path, bwrap):
    """Roles over both transports and a user, each with its own model, on one server of the user's own."""
    (tmp_path / "task").mkdir()
    text = PLAYED.replace("agent: scripted-acp, model: openai/x", "agent: minimal-acp, model: openai/big")
    text = text.replace("agent: scripted", "agent: minimal\n      model: small")
    text = text.replace("{agent: minimal\n      model: small}", "{agent: minimal, model: small}")
    task_md(tmp_path / "task", text)

    def script(conversation):
        if conversation.model == "anthropic/claude-haiku":
            return Say("The order id is BF-1042." if conversation.prompts == 1 else "DONE")
        return ShellScript("echo hi", f"{conversation.model}: what is the order id?")(conversation)

    provider = ScriptedUpstream(script, apis=["openai-chat"])
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(provider):
        code, out, err = rollout("run", "task", "--upstream-url", f"{provider.url}/v1", "--json", "--quiet")
    assert code == 0, out + err
    document = json.loads(out)
    assert (document["state"], document["reward"], document["turns"]) == ("closed/rewarded", 1.0, 5)
    segments = read_trajectory(Path(document["folder"]))
    assert [(s.about["role"], s.about["protocol"]) for s in segments[:2]] == [
        ("planner", "session-factory"),
        ("executor", "acp"),
    ]
    assert segments[1].steps[0].data["text"] == "Apply the plan.\n\nThe order id is BF-1042."
    models = {(call.request["model"], "tools" in call.request) for call in provider.calls}
    assert models == {("anthropic/claude-haiku", False), ("small", True), ("openai/big", True)}
    assert rollout("validate", "task")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "who shall do it? Give --agent NAME"),
        (("--role", "coder"), "--role coder: give NAME=AGENT"),
        (("--role", "a=noop", "--role", "a=noop"), "'a' is given twice"),
        (("--role", "a=noop", "--agent", "noop"), "not both"),
        (("--scene", "none.toml"), "none.toml: expected a rollout.toml"),
        (("--scene", "rollout.toml", "--role", "x=noop"), "no role is called 'x'; there is coder, reviewer"),
        (("--agent", "noop", "--budget", "coder.tokens=5"), "--budget coder.tokens=5: it is a role's; without roles"),
        (("--role", "a=noop", "--budget", "b.turns=5"), "--budget b.turns=5: give ROLE.KIND=N for one of a"),
        (("--role", "a=noop", "--budget", "a.turns=few"), "--budget a.turns=few: give a number, as in coder.tokens"),
        (("--role", "a=noop", "--budget", "a.turnz=5"), "no budget is called 'turnz'; did you mean turns?"),
        (("--role", "a=noop", "--max-turns", "0"), "turns must be a whole number > 0"),
    ],
)
def test_what_cannot_work_is_exit_code_2(rollout, tmp_path, arguments, said):
    written(tmp_path, GOOD)
    code, _, err = rollout("run", "--prompt", "Go.", *arguments)
    assert code == 2
    assert said in err


def test_a_scene_is_validated_with_its_agents_and_its_task(rollout, tmp_path):
    """An unknown agent is an error, a turn without a prompt a note; so are the scenes of a task."""
    written(tmp_path, GOOD)
    code, out, _ = rollout("validate", "rollout.toml")
    assert code == 0
    assert "note   rollout.toml: a turn has no prompt" in out
    written(tmp_path, GOOD.replace("minimal-acp", "minimal-apc"))
    code, out, _ = rollout("validate", "rollout.toml")
    assert code == 1
    assert "minimal-apc" in out
    (tmp_path / "task").mkdir()
    task_md(tmp_path / "task", TASK.replace("turns: [planner]", "turns: [planer]"))
    code, out, _ = rollout("validate", "task")
    assert code == 1
    assert "did you mean planner?" in out


def test_an_agent_of_another_harness_in_a_task_is_a_note_of_validate_with_the_option_that_replaces_it(
    rollout, tmp_path
):
    """With the file and the role; the task runs as the note says, and not without."""
    (tmp_path / "task").mkdir()
    task_md(tmp_path / "task", TASK)
    assert rollout("validate", "task")[0] == 0
    task_md(tmp_path / "task", TASK.replace("scripted-acp", "claude-code"))
    code, out, _ = rollout("validate", "task")
    assert code == 0
    (note,) = [line for line in out.splitlines() if "executor" in line]
    assert note.startswith(f"note   {tmp_path / 'task/task.md'}: role 'executor': the agent 'claude-code' is not known")
    assert note.endswith(f"rollout run {tmp_path / 'task'} --role executor=AGENT")
    assert rollout("run", "task", "--sandbox", "fake")[0] == 2
    code, out, err = rollout("run", "task", "--sandbox", "fake", "--no-verify", "--role", "executor=scripted")
    assert code == 0, out + err


def test_an_agent_of_a_task_that_is_known_and_cannot_work_is_an_error_of_validate(rollout, tmp_path, monkeypatch):
    """It is ours, so it is a mistake here."""
    monkeypatch.setitem(default_registry()._broken, "mine", ConfigError("agent 'mine', entry point 'x:y': no module"))
    (tmp_path / "task").mkdir()
    task_md(tmp_path / "task", TASK.replace("scripted-acp", "mine"))
    code, out, _ = rollout("validate", "task")
    assert code == 1
    assert "task.md: role 'executor': agent 'mine', entry point" in out
