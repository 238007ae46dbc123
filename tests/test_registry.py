"""The registry: mistakes are one clear line each, wherever an agent comes from, and templates render purely."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint

import pytest

from orchestrator import Rollout, RolloutConfig
from orchestrator.registry import (
    AgentConfig,
    Install,
    Place,
    Registry,
    check_agent,
    default_registry,
    load_manifest,
    resolve_factory,
)
from states.errors import ConfigError

PLACE = Place(
    install="/opt/agent",
    python="/opt/agent/bin/python",
    node="/opt/node",
    agents="/opt/ad",
    adapters="/opt/ad/adapters",
    arch="x64",
)
MISTAKES = {
    "a protocol outside the two": ({"protocol": "http"}, r"protocol"),
    "a session factory without an entrypoint": ({"protocol": "session-factory"}, r"needs session_factory"),
    "an entrypoint that is no entrypoint": (
        {"protocol": "session-factory", "session_factory": "json.loads"},
        r"not of the form 'module:callable'",
    ),
    "an entrypoint that does not import": (
        {"protocol": "session-factory", "session_factory": "no_such_module:make"},
        r"no_such_module does not import: ModuleNotFoundError",
    ),
    "an entrypoint that is missing": (
        {"protocol": "session-factory", "session_factory": "json:no_such_name"},
        r"json has no 'no_such_name'",
    ),
    "an entrypoint that is not callable": (
        {"protocol": "session-factory", "session_factory": "json:__name__"},
        r"is a str, which cannot be called",
    ),
    "a session factory with a launch command": (
        {"protocol": "session-factory", "session_factory": "json:loads", "launch": ["sh"]},
        r"launch belongs to protocol acp",
    ),
    "acp without a launch command": ({"protocol": "acp"}, r"needs launch"),
    "acp with a session factory": (
        {"protocol": "acp", "launch": ["sh"], "session_factory": "json:loads"},
        r"session_factory belongs to protocol session-factory",
    ),
    "a missing binary": ({"protocol": "acp", "launch": ["no-such-binary-here"]}, r"'no-such-binary-here' is not on"),
    "an unknown placeholder": (
        {"protocol": "acp", "launch": ["sh"], "env": {"URL": "${base_ulr}"}},
        r"env\.URL: unknown placeholder \$\{base_ulr\}",
    ),
    "an unknown placeholder in the path of a file": (
        {"protocol": "acp", "launch": ["sh"], "files": {"${hom}/x": ""}},
        r"files: unknown placeholder \$\{hom\}",
    ),
    "an unknown key": ({"protocol": "acp", "launch": ["sh"], "lunch": 1}, r"lunch: unknown key \(did you mean launch"),
    "an unknown key of install": (
        {"protocol": "acp", "launch": ["sh"], "install": {"kind": "npm", "pakages": []}},
        r"install\.pakages: unknown key \(did you mean packages",
    ),
    "a missing key of install": (
        {"protocol": "acp", "launch": ["sh"], "install": {"kind": "npm"}},
        r"packages",
    ),
    "a value of a wrong type": ({"protocol": "acp", "launch": "sh --acp"}, r"launch: Expected array, got str"),
    "a bind of nothing": ({"protocol": "acp", "launch": ["sh"], "binds": ["/no/such"]}, r"binds: '/no/such' is no abs"),
    "a relative bind": ({"protocol": "acp", "launch": ["sh"], "binds": ["."]}, r"binds: '\.' is no absolute path"),
    "an api that nobody speaks": ({"protocol": "acp", "launch": ["sh"], "api": ["soap"]}, r"api"),
    "a protocol that there is not": ({"protocol": "http", "launch": ["sh"]}, r"protocol.*'acp' or 'session-factory'"),
    "no protocol": ({"launch": ["sh"]}, r"protocol is missing; give 'acp' or 'session-factory'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_at_registration_and_nothing_is_registered(mistake):
    """Each configuration mistake is a `ConfigError` of one line that names the agent; the registry stays as it was."""
    fields, expected = MISTAKES[mistake]
    registry = Registry()
    with pytest.raises(ConfigError, match=expected) as caught:
        registry.register("mine", **fields)
    assert "mine" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert registry.names() == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_manifest_with_the_same_mistake_names_its_file_or_its_agent(tmp_path, mistake):
    """A TOML manifest is checked like code: what is no field names the file and the key."""
    fields, expected = MISTAKES[mistake]
    path = tmp_path / "mine.toml"
    path.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in fields.items()))
    with pytest.raises(ConfigError, match=expected) as caught:
        Registry().register(load_manifest(path))
    assert "mine" in str(caught.value)


def _toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {_toml(inner)}' for key, inner in value.items()) + "}"
    return json.dumps(value)


def test_the_checks_of_registration_hold_again_when_an_agent_is_resolved(tmp_path, monkeypatch):
    """A factory that imported at registration and no longer does is a `ConfigError` at `get`: no falling back."""
    (tmp_path / "soon_gone_factory.py").write_text("def make(): ...")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry()
    registry.register("mine", protocol="session-factory", session_factory="soon_gone_factory:make")
    assert registry.get("mine").protocol == "session-factory"
    del sys.modules["soon_gone_factory"]
    shutil.rmtree(tmp_path)
    with pytest.raises(ConfigError, match="soon_gone_factory does not import"):
        registry.get("mine")


def test_a_factory_module_that_raises_on_import_is_reported_with_its_own_words(tmp_path, monkeypatch):
    """Whatever a factory's module raises becomes a `ConfigError` that quotes it."""
    (tmp_path / "raises_on_import.py").write_text("raise RuntimeError('no license file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="raises_on_import does not import: RuntimeError: no license file"):
        resolve_factory("raises_on_import:make")


def test_an_unknown_agent_is_answered_with_near_names():
    """A typo in an agent's name is answered with the names that are near it."""
    registry = Registry()
    registry.register("codex-acp", protocol="acp", launch=["sh"])
    with pytest.raises(ConfigError, match=r"unknown agent 'codex'.*did you mean codex-acp"):
        registry.get("codex")


def test_register_takes_an_agent_config_or_its_fields_and_checks_both_alike():
    """`register(AgentConfig(...))` and `register(name, **fields)` are the same act."""
    one, other = Registry(), Registry()
    one.register(AgentConfig("mine", "acp", launch=("sh", "-c", "true"), api=("openai-chat",)))
    other.register("mine", protocol="acp", launch=["sh", "-c", "true"], api=["openai-chat"])
    assert one.get("mine") == other.get("mine")
    with pytest.raises(ConfigError, match="fields beside an AgentConfig"):
        one.register(one.get("mine"), mode="x")
    with pytest.raises(ConfigError, match="protocol"):
        one.register(AgentConfig("mine", "soap"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        (AgentConfig("a b", "acp", launch=("sh",)), "a name is letters"),
        (AgentConfig("mine", "acp", launch=("sh",), api=("soap",)), "api 'soap' is not one of openai-chat"),
    ],
)
def test_a_config_that_was_built_in_code_is_checked_like_a_manifest(agent, expected):
    """What types would have caught is caught at run time too."""
    with pytest.raises(ConfigError, match=expected):
        Registry().register(agent)


def test_a_role_may_name_an_agent_or_bring_one_and_both_are_checked():
    """`resolve` looks a name up, and checks an `AgentConfig` that was never registered."""
    registry = Registry()
    mine = registry.register("mine", protocol="acp", launch=["sh"])
    assert registry.resolve("mine") is mine
    assert registry.resolve(mine) is mine
    with pytest.raises(ConfigError, match="needs session_factory"):
        registry.resolve(AgentConfig("brought", "session-factory"))


def test_an_agent_that_a_rollout_brings_along_is_checked_before_anything_exists(tmp_path):
    """A session-factory without an entrypoint is refused by `Rollout` too; nothing is made, and no ACP is tried."""
    agent = AgentConfig("brought", "session-factory", calls_model=False)
    with pytest.raises(ConfigError, match="agent 'brought': protocol session-factory needs session_factory"):
        Rollout(RolloutConfig(agent=agent, prompt="hello", sandbox="fake", out=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_copied_registry_changes_apart_from_its_original():
    """Two orchestrators of one process do not see each other's registrations."""
    one = Registry()
    one.register("mine", protocol="acp", launch=["sh"])
    other = one.copy()
    other.register("theirs", protocol="acp", launch=["sh"])
    assert (one.names(), other.names()) == (["mine"], ["mine", "theirs"])


def test_a_program_in_the_image_need_not_be_on_this_machine():
    """`in_image` says that the sandbox brings the program, so its absence here is no mistake."""
    check_agent(AgentConfig("mine", "acp", launch=("no-such-binary-here",), in_image=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read"),
        ("name = ", "is no TOML"),
        ("protocol = 'acp'\nlaunch = ['sh']\n[nev]\n", "nev: unknown"),
    ],
)
def test_a_manifest_that_cannot_be_read_names_its_file(tmp_path, text, expected):
    """A missing file, a syntax error and an unknown key each name the file."""
    path = tmp_path / "broken.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_manifest(path)
    assert str(path) in str(caught.value)


# --- templates -----------------------------------------------------------------------------------------------


def _agent(**fields):
    return AgentConfig("mine", "acp", launch=("${install}/run", "--model", "x.${model}"), **fields)


def _render(config, **fields):
    settings = {"cwd": "/app", "home": "/home/a", "model": "m1", "base_url": "http://127.0.0.1:9", "api_key": "key-1"}
    return config.render(PLACE, **(settings | fields))


def test_templates_are_filled_in_and_other_braces_and_dollars_are_left_alone():
    """JSON, shell variables and escaped placeholders survive; paths, files and options are filled in."""
    config = _agent(
        env={"URL": "${base_url}/v1", "SHELLISH": "$HOME {x} $${model}"},
        files={"${home}/c.json": '{"url": "${base_url}", "a": {"b": "$PATH"}}'},
        mode="full",
        config_options={"model": "${model}"},
    )
    launch = _render(config)
    assert launch.argv == ("/opt/agent/run", "--model", "x.m1")
    assert launch.env["URL"] == "http://127.0.0.1:9/v1"
    assert launch.env["SHELLISH"] == "$HOME {x} ${model}"
    assert json.loads(launch.files["/home/a/c.json"]) == {"url": "http://127.0.0.1:9", "a": {"b": "$PATH"}}
    assert (launch.mode, launch.config_options) == ("full", {"model": "m1"})


def test_values_are_escaped_in_files_that_quote_them():
    """A value with quotes and backslashes arrives as itself in JSON and TOML; plain files get it verbatim."""
    odd = 'a"b\\c'
    config = _agent(files={"/c.json": '{"m": "${model}"}', "/c.toml": 'm = "${model}"', "/c.txt": "${model}"})
    files = _render(config, model=odd).files
    assert json.loads(files["/c.json"]) == tomllib.loads(files["/c.toml"]) == {"m": odd}
    assert files["/c.txt"] == odd


def test_without_a_gateway_whatever_names_it_is_left_out():
    """With usage tracking off an agent gets no base URL and no key of ours, only what the role's own env gives."""
    config = _agent(
        env={"URL": "${base_url}", "KEY": "${api_key}", "QUIET": "1"}, files={"/c": "${base_url}", "/d": "x"}
    )
    launch = _render(config, base_url=None, api_key=None, env={"KEY": "mine"})
    assert launch.env == {
        "QUIET": "1",
        "KEY": "mine",
        "ROLLOUT_CWD": "/app",
        "ROLLOUT_MODEL": "m1",
        "BENCHFLOW_AGENT_CWD": "/app",
        "BENCHFLOW_PROVIDER_MODEL": "m1",
    }
    assert launch.files == {"/d": "x"}


@pytest.mark.parametrize(("api", "suffix"), [("openai-chat", "/v1"), ("anthropic-messages", "")])
def test_every_agent_finds_the_gateway_under_the_names_that_existing_agents_read(api, suffix):
    """`BENCHFLOW_*` stand beside our own names, the base URL in the form which clients of that API expect."""
    env = _render(_agent(api=(api,))).env
    assert env["BENCHFLOW_PROVIDER_BASE_URL"] == "http://127.0.0.1:9" + suffix
    assert env["ROLLOUT_BASE_URL"] == "http://127.0.0.1:9"
    assert env["BENCHFLOW_PROVIDER_API_KEY"] == env["ROLLOUT_API_KEY"] == "key-1"
    assert env["BENCHFLOW_PROVIDER_MODEL"] == env["ROLLOUT_MODEL"] == "m1"
    assert env["BENCHFLOW_AGENT_CWD"] == env["ROLLOUT_CWD"] == "/app"


def test_the_environment_of_the_role_wins():
    """What the user sets for a role replaces what the manifest says."""
    assert _render(_agent(env={"A": "1"}), env={"A": "2"}).env["A"] == "2"


def test_a_placeholder_without_a_value_says_which_and_where():
    """An agent that needs a model and gets none is a `ConfigError` naming agent, field and placeholder."""
    with pytest.raises(ConfigError, match=r"agent mine: launch: \$\{model\} is empty \(the model's name\)"):
        _render(_agent(), model="")


def test_metered_says_whether_model_calls_can_be_counted():
    """Metered is who calls a model and can be pointed at the gateway."""
    assert _agent(api=("openai-chat",)).metered
    assert not _agent().metered
    assert not _agent(api=("openai-chat",), calls_model=False).metered


# --- the default registry ------------------------------------------------------------------------------------


def test_every_shipped_manifest_is_valid_and_pins_what_it_installs():
    """Each manifest that ships loads, passes the checks, and names exact versions."""
    registry = default_registry()
    assert {"codex-acp", "claude-agent-acp", "opencode", "fast-agent", "deepagents"} <= set(registry.names())
    assert {"scripted-acp", "minimal-acp", "oracle", "noop"} <= set(registry.names())
    for name in registry.names():
        config = registry.get(name)
        assert config.description
        for package in config.install.packages if config.install else ():
            assert "==" in package or "@" in package[1:], f"{name}: {package} is not pinned"


def test_every_shipped_agent_renders_with_and_without_a_gateway():
    """No shipped template names what nobody provides, whether usage is tracked or not."""
    for name in default_registry().names():
        config = default_registry().get(name)
        assert "${" not in repr(_render(config))
        assert "127.0.0.1:9" not in repr(_render(config, base_url=None, api_key=None))


def _entry(value):
    return EntryPoint("theirs", value, "rollout.agents")


def test_an_entry_point_brings_an_agent_or_a_callable_that_makes_one(tmp_path, monkeypatch):
    """Agents of other distributions are `AgentConfig`s, or made by a callable."""
    (tmp_path / "entry_agents.py").write_text(
        "from orchestrator.registry import AgentConfig\n"
        "ONE = AgentConfig('theirs', 'acp', launch=('sh',))\ndef make(): return ONE\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for value in ("entry_agents:ONE", "entry_agents:make"):
        registry = Registry()
        registry._load_entry_point(_entry(value))
        assert registry.get("theirs").launch == ("sh",)


@pytest.mark.parametrize("value", ["no_such_package:agent", "json:__name__", "json:dumps"])
def test_a_broken_entry_point_hurts_only_who_asks_for_it(value):
    """A broken distribution is listed and raises its reason when it is resolved; other agents go on working."""
    registry = Registry()
    registry.register("mine", protocol="acp", launch=["sh"])
    registry._load_entry_point(_entry(value))
    assert registry.names() == ["mine", "theirs"]
    assert registry.get("mine")
    with pytest.raises(ConfigError, match=f"entry point '{value}'"):
        registry.get("theirs")


def test_the_default_registry_is_made_once_whoever_asks_for_it(tmp_path, monkeypatch):
    """By two threads at the same time, and by a package that registers more agents while it is being loaded."""
    (tmp_path / "more_agents.py").write_text(
        "import threading, orchestrator.registry as r\n"
        "ONE = r.register_agent('one', protocol='acp', launch=['sh'])\n"
        "FOUND = []\n"
        "ASKS = threading.Thread(target=lambda: FOUND.append(r.default_registry()))\n"
        "ASKS.start()\n"
        "r.register_agent('two', protocol='acp', launch=['sh'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("orchestrator.registry._default", None)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [EntryPoint("one", "more_agents:ONE", group)])
    registry = default_registry()
    assert {"one", "two", "oracle"} <= set(registry.names())
    import more_agents

    more_agents.ASKS.join(30)
    assert [registry] == more_agents.FOUND


def test_importing_the_registry_loads_nothing_heavy_and_reads_no_manifest():
    """The import touches no manifest and no entry point; the default registry is made when it is first asked for."""
    code = (
        "import sys, orchestrator.registry as r\n"
        "assert r._default is None\n"
        "heavy = {'tomllib', 'importlib.metadata', 'aiohttp', 'rich', 'difflib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "names = r.default_registry().names()\n"
        "assert r.default_registry() is r.default_registry()\n"
        "heavy = {'aiohttp', 'rich', 'litellm', 'pydantic_ai', 'minisweagent', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_install_is_a_value():
    """Two installs of the same packages are the same install, so they share a cache folder."""
    assert Install("npm", ("a@1",)) == Install("npm", ("a@1",))
