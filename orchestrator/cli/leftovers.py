"""`reap` and `exec`: what was killed, and what was kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.base import cli, holds_a_rollout, json_option, pairs, print_json
from states.errors import ConfigError, OrchestratorError


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
        return _swept(sandbox, pairs("--sandbox-option", sandbox_options), as_json=as_json)
    if not folder.exists():
        raise ConfigError(f"{folder}: there is no such folder")
    rows = [_reaped(one) for one in ([folder] if (folder / "journal.jsonl").is_file() else _left_in(folder))]
    if as_json:
        print_json(rows)
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

    holds_a_rollout(folder)
    result = anyio.run(lambda: exec_in(folder, command, role=role))
    if as_json:
        print_json({"stdout": result.stdout, "stderr": result.stderr, "exit_code": result.return_code})
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
        print_json(list(said))
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
