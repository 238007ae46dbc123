"""What a notebook shows of a rollout: one line, and its own state diagram, painted.

The picture is an image of its own (a data URI), not part of the page: its style cannot meet that of another, and
nothing in it can run, whatever an id or an error may hold. What cannot be drawn is said instead; a display never
raises.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from orchestrator.diagram import diagram_of
from orchestrator.result import RolloutResult
from orchestrator.show import headline
from states.errors import OrchestratorError, said
from states.journal import Record


def shown(result: RolloutResult, records: Sequence[Record] | None = None) -> dict[str, str]:
    """A rollout by media type: text, HTML, and its picture. Without `records` they are read from its folder."""
    line = headline(result)
    verdict = f"{result.verdict.owner}: {result.verdict.reason}"
    words = f"<div><code>{escape(line)}</code><br>{escape(verdict)}</div>"
    try:
        picture = diagram_of(records if records is not None else result, format="svg")
    except OrchestratorError as error:
        return {"text/plain": line, "text/html": f"{words}<div>No diagram: {escape(said(error))}</div>"}
    image = base64.b64encode(picture.encode()).decode()
    shape = 'style="max-width: 100%; height: auto"'
    html = f'{words}<img {shape} alt="{escape(line)}" src="data:image/svg+xml;base64,{image}">'
    return {"text/plain": line, "text/html": html, "image/svg+xml": picture}
