"""A rollout in a notebook: its painted diagram, asked for as IPython asks, hostile text included."""

from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import anyio
import attrs
import pytest
from harness import build
from IPython.core.formatters import DisplayFormatter

from orchestrator.diagram import diagram_of
from orchestrator.result import Verdict
from states.errors import ConfigError
from states.machine import STATES

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


def displayed(thing) -> dict[str, str]:
    """What IPython would send to a notebook's page."""
    data, _ = DisplayFormatter().format(thing)
    return data


def picture_in(html: str) -> ET.Element:
    """The diagram of a page: exactly one image, which holds it."""
    (source,) = re.findall(r'<img [^>]*src="data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)">', html)
    return ET.fromstring(base64.b64decode(source))


class Tags(HTMLParser):
    """The tags of a page and their attributes."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, [name for name, _ in attributes]))


def run(**config):
    rollout = build("acp", **config).rollout
    return rollout, anyio.run(rollout.run)


def test_a_rollout_is_shown_as_its_painted_diagram():
    """Before it runs, and when it is over; with what came of it in words."""
    rollout = build("acp").rollout
    before = displayed(rollout)
    assert "provisioning" in before["text/html"]
    anyio.run(rollout.run)
    after = displayed(rollout)
    assert "closed/rewarded  reward 1" in after["text/plain"]
    assert after["image/svg+xml"] == diagram_of(rollout, format="svg")
    said = {word for text in picture_in(after["text/html"]).iter() for word in (text.text or "").split()}
    assert {state.split("/")[-1] for state in STATES} <= said
    assert rollout._repr_html_() == after["text/html"]


def test_a_result_is_shown_from_its_folder(tmp_path):
    rollout, result = run(out=tmp_path)
    assert displayed(result) == displayed(rollout)


def test_a_result_that_kept_nothing_says_so():
    """There is no journal to draw; a display never raises."""
    _, result = run()
    data = displayed(result)
    assert "No diagram: rollout r1 kept no journal on disk (out=None): draw its Rollout instead" in data["text/html"]
    assert "closed/rewarded" in data["text/plain"]
    assert "image/svg+xml" not in data


def test_a_folder_that_is_gone_or_broken_is_said_too(tmp_path):
    _, result = run(out=tmp_path)
    (result.folder / "journal.jsonl").write_text("no journal\n")
    assert "holds no record of a rollout" in displayed(result)["text/html"]
    (result.folder / "journal.jsonl").unlink()
    assert "journal.jsonl cannot be read: No such file" in displayed(result)["text/html"]


def test_hostile_words_are_words(tmp_path):
    """In an id, a verdict, an event: the page has our tags and no other, and its image cannot run anything."""
    rollout = build("acp", new_id=lambda: HOSTILE, prompt=HOSTILE).rollout
    result = attrs.evolve(anyio.run(rollout.run), verdict=Verdict("agent", HOSTILE), state=HOSTILE)
    for html in (displayed(rollout)["text/html"], displayed(result)["text/html"]):
        assert {tag for tag, _ in Tags(html).found} <= {"div", "code", "br", "img"}
        assert all(not name.startswith("on") for _, names in Tags(html).found for name in names)
    picture = displayed(rollout)["image/svg+xml"]
    assert not re.search(r"<script|onerror=|href|<foreignObject", picture.replace("&lt;", ""))
    ET.fromstring(picture)


@pytest.mark.parametrize("form", ["mermaid", "dot", "svg", "html", "text", "table"])
def test_a_run_is_drawn_alike_from_whatever_it_is_known_by(form, tmp_path):
    """Its folder, its journal, its records, its result, itself."""
    rollout, result = run(out=tmp_path)
    sources = (
        result.folder,
        str(result.folder / "journal.jsonl"),
        rollout.journal,
        list(rollout.journal),
        result,
        rollout,
    )
    assert len({diagram_of(source, format=form) for source in sources}) == 1


def test_the_text_form_is_the_path_with_its_seconds():
    rollout, _ = run()
    lines = diagram_of(rollout, format="text").splitlines()
    assert lines[0] == "Rollout r1"
    assert [line.split()[2] for line in lines[1:]] == [
        *("provisioning", "disconnected", "connecting", "session/acp", "executing", "capturing/whole", "session/acp"),
        *("quiescing", "disconnected", "verifying", "releasing", "closed/rewarded"),
    ]
    assert all(line.split()[-1][0].isupper() for line in lines[1:-1]), "each ends with the event that led out"


def test_a_result_without_a_folder_cannot_be_drawn():
    _, result = run()
    with pytest.raises(ConfigError, match=r"draw its Rollout instead"):
        diagram_of(result)
