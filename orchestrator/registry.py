"""Agents as data: what one is, where its manifests come from, and how one becomes something that can be started.

An `AgentConfig` says how an agent is installed, launched and pointed at a model; it holds no code. The values in it are
templates (`${base_url}`), which `AgentConfig.render` fills in for one role of one rollout. Manifests ship in
`orchestrator/agents/*.toml`; agents that live elsewhere come from the entry-point group `rollout.agents` or from
`register_agent`. A mistake is found when an agent is registered and again when it is resolved, by the same checks, as
one line of `ConfigError`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import attrs

from states.errors import ConfigError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Protocol = Literal["acp", "session-factory"]
Api = Literal["openai-chat", "openai-responses", "anthropic-messages"]

ENTRY_POINTS = "rollout.agents"
"""The entry-point group of agents that live elsewhere: each is an `AgentConfig`, or a callable that returns one."""

PLACEHOLDERS = {
    "base_url": "the model gateway as seen by the agent, without /v1",
    "api_key": "this rollout's key for the gateway",
    "model": "the model's name",
    "cwd": "the folder of the task",
    "home": "the agent's HOME",
    "install": "the folder where its packages are installed",
    "python": "its Python interpreter",
    "node": "its Node binary",
    "agents": "the folder of the agents that ship with us",
    "adapters": "the folder of the adapter programs that ship with us",
    "arch": "x64 or arm64, as npm names it",
}
"""What a template may name."""

_GATEWAY = frozenset({"base_url", "api_key"})
_PLACEHOLDER = re.compile(r"(\$?)\$\{([^}]*)\}")
_QUOTED = (".json", ".toml", ".yaml", ".yml")


# --- values --------------------------------------------------------------------------------------------------


@attrs.frozen
class Install:
    """Packages that an agent needs, installed on first use into a cache outside the tree.

    Example: `Install(kind="python", packages=("fast-agent-acp==0.10.46",), python="3.12")`.
    """

    kind: Literal["npm", "python"]
    packages: tuple[str, ...]
    """Requirements with pinned versions, in the words of npm or of pip."""
    node: str = ""
    """Version of the Node that runs it, brought from npm into the same folder; empty: it needs none."""
    python: str = ""
    """The oldest Python that will do, such as `3.12`; empty: the one that runs us."""
    overrides: tuple[str, ...] = ()
    """Requirements that replace what the packages themselves ask for (kind `python`)."""
    as_of: str = ""
    """A day such as `2026-11-21`: everything is resolved as it was then, so that dependencies do not drift either."""


@attrs.frozen
class Place:
    """Where the programs of an agent lie, in paths that hold inside the sandbox; `orchestrator.install` makes it."""

    install: str = ""
    python: str = ""
    node: str = ""
    agents: str = ""
    adapters: str = ""
    arch: str = ""
    binds: tuple[str, ...] = ()
    """Host folders to be bound read-only at their own paths."""


@attrs.frozen
class Launch:
    """An agent, ready to be started for one role: no placeholder is left in it."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    files: Mapping[str, str]
    """Absolute path in the sandbox to content; written before the agent starts."""
    mode: str
    """ACP session mode to set after session/new; empty: none."""
    config_options: Mapping[str, str]
    """ACP configuration options to set after session/new, by id."""
    binds: tuple[str, ...]
    """Host folders to be bound read-only at their own paths."""


@attrs.frozen
class AgentConfig:
    """One agent, as data. Text values are templates; `PLACEHOLDERS` says what they may name.

    Example:
        >>> config = AgentConfig("mine", "acp", launch=("mine", "--acp"), api=("openai-chat",), env={
        ...     "OPENAI_BASE_URL": "${base_url}/v1", "OPENAI_API_KEY": "${api_key}"})
    """

    name: str
    protocol: Protocol
    description: str = ""
    launch: tuple[str, ...] = ()
    """`acp`: the command that speaks ACP on its stdin and stdout."""
    session_factory: str = ""
    """`session-factory`: `module:callable`, which builds an object with `connect` and `capabilities`."""
    install: Install | None = None
    api: tuple[Api, ...] = ()
    """Wire formats in which it calls a model; empty when it cannot be pointed at a gateway."""
    calls_model: bool = True
    calls_from: Literal["sandbox", "host"] = "sandbox"
    """Where its model calls come from; `host`: from our own process, as with an agent library."""
    env: Mapping[str, str] = attrs.field(factory=dict)
    files: Mapping[str, str] = attrs.field(factory=dict)
    """Path in the sandbox to content. In JSON, TOML and YAML files the values are escaped as in a quoted string."""
    mode: str = ""
    config_options: Mapping[str, str] = attrs.field(factory=dict)
    binds: tuple[str, ...] = ()
    """Folders of this machine that its sandbox sees, read-only, at their own paths; `~` is the user's home."""
    fs: bool = False
    """Advertise the client's file methods to it."""
    terminal: bool = False
    """Advertise the client's terminal methods to it."""
    requires: tuple[str, ...] = ()
    """Modules that have to be importable here, for an agent in our own process; the extra is named like the agent."""
    exit_sec: float = 2.0
    """`acp`: seconds that it gets to exit by itself once its stdin is closed; little for one that ignores that."""
    in_image: bool = False
    """Its program is part of the sandbox's image, so this machine need not have it."""

    @property
    def metered(self) -> bool:
        """Whether it can be pointed at the gateway, so that its model calls are counted."""
        return self.calls_model and bool(self.api)

    def render(
        self,
        place: Place,
        *,
        cwd: str,
        home: str,
        model: str = "",
        base_url: str | None = None,
        api_key: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Launch:
        """Fill in the templates for one role.

        Args:
            place: where its programs lie.
            cwd: the task's folder, inside the sandbox.
            home: the agent's HOME, inside the sandbox.
            model: the model's name.
            base_url: the gateway as the agent sees it, without /v1. None when there is none: then every variable and
                file that names the gateway or its key is left out.
            api_key: the rollout's key for the gateway.
            env: the role's own variables; they win.

        Raises:
            ConfigError: a template names something that is not known here.
        """
        values = attrs.asdict(place, filter=lambda field, _: field.name != "binds")
        values |= {"cwd": cwd, "home": home, "model": model, "base_url": base_url, "api_key": api_key}
        where = f"agent {self.name}"
        usable = {name: text for name, text in self.env.items() if base_url or not _names(text) & _GATEWAY}
        files = {path: text for path, text in self.files.items() if base_url or not _names(text) & _GATEWAY}
        return Launch(
            argv=tuple(_fill(part, values, f"{where}: launch") for part in self.launch),
            env=_common_env(self, cwd=cwd, model=model, base_url=base_url, api_key=api_key)
            | {name: _fill(text, values, f"{where}: env.{name}") for name, text in usable.items()}
            | dict(env or {}),
            files={
                (target := _fill(path, values, f"{where}: files")): _fill(
                    text, values, f"{where}: files.{path}", quoted=target.endswith(_QUOTED)
                )
                for path, text in files.items()
            },
            mode=_fill(self.mode, values, f"{where}: mode"),
            config_options={
                option: _fill(text, values, f"{where}: config_options.{option}")
                for option, text in self.config_options.items()
            },
            binds=place.binds,
        )


def _common_env(
    config: AgentConfig, *, cwd: str, model: str, base_url: str | None, api_key: str | None
) -> dict[str, str]:
    """What every agent finds in its environment: our own names, and those that existing agents read."""
    env = {"ROLLOUT_CWD": cwd, "ROLLOUT_MODEL": model, "BENCHFLOW_AGENT_CWD": cwd, "BENCHFLOW_PROVIDER_MODEL": model}
    if base_url and api_key:
        # By custom an Anthropic client appends /v1/messages to its base URL, an OpenAI client only /chat/completions.
        provider_url = base_url if config.api[:1] == ("anthropic-messages",) else f"{base_url}/v1"
        env |= {"ROLLOUT_BASE_URL": base_url, "ROLLOUT_API_KEY": api_key}
        env |= {"BENCHFLOW_PROVIDER_BASE_URL": provider_url, "BENCHFLOW_PROVIDER_API_KEY": api_key}
    return {name: value for name, value in env.items() if value}


def names_placeholder(config: AgentConfig, name: str) -> bool:
    """Whether any template of `config` names that placeholder."""
    return any(name in _names(text) for _, text in _templates(config))


def _names(text: str) -> set[str]:
    return {match[2] for match in _PLACEHOLDER.finditer(text) if not match[1]}


def _fill(text: str, values: Mapping[str, str | None], where: str, *, quoted: bool = False) -> str:
    """Replace each `${name}` (`$${name}` stands for itself); braces and dollars of other kinds are left alone."""

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return match[0][1:]
        found = values.get(match[2])
        if not found:
            what = PLACEHOLDERS.get(match[2])
            why = f"is empty ({what})" if what else f"is unknown; known are {', '.join(PLACEHOLDERS)}"
            raise ConfigError(f"{where}: ${{{match[2]}}} {why}")
        if quoted:
            import json

            return json.dumps(found, ensure_ascii=False)[1:-1]
        return found

    return _PLACEHOLDER.sub(value, text)


# --- checks: the same when an agent is registered and when it is resolved ------------------------------------------


def check_agent(config: AgentConfig) -> AgentConfig:
    """Return `config` when it can work.

    Raises:
        ConfigError: one line that says which agent, what is wrong and what is expected.
    """
    where = f"agent {config.name!r}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise ConfigError(f"{where}: a name is letters, digits, '.', '_' and '-'")
    if config.protocol not in get_args(Protocol):
        raise ConfigError(f"{where}: protocol {config.protocol!r} is not one of {', '.join(get_args(Protocol))}")
    if foreign := sorted(set(config.api) - set(get_args(Api))):
        raise ConfigError(f"{where}: api {foreign[0]!r} is not one of {', '.join(get_args(Api))}")
    for key, text in _templates(config):
        if unknown := _names(text) - set(PLACEHOLDERS):
            known = ", ".join(PLACEHOLDERS)
            raise ConfigError(f"{where}: {key}: unknown placeholder ${{{min(unknown)}}}; known are {known}")
    for bind in config.binds:
        if not Path(bind).expanduser().is_absolute() or not Path(bind).expanduser().exists():
            raise ConfigError(f"{where}: binds: {bind!r} is no absolute path of something that exists")
    if config.protocol == "session-factory":
        _check_factory(config, where)
    else:
        _check_launch(config, where)
    return config


def _templates(config: AgentConfig) -> Iterator[tuple[str, str]]:
    yield from (("launch", part) for part in config.launch)
    yield from ((f"env.{name}", text) for name, text in config.env.items())
    for path, text in config.files.items():
        yield "files", path
        yield f"files.{path}", text
    yield "mode", config.mode
    yield from ((f"config_options.{name}", text) for name, text in config.config_options.items())


def _check_factory(config: AgentConfig, where: str) -> None:
    if not config.session_factory:
        raise ConfigError(f"{where}: protocol session-factory needs session_factory = 'module:callable'")
    if config.files:
        raise ConfigError(f"{where}: files belongs to protocol acp; a session-factory writes its own when it connects")
    if config.launch:
        raise ConfigError(f"{where}: launch belongs to protocol acp; a session-factory is not launched")
    try:
        resolve_factory(config.session_factory)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_launch(config: AgentConfig, where: str) -> None:
    if config.session_factory:
        raise ConfigError(f"{where}: session_factory belongs to protocol session-factory, this is acp")
    if not config.launch:
        raise ConfigError(f"{where}: protocol acp needs launch, the command that speaks ACP on stdin and stdout")
    program = config.launch[0]
    if config.in_image or _names(program):
        return
    from shutil import which

    if which(program) is None:
        raise ConfigError(
            f"{where}: its program {program!r} is not on this machine; install it, or say in_image = true "
            "when the sandbox brings it"
        )


def resolve_factory(entrypoint: str) -> Callable[..., Any]:
    """The callable that `module:callable` names.

    Raises:
        ConfigError: it is not of that form, its module does not import, or what it names is missing or not callable.
    """
    module_name, colon, attribute = entrypoint.partition(":")
    if not (colon and module_name and attribute):
        raise ConfigError(f"session factory {entrypoint!r} is not of the form 'module:callable'")
    import importlib

    try:
        found: Any = importlib.import_module(module_name)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"session factory {entrypoint!r}: {module_name} does not import: {type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"session factory {entrypoint!r}: {module_name} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"session factory {entrypoint!r} is a {type(found).__name__}, which cannot be called")
    factory: Callable[..., Any] = found
    return factory


# --- manifests -----------------------------------------------------------------------------------------------


def load_manifest(path: str | Path) -> AgentConfig:
    """Read one agent from a TOML file whose keys are the fields of `AgentConfig` (`name` defaults to the file's).

    Raises:
        ConfigError: the file cannot be read, is no TOML, or has a key or a value that does not belong there.
    """
    import tomllib

    path = Path(path)
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is no TOML: {error}") from error
    return _from_mapping({"name": path.stem} | data, str(path))


def _from_mapping(data: Mapping[str, Any], where: str) -> AgentConfig:
    import msgspec

    _refuse_unknown(data, AgentConfig, where)
    if isinstance(data.get("install"), Mapping):
        _refuse_unknown(data["install"], Install, where, "install.")
    try:
        return msgspec.convert(dict(data), AgentConfig)
    except msgspec.ValidationError as error:
        text, _, key = str(error).partition(" - at `$.")
        raise ConfigError(f"{where}: {_explained(text.replace('`', ''), key.rstrip('`'))}") from error


def _explained(problem: str, key: str) -> str:
    """What msgspec says of a manifest's key, in the words of who writes one: with those that it may be."""
    if missing := re.fullmatch(r"Object missing required field (\w+)", problem):
        key = f"{key}.{missing[1]}" if key else missing[1]
        return f"{key} is missing{f'; give {_or(_WORDS[key])}' if key in _WORDS else ''}"
    if problem.startswith("Invalid enum value") and key in _WORDS:
        return f"{key}: expected {_or(_WORDS[key])}, found {problem.removeprefix('Invalid enum value ')}"
    return f"{key + ': ' if key else ''}{problem}"


_WORDS = {"protocol": get_args(Protocol), "api[...]": get_args(Api), "install.kind": ("npm", "python")}
"""The words that a key may have, for a message."""


def _or(words: tuple[str, ...]) -> str:
    return ", ".join(map(repr, words[:-1])) + f" or {words[-1]!r}"


def _refuse_unknown(data: Mapping[str, Any], kind: type[attrs.AttrsInstance], where: str, prefix: str = "") -> None:
    known = [field.name for field in attrs.fields(kind)]
    for key in data:
        if key not in known:
            raise ConfigError(f"{where}: {prefix}{key}: unknown key{_near(key, known)}; known are {', '.join(known)}")


def _near(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


# --- the registry --------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Registry:
    """Agents by name. A rollout's config carries one; `copy` keeps two orchestrators in one process apart.

    Example:
        >>> mine: Registry = default_registry().copy()
        >>> mine.register("oracle", protocol="acp", launch=["sh"]).protocol, default_registry().get("oracle").protocol
        ('acp', 'session-factory')
    """

    _agents: dict[str, AgentConfig] = attrs.field(factory=dict)
    _broken: dict[str, ConfigError] = attrs.field(factory=dict)

    def register(self, agent: AgentConfig | str, **fields: Any) -> AgentConfig:
        """Add or replace an agent: `register(AgentConfig(...))`, or `register(name, protocol=..., ...)`.

        Raises:
            ConfigError: it cannot work; the registry has not changed.
        """
        if isinstance(agent, str):
            agent = _from_mapping({"name": agent} | fields, f"agent {agent!r}")
        elif fields:
            raise ConfigError(f"agent {agent.name!r}: fields beside an AgentConfig: {', '.join(fields)}")
        self._agents[check_agent(agent).name] = agent
        self._broken.pop(agent.name, None)
        return agent

    def get(self, name: str) -> AgentConfig:
        """The agent of that name, checked once more.

        Raises:
            ConfigError: there is none (near names are given), or it can no longer work.
        """
        if name in self._broken:
            raise self._broken[name]
        if name not in self._agents:
            raise ConfigError(
                f"unknown agent {name!r}{_near(name, self.names())}; known are {', '.join(self.names()) or 'none'}"
            )
        return check_agent(self._agents[name])

    def resolve(self, agent: AgentConfig | str) -> AgentConfig:
        """What a role names: an agent of this registry, or one that was brought along. Checked, like `get`."""
        return self.get(agent) if isinstance(agent, str) else check_agent(agent)

    def names(self) -> list[str]:
        """The names of all agents, sorted; also of those that are broken."""
        return sorted({*self._agents, *self._broken})

    def copy(self) -> Registry:
        """A registry of the same agents which changes apart from this one."""
        return Registry(dict(self._agents), dict(self._broken))

    def _load_entry_point(self, entry: EntryPoint) -> None:
        """Take an agent of another distribution. A broken one is an error only for who asks for it."""
        try:
            found = entry.load()
            config = found() if callable(found) else found
            if not isinstance(config, AgentConfig):
                raise ConfigError(f"it gives {type(config).__name__}, not an AgentConfig")  # noqa: TRY301
            self.register(config)
        except Exception as error:
            self._broken[entry.name] = ConfigError(f"agent {entry.name!r}, entry point {entry.value!r}: {error}")


_default: Registry | None = None
_making = threading.RLock()


def default_registry() -> Registry:
    """The process's registry: what ships here and what entry points bring, read when it is first asked for."""
    global _default  # noqa: PLW0603 - the only module-level state of the project (design rule 12)
    with _making:  # of two threads that ask first, one would else register its agents where nobody looks
        if _default is None:
            _default = _shipped()
            _bring(_default)
        return _default


def _shipped() -> Registry:
    registry = Registry()
    for manifest in sorted((Path(__file__).parent / "agents").glob("*.toml")):
        registry.register(load_manifest(manifest))
    return registry


def _bring(registry: Registry) -> None:
    """Agents of other packages. The registry is the default by now: one that registers more of them by itself may."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS):
        registry._load_entry_point(entry)  # noqa: SLF001 - our own class


def register_agent(agent: AgentConfig | str, **fields: Any) -> AgentConfig:
    """Add an agent to the default registry; see `Registry.register`.

    Example:
        >>> register_agent("sh-agent", protocol="acp", launch=["sh", "-c", "exec my-agent --acp"]).name
        'sh-agent'

    Raises:
        ConfigError: it cannot work; the registry has not changed.
    """
    return default_registry().register(agent, **fields)
