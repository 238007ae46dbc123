"""The command line `rollout`: thin. What a command means is the library's; here are its words, its exit codes and ^C.

Nothing is imported for a command that is not given, so that `rollout --help` is quick. One JSON document goes to stdout
under `--json`; what happens meanwhile, and what went wrong, goes to stderr, in a sentence and never as a traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from orchestrator.cli import authoring, examining, leftovers, looking, running, steering
from orchestrator.cli.base import ENDINGS, EXIT_CODES, cli, print_json
from states.errors import ConfigError, OrchestratorError

__all__ = ["COMMANDS", "ENDINGS", "EXIT_CODES", "cli", "main"]

COMMANDS = (running, steering, leftovers, looking, authoring, examining)
"""The modules of the commands: each adds its own to the group `cli` when it is imported."""


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
        print_json({"error": {"type": type(error).__name__, "message": message, "exit_code": code}})
    return code
