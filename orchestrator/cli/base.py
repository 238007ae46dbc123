"""What the commands share: the group that they are in, exit codes, options, and how a document is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from states.errors import ConfigError

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

EPILOG = "\b\nExit codes:\n" + "\n".join(f"  {code}  {meaning}" for code, meaning in EXIT_CODES.items())


def print_json(document: Any) -> None:
    """The one document of `--json`, on stdout."""
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


FOLDER = click.argument("folder", type=click.Path(file_okay=False, path_type=Path))


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """`K=V` of an option that can be repeated."""
    found = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not key or not equals:
            raise ConfigError(f"{option} {one}: give {'FROM=TO' if 'map' in option else 'K=V'}")
        found[key] = value
    return found


def holds_a_rollout(folder: Path) -> None:
    """Raise `ConfigError` where there is no journal."""
    if not (folder / "journal.jsonl").is_file():
        raise ConfigError(f"{folder} holds no rollout: there is no journal.jsonl in it")


def at_most(state: str, own: Mapping[str, float]) -> str:
    """How long a state may take: so long it is waited for, and not longer. `own`: the limits of its config."""
    from states.deadlines import DEADLINES

    limit = own.get(state, DEADLINES.get(state))
    return "" if limit is None else f" (at most {limit:g} s)"
