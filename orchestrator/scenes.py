"""Scenes as data: who takes turns, read from a `rollout.toml` or from the roles and scenes of a `task.md`.

A `rollout.toml` holds roles, the order of their turns, and the settings of the rollout that belong beside them:

    task = "tasks/sum"                  # paths are relative to this file
    timeout = 3600

    [[roles]]
    name = "coder"
    agent = "codex-acp"                 # a registered agent, or a manifest (.toml)
    model = "openai/gpt-5"

    [[roles]]
    name = "reviewer"
    agent = "pydantic-ai"
    model = "openai/gpt-5-mini"
    turn_sec = 300
    budgets = { tokens = 50000, turns = 2 }
    env = { TOKEN = "${TOKEN}" }        # a variable of whoever loads the file and hands it over

    [[turns]]
    role = "coder"                      # without a prompt: the task's instruction

    [[turns]]
    role = "reviewer"
    prompt_file = "review.md"           # or: prompt = "Review it."

A director that is an agent (`orchestrator.directing`) is one of the roles; `[[turns]]` may then be left out:

    [director]                          # or just: director = "user", above the tables
    role = "user"                       # its agent is model-user where it names none
    persona = "You are impatient."      # of a simulated user; any other director has a brief = "..."
    facts = { order_id = "BF-1042" }    # what it alone knows
    limit = 6

Both readers end up in `Scene`; whatever is wrong is one `ConfigError` with file, line and key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import attrs
from msgspec import Meta, Struct, field

from orchestrator.budgets import Budgets
from orchestrator.config import DirectorRole, Role, Scene, Turn, UsageTracking
from orchestrator.questions import Policy
from orchestrator.sandboxes import Network
from orchestrator.tasks import documents, files
from orchestrator.tasks.schema import Count, Seconds, Section, Text
from orchestrator.tasks.task import Task, resolve_env
from states.errors import ConfigError, TaskError

if TYPE_CHECKING:
    from orchestrator.directors import Decision, Director, Story
    from orchestrator.registry import AgentConfig

Agents = Mapping[str, str] | str
"""Which agent plays a role, as `AGENT[:MODEL]`: by the role's name, or one for all. It wins over what is written."""

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


Given = dict[str, Any]
"""Budgets by their kinds. What there is of them is known by `Budgets` alone, and checked there."""


# --- rollout.toml --------------------------------------------------------------------------------------------


class RoleTable(Section):
    """`[[roles]]`."""

    name: Name
    agent: Text | None = None
    model: str = ""
    env: dict[str, str] = field(default_factory=dict)
    turn_sec: Seconds | None = None
    idle_sec: Seconds | None = None
    budgets: Given = field(default_factory=dict)


class TurnTable(Section):
    """`[[turns]]`."""

    role: Text
    prompt: Text | None = None
    prompt_file: Text | None = None
    budgets: Given = field(default_factory=dict)


class SceneTable(Section):
    """`[scene]`: what is of all roles together."""

    budgets: Given = field(default_factory=dict)


class DirectorTable(Section):
    """`[director]`: which role directs, and the fields of `DirectorRole` and of `model_user`."""

    role: Text
    brief: str = ""
    persona: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    limit: Count | None = None
    checks: Annotated[int, Meta(ge=0)] = 0


class RolloutToml(Section):
    """A whole `rollout.toml`; the settings are those of `RolloutConfig`, and what is left out keeps its default."""

    roles: list[RoleTable] = field(default_factory=list)
    turns: list[TurnTable] = field(default_factory=list)
    director: Text | DirectorTable | None = None
    task: Text | None = None
    prompt: Text | None = None
    env: dict[str, str] = field(default_factory=dict)
    timeout: Seconds | None = None
    turn_sec: Seconds | None = None
    idle_sec: Seconds | None = None
    policy: Policy | None = None
    usage_tracking: UsageTracking | None = None
    network: Network | None = None
    budgets: Given = field(default_factory=dict)
    scene: SceneTable = field(default_factory=SceneTable)


SETTINGS = ("prompt", "timeout", "turn_sec", "idle_sec", "policy", "usage_tracking", "network")
"""Keys of a `rollout.toml` that are keywords of `RolloutConfig` as they stand."""


def load_scene(path: Path | str, agents: Agents | None = None, *, variables: Mapping[str, str] | None = None) -> Scene:
    """The scene of a `rollout.toml`; arguments and errors as `load_rollout`."""
    scene: Scene = load_rollout(path, agents, variables=variables)["scene"]
    return scene


def load_rollout(
    path: Path | str, agents: Agents | None = None, *, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A `rollout.toml` as keywords: `RolloutConfig(**load_rollout("rollout.toml"))`.

    Args:
        path: The file. Paths in it are relative to it.
        agents: Who plays which role, over what the file says.
        variables: What `${NAME}` in an `env` stands for; the process's own environment is not looked at.

    Raises:
        ConfigError: The file cannot be read, or something in it cannot work; says which line and key.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected a rollout.toml, which cannot be read: {error}") from error
    try:
        document = documents.parse_toml(text, path, RolloutToml)
    except TaskError as error:
        raise ConfigError(str(error)) from error
    place = _Place(path, documents.toml_lines(text))
    given = variables or {}
    config: dict[str, Any] = _cast(document, place, agents, given)
    config |= {key: value for key in SETTINGS if (value := getattr(document, key)) is not None}
    if document.task is not None:
        config["task"] = path.parent / document.task
    if document.env:
        config["env"] = _env(document.env, given, place, "env")
    if document.budgets:
        config["budgets"] = _budgets(document.budgets, "budgets", place)
        if "wall_sec" in document.budgets and document.timeout is not None:
            place.refuse("budgets.wall_sec", "there is a timeout too, which is the same in short; keep one of the two")
    return config


def _budgets(given: Given, key: str, place: _Place) -> Budgets:
    for kind, limit in given.items():
        try:
            Budgets.of({kind: limit})
        except ConfigError as error:
            place.refuse(f"{key}.{kind}", str(error).removeprefix("Budgets: "))
    return Budgets.of(given)


@attrs.frozen
class _Place:
    """Where the keys of a file stand."""

    path: Path
    lines: Mapping[str, int]

    def refuse(self, key: str, problem: str) -> NoReturn:
        """Raise the one kind of error that there is here. `key` is dotted: `turns.[1].role`."""
        shown = key.replace(".[", "[")
        raise ConfigError(f"{self.path}{documents.line_of(key, self.lines)}: {shown}: {problem}")


def _cast(document: RolloutToml, place: _Place, agents: Agents | None, given: Mapping[str, str]) -> dict[str, Any]:
    """The scene, and its director where there is one, as keywords."""
    written = document.director
    led = DirectorTable(written) if isinstance(written, str) else written
    for key, kind, tables in (("roles", "role", document.roles), ("turns", "turn", document.turns)):
        if not tables and not (kind == "turn" and led):
            place.refuse(key, f"expected at least one {kind} ([[{key}]]), found none: the scene is empty")
    names = [role.name for role in document.roles]
    for index, name in enumerate(names):
        if (first := names.index(name)) < index:
            place.refuse(f"roles.[{index}].name", f"{name!r} is the name of roles[{first}] already; rename one")
    _known(names, agents)
    director = _director(led, names, place) if led else None
    roles = []
    for index, table in enumerate(document.roles):
        directs = director is not None and director.role.name == table.name
        if directs and not isinstance(agents, Mapping):  # one agent for all is one for those who work
            roles.append(_role(table, f"roles.[{index}]", place, None, given, usual="model-user"))
        else:
            roles.append(
                _role(table, f"roles.[{index}]", place, agents, given, usual="model-user" if directs else None)
            )
    turns = tuple(_turn(table, f"turns.[{index}]", place, names) for index, table in enumerate(document.turns))
    budgets = _budgets(document.scene.budgets, "scene.budgets", place)
    if director is None:
        return {"scene": Scene(tuple(roles), turns, budgets)}
    for index, turn in enumerate(turns):
        if turn.role == director.role.name:
            place.refuse(f"turns.[{index}].role", f"{turn.role!r} directs: it takes no turns, it decides them")
    role = next(role for role in roles if role.name == director.role.name)
    workers = tuple(one for one in roles if one is not role)
    return {"scene": Scene(workers, turns, budgets), "director": attrs.evolve(director, role=role)}


def _director(led: DirectorTable, names: Sequence[str], place: _Place) -> DirectorRole:
    """What the file says of the director; its role is filled in later."""
    from orchestrator.directors import model_user

    key = "director.role" if "director.role" in place.lines else "director"
    if led.role not in names:
        place.refuse(key, _no_such_role(led.role, names))
    if len(names) == 1:
        place.refuse(key, f"{led.role!r} is the only role: there is nobody to direct")
    if led.brief and (led.persona or led.facts):
        place.refuse("director.brief", "there is a persona (or facts) too: those write the brief; keep one of the two")
    if led.persona or led.facts:
        user = model_user("", persona=led.persona, facts=led.facts, limit=led.limit, name=led.role)
        return attrs.evolve(user, checks=led.checks)
    return DirectorRole(Role(led.role, ""), led.brief, led.limit, led.checks)


def _role(
    table: RoleTable,
    key: str,
    place: _Place,
    agents: Agents | None,
    given: Mapping[str, str],
    *,
    usual: str | None = None,
) -> Role:
    written = table.agent or usual
    agent, model = _player(table.name, written, table.model, agents, place=place, key=f"{key}.agent")
    env = _env(table.env, given, place, f"{key}.env")
    budgets = _budgets(table.budgets, f"{key}.budgets", place)
    return Role(table.name, agent, model, env, turn_sec=table.turn_sec, idle_sec=table.idle_sec, budgets=budgets)


def _turn(table: TurnTable, key: str, place: _Place, names: Sequence[str]) -> Turn:
    if table.role not in names:
        place.refuse(f"{key}.role", _no_such_role(table.role, names))
    if table.prompt_file is None:
        return _turn_of(table.role, table.prompt, table.budgets, key, place)
    if table.prompt is not None:
        place.refuse(f"{key}.prompt_file", "there is a prompt too; keep one of the two")
    try:
        text = (place.path.parent / table.prompt_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        place.refuse(f"{key}.prompt_file", f"expected a file of text, found {table.prompt_file!r}: {error}")
    if not text:
        place.refuse(f"{key}.prompt_file", f"{table.prompt_file} is empty; expected what the role is asked")
    return _turn_of(table.role, text, table.budgets, key, place)


def _turn_of(role: str, prompt: str | None, given: Given, key: str, place: _Place) -> Turn:
    budgets = _budgets(given, f"{key}.budgets", place)
    try:
        return Turn(role, prompt, budgets)
    except ConfigError as error:
        place.refuse(f"{key}.budgets.turns", str(error))


def _env(env: Mapping[str, str], given: Mapping[str, str], place: _Place, key: str) -> dict[str, str]:
    try:
        return resolve_env(env, given, key)
    except ConfigError as error:
        place.refuse(key, str(error).partition(": ")[2])


# --- who plays a role ----------------------------------------------------------------------------------------


def _known(names: Sequence[str], agents: Agents | None) -> None:
    """Refuse an agent that was given to nobody."""
    for name in agents if isinstance(agents, Mapping) else ():
        if name not in names:
            raise ConfigError(f"an agent is given for {name!r}, but {_no_such_role(name, names)}")


def _no_such_role(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), 1, cutoff=0.7)
    known = f"did you mean {near[0]}?" if near else f"there is {', '.join(names)}"
    return f"no role is called {name!r}; {known}"


def _player(
    name: str, agent: str | None, model: str, agents: Agents | None, *, place: _Place, key: str
) -> tuple[str | AgentConfig, str]:
    """Who plays this role with which model: what was given, or else what is written."""
    folder = place.path.parent
    given = agents.get(name) if isinstance(agents, Mapping) else agents
    if given is not None:
        agent, _, other = given.partition(":")
        model, folder = other or model, Path()
    if not agent:
        place.refuse(key, f"nobody plays {name!r}: name its agent here, or give one with --role {name}=AGENT")
    if not agent.endswith(".toml"):
        return agent, model
    from orchestrator.registry import load_manifest

    try:
        return load_manifest(folder / agent), model
    except ConfigError as error:
        place.refuse(key, str(error))


_PROVIDERS = (("claude", "anthropic"), ("gpt-", "openai"), ("o1", "openai"), ("o3", "openai"), ("o4", "openai"))


def provided(model: str) -> str:
    """A model's name with its provider, which BenchFlow's packages leave out where it is plain to see.

    >>> provided("claude-haiku"), provided("gpt-5.5"), provided("openrouter/x"), provided("mine")
    ('anthropic/claude-haiku', 'openai/gpt-5.5', 'openrouter/x', 'mine')
    """
    known = (*_PROVIDERS, ("gemini", "gemini"))
    provider = next((name for start, name in known if model.startswith(start) and "/" not in model), None)
    return f"{provider}/{model}" if provider else model


def with_model(scene: Scene, model: str) -> Scene:
    """The scene with this model for every role that names none."""
    return attrs.evolve(scene, roles=tuple(attrs.evolve(role, model=role.model or model) for role in scene.roles))


def led_with_model(director: Any, model: str) -> Any:
    """The director with this model, where it is an agent that names none."""
    if not isinstance(director, DirectorRole) or director.role.model:
        return director
    return attrs.evolve(director, role=attrs.evolve(director.role, model=model))


def roles_in_turn(agents: Mapping[str, str]) -> Scene:
    """A scene without a file: these roles, `AGENT[:MODEL]` each, take one turn each in the order given.

    >>> [role.name for role in roles_in_turn({"coder": "codex-acp", "reviewer": "pydantic-ai:openai/gpt-5"}).roles]
    ['coder', 'reviewer']
    """
    here = _Place(Path("--role"), {})
    players = {name: _player(name, None, "", agents, place=here, key=name) for name in agents}
    return Scene(
        tuple(Role(name, agent, model) for name, (agent, model) in players.items()),
        tuple(Turn(name) for name in agents),
    )


# --- task.md -------------------------------------------------------------------------------------------------


class RoleMd(Section):
    """`agents.roles.NAME` of a `task.md`."""

    agent: Text | None = None
    model: str | None = None
    reasoning_effort: str | None = None
    env: dict[str, str | int | float | bool] = field(default_factory=dict)
    timeout_sec: Seconds | None = None
    idle_timeout_sec: Seconds | None = None
    skills_dir: str | None = None
    capabilities: list[str] | None = None
    budgets: Given = field(default_factory=dict)


class AgentsMd(Section):
    """`agents` of a `task.md`."""

    roles: dict[Name, RoleMd] = field(default_factory=dict)


class TurnMd(Section):
    """One of a scene's turns."""

    role: Text
    prompt: str | None = None
    budgets: Given = field(default_factory=dict)


class SceneMd(Section):
    """One of `scenes`: its turns, or one turn for each of its roles."""

    name: str | None = None
    roles: list[str] | None = None
    turns: list[str | TurnMd] | None = None
    skills_dir: str | None = None
    budgets: Given = field(default_factory=dict)


Part = Literal["base", "role", "scene", "turn"]


class PromptMd(Section):
    """`benchflow.prompt`: how the prompt of a turn is made of the task's, the role's, the scene's and its own."""

    composition: Literal["append", "replace"] = "replace"
    order: Annotated[list[Part], Meta(min_length=1)] | None = None


class NudgesMd(Struct):
    """`benchflow.nudges`, as far as it is read."""

    nudge_budget: Annotated[int, Meta(gt=0)] | None = None


class BenchflowMd(Struct):
    """`benchflow`, as far as it is read."""

    prompt: PromptMd = field(default_factory=PromptMd)
    nudges: NudgesMd = field(default_factory=NudgesMd)


class UserMd(Struct):
    """`user`, as far as it is read."""

    model: str | None = None
    stop_rule: str | None = None
    private_facts: dict[str, str] = field(default_factory=dict)


class ScenesMd(Section):
    """What a `task.md` says of scenes, of its front matter."""

    agents: AgentsMd = field(default_factory=AgentsMd)
    scenes: list[SceneMd] = field(default_factory=list)
    user: UserMd = field(default_factory=UserMd)
    benchflow: BenchflowMd = field(default_factory=BenchflowMd)


def scene_of(task: Task, agents: Agents | None = None) -> Scene | None:
    """The scene that a task brings along: all its scenes, one after the other; None when it has none.

    A role keeps its session from one of the task's scenes to the next when nobody spoke in between. Which agent plays
    a role comes from `agents`, or else from the task.

    Raises:
        ConfigError: Its roles and scenes do not fit together, or nobody plays a role; says which line and key.
    """
    if not task.extra.get("scenes"):
        return None
    document, place = _document(task)
    order = document.agents.roles
    turns = [turn for index in range(len(document.scenes)) for turn in _turns_of(index, document, task, place)]
    if not turns:
        place.refuse("scenes", "expected at least one turn, found none: the scene is empty")
    names = [name for name in order if any(turn.role == name for turn in turns)]
    _known([*names, USER] if user_of(task) is not None else names, agents)
    roles = tuple(_role_of(name, order[name], place, agents) for name in names)
    return Scene(roles, tuple(turns), _budgets_of(document.scenes, place))


def _budgets_of(scenes: Sequence[SceneMd], place: _Place) -> Budgets:
    """The budgets of the one scene; several are played as one, so that none of them has some of its own."""
    for index, scene in enumerate(scenes):
        if scene.budgets and len(scenes) > 1:
            place.refuse(
                f"scenes.[{index}].budgets", "a task's scenes are played as one; give them to its roles or its turns"
            )
    return _budgets(scenes[0].budgets, "scenes.[0].budgets", place)


def _document(task: Task) -> tuple[ScenesMd, _Place]:
    """What the task says of scenes, checked, and where it says it."""
    path = task.path / "task.md"
    text, _ = documents.front_matter(files.read_text(path, task.path), path)
    lines = documents.yaml_lines(text, path, first_line=2)
    said = {key: task.extra[key] for key in ("agents", "scenes", "user", "benchflow") if key in task.extra}
    return documents.typed(said, path, ScenesMd, lines), _Place(path, lines)


def _turns_of(index: int, document: ScenesMd, task: Task, place: _Place) -> list[Turn]:
    scene, key = document.scenes[index], f"scenes.[{index}]"
    names = list(document.agents.roles)
    for at, name in enumerate(scene.roles or ()):
        if name not in names:
            place.refuse(f"{key}.roles.[{at}]", _no_such_role(name, names))
    turns = [turn if isinstance(turn, TurnMd) else TurnMd(turn) for turn in scene.turns or ()]
    for at, turn in enumerate(turns):
        if turn.role not in names:
            place.refuse(f"{key}.turns.[{at}].role", _no_such_role(turn.role, names))
        if scene.roles is not None and turn.role not in scene.roles:
            place.refuse(f"{key}.turns.[{at}].role", f"{turn.role!r} is not one of the scene's roles")
    turns = turns or [TurnMd(name) for name in (names if scene.roles is None else scene.roles)]
    called = scene.name or f"scene-{index}"
    policy = document.benchflow.prompt
    return [
        _turn_of(turn.role, _prompt(turn, called, policy, task), turn.budgets, f"{key}.turns.[{at}]", place)
        for at, turn in enumerate(turns)
    ]


def _prompt(turn: TurnMd, scene: str, policy: PromptMd, task: Task) -> str | None:
    """The prompt of a turn by the task's policy: by default the most special one there is; None for the task's own."""
    prompts: Mapping[str, str] = task.extra.get("prompts", {})
    parts: dict[Part, str] = {
        "base": task.instruction,
        "role": prompts.get(f"role:{turn.role}", ""),
        "scene": prompts.get(f"scene:{scene}", ""),
        "turn": turn.prompt or "",
    }
    usual: list[Part] = ["base", "role", "scene", "turn"]
    order = policy.order or (usual if policy.composition == "append" else usual[::-1])
    there = [part for part in order if parts[part].strip()]
    chosen = there if policy.composition == "append" else there[:1]
    return None if chosen in ([], ["base"]) else "\n\n".join(parts[part].strip() for part in chosen)


def _role_of(name: str, role: RoleMd, place: _Place, agents: Agents | None) -> Role:
    written = provided(role.model or "")
    agent, model = _player(name, role.agent, written, agents, place=place, key=f"agents.roles.{name}.agent")
    env = {key: str(value) for key, value in role.env.items()}
    limits: dict[str, Any] = {"turn_sec": role.timeout_sec, "idle_sec": role.idle_timeout_sec}
    budgets = _budgets(role.budgets, f"agents.roles.{name}.budgets", place)
    return Role(name, agent, model, env, budgets=budgets, **limits)


# --- the user of a task.md -----------------------------------------------------------------------------------


@attrs.frozen
class User:
    """The simulated user that a task describes: who it is, what it alone knows, and how many turns it has patience for.

    `model` is `scripted` for one that needs no model, else the model that plays it.
    """

    persona: str
    facts: Mapping[str, str] = attrs.field(factory=dict, repr=lambda facts: f"<{len(facts)} facts>")
    model: str = "scripted"
    limit: int = 5


def user_of(task: Task) -> User | None:
    """The user that a task describes, None when it describes none. Raises `ConfigError` as `scene_of`."""
    persona = str(task.extra.get("prompts", {}).get("user-persona", ""))
    if not persona and not task.extra.get("user"):
        return None
    document, place = _document(task)
    limits = [limit for limit in (document.benchflow.nudges.nudge_budget,) if limit is not None]
    if (rule := document.user.stop_rule) is not None:
        found = re.search(r"-([1-9]\d{0,5})-rounds$", rule)
        if found is None:
            place.refuse("user.stop_rule", f"expected a rule such as satisfied-or-5-rounds, found {rule!r}")
        limits.append(int(found[1]))
    user = document.user
    return User(persona, user.private_facts, user.model or "scripted", min(limits, default=User("").limit))


def tells_when_asked(scene: Scene, user: User) -> Director:
    """The scene's turns, beside a scripted user who tells a fact when the turn before has asked for it.

    After the scene's own turns the role that spoke last gets what it asked for as a turn of its own, until nothing is
    asked or the user's limit is reached. A turn that crashed or spent a limit is the last one.
    """
    from orchestrator.plans import went_on

    def decide(story: Story) -> Decision:
        taken = len(story.turns)
        if taken and not went_on(story.turns[-1].ended_by):
            return None
        told = _told(story, user) if taken else None
        if taken < len(scene.turns):
            turn = scene.turns[taken]
            prompt = story.instruction if turn.prompt is None else turn.prompt
            return attrs.evolve(turn, prompt=f"{prompt}\n\n{told}") if told else turn
        return Turn(story.turns[-1].role, told) if told and taken < user.limit else None

    return decide


def _told(story: Story, user: User) -> str | None:
    """What the user says to the last turn: the first fact that it asks for and that nobody was told yet."""
    asked = story.turns[-1].said.lower()
    for key, value in user.facts.items():
        words = key.lower().replace("_", " ").split()
        line = f"The user says: the {' '.join(words)} is {value}."
        if "?" in asked and all(word in asked for word in words) and not any(line in t.prompt for t in story.turns):
            return line
    return None


USER = "user"
"""The name of a task's simulated user among the roles: `--role user=AGENT[:MODEL]` says who plays it."""


def director_of(task: Task, scene: Scene, agents: Agents | None = None) -> Director | DirectorRole | None:
    """Who leads the scene of a task: its simulated user, where it describes one.

    One that names a model, or that `agents` gives an agent to, is played by that; a scripted one tells what it is
    asked for. None: there is no user, or a scripted one that knows nothing, and the turns are taken in order.

    Raises:
        ConfigError: as `scene_of`; or the user has the name of a role.
    """
    from orchestrator.directors import model_user

    user = user_of(task)
    if user is None:
        return None
    players = {name: agent for name, agent in agents.items() if name == USER} if isinstance(agents, Mapping) else {}
    if any(role.name == USER for role in scene.roles):
        players = {}
    model = "" if user.model == "scripted" else provided(user.model)
    if not model and not players:
        return tells_when_asked(scene, user) if user.facts else None
    _, place = _document(task)
    if any(role.name == USER for role in scene.roles):
        place.refuse("user", f"a role of the scene is called {USER!r} too; rename that")
    agent, model = _player(USER, "model-user", model, players, place=place, key="user.model")
    return model_user(model, persona=user.persona, facts=user.facts, limit=user.limit, agent=agent)


def rollout_of(task: Task | Path | str, agents: Agents | None = None) -> dict[str, Any]:
    """A task with its own scene and its simulated user, as keywords: `RolloutConfig(**rollout_of("tasks/order"))`.

    A task without scenes needs `agents`: one for its single turn, or by role, who then take one turn each.

    Raises:
        ConfigError: as `scene_of` and `director_of`; or nobody is named who shall do it.
    """
    from orchestrator.tasks.loading import load_task

    loaded = load_task(task) if isinstance(task, str | Path) else task
    scene = scene_of(loaded, agents) or _without_scenes(loaded, agents)
    director = director_of(loaded, scene, agents)
    if director is None and user_of(loaded) is not None:
        note = "task.md: its user is scripted and knows no fact that it could tell: the turns are taken as written"
        loaded = attrs.evolve(loaded, notes=(*loaded.notes, note))
    return {"task": loaded, "scene": scene, "director": director}


def _without_scenes(task: Task, agents: Agents | None) -> Scene:
    if isinstance(agents, Mapping):
        workers = {name: agent for name, agent in agents.items() if name != USER or user_of(task) is None}
        if workers:
            return roles_in_turn(workers)
    if not isinstance(agents, str):
        raise ConfigError(f"task {task.name} has no scenes: say which agent shall do it")
    agent, model = _player("agent", None, "", agents, place=_Place(Path("--agent"), {}), key="agent")
    return Scene.single(agent, model=model)
