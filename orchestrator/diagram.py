"""Diagrams of the machine and of a run, drawn from the table itself, so that they cannot drift from it.

    table (and, for a run, its journal)  ->  `Diagram`, a neutral model  ->  mermaid, dot, svg, html, text, ...

The text forms are the same bytes each time. The SVG has a layout made by hand, needs no graphviz, and a test fails when
the table has an edge for which it has no line. `python -m orchestrator.diagram --write diagrams` renders the folder
`diagrams/`; `--check` compares and exits 1 where a file differs.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs

from orchestrator.visits import Paint, duration
from states import events as ev
from states import machine
from states.deadlines import BOUNDED_BY_ROLLOUT, DEADLINES, EXPIRY, Deadline, crashed
from states.errors import ConfigError, JournalError
from states.journal import Record

if TYPE_CHECKING:
    from orchestrator.result import RolloutResult
    from orchestrator.rollout import Rollout

Format = Literal["mermaid", "dot", "svg", "html", "text", "table", "faults"]

GROUPS: dict[str, tuple[str, ...]] = {
    "session": machine.SESSION,
    "capturing": machine.CAPTURING,
    "closed": machine.CLOSED,
}
"""States that are drawn inside a common frame, and share arrows where all of them have them."""

FROM_OUTSIDE = tuple(event.__name__ for event in (ev.Cancelled, ev.SandboxFailed, ev.Recovered))
"""Events that are legal in every live state: drawn where a run took them, and otherwise told in a legend."""

# --- the neutral model ---------------------------------------------------------------------------------------


@attrs.frozen
class Label:
    """One reason to go: the event, its guard and the ending which it sets."""

    event: str
    guard: str = ""
    ending: str = ""

    def __str__(self) -> str:
        return self.event + (f" [{self.guard}]" if self.guard else "") + (f" !{self.ending}" if self.ending else "")


@attrs.frozen
class Arrow:
    """All labels from one node to another. A node is a state, or a group whose states all have the label."""

    source: str
    target: str
    labels: tuple[Label, ...]
    counts: Mapping[str, int] = attrs.field(factory=dict)
    """How often a run took it, by event."""

    @property
    def taken(self) -> int:
        """How often a run took it."""
        return sum(self.counts.values())

    @property
    def words(self) -> tuple[str, ...]:
        """Its events for a reader: of an arrow that a run took, those that led along it."""
        if not self.taken:
            return self.events
        times = {event: f" ×{n}" if n > 1 else "" for event, n in self.counts.items()}
        return tuple(f"{event}{times[event]}" for event in self.events if event in times)

    @property
    def events(self) -> tuple[str, ...]:
        """The events, each once."""
        return tuple(dict.fromkeys(label.event for label in self.labels))


@attrs.frozen
class Diagram:
    """What renderers draw: the states in the order of the table, the arrows, and a run's paint if there is one."""

    arrows: tuple[Arrow, ...]
    outside: tuple[Arrow, ...]
    paint: Paint | None = None

    @property
    def title(self) -> str:
        """What it shows. An id is an embedder's choice, so what could end a string in some format is replaced."""
        if self.paint is None:
            return "Rollout"
        return "Rollout " + "".join(c if c.isalnum() or c in "._:/@-" else "?" for c in self.paint.rollout)

    def visited(self, state: str) -> int:
        """How often the painted run entered a state."""
        return self.paint.visits.get(state, 0) if self.paint else 0


def extract(paint: Paint | None = None) -> Diagram:
    """The model of the machine, painted with a run where one is given."""
    inner: dict[tuple[str, str], list[Label]] = defaultdict(list)
    outer: dict[tuple[str, str], list[Label]] = defaultdict(list)
    for row in machine.TABLE:
        label = Label(row.event.__name__, row.guard.__name__ if row.guard else "", row.ending or "")
        into = outer if label.event in FROM_OUTSIDE else inner
        for source in _grouped(row.sources):
            if row.to is not None:
                into[source, row.to].append(label)
    return Diagram(_arrows(_same_target(inner), paint), _arrows(outer, paint), paint)


def _grouped(sources: tuple[str, ...]) -> list[str]:
    """Sources with each group that is complete in place of its states."""
    names = list(sources)
    for group, states in GROUPS.items():
        if set(states) <= set(names):
            names[names.index(states[0])] = group
            names = [name for name in names if name not in states]
    return names


def _same_target(found: dict[tuple[str, str], list[Label]]) -> dict[tuple[str, str], list[Label]]:
    """Arrows by one event into each state of a group, joined: the guards only say into which."""
    joined = {key: list(labels) for key, labels in found.items()}
    for group, states in GROUPS.items():
        for source in dict.fromkeys(source for source, _ in found):
            per_state = [{label.event for label in joined.get((source, state), [])} for state in states]
            for event in sorted(set.intersection(*per_state)):
                for state in states:
                    joined[source, state] = [label for label in joined[source, state] if label.event != event]
                joined.setdefault((source, group), []).append(Label(event))
    return {key: labels for key, labels in joined.items() if labels}


def _arrows(found: dict[tuple[str, str], list[Label]], paint: Paint | None) -> tuple[Arrow, ...]:
    return tuple(
        Arrow(source, target, tuple(labels), _counts(source, target, labels, paint))
        for (source, target), labels in found.items()
    )


def _counts(source: str, target: str, labels: Sequence[Label], paint: Paint | None) -> dict[str, int]:
    if paint is None:
        return {}
    sources, targets = GROUPS.get(source, (source,)), GROUPS.get(target, (target,))
    counts: Counter[str] = Counter()
    for (a, event, b), times in paint.edges.items():
        if a in sources and b in targets and event in {label.event for label in labels}:
            counts[event] += times
    return dict(counts)


# --- text renderers ------------------------------------------------------------------------------------------


def _alias(name: str) -> str:
    return name.replace("/", "_")


def to_mermaid(diagram: Diagram) -> str:
    """A `stateDiagram-v2`, as GitHub and most documentation tools draw it."""
    lines = ["---", f"title: {diagram.title}", "---", "stateDiagram-v2", "    direction LR"]
    for group, states in GROUPS.items():
        lines.append(f"    state {group} {{")
        lines += [f'        state "{_stay(diagram, state)}" as {_alias(state)}' for state in states]
        lines.append("    }")
    for state in machine.STATES:
        if "/" not in state and diagram.visited(state):
            lines.append(f'    state "{_stay(diagram, state)}" as {state}')
    lines.append(f"    [*] --> {machine.INITIAL}")
    for arrow in _drawn(diagram):
        lines.append(f"    {_alias(arrow.source)} --> {_alias(arrow.target)}: {', '.join(arrow.words)}")
    lines.append("    closed --> [*]")
    if diagram.paint is None:
        lines += ["    note right of closed", *(f"        {line}" for line in OUTSIDE_NOTE), "    end note"]
    else:
        visited = [_alias(state) for state in machine.STATES if diagram.visited(state)]
        lines.append("    classDef visited stroke:#2563eb,stroke-width:3px")
        lines.append(f"    class {','.join(visited)} visited")
    return "\n".join(lines) + "\n"


OUTSIDE_NOTE = (
    "From outside, in every live state:",
    "Cancelled: what runs is captured and released, then closed/cancelled",
    "SandboxFailed: the same, then closed/failed",
    "Recovered (after kill -9): goes on where no live agent is needed",
)


def _drawn(diagram: Diagram) -> tuple[Arrow, ...]:
    """The inner arrows, and of those from outside the ones that a run took."""
    return (*diagram.arrows, *(arrow for arrow in diagram.outside if arrow.taken))


def _stay(diagram: Diagram, state: str) -> str:
    times = diagram.visited(state)
    if not times or diagram.paint is None:
        return state
    return f"{state} ({f'{times} ×, ' if times > 1 else ''}{duration(diagram.paint.seconds[state])})"


def to_dot(diagram: Diagram) -> str:
    """Graphviz text: `dot -Tsvg`. Groups are clusters."""
    lines = [
        "digraph rollout {",
        "  compound=true; rankdir=LR; splines=spline; nodesep=0.4; ranksep=0.6;",
        f'  label="{diagram.title}"; labelloc=t; fontname="Helvetica";',
        '  node [shape=box, style="rounded", fontname="Helvetica", fontsize=11];',
        '  edge [fontname="Helvetica", fontsize=9];',
    ]
    for group, states in GROUPS.items():
        lines.append(f'  subgraph "cluster_{group}" {{')
        lines.append(f'    label="{group}"; style=rounded; color=gray;')
        lines += [f"    {_dot_node(diagram, state)}" for state in states]
        lines.append("  }")
    lines += [f"  {_dot_node(diagram, state)}" for state in machine.STATES if "/" not in state]
    lines += ['  start [shape=point, width=0.15, label=""];', f'  start -> "{machine.INITIAL}";']
    lines += [_dot_edge(arrow) for arrow in _drawn(diagram)]
    return "\n".join([*lines, "}"]) + "\n"


def _dot_node(diagram: Diagram, state: str) -> str:
    painted = ', color="#2563eb", penwidth=2' if diagram.visited(state) else ""
    shape = ", peripheries=2" if state in machine.CLOSED else ""
    return f'"{state}" [label="{_stay(diagram, state)}"{shape}{painted}];'


def _dot_edge(arrow: Arrow) -> str:
    label = "\\n".join(arrow.words)
    attributes = [f'label="{label}"']
    if arrow.source in GROUPS:
        attributes.append(f'ltail="cluster_{arrow.source}"')
    if arrow.target in GROUPS:
        attributes.append(f'lhead="cluster_{arrow.target}"')
    if arrow.taken:
        attributes += ['color="#2563eb"', "penwidth=2"]
    source, target = (GROUPS.get(name, (name,))[0] for name in (arrow.source, arrow.target))
    return f'  "{source}" -> "{target}" [{", ".join(attributes)}];'


def to_text(diagram: Diagram) -> str:
    """Plain lines: every arrow; of a run, its way with the seconds since it began."""
    if diagram.paint is None:
        arrows = (*diagram.arrows, *diagram.outside)
        return "".join(f"{arrow.source} --{', '.join(arrow.events)}--> {arrow.target}\n" for arrow in arrows)
    path = diagram.paint.path
    lines = [diagram.title]
    for visit in path:
        spent = "" if visit.event is None else f"{duration(visit.seconds):>10}  {visit.event.name}"
        lines.append(f"{visit.entered - path[0].entered:>9.3f} s  {visit.state:<18}{spent}".rstrip())
    return "\n".join(lines) + "\n"


def to_table(diagram: Diagram) -> str:
    """Every row of the table as Markdown; for a run, its states and how long they took."""
    if diagram.paint is not None:
        return _run_table(diagram, diagram.paint)
    edges = sum(len(row.sources) for row in machine.TABLE)
    lines = [
        "# Transitions",
        "",
        f"{len(machine.TABLE)} rows, {edges} edges, {len(machine.EVENTS)} events, {len(machine.STATES)} states.",
        "",
        "Rows with the same event and source are tried from top to bottom; the first ending that is set wins.",
        "*stays*: the event is journaled, and the handler that runs is not disturbed.",
        "",
        "| event | from | to | guard | ending |",
        "|---|---|---|---|---|",
    ]
    for row in machine.TABLE:
        cells = (
            row.event.__name__,
            ", ".join(_grouped(row.sources)),
            row.to or "*stays*",
            row.guard.__name__ if row.guard else "",
            row.ending or "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Events", "", "| event | what happened |", "|---|---|"]
    lines += [f"| {name} | {_first_line(event)} |" for name, event in machine.EVENTS.items()]
    lines += ["", "## Guards", "", "| guard | holds when |", "|---|---|"]
    guards = dict.fromkeys(row.guard for row in machine.TABLE if row.guard)
    lines += [f"| {guard.__name__} | {_first_line(guard)} |" for guard in guards]
    return "\n".join(lines) + "\n"


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _run_table(diagram: Diagram, paint: Paint) -> str:
    lines = [f"# {diagram.title}", "", "| state | visits | time |", "|---|---:|---:|"]
    visited = [state for state in machine.STATES if diagram.visited(state)]
    lines += [f"| {state} | {paint.visits[state]} | {duration(paint.seconds[state])} |" for state in visited]
    lines += ["", "| from | event | to | times |", "|---|---|---|---:|"]
    lines += [f"| {a} | {event} | {b} | {times} |" for (a, event, b), times in paint.edges.items()]
    return "\n".join(lines) + "\n"


def to_faults(_diagram: Diagram) -> str:
    """What happens in each state when its time is up, its handler raises, or the process is killed."""
    failure = ev.Failure("harness", "", "")
    lines = [
        "# Faults",
        "",
        "What fires when a state outlasts its deadline and when its handler raises, and how a new process enters it",
        "after `kill -9`. A deadline with a star is also bounded by what is left of the rollout's own time.",
        "",
        "| state | deadline | expiry fires | leads to | a crash fires | after kill -9 |",
        "|---|---:|---|---|---|---|",
    ]
    for state in machine.LIVE:
        expired, crash = EXPIRY[state](failure, Deadline(0.0)), crashed(state, failure, Deadline(0.0))
        recovered = machine.rows(state, ev.Recovered)[0].to
        star = "\\*" if state in BOUNDED_BY_ROLLOUT else ""
        cells = (
            state,
            f"{DEADLINES[state]:,.0f} s{star}",
            expired.name,
            " or ".join(dict.fromkeys(row.to or "*stays*" for row in machine.rows(state, type(expired)))),
            crash.name,
            recovered or "entered again",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def to_svg(diagram: Diagram) -> str:
    """A self-contained picture, for light and dark pages."""
    from orchestrator.diagram_svg import render_svg

    return render_svg(diagram)


def to_html(diagram: Diagram) -> str:
    """A self-contained page: the picture, and the run's path or the table."""
    from orchestrator.diagram_svg import render_html

    return render_html(diagram)


RENDERERS: dict[str, Callable[[Diagram], str]] = {
    "mermaid": to_mermaid,
    "dot": to_dot,
    "svg": to_svg,
    "html": to_html,
    "text": to_text,
    "table": to_table,
    "faults": to_faults,
}


def diagram_of(
    source: str | Path | Sequence[Record] | RolloutResult | Rollout | None = None,
    format: Format = "mermaid",  # noqa: A002 - the word users know
) -> str:
    """Draw the machine, or a run on it: which states it visited, for how long, and which way it took.

    Args:
        source: None for the machine itself; else a run, as its folder or journal, its records, a `RolloutResult` whose
            rollout kept a folder, or a `Rollout`, at any time.
        format: `mermaid`, `dot`, `svg`, `html`, `text`, `table` (Markdown) or `faults` (of the machine alone).

    Raises:
        ConfigError: there is no such format, or the result's rollout kept nothing on disk.
        JournalError: the journal cannot be read.

    >>> diagram_of(format="mermaid").splitlines()[3]
    'stateDiagram-v2'
    >>> diagram_of(format="text").splitlines()[0]
    'provisioning --Provisioned--> disconnected'
    """
    if format not in RENDERERS:
        raise ConfigError(f"no diagram format {format!r}; there are {', '.join(RENDERERS)}")
    return RENDERERS[format](extract() if source is None else extract(Paint.of(_records(source))))


def _records(source: Any) -> Sequence[Record]:
    from orchestrator.journal import read_journal
    from orchestrator.result import RolloutResult

    if isinstance(source, RolloutResult):
        if source.folder is None:
            raise ConfigError(f"rollout {source.rollout} kept no journal on disk (out=None): draw its Rollout instead")
        source = source.folder
    if isinstance(source, str | Path):
        if not (read := read_journal(Path(source))):
            raise JournalError(f"{source} holds no record of a rollout")
        return read
    records: Sequence[Record] = source if isinstance(source, list | tuple) else source.journal
    return records


# --- the folder diagrams/ ------------------------------------------------------------------------------------

FILES: dict[str, Format] = {
    "rollout.mmd": "mermaid",
    "rollout.dot": "dot",
    "rollout.svg": "svg",
    "transitions.md": "table",
    "faults.md": "faults",
}


def write(folder: Path) -> None:
    """Render every file of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, form in FILES.items():
        (folder / name).write_text(diagram_of(format=form), encoding="utf-8")


def drift(folder: Path) -> list[str]:
    """The files that are missing or differ from what the table gives."""

    def differs(name: str, form: Format) -> bool:
        path = folder / name
        return not path.is_file() or path.read_text(encoding="utf-8") != diagram_of(format=form)

    return [name for name, form in FILES.items() if differs(name, form)]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m orchestrator.diagram --write FOLDER | --check FOLDER`."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m orchestrator.diagram", description="Render the diagrams.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", metavar="FOLDER", type=Path, help="render every file")
    what.add_argument("--check", metavar="FOLDER", type=Path, help="exit 1 where a file differs from the table")
    options = parser.parse_args(argv)
    if options.write:
        write(options.write)
        return 0
    drifted = drift(options.check)
    for name in drifted:
        sys.stderr.write(f"{options.check / name} differs from the table; run: make diagrams\n")
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main())
