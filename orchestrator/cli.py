"""The command line `rollout`: thin. What a command means is the library's; here are its words, its exit codes and ^C.

Nothing is imported for a command that is not given, so that `rollout --help` is quick. One JSON document goes to stdout
under `--json`; what happens meanwhile, and what went wrong, goes to stderr, in a sentence and never as a traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from states.errors import ConfigError, OrchestratorError

if TYPE_CHECKING:
    from orchestrator.config import Role, RolloutConfig, Scene
    from orchestrator.registry import AgentConfig, Registry
    from orchestrator.result import RolloutResult
    from orchestrator.rollout import Rollout
    from orchestrator.watch import Follower
    from states.ports import Sandbox

F = TypeVar("F", bound=Callable[..., Any])

EXIT_CODES: Mapping[int, str] = {
    0: "closed/rewarded or closed/unverified, whatever the reward is; any other command: it worked",
    1: "closed/failed; validate: a mistake; conformance: a failed clause; doctor: no sandbox; or an error of ours",
    2: "the command, or the configuration that it describes, cannot work; nothing was started",
    3: "closed/void: nothing was done that could be graded",
    4: "closed/cancelled",
    5: "stopped by a first ^C or SIGTERM: captured, not closed",
}
"""What this program exits with. `rollout run --help` prints it."""

ENDINGS: Mapping[str | None, int] = {"rewarded": 0, "unverified": 0, "failed": 1, "void": 3, "cancelled": 4, None: 5}

EXPORTS = ("atif", "inspect", "otel", "verifiers-jsonl", "benchflow")
"""The formats of `rollout export`: those of `orchestrator.export`, which is not imported for a list of words."""

EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code}  {meaning}" for code, meaning in EXIT_CODES.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. This is what the installed program `rollout` calls."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(cli.main(arguments, prog_name="rollout", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return _failed(arguments, error, 2, say=False)
    except click.Abort:
        return _failed(arguments, KeyboardInterrupt("interrupted"), 4)
    except ConfigError as error:
        return _failed(arguments, error, 2)
    except OrchestratorError as error:
        return _failed(arguments, error, 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read us has seen enough
        return 0
    except Exception as error:
        if os.environ.get("ROLLOUT_DEBUG"):
            raise
        said = f"this is a bug ({type(error).__name__}: {error}); ROLLOUT_DEBUG=1 shows where"
        return _failed(arguments, OrchestratorError(said), 1)


def _failed(arguments: Sequence[str], error: BaseException, code: int, *, say: bool = True) -> int:
    """Say what went wrong, in a sentence; under `--json` as the one document on stdout, too."""
    if say:
        click.echo(f"rollout: {error}", err=True)
    if "--json" in arguments:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        _print_json({"error": {"type": type(error).__name__, "message": message, "exit_code": code}})
    return code


def _print_json(document: Any) -> None:
    from orchestrator.journal import encode_any

    click.echo(encode_any(document).decode())


def json_option(command: F) -> F:
    """`--json`, the same for every command."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")(command)


def _version(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    """Say which version this is."""
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        click.echo(f"rollout {version('rollout-orchestrator')}")
    except PackageNotFoundError:
        click.echo("rollout, from a source tree that is not installed")
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EPILOG)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Its version.")
def cli() -> None:
    """Run agents on tasks, each run driven by one explicit state machine.

    \b
    Start here:
      rollout doctor                                what this machine can do
      rollout run demo --agent oracle               the demo task, solved by its own solution: no model needed
      rollout run demo --agent codex-acp --model openai/gpt-5
      rollout show runs                             what happened
    """  # noqa: D301 - click reads \b as the character


# --- run -----------------------------------------------------------------------------------------------------


@cli.command(epilog=EPILOG, short_help="Run one rollout of a task.")
@click.argument("task", required=False)
@click.option("-a", "--agent", metavar="NAME|FILE", help="A registered agent, or a manifest (.toml).")
@click.option("-m", "--model", default="", metavar="PROVIDER/NAME", help="For example openai/gpt-5.")
@click.option("--scene", type=click.Path(path_type=Path), metavar="FILE", help="Roles and turns: a rollout.toml.")
@click.option("--role", "roles", multiple=True, metavar="NAME=AGENT[:MODEL]", help="Who plays a role; repeatable.")
@click.option("--prompt", help="Ask this, instead of the task's instruction.")
@click.option(
    "--sandbox", default="local", show_default=True, metavar="NAME", help="local, docker, daytona, or module:Class."
)
@click.option("--sandbox-option", "sandbox_options", multiple=True, metavar="K=V", help="A word of that sandbox's own.")
@click.option("--image", metavar="IMAGE", help="A prebuilt image, over the task's own.")
@click.option("--image-map", multiple=True, metavar="FROM=TO", help="TO stands for FROM, which cannot be had here.")
@click.option(
    "--network",
    type=click.Choice(["gateway-only", "bridge", "host", "none"]),
    default="gateway-only",
    show_default=True,
    help="What the sandbox can reach.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="The rollout gets a folder of its own in here.",
)
@click.option("--timeout", type=float, metavar="S", help="Seconds for everything up to verification.")
@click.option("--turn-timeout", type=float, metavar="S", help="Seconds for a turn; the task's own by default.")
@click.option("--idle-timeout", type=float, metavar="S", help="Longest silence in a turn.")
@click.option("--max-tokens", type=int, metavar="N", help="Token budget (metered agents).")
@click.option("--max-cost", type=float, metavar="USD", help="Cost budget (metered agents, known prices).")
@click.option("--max-tool-calls", type=int, metavar="N", help="Tool calls of all roles.")
@click.option("--max-turns", type=int, metavar="N", help="Turns of all roles.")
@click.option(
    "--budget", "limits", multiple=True, metavar="ROLE.KIND=N", help="A role's own: coder.tokens=50000; repeatable."
)
@click.option("-e", "--env", multiple=True, metavar="K=V", help="For the agent; K alone takes the value set here.")
@click.option(
    "--usage-tracking",
    type=click.Choice(["auto", "required", "off"]),
    default="auto",
    show_default=True,
    help="Meter model calls where that is possible, or else refuse, or never.",
)
@click.option(
    "--gateway-reach",
    default="auto",
    show_default=True,
    metavar="HOW",
    help="How the sandbox finds the gateway: auto, relay, none, or a URL that you expose.",
)
@click.option(
    "--gateway-port", type=int, default=0, metavar="N", help="Where the gateway listens here; any by default."
)
@click.option("--upstream-url", metavar="URL", help="Where the model is served, when not at its provider.")
@click.option(
    "--upstream-api",
    "upstream_apis",
    multiple=True,
    type=click.Choice(["openai-chat", "openai-responses", "anthropic-messages"]),
    help="A wire format of that server; may be repeated.  [default: openai-chat]",
)
@click.option("--upstream-key-env", metavar="NAME", help="The variable that holds that server's key.")
@click.option(
    "--policy",
    type=click.Choice(["allow", "deny", "ask"]),
    default="allow",
    show_default=True,
    help="What answers an agent's requests for permission.",
)
@click.option(
    "--keep-sandbox",
    type=click.Choice(["never", "on-failure", "always"]),
    default="never",
    show_default=True,
    help="Leave the sandbox there, to look into it.",
)
@click.option("--no-verify", is_flag=True, help="Do not verify: the rollout ends unverified.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing until it is over.")
@json_option
@click.pass_context
def run(context: click.Context, /, *, quiet: bool, as_json: bool, **_options: Any) -> int:
    """Run one rollout of TASK: a task's folder, or `demo`, the task that ships with this program.

    Who takes turns: one --agent; or the roles of a --scene file, or of a task that has scenes, each played as written
    there unless --role (or --agent, for all of them) says otherwise; or the --role options alone, one turn each.
    What the command line says goes before what the file says.

    A first ^C (or SIGTERM) stops it: the turn in flight is cancelled and captured, and nothing more is begun.
    A second one cancels it: everything is given back, and it is closed.
    """
    from orchestrator.rollout import Rollout

    rollout = Rollout(_configured(context))

    async def begin() -> Rollout:
        return rollout

    return _outcome(_drive(begin, None, quiet=quiet), as_json=as_json)


def _configured(context: click.Context) -> RolloutConfig:
    """The library's config of a `run` that was asked for, with what it takes to ask for it again."""
    import attrs

    default = click.core.ParameterSource.DEFAULT
    given = {name for name in context.params if context.get_parameter_source(name) is not default}
    options = {name: value for name, value in context.params.items() if name not in ("task", "quiet", "as_json")}
    config = _config(context.params["task"], given, **options)
    return attrs.evolve(config, made_from=_made_from(context, given))


def _made_from(context: click.Context, given: set[str]) -> dict[str, Any]:
    """What was asked for, without values that may be secret: those have to be given again."""
    from orchestrator.redact import secrets_of

    argv: list[str] = []
    variables = context.params["env"]
    hidden = [one.partition("=")[0] for one in variables if "=" in one]
    for parameter in context.command.params:
        name = str(parameter.name)
        elsewhere = name in ("quiet", "as_json", "out", "env")
        if name not in given or elsewhere or not isinstance(parameter, click.Option):
            continue
        value = context.params[name]
        for one in value if parameter.multiple else (value,):
            if name == "upstream_url" and secrets_of({name: one}):
                hidden.append("")
                continue
            argv += [parameter.opts[-1]] if parameter.is_flag else [parameter.opts[-1], str(one)]
    return {
        "task": context.params["task"],
        "argv": argv,
        "env": [one for one in variables if "=" not in one],
        "not_written_down": hidden,
        "cwd": str(Path.cwd()),
    }


def _outcome(result: RolloutResult, *, as_json: bool) -> int:
    """Say what came of it; the exit code."""
    page = _draw(result)
    if as_json:
        _print_json(result.to_json())
    else:
        with _somebody_may_have_left():
            _say_result(result, page)
    if result.ending is None and result.verdict.owner != "operator":
        click.echo(f"rollout: {result.verdict.reason}", err=True)
        return 1
    return ENDINGS[result.ending]


@contextlib.contextmanager
def _somebody_may_have_left() -> Iterator[None]:
    """Whoever reads us may go before we have said everything (`| head -1`): that is no failure of the rollout."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _config(
    task: str | None,
    given: set[str],
    *,
    agent: str | None,
    model: str,
    scene: Path | None,
    roles: tuple[str, ...],
    env: tuple[str, ...],
    sandbox_options: tuple[str, ...],
    image_map: tuple[str, ...],
    upstream_url: str | None,
    upstream_apis: tuple[str, ...],
    upstream_key_env: str | None,
    no_verify: bool,
    limits: tuple[str, ...],
    **options: Any,
) -> RolloutConfig:
    """The library's config of what was asked for; `given` are the options that were. Raises `ConfigError`."""
    import attrs

    from orchestrator.budgets import Budgets
    from orchestrator.config import RolloutConfig

    _finite({name: options[name] for name in ("timeout", "turn_timeout", "idle_timeout")})
    budgets = {name: options.pop(f"max_{name}") for name in ("tokens", "cost", "tool_calls", "turns")}
    variables = _variables(env)
    asked = {
        "task": _task(task),
        "verifier": None if no_verify else "task",
        "turn_sec": options.pop("turn_timeout"),
        "idle_sec": options.pop("idle_timeout"),
        "sandbox_options": _pairs("--sandbox-option", sandbox_options),
        "image_map": _pairs("--image-map", image_map),
        **options,
    }
    options_of = {"turn_sec": "turn_timeout", "idle_sec": "idle_timeout", "scene": ""}
    file = _scene_file(scene, agent, roles, variables)
    written = {key: value for key, value in file.items() if options_of.get(key, key) not in given}
    config = {**asked, **written}
    config["env"] = {**file.get("env", {}), **variables}
    spent = {name: limit for name, limit in budgets.items() if limit is not None}
    if "timeout" in given:
        spent["wall_sec"] = None  # its short word wins over the file's
    config["budgets"] = attrs.evolve(file.get("budgets", Budgets()), **spent)
    config |= _cast(config, agent, model, roles)
    if limits:
        config |= _budgeted(config, limits)
    config["upstream"] = _upstream(model, upstream_url, upstream_apis, upstream_key_env)
    if config.get("policy") == "ask" and sys.stdin.isatty():
        from orchestrator.questions import ask_on_terminal

        config["terminal"] = ask_on_terminal
    return RolloutConfig(**config)


def _finite(seconds: Mapping[str, float | None]) -> None:
    """Refuse what is no time, by the name of the option that it was given with."""
    for name, given in seconds.items():
        if given is not None and not 0 < given < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} {given:g}: give seconds, a number above 0")


def _scene_file(
    path: Path | None, agent: str | None, roles: Sequence[str], variables: Mapping[str, str]
) -> dict[str, Any]:
    """The keywords of a config that a `rollout.toml` holds."""
    if path is None:
        return {}
    from orchestrator.scenes import load_rollout

    sys.path.insert(0, str(path.resolve().parent))  # for the module of a manifest, as in `_agent`
    return load_rollout(path, _players(roles) or agent, variables={**os.environ, **variables})


def _players(given: Sequence[str]) -> dict[str, str]:
    """Which agent plays a role, by the role's name."""
    players: dict[str, str] = {}
    for one in given:
        name, _, agent = one.partition("=")
        if not name or not agent or name in players:
            again = f"{name!r} is given twice" if name in players else "give NAME=AGENT or NAME=AGENT:MODEL"
            raise ConfigError(f"--role {one}: {again}")
        players[name] = agent
    return players


def _budgeted(config: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """Scene and director with these budgets, `ROLE.KIND=N`, for their roles, over those that they have."""
    import attrs

    from orchestrator.budgets import Budgets
    from orchestrator.config import DirectorRole

    scene, led = config.get("scene"), config.get("director")
    if scene is None:
        raise ConfigError(f"--budget {given[0]}: it is a role's; without roles give --max-tokens and the like")
    director = led.role if isinstance(led, DirectorRole) else None
    budgets = {role.name: role.budgets for role in (*scene.roles, *([director] if director else []))}
    for one in given:
        who, _, limit = one.partition("=")
        name, _, kind = who.rpartition(".")
        if name not in budgets:
            raise ConfigError(f"--budget {one}: give ROLE.KIND=N for one of {', '.join(budgets)}")
        try:
            budgets[name] = Budgets.of({**budgets[name].given(), kind: float(limit)})
        except ValueError:
            raise ConfigError(f"--budget {one}: give a number, as in coder.tokens=50000") from None
        except ConfigError as error:
            raise ConfigError(f"--budget {one}: {str(error).removeprefix('Budgets: ')}") from error
    roles = tuple(attrs.evolve(role, budgets=budgets[role.name]) for role in scene.roles)
    if led is not None and director is not None:
        led = attrs.evolve(led, role=attrs.evolve(director, budgets=budgets[director.name]))
    return {"scene": attrs.evolve(scene, roles=roles), "director": led}


SOLO = ("oracle", "noop")
"""Agents that stand for a whole scene: one turn, whatever roles the task has."""


def _cast(config: Mapping[str, Any], agent: str | None, model: str, roles: Sequence[str]) -> dict[str, Any]:
    """Who takes turns, and who leads, as keywords of a config."""
    from orchestrator import scenes
    from orchestrator.registry import default_registry

    players = _players(roles)
    if players and agent:
        raise ConfigError("give --agent for every role, or --role for each of them, not both")
    scene, director, task = config.get("scene"), config.get("director"), config["task"]
    if scene is None and task is not None and config.get("prompt") is None and agent not in SOLO:
        from orchestrator.tasks import load_task

        task = load_task(task)
        if task.extra.get("scenes") or (scenes.user_of(task) is not None and (players or agent)):
            brought = scenes.rollout_of(task, players or agent)
            task, scene, director = brought["task"], brought["scene"], brought["director"]
    if scene is None and players:
        scene = scenes.roles_in_turn(players)
    if scene is not None:
        scene, director = scenes.with_model(scene, model), scenes.led_with_model(director, model)
        return {"task": task, "scene": scene, "director": director}
    if agent is None:
        raise ConfigError(
            "who shall do it? Give --agent NAME (see `rollout agents`), --scene FILE or --role NAME=AGENT"
        )
    return {"agent": _agent(agent, default_registry()), "model": model}


def _task(named: str | None) -> Path | None:
    """A task's folder; `demo` is the one that ships, unless there is a folder of that name."""
    if named == "demo" and not Path(named).exists():
        from orchestrator.tasks import demo_task

        return demo_task()
    return Path(named) if named is not None else None


def _agent(named: str, registry: Registry) -> AgentConfig:
    """An agent by its name, or from a manifest of the user's own."""
    from orchestrator.registry import check_agent, load_manifest

    if named.endswith(".toml"):
        sys.path.insert(0, str(Path(named).resolve().parent))  # as for a script: its module may lie beside it
        return check_agent(load_manifest(named))
    return registry.get(named)


def _variables(given: Sequence[str]) -> dict[str, str]:
    """`K=V` as given; `K` with the value that it has here."""
    variables = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not name or (not equals and name not in os.environ):
            raise ConfigError(f"--env {one}: give NAME=VALUE, or the NAME of a variable that is set here")
        variables[name] = value if equals else os.environ[name]
    return variables


def _say_note(text: str) -> None:
    """Where there is no journal for it."""
    click.echo(f"note: {text}", err=True)


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """`K=V` of an option that can be repeated."""
    pairs = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not key or not equals:
            raise ConfigError(f"{option} {one}: give {'FROM=TO' if 'map' in option else 'K=V'}")
        pairs[key] = value
    return pairs


def _upstream(model: str, url: str | None, apis: Sequence[str], key_env: str | None) -> Any:
    """A server of the user's own, which serves every model that a role names; None: the provider, by its name."""
    if url is None:
        if apis or key_env:
            raise ConfigError("--upstream-api and --upstream-key-env belong to --upstream-url, which is not given")
        return None
    if key_env and key_env not in os.environ:
        raise ConfigError(f"--upstream-key-env {key_env}: no such variable is set")
    from orchestrator.gateway.upstream import Upstream

    # The choices of the option are the wire formats, and are checked once more there.
    spoken: Any = apis or ("openai-chat",)
    key = os.environ[key_env] if key_env else ""
    Upstream(model or "default", url, spoken, key)  # a mistake in them is said once, before there is any role
    return lambda named: Upstream(named or model or "default", url, spoken, key)


def _drive(begin: Callable[[], Awaitable[Rollout]], seen: Follower | None, *, quiet: bool) -> RolloutResult:
    """Run it to where it ends, listening for ^C, with a view of it where somebody looks.

    `seen` has read what is not to be logged any more.
    """
    import anyio

    async def listen(rollout: Rollout) -> None:
        times = 0
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
            async for number in received:
                times += 1
                name = signal.Signals(number).name
                if times == 1:
                    _say_beside_the_view(f"rollout: {name}: stopping; once more cancels")
                    rollout.stop(name)
                elif times == 2:
                    _say_beside_the_view(f"rollout: {name}: cancelling; everything is given back first")
                    rollout.cancel(name)
                else:
                    _say_beside_the_view(f"rollout: {name}: it is being cancelled, in {_waiting_for(rollout)}")

    async def view(rollout: Rollout) -> None:
        folder = rollout.folder
        assert folder is not None
        if sys.stderr.isatty() and rollout.config.policy != "ask":  # questions need the terminal for themselves
            from orchestrator.watch import follow

            await follow(folder, lambda _moved: None)
        else:
            from orchestrator.watch import Follower

            await _log(seen or Follower(folder))

    async def drive() -> RolloutResult:
        rollout = await begin()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listen, rollout)
            if not quiet:
                tasks.start_soon(view, rollout)
            async with _controlled(rollout):
                result = await rollout.run()
            await rollout.detach()
            tasks.cancel_scope.cancel()
        return result

    return anyio.run(drive)


def _say_beside_the_view(text: str) -> None:
    """A line on stderr that stays: the view of a terminal takes over `sys.stderr`, which `click.echo` goes round."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


WAITS: Mapping[str, str] = {
    "provisioning": "the sandbox to come up",
    "connecting": "the agent to answer",
    "cancelling": "the agent to end its turn",
    "capturing/whole": "the turn to be sealed",
    "capturing/partial": "the turn to be sealed",
    "quiescing": "every process of the agent to be gone",
    "checking": "the task's tests to end",
    "verifying": "the task's tests to end",
    "releasing": "the sandbox to be given back",
}
"""What a rollout waits for that is being cancelled."""


def _waiting_for(rollout: Rollout) -> str:
    """What an impatient person wants to know: what it waits for, for how long at most, and what to do instead."""
    state = rollout.state
    what = f": waiting for {WAITS[state]}" if state in WAITS else ""
    return f"{state}{_at_most(state, rollout.config.deadlines)}{what}; kill -9 leaves it to `rollout reap`"


@contextlib.asynccontextmanager
async def _controlled(rollout: Rollout) -> AsyncIterator[None]:
    """Hear a second terminal. Where no socket can be made, that is said, and the rollout runs all the same."""
    from orchestrator.control import serve

    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(serve(rollout))
        except ConfigError as error:
            _say_beside_the_view(f"rollout: it cannot be cancelled from elsewhere: {error}")
        yield


async def _log(follower: Follower) -> None:
    """A line a transition, for logs."""
    import anyio

    from orchestrator.watch import POLL_SEC

    try:
        while not follower.closed:
            _log_new(follower)
            await anyio.sleep(POLL_SEC)
    finally:
        _log_new(follower)


def _log_new(follower: Follower) -> None:
    for moved in follower.look():
        click.echo(f"{follower.rollout}  {moved['source']} -> {moved['dest']}  ({moved['event']})", err=True)


def _say_result(result: RolloutResult, page: Path | None) -> None:
    """What came of it, shortly, and where to read on."""
    from orchestrator.show import headline, story_of, tell_shortly

    click.echo(headline(result, click.style))
    if result.folder is None:
        return
    click.echo(tell_shortly(story_of(result.folder), style=click.style), nl=False)
    click.echo(f"artifacts {result.folder}")
    if page is not None:
        click.echo(f"diagram   {page}")
    click.echo(f"more      rollout show {result.folder}")
    if result.ending is None:
        click.echo(f"go on     rollout resume {result.folder}   (--ask-again asks a turn that was cut off once more)")
        click.echo(f"close it  rollout reap {result.folder}")


def _draw(result: RolloutResult) -> Path | None:
    """Put the run's own diagram beside its journal; one that cannot be written costs nobody a result."""
    if result.folder is None:
        return None
    from orchestrator.diagram import diagram_of

    page = result.folder / "diagram.html"
    try:
        page.write_text(diagram_of(result.folder, format="html"), encoding="utf-8")
    except (OSError, OrchestratorError) as error:
        click.echo(f"rollout: no diagram: {error}", err=True)
        return None
    return page


# --- looking -------------------------------------------------------------------------------------------------


@cli.command(short_help="What happened in a rollout, or in a folder of them.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=Path("runs"))
@click.option("--all", "every_step", is_flag=True, help="Every step of long turns.")
@click.option("-f", "--follow", is_flag=True, help="Stay until it is closed (on a terminal).")
@json_option
def show(folder: Path, *, every_step: bool, follow: bool, as_json: bool) -> int:
    """What happened in a rollout: its path with times, its turns, usage, verdict and errors.

    FOLDER is a rollout's folder, or one that holds several (by default `runs`): then they are listed.
    """
    from orchestrator import show as telling

    if not (folder / "journal.jsonl").is_file():
        return _show_all(folder, as_json=as_json)
    if follow and not as_json:
        _follow(folder)
    story = telling.story_of(folder)
    if as_json:
        _print_json(story.to_json())
    else:
        click.echo(telling.tell(story, style=click.style, every_step=every_step), nl=False)
    return 0


def _show_all(folder: Path, *, as_json: bool) -> int:
    from orchestrator import show as telling

    if not folder.is_dir():
        raise ConfigError(f"{folder} is not there; give the folder of a rollout, or one that holds rollouts")
    rows = [telling.summary(one) for one in telling.rollouts_in(folder)]
    if not rows and not as_json:
        raise ConfigError(f"{folder} holds no rollout: no journal.jsonl in it, nor in a folder in it")
    if as_json:
        _print_json(rows)
    else:
        click.echo(telling.table(rows), nl=False)
    return 0


def _holds_a_rollout(folder: Path) -> None:
    """Raise `ConfigError` where there is no journal."""
    if not (folder / "journal.jsonl").is_file():
        raise ConfigError(f"{folder} holds no rollout: there is no journal.jsonl in it")


def _follow(folder: Path) -> None:
    import anyio

    from orchestrator.watch import follow

    anyio.run(follow, folder, lambda _moved: None)


@cli.command(short_help="Draw the state machine, or what a rollout did.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["mermaid", "dot", "svg", "html", "text", "table", "faults"]),
    help="By default what the name of the output file says, or else mermaid.",
)
@click.option("--run", "folder", type=click.Path(path_type=Path), help="Paint this rollout's path on it.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="A file, instead of stdout.")
@json_option
def diagram(form: str | None, folder: Path | None, output: Path | None, *, as_json: bool) -> int:
    """The state machine as a diagram; with --run, what a rollout did, its visits and seconds painted on.

    html and svg are self-contained; neither needs graphviz.
    """
    from orchestrator.diagram import diagram_of

    if folder is not None and folder.name != "journal.jsonl":
        _holds_a_rollout(folder)
    chosen: Any = form or _diagram_format(output)
    text = diagram_of(folder, format=chosen)
    if output is not None:
        _write(output, text)
    if as_json:
        _print_json({"format": chosen, "output": str(output) if output else None, "diagram": text})
    elif output is None:
        click.echo(text, nl=False)
    else:
        click.echo(f"wrote {output}")
    return 0


SUFFIXES: Mapping[str, str] = {
    ".svg": "svg",
    ".html": "html",
    ".dot": "dot",
    ".md": "table",
    ".mmd": "mermaid",
    ".txt": "text",
}
"""What the name of a diagram's file says of its format."""


def _diagram_format(output: Path | None) -> str:
    """The format that a file's name says."""
    if output is None:
        return "mermaid"
    if output.suffix.lower() not in SUFFIXES:
        known = ", ".join(f"{suffix} ({form})" for suffix, form in SUFFIXES.items())
        raise ConfigError(f"{output}: no diagram is written as {output.suffix or 'that'}; give --format, or {known}")
    return SUFFIXES[output.suffix.lower()]


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


@cli.command(short_help="A rollout in the format of another program.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--to", required=True, type=click.Choice(EXPORTS), help="The format.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A new file (benchflow: folder), not stdout.")
@json_option
def export(folder: Path, to: str, output: Path | None, *, as_json: bool) -> int:
    """A rollout's folder in the format of another program: a trajectory, a log, traces, training data.

    \b
      atif             the trajectory format that Harbor reads
      inspect          a log for Inspect's viewer, named .json
      otel             OpenTelemetry spans, as OTLP JSON
      verifiers-jsonl  a line a rollout for verifiers' traces.jsonl; FOLDER may hold several
      benchflow        a folder as BenchFlow writes them

    \b
    A rollout that was cancelled, is void or not over is exported as far as it came, and says so.
    """  # noqa: D301 - click reads \b as the character
    from orchestrator import export as exporting

    if output is None:
        files = exporting.files_of(folder, to)
        if "." not in files:
            raise ConfigError(f"{to} is a folder: give -o and a name for it")
        click.echo(files["."].decode(), nl=False)
        return 0
    written = exporting.export(folder, to, output)
    if as_json:
        _print_json({"to": to, "output": str(written)})
    else:
        click.echo(f"wrote {written}")
    return 0


# --- agents and tasks ----------------------------------------------------------------------------------------


@cli.command(short_help="List the agents, or install one.")
@click.option("--install", "wanted", multiple=True, metavar="NAME", help="Install this one now; may be repeated.")
@json_option
def agents(wanted: tuple[str, ...], *, as_json: bool) -> int:
    """The agents that can be named: those that ship, and those of installed packages.

    An agent with packages of its own is installed on first use, into a cache outside your project; --install does
    that beforehand.
    """
    from orchestrator.registry import default_registry

    registry = default_registry()
    if wanted:
        return _install(registry, wanted, as_json=as_json)
    rows = [_agent_row(registry, name) for name in registry.names()]
    if as_json:
        _print_json(rows)
        return 0
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        known = ", ".join(row["api"]) or ("no model" if not row["calls_model"] else "not metered")
        click.echo(f"{click.style(row['name'].ljust(width), bold=True)}  {row['protocol']:<15}  {known}")
        click.echo(f"{'':<{width}}  {row['description']}")
        click.echo(f"{'':<{width}}  {click.style(row['status'], dim=True)}")
    return 0


def _agent_row(registry: Registry, name: str) -> dict[str, Any]:
    """What is known of one agent; of one that cannot work, why."""
    from orchestrator.install import installed

    row: dict[str, Any] = {"name": name, "protocol": "", "api": [], "calls_model": True, "description": ""}
    try:
        config = registry.get(name)
    except ConfigError as error:
        return {**row, "status": f"cannot work: {error}"}
    if config.install is None:
        status = "nothing to install"
    else:
        status = "installed" if installed(config) else f"installed on first use, or by: rollout agents --install {name}"
    return {
        **row,
        "protocol": config.protocol,
        "api": list(config.api),
        "calls_model": config.calls_model,
        "description": config.description,
        "status": status,
    }


def _install(registry: Registry, wanted: Sequence[str], *, as_json: bool) -> int:
    import anyio

    from orchestrator.install import ensure_installed

    places = {}
    for config in [registry.get(name) for name in wanted]:
        place = anyio.run(ensure_installed, config, lambda line: click.echo(line, err=True))
        places[config.name] = place.install
        if not as_json:
            click.echo(f"{config.name}: {place.install or 'nothing to install'}")
    if as_json:
        _print_json(places)
    return 0


@cli.command(short_help="Check a task, a scene or an agent's manifest.")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def validate(path: Path, *, as_json: bool) -> int:
    """Check a task, a folder of tasks, a rollout.toml, or an agent's manifest (.toml) before anybody runs it.

    What cannot work is an error, and the exit code 1; what is likely to be a surprise is a note. So is an agent of a
    task that is not known here: --role replaces it.
    """
    errors, notes = _findings(path)
    if as_json:
        _print_json({"path": str(path), "ok": not errors, "errors": errors, "notes": notes})
    else:
        for error in errors:
            click.echo(f"{click.style('error', fg='red')}  {error}")
        for note in notes:
            click.echo(f"{click.style('note', fg='yellow')}   {note}")
        if not errors:
            click.echo(f"{click.style('ok', fg='green')}     {path}")
    return 1 if errors else 0


def _findings(path: Path) -> tuple[list[str], list[str]]:
    """What cannot work, and what is worth knowing."""
    if path.suffix == ".toml" and path.name != "task.toml":
        try:
            if _is_scene(path):
                return [], _scene_findings(path)
            _agent(str(path), _nobody())
        except ConfigError as error:
            return [str(error)], []
        return [], []
    from orchestrator.scenes import director_of, scene_of
    from orchestrator.tasks import load_tasks
    from orchestrator.tasks import validate as validate_task

    folder = path.parent if path.name in {"task.toml", "task.md"} else path
    strangers: list[str] = []
    try:
        for task in load_tasks(folder):
            if (scene := scene_of(task)) is not None:
                strangers += _strangers(scene, director_of(task, scene), task.path)
    except ConfigError as error:
        errors = str(error).splitlines()
        return errors, [*strangers, *(finding for finding in validate_task(folder) if finding not in errors)]
    return [], [*strangers, *validate_task(folder)]


def _strangers(scene: Scene, director: object, task: Path) -> list[str]:
    """Roles of a task that are played by an agent of another harness: whoever runs it says by whom instead.

    Raises `ConfigError` for an agent that is known, and cannot work.
    """
    from orchestrator.registry import default_registry

    roles, known = _players_of(scene, director), default_registry().names()
    strange = [role for role in roles if isinstance(role.agent, str) and role.agent not in known]
    _check_players([role for role in roles if role not in strange], task / "task.md")
    return [
        f"{task / 'task.md'}: role {role.name!r}: the agent {role.agent!r} is not known here (see `rollout agents`); "
        f"give another one: rollout run {task} --role {role.name}=AGENT"
        for role in strange
    ]


def _is_scene(path: Path) -> bool:
    """Whether this is a `rollout.toml`, by its name or by what it holds, and not an agent's manifest."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return path.name == "rollout.toml" or any(line.startswith(("[[roles]]", "[[turns]]")) for line in text.splitlines())


def _scene_findings(path: Path) -> list[str]:
    """Check a `rollout.toml`, its agents among it. Raises `ConfigError` for what cannot work."""
    from orchestrator.scenes import load_rollout
    from orchestrator.tasks import load_task

    sys.path.insert(0, str(path.resolve().parent))
    config = load_rollout(path, variables=os.environ)
    _check_players(_players_of(config["scene"], config.get("director")), path)
    if "task" in config:
        load_task(config["task"])
    elif "prompt" not in config and any(turn.prompt is None for turn in config["scene"].turns):
        return [f"{path}: a turn has no prompt and the file names no task; `rollout run` will need one"]
    return []


def _players_of(scene: Scene, director: object) -> list[Role]:
    """All roles, the director's among them."""
    from orchestrator.config import DirectorRole

    return [*scene.roles, *([director.role] if isinstance(director, DirectorRole) else [])]


def _check_players(roles: Sequence[Role], path: Path) -> None:
    """Raise `ConfigError` when a role of the file `path` is played by an agent that there is not."""
    from orchestrator.registry import default_registry

    for role in roles:
        try:
            default_registry().resolve(role.agent)
        except ConfigError as error:
            raise ConfigError(f"{path}: role {role.name!r}: {error}") from error


def _nobody() -> Registry:
    from orchestrator.registry import Registry

    return Registry()


@cli.group(short_help="Write a new task, an agent's manifest, or a scene.")
def init() -> None:
    """Write a new task, the manifest of a new agent, or a scene (a rollout.toml), with comments, to start from."""


@init.command("task")
@click.argument("path", type=click.Path(path_type=Path))
@json_option
def init_task(path: Path, *, as_json: bool) -> int:
    """Write a new task into the folder PATH. As it is, `--agent oracle` solves it."""
    from orchestrator.tasks import scaffold_task

    return _written(
        scaffold_task(path), f"rollout validate {path} && rollout run {path} --agent oracle", as_json=as_json
    )


@init.command("agent")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--protocol",
    type=click.Choice(["acp", "session-factory"]),
    default="acp",
    show_default=True,
    help="A program that speaks ACP, or a Python callable.",
)
@json_option
def init_agent(path: Path, *, protocol: str, as_json: bool) -> int:
    """Write an agent's manifest to PATH (a .toml file; for a session factory, a Python module beside it)."""
    from orchestrator.scaffold import scaffold_agent

    files = scaffold_agent(path, protocol)
    model = " --model openai/gpt-5" if protocol == "acp" else ""
    then = f"rollout validate {files[0]} && rollout run demo --agent {files[0]}{model}"
    return _written(files, then, as_json=as_json)


@init.command("scene")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default=Path("rollout.toml"), metavar="[FILE]")
@json_option
def init_scene(path: Path, *, as_json: bool) -> int:
    """Write a scene of two roles to FILE (by default rollout.toml). As it is, it runs without a model."""
    from orchestrator.scaffold import scaffold_scene

    file = scaffold_scene(path)
    return _written([file], f"rollout validate {file} && rollout run demo --scene {file}", as_json=as_json)


def _written(files: Sequence[Path], then: str, *, as_json: bool) -> int:
    if as_json:
        _print_json({"written": [str(file) for file in files], "next": then})
    else:
        for file in files:
            click.echo(f"wrote {file}")
        click.echo(f"next: {then}")
    return 0


# --- a second terminal -----------------------------------------------------------------------------------------


FOLDER = click.argument("folder", type=click.Path(file_okay=False, path_type=Path))


@cli.command(short_help="Cancel the turn in flight of a rollout that runs.")
@FOLDER
@json_option
def interrupt(folder: Path, *, as_json: bool) -> int:
    """Cancel the turn that is in flight in the rollout of FOLDER; it is captured, and the rollout goes on."""
    return _asked(folder, "interrupt", as_json=as_json)


@cli.command(short_help="Cancel a rollout that runs, and wait until it is closed.")
@FOLDER
@json_option
def cancel(folder: Path, *, as_json: bool) -> int:
    """Cancel the rollout of FOLDER, wherever it stands: captured, given back, closed. This waits until it is.

    ^C ends the waiting, not the cancelling. A second cancel changes nothing, and waits too.
    """
    return _asked(folder, "cancel", as_json=as_json)


@cli.command(short_help="Hold a rollout that runs before its next turn.")
@FOLDER
@json_option
def pause(folder: Path, *, as_json: bool) -> int:
    """Hold the rollout of FOLDER before its next turn; its own clock stands still until `rollout resume`."""
    return _asked(folder, "pause", as_json=as_json)


@cli.command(epilog=EPILOG, short_help="Go on with a rollout that is paused, was stopped, or was killed.")
@FOLDER
@click.option("-e", "--env", multiple=True, metavar="K=V", help="What was given so and not written down, once more.")
@click.option("--upstream-url", metavar="URL", help="Where the model is served now.")
@click.option("--ask-again", is_flag=True, help="Ask a turn that was cut off once more: by itself it counts as taken.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing until it is over.")
@json_option
def resume(
    folder: Path, *, env: tuple[str, ...], upstream_url: str | None, ask_again: bool, quiet: bool, as_json: bool
) -> int:
    """Let the rollout of FOLDER go on: in the process that holds it paused, or else in this one.

    One that was stopped (^C) or whose process was killed is taken over from its journal: same plan, same sandbox, same
    folder, with what was asked for when it began. Values of --env were not written down; give them again. A turn that
    was cut off counts as taken, unless it is asked again. Agents begin a new session: their files are there, what they
    remembered is not.
    """
    from orchestrator import control

    folder = folder.resolve()
    if control.is_driven(folder):
        return _asked(folder, "resume", as_json=as_json)
    from orchestrator.recovery import resume as go_on
    from orchestrator.watch import Follower

    seen = Follower(folder)
    seen.look()
    made = _made(folder)
    with _standing_in(made["cwd"]):
        config = _asked_again(folder, made, env, upstream_url)

        async def begin() -> Rollout:
            return await go_on(folder, config, ask_again=ask_again)

        try:
            result = _drive(begin, seen, quiet=quiet)
        except KeyboardInterrupt:
            click.echo(f"rollout: stopped before it went on; rollout resume {folder}", err=True)
            return ENDINGS[None]
    return _outcome(result, as_json=as_json)


def _made(folder: Path) -> dict[str, Any]:
    """What `_made_from` wrote of the rollout in `folder`."""
    from orchestrator.show import story_of

    made: dict[str, Any] = story_of(folder).about.get("made_from") or {}
    if "argv" not in made:
        raise ConfigError(
            f"rollout {folder.name} was not begun by `rollout run`: the program that began it goes on with it, by "
            "orchestrator.recovery.resume"
        )
    return made


@contextlib.contextmanager
def _standing_in(folder: str) -> Iterator[None]:
    """The paths of a rollout are relative to where it was begun."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(contextlib.chdir(folder))
        except OSError as error:
            raise ConfigError(f"{folder}, where it was begun, is not there: {error.strerror}") from error
        yield


def _asked_again(
    folder: Path, made: Mapping[str, Any], env: tuple[str, ...], upstream_url: str | None
) -> RolloutConfig:
    """The config with which the rollout of `folder` began. Raises `ConfigError` for what is missing."""
    hidden = {name or "--upstream-url" for name in made["not_written_down"]}
    given = {one.partition("=")[0] for one in env} | ({"--upstream-url"} if upstream_url else set())
    missing = sorted(hidden - given)
    if missing:
        how = " ".join(name if name.startswith("--") else f"--env {name}=VALUE" for name in missing)
        raise ConfigError(f"rollout {folder.name} was given what is never written down; give it again: {how}")
    variables = [*(name for name in made["env"] if name not in given), *env]
    again = [word for one in variables for word in ("--env", one)]
    again += ["--upstream-url", upstream_url] if upstream_url else []
    task = ["--", made["task"]] if made["task"] is not None else []
    return _configured(run.make_context("run", [*made["argv"], *again, *task]))


def _asked(folder: Path, what: Any, *, as_json: bool) -> int:
    """Ask whoever drives it; what it said. A cancel is waited for."""
    from orchestrator.control import ask

    with ask(folder, what) as (answer, states):
        state = answer.state
        if not as_json:
            click.echo(f"{folder.name}  {answer.said}")
        try:
            for state in states if what == "cancel" else ():
                click.echo(f"{folder.name}  {state}{_at_most(state, {})}", err=True)
        except KeyboardInterrupt:
            click.echo(f"rollout: no longer waiting; it is being cancelled all the same, in {state}", err=True)
            return 0
    if as_json:
        _print_json({"rollout": folder.name, "state": state, "changed": answer.changed, "said": answer.said})
    return 0


def _at_most(state: str, own: Mapping[str, float]) -> str:
    """How long a state may take: so long it is waited for, and not longer. `own`: the limits of its config."""
    from states.deadlines import DEADLINES

    limit = own.get(state, DEADLINES.get(state))
    return "" if limit is None else f" (at most {limit:g} s)"


# --- what was left -------------------------------------------------------------------------------------------------


@cli.command(short_help="Close what a killed process left behind.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), default=Path("runs"))
@click.option("--sandbox", metavar="KIND", help="Give back what dead orchestrators left at this kind of sandbox.")
@click.option("--sandbox-option", "sandbox_options", multiple=True, metavar="K=V", help="A word of that sandbox's own.")
@json_option
def reap(folder: Path, *, sandbox: str | None, sandbox_options: tuple[str, ...], as_json: bool) -> int:
    """Take over rollouts whose process was killed: capture what is on disk, give everything back, close them.

    FOLDER is a rollout's folder, or one that holds several (by default `runs`). What is closed and holds nothing is
    left alone, and so is what another process drives. With --sandbox no journal is needed: sandboxes of that kind are
    found by the labels that they carry.
    """
    if sandbox is not None:
        return _swept(sandbox, _pairs("--sandbox-option", sandbox_options), as_json=as_json)
    if not folder.exists():
        raise ConfigError(f"{folder}: there is no such folder")
    rows = [_reaped(one) for one in ([folder] if (folder / "journal.jsonl").is_file() else _left_in(folder))]
    if as_json:
        _print_json(rows)
    else:
        for row in rows:
            colour = "red" if row["error"] else "green"
            idle = "" if row["changed"] or row["error"] else " already, and it holds nothing: nothing to reap"
            click.echo(f"{row['rollout']}  {click.style(row['error'] or row['state'], fg=colour)}{idle}")
        if not rows:
            click.echo("nothing to reap")
    return 1 if any(row["error"] for row in rows) else 0


@cli.command("exec", short_help="Run a command in a sandbox that was kept.")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("command", nargs=-1, required=True, metavar="-- COMMAND...")
@click.option("--role", metavar="NAME", help="As this role's agent, with its HOME and /tmp; else as the verifier.")
@json_option
def exec_(folder: Path, command: tuple[str, ...], *, role: str | None, as_json: bool) -> int:
    """Look into the sandbox that the rollout in FOLDER kept (--keep-sandbox): it is kept as it was.

    Exits with the command's own code.
    """
    import anyio

    from orchestrator.kept import exec_in

    _holds_a_rollout(folder)
    result = anyio.run(lambda: exec_in(folder, command, role=role))
    if as_json:
        _print_json({"stdout": result.stdout, "stderr": result.stderr, "exit_code": result.return_code})
    else:
        click.echo(result.stdout, nl=False)
        click.echo(result.stderr, nl=False, err=True)
    return result.return_code if result.return_code >= 0 else 128 - result.return_code


def _swept(kind: str, options: Mapping[str, str], *, as_json: bool) -> int:
    """Give back what dead orchestrators left at one kind of sandbox."""
    import anyio

    from orchestrator.sandboxes import sweep

    said = anyio.run(sweep, kind, options)
    if as_json:
        _print_json(list(said))
    else:
        click.echo("\n".join(said) or "nothing to reap")
    return 0


def _left_in(folder: Path) -> list[Path]:
    """The rollouts in a folder that are not closed, or still hold something."""
    from orchestrator.show import rollouts_in, story_of
    from states.machine import CLOSED

    left = []
    for one in rollouts_in(folder):
        try:
            result = story_of(one).result
        except OrchestratorError as error:
            click.echo(f"rollout: {one} is left alone: {error}", err=True)
            continue
        if result.state not in CLOSED or result.leaked:
            left.append(one)
    return left


def _reaped(folder: Path) -> dict[str, Any]:
    """Reap one; what came of it."""
    import anyio

    from orchestrator.journal import read_journal
    from orchestrator.recovery import reap as reap_rollout

    row: dict[str, Any] = {"rollout": folder.name, "state": None, "reward": None, "leaked": [], "changed": False}
    try:
        before = len(read_journal(folder))
        result = anyio.run(reap_rollout, folder)
        changed = len(read_journal(folder)) > before
    except OrchestratorError as error:
        return {**row, "error": str(error)}
    return {
        "rollout": result.rollout,
        "state": result.state,
        "reward": result.reward,
        "leaked": list(result.leaked),
        "changed": changed,
        "error": f"still held: {', '.join(result.leaked)}" if result.leaked else None,
    }


# --- a sandbox of one's own ----------------------------------------------------------------------------------------


@cli.command(short_help="Whether a sandbox does what rollouts need.")
@click.argument("sandbox")
@click.option("--sandbox-option", "sandbox_options", multiple=True, metavar="K=V", help="A word of that sandbox's own.")
@click.option("--image", metavar="IMAGE", help="What it runs, where it runs images.")
@click.option("-k", "word", default="", metavar="WORD", help="Only clauses whose name has this in it.")
@json_option
def conformance(sandbox: str, *, sandbox_options: tuple[str, ...], image: str | None, word: str, as_json: bool) -> int:
    """Check that SANDBOX (local, fake, or module:Class) does what rollouts need, clause by clause.

    Real sandboxes are made, used and given back. Exits with 1 when a clause fails.
    """
    import uuid

    import anyio

    from orchestrator.conformance import SANDBOX_CLAUSES, Outcome, run_clauses
    from orchestrator.sandboxes import SandboxSpec, check_made, check_sandbox, lacks, make_sandbox

    options = _pairs("--sandbox-option", sandbox_options)
    check_sandbox(sandbox, options)
    check_made(SandboxSpec(sandbox, "conformance", image=image, options=options, note=_say_note))
    clauses = [clause for clause in SANDBOX_CLAUSES if word in clause.name]
    if not clauses:
        raise ConfigError(f"-k {word}: no clause has that in its name")

    def make() -> Sandbox:
        name = f"conformance-{uuid.uuid4().hex[:8]}"
        return make_sandbox(SandboxSpec(sandbox, name, image=image, options=options))

    def tell(outcome: Outcome) -> None:
        if not as_json:
            click.echo(
                f"{click.style('pass', fg='green') if outcome.passed else click.style('FAIL', fg='red')}  ", nl=False
            )
            click.echo(f"{outcome.clause.name}: {outcome.clause.asserts if outcome.passed else outcome.said}")

    async def run_all() -> tuple[Outcome, ...]:
        return await run_clauses(clauses, make, lacks=lacks(sandbox), tell=tell)

    outcomes = anyio.run(run_all)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if as_json:
        rows = [
            {"clause": o.clause.name, "asserts": o.clause.asserts, "passed": o.passed, "said": o.said} for o in outcomes
        ]
        _print_json({"sandbox": sandbox, "clauses": rows, "left_out": len(clauses) - len(outcomes)})
    else:
        left_out = len(clauses) - len(outcomes)
        beside = f"; {left_out} left out, which it cannot meet by design" if left_out else ""
        click.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} clauses hold{beside}")
    return 1 if failed else 0


# --- the machine it runs on ------------------------------------------------------------------------------------


@cli.command(short_help="What this machine can and cannot do.")
@json_option
def doctor(*, as_json: bool) -> int:
    """What this machine can and cannot do, found out by trying, and how to fix it.

    Exits with 1 when rollouts in the local sandbox cannot work; what is merely missing costs nothing.
    """
    from orchestrator import doctor as doctoring

    findings = doctoring.examine()
    if as_json:
        import attrs

        _print_json({"ok": doctoring.healthy(findings), "findings": [attrs.asdict(finding) for finding in findings]})
    else:
        click.echo(doctoring.report(findings, click.style), nl=False)
    return 0 if doctoring.healthy(findings) else 1


if __name__ == "__main__":
    sys.exit(main())
