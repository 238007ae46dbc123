"""Whether a sandbox was left behind: by the process that made it, and by whoever has its rollout's journal now."""

from __future__ import annotations

import functools
import socket
import subprocess
import sys

import pytest

from orchestrator.journal import JournalSink, JournalWriter, MemorySink
from orchestrator.owners import give_back_each, is_alive, labels_of, left_behind, owner, started_at
from states.errors import JournalError, SandboxError
from states.journal import Header
from states.machine import Rules

HOLD = """
import sys
from pathlib import Path
from orchestrator.journal import JournalSink
print(JournalSink(Path(sys.argv[1])).claim(), flush=True)
sys.stdin.read()
"""


def is_left(labels) -> bool:
    """Whether a sweep would take what carries them."""
    with left_behind(labels) as left:
        return left


@pytest.fixture
def dead(tmp_path):
    """The labels of a sandbox whose maker is dead, and whose rollout has a journal."""
    (tmp_path / "journal.jsonl").touch()
    return {**labels_of("r1", tmp_path), "owner-started": "1"}


def test_a_process_is_known_by_its_start(dead):
    """A number that was given anew is nobody's."""
    assert is_alive(owner())
    assert not is_alive({**owner(), "started": "1"})
    assert not is_alive({})
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert started_at(process.pid) is None
    assert is_left(dead)


def test_what_a_living_process_made_is_not_left(tmp_path):
    """Nor what one of another machine made, nor what nobody says that they made."""
    mine = labels_of("r1", None)
    assert mine == {"rollout": "r1", **{f"owner-{key}": str(value) for key, value in owner().items()}}
    assert mine["owner-host"] == socket.gethostname()
    assert not is_left(mine)
    assert not is_left({**mine, "owner-started": "1", "owner-host": "elsewhere"})
    assert not is_left({"owner-host": mine["owner-host"]})
    assert not is_left({})


@pytest.mark.parametrize(
    "elsewhere",
    [{"owner-boot": "another"}, {"owner-space": "1"}, {"owner-boot": "", "owner-space": ""}],
    ids=["another machine", "another container", "nobody knows where"],
)
def test_what_was_made_elsewhere_under_this_machines_name_is_not_left(dead, tmp_path, elsewhere):
    """Its process cannot be looked for here, so it may live, unless its journal is here, which nobody holds."""
    theirs = {**dead, **elsewhere}
    assert not is_left(theirs)
    assert not is_left({**theirs, "folder": "/home/somebody/runs/r1"})
    with left_behind(theirs, unknown=True) as left:
        assert left
    sink, journal = MemorySink(), tmp_path / "journal.jsonl"
    JournalWriter(sink, lambda: 0.0, Header("r2", Rules(), 0.0))
    journal.write_bytes(b"".join(line + b"\n" for line in sink.lines))
    assert not is_left(theirs)
    assert is_left({**theirs, "rollout": "r2"})
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(journal)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ours\n"
        with left_behind({**theirs, "rollout": "r2"}, unknown=True) as left:
            assert not left
    assert not is_left({**theirs, "rollout": "r2", "owner-host": "elsewhere"})


@pytest.mark.parametrize("here", [True, False])
def test_what_another_process_went_on_with_is_not_left(dead, tmp_path, here):
    """Who made it is dead; who holds the journal is alive, from before anything of its own is written."""
    journal = tmp_path / "journal.jsonl"
    if here:
        sink = JournalSink(journal)
        assert sink.claim() == "ours"
        assert not is_left(dead)
        sink.close()
    else:
        argv = [sys.executable, "-c", HOLD, str(journal)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ours\n"
            assert not is_left(dead)
    assert is_left(dead)


def test_while_a_sweep_takes_it_nobody_goes_on_with_it(dead, tmp_path):
    """The journal is the sweep's for so long."""
    with left_behind(dead) as left:
        assert left
        assert JournalSink(tmp_path / "journal.jsonl").claim() == "taken"
    sink = JournalSink(tmp_path / "journal.jsonl")
    assert sink.claim() == "ours"
    sink.close()


def test_without_a_journal_its_maker_decides(dead, tmp_path):
    """It was kept nowhere, or was removed."""
    (tmp_path / "journal.jsonl").unlink()
    assert is_left(dead)
    del dead["folder"]
    assert is_left(dead)


@pytest.mark.anyio
async def test_what_cannot_be_given_back_keeps_nothing_else_from_it(dead):
    """Each that was left is seen to, and no other; then what went wrong is said, beside what went well."""
    asked = []

    async def give_back(name, wrong=None):
        asked.append(name)
        if wrong is not None:
            raise wrong
        return f"{name} is gone"

    def found(*names, **wrong):
        labels = {"mine": labels_of("r1", None)}
        return [
            (left_behind(labels.get(name, dead)), functools.partial(give_back, name, wrong.get(name))) for name in names
        ]

    assert await give_back_each(found("one", "mine", "two")) == ("one is gone", "two is gone")
    with pytest.raises(SandboxError, match=r"^two is gone\none is locked\nits journal is torn$"):
        await give_back_each(
            found("one", "two", "three", one=SandboxError("one is locked"), three=JournalError("its journal is torn"))
        )
    assert asked == ["one", "two", "one", "two", "three"]
