"""`rollout resume`: what ^C stopped, or kill -9 ended, goes on in another process. Real processes, real signals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli_control import WAITS, events, manifest, only, terminal
from test_cli_run import agent, start, until

from orchestrator import cli
from orchestrator.journal import read_journal
from orchestrator.tasks import demo_task
from states.journal import Transition

SUM = "s=0; while read -r n; do s=$((s + n)); done < numbers.txt; echo $s > answer.txt"
SLEEPS = {"turns": [[{"shell": f"if [ -e one ]; then {SUM}; else touch one; sleep 60; fi"}]]}
"""It solves the task when it is asked for the second time; the first time it is cut off."""


def run_demo(folder: Path, transport: str, *arguments: str) -> subprocess.Popen:
    """`rollout run demo` in the local sandbox, by an agent that is cut off at first."""
    argv = ["run", "demo", "--agent", manifest(folder, transport, SLEEPS), "--json", *arguments]
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.cli", *argv], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until(process, "-> executing")
    return process


def until_it_is_at_work(folder: Path) -> None:
    """Until the agent's command has begun: its first step of work is on disk."""
    trajectory = only(folder) / "trajectory.jsonl"
    while b'"in_progress"' not in trajectory.read_bytes():
        pass


@pytest.mark.sandbox
@pytest.mark.parametrize("transport", ["acp", "session-factory"])
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_what_was_cut_off_goes_on_and_solves_the_task(tmp_path, capfd, transport, end):
    """Stopped or killed in a turn, it is asked again in the same sandbox: what the first turn left is there."""
    process = run_demo(tmp_path, transport)
    until_it_is_at_work(tmp_path)
    process.send_signal(end)
    process.communicate(timeout=60)
    assert process.returncode == (5 if end == signal.SIGTERM else -9)
    folder = only(tmp_path)
    assert cli.main(["resume", str(folder), "--ask-again", "--json"]) == 0
    said = capfd.readouterr()
    result = json.loads(said.out)
    assert (result["state"], result["reward"], result["turns"]) == ("closed/rewarded", 1.0, 2)
    assert f"{folder.name}  " in said.err
    assert "(Recovered)" in said.err
    assert "-> provisioning" not in said.err
    assert "(Provisioned)" not in said.err, "what the dead one did is not told again"
    assert events(folder).count("Provisioned") == 1
    assert cli.main(["resume", str(folder)]) == 2
    assert "is over: closed/rewarded" in capfd.readouterr().err


@pytest.mark.sandbox
def test_two_terminals_that_resume_at_once_drive_it_once(tmp_path):
    """One goes on; the other is told who drives it, or that nobody holds it, and changes nothing."""
    process = run_demo(tmp_path, "session-factory")
    until_it_is_at_work(tmp_path)
    process.kill()
    process.communicate(timeout=60)
    folder = only(tmp_path)
    both = [terminal("resume", str(folder), "--ask-again", "--json") for _ in range(2)]
    said = [one.communicate(timeout=120) for one in both]
    documents = [json.loads(out) for out, _ in said]
    won = [document for document in documents if document.get("reward") == 1.0]
    (lost,) = [document for document in documents if document not in won]
    assert len(won) == 1, said
    assert "error" in lost or lost["changed"] is False
    moves = [record for record in read_journal(folder) if isinstance(record, Transition)]
    assert [move.event.name for move in moves].count("Recovered") == 1
    assert moves[-1].dest == "closed/rewarded"


def test_a_second_stop_and_a_second_resume(tmp_path):
    """^C in a resumed rollout stops it again; what it is then is in its journal."""
    script = {"turns": [[{"say": "working"}, {"wait_cancel": 60}]]}
    process = start(tmp_path, manifest(tmp_path, "acp", script), "--sandbox", "local")
    for _ in range(2):
        until(process, "-> executing")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 5, err
        argv = [sys.executable, "-m", "orchestrator.cli", "resume", str(only(tmp_path)), "--ask-again", "--json"]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(process, "-> executing")
    assert cli.main(["cancel", str(only(tmp_path))]) == 0
    process.communicate(timeout=60)
    assert process.returncode == 4
    found = events(only(tmp_path))
    assert (found.count("Recovered"), found.count("Prompted"), found.count("Captured")) == (2, 3, 3)


@pytest.fixture
def stopped(tmp_path):
    """The folder of a rollout of a task that lies in `tmp_path`, that was stopped; more arguments as given."""

    def stop(*arguments: str) -> Path:
        shutil.copytree(demo_task(), tmp_path / "task")
        argv = ["run", "task", "--agent", Path(agent(tmp_path, "waits", WAITS)).name, "--sandbox", "fake", *arguments]
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.cli", *argv],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        until(process, "-> executing")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 5
        assert b"rollout resume" in out
        return only(tmp_path)

    return stop


def refused(capfd, folder: Path, *arguments: str) -> str:
    """What is said; nothing was written."""
    before = (folder / "journal.jsonl").read_bytes()
    assert cli.main(["resume", str(folder), *arguments]) == 2
    assert (folder / "journal.jsonl").read_bytes() == before
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1, err
    return err


def test_values_that_were_not_written_down_are_asked_for_by_name(stopped, capfd, monkeypatch):
    """--env K=V is in no file; K alone is taken from the environment again, and missed there by its name."""
    monkeypatch.setenv("FROM_HERE", "a-value-of-the-environment")
    folder = stopped("--env", "TOKEN=quite-a-secret", "--env", "MODE=fast", "--env", "FROM_HERE")
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"quite-a-secret" not in kept
    assert b"a-value-of-the-environment" not in kept
    said = refused(capfd, folder, "--env", "MODE=fast")
    assert "was given what is never written down; give it again: --env TOKEN=VALUE" in said
    monkeypatch.delenv("FROM_HERE")
    assert "--env FROM_HERE: give NAME=VALUE" in refused(capfd, folder, "-e", "TOKEN=t", "-e", "MODE=fast")
    again = ("-e", "TOKEN=another", "-e", "MODE=fast", "-e", "FROM_HERE=x")
    # A fake sandbox dies with its process: everything else was right.
    assert cli.main(["resume", str(folder), *again, "--json"]) == 1
    result = json.loads(capfd.readouterr().out)
    assert result["verdict"]["owner"] == "sandbox"
    assert "fake sandbox" in result["verdict"]["reason"]


def test_a_task_an_agent_or_a_folder_that_has_changed_is_refused_by_name(stopped, capfd, tmp_path):
    """The identity is a hash of the inputs: each that differs is named, and what was began is left as it was."""
    folder = stopped()
    instruction = tmp_path / "task" / "instruction.md"
    text = instruction.read_text()
    instruction.write_text("Something else.\n")
    assert "was begun with other inputs, and cannot go on with these: task_digest" in refused(capfd, folder)
    instruction.write_text(text)
    waits = tmp_path / "waits.toml"
    kept = waits.read_text()
    waits.write_text(kept.replace("working", "idling"))
    said = refused(capfd, folder)
    assert "cannot go on with these: roles (agent: the manifest of agent waits)" in said
    waits.unlink()
    assert "waits.toml: cannot be read" in refused(capfd, folder)
    waits.write_text(kept)
    made = json.loads((folder / "journal.jsonl").read_text().splitlines()[0])["info"]["made_from"]
    assert made == {
        "task": "task",
        "argv": ["--agent", "waits.toml", "--sandbox", "fake"],
        "env": [],
        "cwd": str(tmp_path),
        "not_written_down": [],
    }
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    try:
        assert "where it was begun, is not there" in refused(capfd, moved / "runs" / folder.name)
    finally:
        moved.rename(tmp_path)


def test_a_rollout_that_a_program_began_is_that_programs_to_resume(tmp_path, capfd):
    code = (
        "import os; from orchestrator import Rollout, RolloutConfig\n"
        "Rollout(RolloutConfig(prompt='hi', agent='noop', sandbox='fake')); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path)
    assert "was not begun by `rollout run`" in refused(capfd, only(tmp_path))


def test_a_folder_without_a_rollout_is_one_sentence(tmp_path, capfd):
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "holds no rollout" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
