"""What a task or a user asks for and a sandbox does not give is said in the result, and nothing is dropped silently."""

from __future__ import annotations

import attrs
import pytest

from orchestrator import Rollout, RolloutConfig, cli
from orchestrator.sandboxes import SandboxSpec, make_sandbox
from orchestrator.sandboxes._image_map import map_bases, mapped
from orchestrator.tasks import demo_task, load_task


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"gpus": 2}, "the task asks for 2 GPU(s), and agents have none"),
        ({"image": "debian:12"}, "the image debian:12 is not run: a local sandbox has this machine's own programs"),
        ({"image_map": {"a": "b", "c": "d"}}, "the image map's a, c stands for nothing: a local sandbox runs no image"),
    ],
)
def test_a_local_sandbox_says_what_it_does_not_give(asked, sentence):
    """Once, when it is made for a rollout, with what to do instead where there is something."""
    notes: list[str] = []
    make_sandbox(SandboxSpec("local", "box", note=notes.append, **asked))
    (note,) = notes
    assert note.startswith(sentence)


def test_a_local_sandbox_that_gives_everything_says_nothing():
    """A note is worth reading, so there is none without a reason."""
    notes: list[str] = []
    make_sandbox(SandboxSpec("local", "box", cpus=1, memory_mb=512, note=notes.append))
    assert notes == []


def test_conformance_of_a_local_sandbox_says_that_its_image_is_not_run(capfd):
    """There is no journal to put the note into: it is on stderr."""
    assert cli.main(["conformance", "local", "--image", "debian", "-k", "no such clause"]) == 2
    assert "note: the image debian is not run" in capfd.readouterr().err


NETWORKS = [
    ("public", "gateway-only", "the task asks for a public network; the sandbox has gateway-only"),
    ("public", "host", None),
    ("no-network", "host", "the task asks for no network; the sandbox has the network host, which was asked for here"),
    ("no-network", "gateway-only", None),
    ("allowlist", "bridge", "the task allows a.org, b.org alone; the sandbox has the network bridge, and reaches more"),
    ("allowlist", "none", "the task asks for a.org, b.org; the sandbox has the network none, and reaches none of it"),
    (None, "host", None),
]


@pytest.mark.anyio
@pytest.mark.parametrize(("asked", "given", "sentence"), NETWORKS)
async def test_a_network_that_is_not_the_tasks_is_a_note(asked, given, sentence):
    """Wider or narrower than the task asks for; nothing is said where it is as the task has it."""
    hosts = ("a.org", "b.org") if asked == "allowlist" else ()
    task = attrs.evolve(load_task(demo_task()), network=asked, allowed_hosts=hosts)
    config = RolloutConfig(task=task, agent="noop", sandbox="fake", verifier=None, network=given, out=None)
    result = await Rollout(config).run()
    said = [note for note in result.notes if "network" in note]
    assert [note[: len(sentence or "")] for note in said] == ([sentence] if sentence else [])


def test_an_image_map_that_matches_nothing_is_a_note():
    """With the images that are asked for, so that a slip of the pen is found; names of the map that match are not."""
    notes: list[str] = []
    _, bases = map_bases(
        "FROM debian:12 AS a\nFROM a\nFROM ubuntu", {"debain:12": "x", "docker.io/ubuntu": "y"}, notes.append
    )
    assert bases == ("debian:12", "y")
    assert notes == [
        "the image y stands for ubuntu (image map)",
        "the image map's debain:12 matches nothing: what is asked for is debian:12, ubuntu",
    ]
    notes.clear()
    assert mapped("debian", {"debian:12": "x", "a": "b"}, notes.append) == "debian"
    assert notes == ["the image map's debian:12, a match nothing: what is asked for is debian"]
