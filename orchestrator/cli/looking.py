"""`show`, `diagram` and `export`: what happened, told, drawn, or in the format of another program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from orchestrator.cli.base import cli, holds_a_rollout, json_option, print_json
from states.errors import ConfigError


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
        print_json(story.to_json())
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
        print_json(rows)
    else:
        click.echo(telling.table(rows), nl=False)
    return 0


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
        holds_a_rollout(folder)
    chosen: Any = form or _diagram_format(output)
    text = diagram_of(folder, format=chosen)
    if output is not None:
        _write(output, text)
    if as_json:
        print_json({"format": chosen, "output": str(output) if output else None, "diagram": text})
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


EXPORTS = ("atif", "inspect", "otel", "verifiers-jsonl", "benchflow")
"""The formats of `rollout export`: those of `orchestrator.export`, which is not imported for a list of words."""


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
        print_json({"to": to, "output": str(written)})
    else:
        click.echo(f"wrote {written}")
    return 0
