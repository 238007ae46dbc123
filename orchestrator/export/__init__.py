"""Exports: a rollout's folder in the formats that others read. Each is a fold of what is in the folder, nothing else.

    document(folder, "atif")                    the document as JSON values
    export(folder, "atif", "trajectory.json")   the same, written

They hold for every rollout: one that is over, was cancelled, void, killed or still runs is exported as far as it came,
and says what it is. Secrets are in none of them, since none is in the folder. One module a format, each with one
function `to_<format>`; nothing of a host is imported, so nothing of a host has to be installed.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import attrs

from orchestrator._words import shown
from orchestrator.export.recorded import Recorded, Source, recorded
from orchestrator.journal import encode_any
from orchestrator.show import rollouts_in
from states.errors import ConfigError

__all__ = ["FORMATS", "Format", "FormatName", "Recorded", "Source", "document", "export", "files_of", "recorded"]

FormatName = Literal["atif", "inspect", "otel", "verifiers-jsonl", "benchflow"]


@attrs.frozen
class Format:
    """What a format is: its name, who reads it, and whether it is one JSON document, a line of many, or a folder."""

    name: FormatName
    read_by: str
    kind: Literal["json", "jsonl", "folder"]
    made_by: str
    suffix: str = ""
    """What the name of its file has to end with, where its readers go by that."""

    def fold(self, source: Source) -> Any:
        """The document: a dict; of a folder, the bytes of its files by their paths."""
        module, _, function = self.made_by.partition(":")
        return getattr(importlib.import_module(module), function)(source)


FORMATS: Mapping[str, Format] = {
    form.name: form
    for form in (
        Format("atif", "Harbor, and what else reads trajectories", "json", "orchestrator.export.atif:to_atif"),
        Format(
            "inspect", "Inspect's viewer and API", "json", "orchestrator.export.inspect_log:to_inspect", suffix=".json"
        ),
        Format("otel", "OpenTelemetry collectors: OTLP JSON", "json", "orchestrator.export.otel:to_otel"),
        Format(
            "verifiers-jsonl",
            "verifiers and trainers: one line a rollout",
            "jsonl",
            "orchestrator.export.verifiers:to_verifiers",
        ),
        Format(
            "benchflow",
            "what reads BenchFlow's rollout folders",
            "folder",
            "orchestrator.export.benchflow:to_benchflow",
        ),
    )
}
assert tuple(FORMATS) == get_args(FormatName)


def document(source: Source, to: str) -> Any:
    """A rollout in a format: JSON values; for a folder, the bytes of each file by its path.

    A format of lines gives those of every rollout in a folder that holds several (`runs`), the oldest first.

    Raises:
        ConfigError: there is no such format, or no rollout in that folder, or no folder (`out=None`).
        JournalError: a file in the folder cannot be read.
    """
    form = _format(to)
    if source is None:
        raise ConfigError("the rollout kept nothing on disk (out=None), and an export is made of that: run it with out")
    if not isinstance(source, str | Path | Recorded):
        raise ConfigError(f"an export is made of a rollout's folder (result.folder), not of {shown(source)}")
    if form.kind == "jsonl":
        return [line for rollout in _rollouts(source) for line in form.fold(rollout)]
    return form.fold(source)


def _rollouts(source: Source) -> list[Source]:
    if isinstance(source, Recorded) or (Path(source) / "journal.jsonl").is_file():
        return [source]
    return [*rollouts_in(Path(source))] or [source]


def files_of(source: Source, to: str) -> Mapping[str, bytes]:
    """The bytes that `export` writes, by their path in the folder that it makes; of a single file under `.`."""
    form, made = _format(to), document(source, to)
    if form.kind == "folder":
        files: Mapping[str, bytes] = made
        return files
    lines = made if form.kind == "jsonl" else [made]
    return {".": b"".join(encode_any(line) + b"\n" for line in lines)}


def export(source: Source, to: str, out: Path | str) -> Path:
    """Write a rollout in a format to `out`, a file or (see `Format.kind`) a folder, and return its path.

    Example:
        >>> export("runs/47ba59e33813", "atif", "trajectory.json")  # doctest: +SKIP
        PosixPath('trajectory.json')

    Raises:
        ConfigError: as `document`; or `out` is there already, or cannot be written.
        JournalError: as `document`.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} is there already, and an export overwrites nothing: give another name, or remove it")
    form = _format(to)
    if not out.name.endswith(form.suffix):
        raise ConfigError(f"{out}: whoever reads {to} goes by a file's name, which has to end with {form.suffix}")
    files = files_of(source, to)
    try:
        _write(out, files)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}") from error
    return out


def _format(to: str) -> Format:
    if to not in FORMATS:
        raise ConfigError(f"no export format {to!r}; there are {', '.join(FORMATS)}")
    return FORMATS[to]


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    """Write it in a folder of ours beside its place, then move it: what stands at `out` is whole."""
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
        draft = Path(folder) / "draft"
        for name, data in files.items():
            file = draft / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        draft.rename(out)
