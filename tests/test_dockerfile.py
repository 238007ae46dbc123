"""Which images a Dockerfile starts from, as Docker reads it: by instructions, not by lines."""

from __future__ import annotations

import pytest

from orchestrator.sandboxes._image_map import map_bases
from orchestrator.tasks.recipe import read_recipe
from states.errors import TaskError

FOUND = {
    "a line of a program that is continued": (
        'FROM a\nRUN python3 -c "\\\nimport os; \\\nfrom json import loads"',
        "a",
    ),
    "a line of a here-document": ("FROM a\nRUN python3 <<EOF\nfrom json import loads\nEOF", "a"),
    "a continuation with a comment and an empty line": ("FROM a\nRUN b \\\n# c\n\n  && \\\nfrom d", "a"),
    "a stage's name in another case": ("FROM a AS Build\nfrom BUILD as next\nFROM Next", "a"),
    "an argument of another one, and a default": ("ARG V=1\nARG B=b:$V\nFROM $B\nFROM ${C:-c}", "b:1 c"),
}


@pytest.mark.parametrize(("text", "bases"), FOUND.values(), ids=FOUND)
def test_only_what_docker_would_start_from_is_a_base(text, bases):
    """Whatever else begins with `from` is not asked for at a registry."""
    assert map_bases(text, {}, lambda _: None) == (text, tuple(bases.split()))


def test_a_mapped_base_leaves_every_other_line_where_it_was():
    """So that an error of the engine names the line of the Dockerfile that its author sees."""
    text = "FROM --platform=linux/amd64 \\\n  a \\\n  AS one\nRUN <<EOF\nFROM a\nEOF\nFROM one"
    mapped, bases = map_bases(text, {"a": "mine"}, lambda _: None)
    assert mapped == "FROM --platform=linux/amd64 mine AS one\n\n\nRUN <<EOF\nFROM a\nEOF\nFROM one"
    assert bases == ("mine",)


def test_a_line_that_is_no_instruction_is_named():
    """Before anything is built, with the file and the line."""
    with pytest.raises(TaskError, match=r"^here/Dockerfile:2: expected a Dockerfile instruction .* 'oops'"):
        map_bases("FROM a\noops", {}, lambda _: None, "here/Dockerfile")


def test_a_recipe_goes_on_from_a_stage_that_is_named_in_another_case(tmp_path):
    """As for the images of a build: what that stage had is there."""
    dockerfile = tmp_path / "Dockerfile"
    dockerfile.write_text("FROM a AS Build\nENV KEY=value\nFROM build\n")
    assert dict(read_recipe(dockerfile, tmp_path, "/app").env) == {"KEY": "value"}
