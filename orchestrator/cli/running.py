"""`run` and `resume`: a rollout in this process, with ^C, a view of it, and what is said in the end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.base import ENDINGS, EPILOG, FOLDER, at_most, cli, json_option, print_json
from orchestrator.cli.options import configured
from orchestrator.cli.steering import asked
from states.errors import ConfigError, OrchestratorError

if TYPE_CHECKING:
    from orchestrator.config import RolloutConfig
    from orchestrator.result import RolloutResult
    from orchestrator.rollout import Rollout
    from orchestrator.watch import Follower


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

    rollout = Rollout(configured(context))

    async def begin() -> Rollout:
        return rollout

    return _outcome(_drive(begin, None, quiet=quiet), as_json=as_json)


def _outcome(result: RolloutResult, *, as_json: bool) -> int:
    """Say what came of it; the exit code."""
    page = _draw(result)
    if as_json:
        print_json(result.to_json())
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
    return f"{state}{at_most(state, rollout.config.deadlines)}{what}; kill -9 leaves it to `rollout reap`"


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
    """A line a transition, and a line a note while the sandbox comes up, for logs."""
    import anyio

    from orchestrator.watch import POLL_SEC

    try:
        while not follower.closed:
            _log_new(follower)
            await anyio.sleep(POLL_SEC)
    finally:
        _log_new(follower)


def _log_new(follower: Follower) -> None:
    from orchestrator.show import one_line

    for new in follower.look():
        noted = new["type"] == "note"
        said = one_line(new["text"], 400) if noted else f"{new['source']} -> {new['dest']}  ({new['event']})"
        click.echo(f"{follower.rollout}  {said}", err=True)


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
        return asked(folder, "resume", as_json=as_json)
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
    return configured(run.make_context("run", [*made["argv"], *again, *task]))
