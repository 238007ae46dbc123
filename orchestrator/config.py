"""What a rollout is asked to do, as frozen values: roles, turns, the task, limits, and which parts are brought along.

Everything that can be wrong is found here, before a sandbox exists, as one clear `ConfigError`.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import anyio
import attrs

from orchestrator._words import shown
from orchestrator.budgets import Budgets, Limits
from orchestrator.questions import ANSWER_SEC, Policy
from orchestrator.registry import AgentConfig, Registry, default_registry
from orchestrator.sandboxes import Network
from states.deadlines import DEADLINES
from states.errors import ConfigError
from states.journal import Transition
from states.ports import AskHandler, AskUserRequest, ExecSandbox, Plan, Sandbox, Verifier

if TYPE_CHECKING:
    from orchestrator.journal import Sink

UsageTracking = Literal["auto", "required", "off"]
Keep = Literal["never", "on-failure", "always"]
Hook = Callable[[Transition], Any]


def _seconds(instance: Any, attribute: Any, value: Any) -> None:
    if value is not None and not (isinstance(value, int | float) and value > 0):
        raise ConfigError(f"{type(instance).__name__}: {attribute.name} must be seconds > 0 or None, not {value!r}")


def _at_least(least: int) -> Callable[[Any, Any, Any], None]:
    def check(instance: Any, attribute: Any, value: Any) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            kind = f"a whole number, {least} or more"
            raise ConfigError(f"{type(instance).__name__}: {attribute.name} must be {kind}, not {value!r}")

    return check


def _one_of(*words: str) -> Callable[[Any, Any, Any], None]:
    def check(instance: Any, attribute: Any, value: Any) -> None:
        if value not in words:
            known = ", ".join(words)
            raise ConfigError(f"{type(instance).__name__}: {attribute.name} {value!r} is not one of {known}")

    return check


def _port(_instance: Any, _attribute: Any, value: Any) -> None:
    if not (isinstance(value, int) and 0 <= value < 65_536):
        raise ConfigError(f"gateway_port must be a port, or 0 for any free one, not {value!r}")


def _reach(_instance: Any, _attribute: Any, value: str) -> None:
    if value not in ("auto", "relay", "none") and not re.fullmatch(r"https?://[^/\s?#]+(/[^\s?#]*)?", str(value)):
        raise ConfigError(f"gateway_reach is auto, relay, none, or the URL of the gateway (http://...), not {value!r}")


def _a(what: str, *kinds: type) -> Callable[[Any, Any, Any], None]:
    """Demands one of these kinds, which are `what` in words."""

    def check(instance: Any, attribute: Any, value: Any) -> None:
        if not isinstance(value, kinds):
            raise ConfigError(f"{type(instance).__name__}: {attribute.name} must be {what}, not {shown(value)}")

    return check


def _several(what: str, fits: Callable[[Any], bool]) -> Callable[[Any, Any, Any], None]:
    """Demands a tuple (or list) whose members all fit; `what` says how one is written."""

    def check(instance: Any, attribute: Any, value: Any) -> None:
        name = f"{type(instance).__name__}: {attribute.name}"
        if not isinstance(value, tuple | list):
            raise ConfigError(f"{name} must be a tuple, such as ({what},), not {shown(value)}")
        if wrong := [each for each in value if not fits(each)]:
            raise ConfigError(f"{name} holds {shown(wrong[0])}; each must be like {what}")

    return check


def _with(*methods: str) -> Callable[[Any, Any, Any], None]:
    """Demands an object that has these methods, where one is brought."""

    def check(instance: Any, attribute: Any, value: Any) -> None:
        if value is None or (isinstance(value, str) and value == attribute.default):
            return
        name, wanted = f"{type(instance).__name__}: {attribute.name}", " and ".join(f"{name}()" for name in methods)
        if isinstance(value, type):
            raise ConfigError(f"{name} must be an object with {wanted}, not the class {value.__name__} itself")
        if lacks := [method for method in methods if not callable(getattr(value, method, None))]:
            raise ConfigError(f"{name} must be an object with {wanted}; {shown(value)} lacks {', '.join(lacks)}")

    return check


def _callable(instance: Any, attribute: Any, value: Any) -> None:
    if value is not None and not callable(value):
        raise ConfigError(f"{type(instance).__name__}: {attribute.name} must be a function, not {shown(value)}")


def _director(_instance: Any, _attribute: Any, value: Any) -> None:
    fits = value is None or isinstance(value, str | DirectorRole) or (callable(value) and not isinstance(value, type))
    if not fits:
        kinds = "a function of the story, a DirectorRole, or the name of a role of the scene"
        raise ConfigError(f"RolloutConfig: director must be {kinds}, not {shown(value)}")


def _budgets(given: Any) -> Budgets:
    """Budgets as they are, or from a mapping such as `{"tokens": 1000}`."""
    if isinstance(given, Mapping):
        return Budgets.of(given)
    if not isinstance(given, Budgets):
        raise ConfigError(f"budgets must be Budgets(...) or a mapping such as {{'tokens': 1000}}, not {shown(given)}")
    return given


def _safe(_instance: Any, _attribute: Any, value: Any) -> None:
    if not (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value)):
        raise ConfigError(f"a role's name is letters, digits, '_', '.' and '-', not {value!r}: folders are named by it")


_AGENT = _a("the name of an agent, or an AgentConfig", str, AgentConfig)
_MAPPING = _a("a mapping of names to values", Mapping)
_TEXT = _a("text", str, type(None))


def _count(env: Any) -> str:
    return f"<{len(env)} variables>"


@attrs.frozen
class Role:
    """Who can be given a turn: an agent under a name of this scene, with its own model, environment and limits.

    `turn_sec` bounds one turn by wall clock, `idle_sec` its longest silence; None takes the rollout's. `budgets` are
    for all turns of the role together. `env` wins over the rollout's `env`.

    >>> Role("coder", "codex-acp", "openai/gpt-5", turn_sec=600, budgets=Budgets(cost=1.5)).turn_sec
    600
    """

    name: str = attrs.field(validator=_safe)
    agent: str | AgentConfig = attrs.field(validator=_AGENT)
    model: str = ""
    env: Mapping[str, str] = attrs.field(factory=dict, validator=_MAPPING, repr=_count)
    turn_sec: float | None = attrs.field(default=None, validator=_seconds)
    idle_sec: float | None = attrs.field(default=None, validator=_seconds)
    budgets: Budgets = attrs.field(default=Budgets(), converter=_budgets)


def _one_turn(_instance: Any, _attribute: Any, budgets: Budgets) -> None:
    if budgets.turns is not None:
        raise ConfigError("a turn has no budget of turns: it is one; give that to its role, the scene or the rollout")


@attrs.frozen
class Turn:
    """One prompt to one role. Without a prompt the role gets the task's instruction; `budgets` are this turn's own.

    >>> Scene((Role("coder", "oracle"),), (Turn("coder"), Turn("coder", "Look again."))).turns[1].prompt
    'Look again.'
    """

    role: str
    prompt: str | None = attrs.field(default=None, validator=_TEXT)
    budgets: Budgets = attrs.field(default=Budgets(), converter=_budgets, validator=_one_turn)


@attrs.frozen
class Scene:
    """Roles, and the order in which they take turns in one sandbox. Without turns it takes a director to lead it.

    `budgets` are for all roles together.

    >>> Scene.single("oracle").turns
    (Turn(role='agent', prompt=None, budgets=Budgets()),)
    """

    roles: tuple[Role, ...] = attrs.field(
        validator=_several('Role("coder", "codex-acp")', lambda r: isinstance(r, Role))
    )
    turns: tuple[Turn, ...] = attrs.field(
        default=(), validator=_several('Turn("coder")', lambda turn: isinstance(turn, Turn))
    )
    budgets: Budgets = attrs.field(default=Budgets(), converter=_budgets)

    def __attrs_post_init__(self) -> None:
        names = [role.name for role in self.roles]
        if not names:
            raise ConfigError("a scene needs at least one role")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"two roles of the scene are called {twice[0]!r}")
        for turn in self.turns:
            if turn.role not in names:
                raise ConfigError(f"a turn names the role {turn.role!r}; the scene has {', '.join(names)}")

    @classmethod
    def single(cls, agent: str | AgentConfig, *, prompt: str | None = None, name: str = "agent", **role: Any) -> Scene:
        """One role that takes one turn; further keywords are those of `Role`."""
        return cls((Role(name, agent, **role),), (Turn(name, prompt),))


@attrs.frozen
class DirectorRole:
    """A director that is an agent: a role which takes no turns itself, and says between them what comes next.

    Its agent is a session factory that lives in our own process, outside the sandbox. The scene's own turns are taken
    first, each with what the director adds to it; after them it leads. See `orchestrator.directing`.

    Args:
        role: Its name, agent, model and environment; no other role of the scene has this name.
        brief: Who it is, what it wants, and what it alone knows. Told to it once, before anything else.
        limit: It leads until so many turns were taken in all; None leaves that to `max_turns`.
        checks: How many soft verifications it may ask for.

    >>> user = DirectorRole(Role("user", "model-user", "openai/gpt-5-mini"), "You are impatient.", limit=6)
    >>> RolloutConfig(prompt="Find the order.", agent="oracle", director=user).the_director().limit
    6
    """

    role: Role = attrs.field(validator=_a("a Role", Role))
    brief: str = attrs.field(default="", repr=lambda brief: f"<{len(brief)} characters>")
    limit: int | None = attrs.field(default=None, validator=attrs.validators.optional(_at_least(1)))
    checks: int = attrs.field(default=0, validator=_at_least(0))


def _no_second_timeout(config: Any, _attribute: Any, budgets: Budgets) -> None:
    if config.timeout is not None and budgets.wall_sec is not None:
        raise ConfigError("timeout is budgets.wall_sec in short: give one of the two")


@attrs.frozen(kw_only=True)
class RolloutConfig:
    """One rollout: a task, a scene, and the parts that it runs on. Every part can be brought or left out.

    Args:
        task: a task folder, a loaded `Task`, or None when `prompt` says all there is (then nothing is verified,
            unless a `verifier` is brought).
        scene: who takes turns. Give `agent` and `model` instead for the usual single turn.
        sandbox: a kind of `orchestrator.sandboxes`, `module:Class`, or an object that satisfies `Sandbox`, or the
            smaller `ExecSandbox`: start, exec, upload and download are enough.
        sandbox_options: words of that kind of sandbox, as `OPTIONS` of its module lists them.
        image, image_map: a prebuilt image, over the task's own; and images that stand for ones which cannot be had.
            For sandboxes that run images.
        network: what the sandbox can reach.
        out: the folder under which the rollout's own folder is made; None keeps journal and trajectory in memory.
        upstream: where models are called: an `Upstream` for all roles, or a callable that finds one by a role's model;
            None finds it in the environment.
        usage_tracking: `auto` meters where that is possible, `required` refuses what cannot be metered, `off` meters
            nothing and uses no gateway: with an `upstream` of your own, agents call that directly, with its key.
        gateway: a gateway that is shared with other rollouts; None starts one where it is needed.
        gateway_port: where that one listens on this host's loopback; 0 is any free port.
        gateway_reach: how a sandbox finds the gateway: `auto` (by itself where it can, else by a relay), `relay` (a
            small program on the sandbox's own Python 3 carries the calls over the sandbox's channel), a URL that you
            expose and that ends at the gateway (give `gateway_port` then, or bring the gateway), or `none`.
        timeout: `budgets.wall_sec` in short: seconds for the whole rollout up to verification; scoring and teardown
            always get their own.
        turn_sec, idle_sec: limits of a turn for roles that set none; `turn_sec` defaults to the task's, or 900 s.
        budgets: what the rollout may spend, whoever spends it: `Budgets`, or a mapping such as `{"tokens": 1000}`.
        deadlines: seconds by state, over those of `states.deadlines`.
        verifier: who gives the reward: `task` (the task's own), a `Verifier`, or None: the host verifies.
        policy: what answers an agent's question when no handler is bound.
        terminal: who asks a person under the policy `ask` (`orchestrator.questions.ask_on_terminal`); without one the
            default answers, and the answer says so.
        answer_sec: how long a handler or a person may take to answer; then the question is declined, with that as the
            reason. None: as long as the turn.
        env: variables of every role's agent, passed as given and redacted by value.
        hooks: functions that are called with each transition; an error of one is a note in the journal.
        director: who decides the next turn by what happened so far. A callable (`orchestrator.directors`): the scene
            then only says which roles there are. Or an agent (`orchestrator.directing`): a `DirectorRole`, such as
            `model_user` makes, or the name of a role of the scene that takes no turns.
        max_turns, max_checks: bounds on what a director may ask for; `budgets.turns` goes before the first.
        plan: the same at the level of `states.ports.Plan`. Without either, the scene's turns are taken in order.
        journal: where journal lines go instead of `journal.jsonl`: an object with `write(line: bytes)` and `close()`.
        registry: the agents that can be named.
        max_connects, max_verifies: how often an agent is connected without a turn taken, and a verifier run.
        made_from: what this config was made from, in JSON's values, for whoever makes it again when the rollout is
            resumed (`orchestrator.recovery.resume`); kept in `config.json` and the journal's first line.
        clock, monotonic, new_id: seconds since the epoch, seconds for limits, and ids; a host may bring its own.

    Raises:
        ConfigError: what is asked for cannot work.

    Example:
        >>> config = RolloutConfig(prompt="Do it.", agent="scripted", turn_sec=60, out=None)
        >>> config.the_scene().turns
        (Turn(role='agent', prompt=None, budgets=Budgets()),)
        >>> RolloutConfig(prompt="Do it.", agent="scripted", turn_sec=-1)
        Traceback (most recent call last):
        states.errors.ConfigError: RolloutConfig: turn_sec must be seconds > 0 or None, not -1
    """

    task: Any = None
    prompt: str | None = attrs.field(default=None, validator=_TEXT)
    scene: Scene | None = attrs.field(default=None, validator=_a("a Scene", Scene, type(None)))
    agent: str | AgentConfig | None = attrs.field(default=None, validator=attrs.validators.optional(_AGENT))
    model: str = ""
    env: Mapping[str, str] = attrs.field(factory=dict, validator=_MAPPING, repr=_count)
    sandbox: str | Sandbox | ExecSandbox | Callable[..., Sandbox] = "local"
    sandbox_options: Mapping[str, str] = attrs.field(factory=dict, validator=_MAPPING)
    image: str | None = None
    image_map: Mapping[str, str] = attrs.field(factory=dict, validator=_MAPPING)
    network: Network = attrs.field(default="gateway-only", validator=_one_of(*get_args(Network)))
    keep_sandbox: Keep = attrs.field(default="never", validator=_one_of("never", "on-failure", "always"))
    out: Path | None = attrs.field(default=Path("runs"), converter=attrs.converters.optional(Path))
    upstream: Any = None
    usage_tracking: UsageTracking = attrs.field(default="auto", validator=_one_of("auto", "required", "off"))
    gateway: Any = None
    gateway_port: int = attrs.field(default=0, validator=_port)
    gateway_reach: str = attrs.field(default="auto", validator=_reach)
    timeout: float | None = attrs.field(default=None, validator=_seconds)
    turn_sec: float | None = attrs.field(default=None, validator=_seconds)
    idle_sec: float | None = attrs.field(default=None, validator=_seconds)
    deadlines: Mapping[str, float] = attrs.field(factory=dict, validator=_MAPPING)
    budgets: Budgets = attrs.field(default=Budgets(), converter=_budgets, validator=_no_second_timeout)
    verifier: Verifier | Literal["task"] | None = attrs.field(default="task", validator=_with("verify"))
    policy: Policy = attrs.field(default="allow", validator=_one_of("allow", "deny", "ask"))
    on_ask_user: AskHandler | None = attrs.field(default=None, validator=_callable)
    terminal: Callable[[AskUserRequest], str] | None = attrs.field(default=None, validator=_callable)
    answer_sec: float | None = attrs.field(default=ANSWER_SEC, validator=_seconds)
    hooks: tuple[Hook, ...] = attrs.field(default=(), validator=_several("on_transition", callable))
    plan: Plan | None = attrs.field(default=None, validator=_with("next"))
    director: Callable[..., Any] | DirectorRole | str | None = attrs.field(default=None, validator=_director)
    max_turns: int = attrs.field(default=200, validator=_at_least(1))
    max_checks: int = attrs.field(default=50, validator=_at_least(0))
    journal: Sink | None = attrs.field(default=None, validator=_with("write", "close"))
    registry: Registry = attrs.field(factory=default_registry, validator=_a("a Registry", Registry), repr=False)
    max_connects: int = attrs.field(default=2, validator=_at_least(1))
    max_verifies: int = attrs.field(default=2, validator=_at_least(1))
    made_from: Mapping[str, Any] = attrs.field(factory=dict, validator=_MAPPING, repr=False)
    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = anyio.current_time
    new_id: Callable[[], str] = lambda: uuid.uuid4().hex[:12]

    def __attrs_post_init__(self) -> None:
        if self.plan is not None and self.director is not None:
            raise ConfigError("give either a plan or a director")
        if (self.scene is None) == (self.agent is None):
            raise ConfigError("give either a scene or an agent")
        if self.scene is not None and self.model:
            raise ConfigError("a scene's roles carry their own model; model goes with agent")
        if self.gateway is not None and self.gateway_port:
            raise ConfigError("gateway_port is for a gateway that is started here; the one that is brought has its own")
        if "://" in self.gateway_reach and self.gateway is None and not self.gateway_port:
            raise ConfigError(f"what answers at {self.gateway_reach} must know where the gateway is: give gateway_port")
        self._check_director()
        given: Mapping[str, Any] = self.deadlines
        for state, seconds in given.items():
            if state not in DEADLINES:
                raise ConfigError(f"deadlines: no state is called {state!r}; known are {', '.join(DEADLINES)}")
            if not (isinstance(seconds, int | float) and seconds > 0):
                raise ConfigError(f"deadlines: {state} must be seconds > 0, not {seconds!r}")
        if (
            self.task is None
            and self.prompt is None
            and (self.scene is None or any(t.prompt is None for t in self.scene.turns))
        ):
            raise ConfigError("nothing to ask: give a task, or a prompt")

    def _check_director(self) -> None:
        scene = self.scene or self.the_scene()
        if not scene.turns and self.director is None and self.plan is None:
            raise ConfigError("a scene needs at least one turn, or a director that leads it")
        names = [role.name for role in scene.roles]
        if isinstance(self.director, str):
            if self.director not in names or len(names) == 1:
                raise ConfigError(
                    f"the director {self.director!r} must be one of the scene's roles, beside one that works; "
                    f"it has {', '.join(names)}"
                )
            if any(turn.role == self.director for turn in scene.turns):
                raise ConfigError(f"the director {self.director!r} takes no turns: it decides them")
        if isinstance(self.director, DirectorRole) and self.director.role.name in names:
            raise ConfigError(f"two roles of the scene are called {self.director.role.name!r}, one is the director")

    def the_scene(self) -> Scene:
        """The scene that is played, without a director: the one given, or the agent's single turn."""
        if self.scene is not None:
            workers = tuple(role for role in self.scene.roles if role.name != self.director)
            return attrs.evolve(self.scene, roles=workers)
        assert self.agent is not None
        return Scene.single(self.agent, model=self.model)

    def the_director(self) -> DirectorRole | None:
        """The director, where it is an agent."""
        if isinstance(self.director, str) and self.scene is not None:
            return DirectorRole(next(role for role in self.scene.roles if role.name == self.director))
        return self.director if isinstance(self.director, DirectorRole) else None

    def limits(self) -> Limits:
        """Every budget that outlives a turn, the short words among them. A director's turns are bounded anyway."""
        given = self.budgets
        if self.timeout is not None:
            given = attrs.evolve(given, wall_sec=self.timeout)
        if self.director is not None and given.turns is None:
            given = attrs.evolve(given, turns=self.max_turns)
        scene, led = self.the_scene(), self.the_director()
        roles = {role.name: role.budgets for role in scene.roles}
        return Limits(given, scene.budgets, roles, {led.role.name: led.role.budgets} if led is not None else {})
