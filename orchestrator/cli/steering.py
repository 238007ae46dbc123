"""`interrupt`, `cancel` and `pause`: a rollout that another terminal drives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from orchestrator.cli.base import FOLDER, at_most, cli, json_option, print_json


@cli.command(short_help="Cancel the turn in flight of a rollout that runs.")
@FOLDER
@json_option
def interrupt(folder: Path, *, as_json: bool) -> int:
    """Cancel the turn that is in flight in the rollout of FOLDER; it is captured, and the rollout goes on."""
    return asked(folder, "interrupt", as_json=as_json)


@cli.command(short_help="Cancel a rollout that runs, and wait until it is closed.")
@FOLDER
@json_option
def cancel(folder: Path, *, as_json: bool) -> int:
    """Cancel the rollout of FOLDER, wherever it stands: captured, given back, closed. This waits until it is.

    ^C ends the waiting, not the cancelling. A second cancel changes nothing, and waits too.
    """
    return asked(folder, "cancel", as_json=as_json)


@cli.command(short_help="Hold a rollout that runs before its next turn.")
@FOLDER
@json_option
def pause(folder: Path, *, as_json: bool) -> int:
    """Hold the rollout of FOLDER before its next turn; its own clock stands still until `rollout resume`."""
    return asked(folder, "pause", as_json=as_json)


def asked(folder: Path, what: Any, *, as_json: bool) -> int:
    """Ask whoever drives it; what it said. A cancel is waited for."""
    from orchestrator.control import ask

    with ask(folder, what) as (answer, states):
        state = answer.state
        if not as_json:
            click.echo(f"{folder.name}  {answer.said}")
        try:
            for state in states if what == "cancel" else ():
                click.echo(f"{folder.name}  {state}{at_most(state, {})}", err=True)
        except KeyboardInterrupt:
            click.echo(f"rollout: no longer waiting; it is being cancelled all the same, in {state}", err=True)
            return 0
    if as_json:
        print_json({"rollout": folder.name, "state": state, "changed": answer.changed, "said": answer.said})
    return 0
