"""Two terminals: a rollout that runs in one, and what is asked of it in others. Real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli_run import agent, start, until

from orchestrator import cli
from orchestrator.journal import read_journal
from states.journal import Transition

WAITS = {"turns": [[{"say": "working"}, {"wait_cancel": 60}]]}
SLOW = {"turns": [[{"say": "working"}, {"ignore_cancel": True}, {"hang": True}]]}


def only(folder: Path) -> Path:
    """The one rollout in a folder's runs."""
    (found,) = (folder / "runs").iterdir()
    return found


def events(folder: Path) -> list[str]:
    """The names of its events."""
    return [record.event.name for record in read_journal(folder) if isinstance(record, Transition)]


def terminal(*arguments: str) -> subprocess.Popen:
    """Another terminal."""
    argv = [sys.executable, "-m", "orchestrator.cli", *arguments]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("transport", ["acp", "session-factory"])
def test_a_cancel_from_elsewhere_closes_it_and_waits_until_it_is(tmp_path, transport):
    """Both terminals are told; the exit code of the one that ran it is 4, and the cancelling one's is 0."""
    process = start(tmp_path, manifest(tmp_path, transport, WAITS), *on(transport))
    until(process, "-> executing")
    other = terminal("cancel", str(only(tmp_path)))
    said, showed = other.communicate(timeout=60)
    out, err = process.communicate(timeout=60)
    assert other.returncode == 0, showed
    assert "cancelled: what it holds is given back, then it is closed" in said
    assert "cancelling (at most 10 s)" in showed
    assert showed.splitlines()[-1].endswith("closed/cancelled")
    assert process.returncode == 4, err
    assert json.loads(out)["state"] == "closed/cancelled"
    assert not (only(tmp_path) / "control.sock").exists()


def manifest(folder: Path, transport: str, script: dict) -> str:
    """A scripted agent over either transport."""
    if transport == "session-factory":
        return agent(folder, "waits", script)
    path = folder / "waits.toml"
    path.write_text(
        'protocol = "acp"\ncalls_model = false\n'
        'launch = ["${python}", "${agents}/scripted_acp.py", "${home}/script.json"]\n'
        f"[files]\n\"${{home}}/script.json\" = '''{json.dumps(script)}'''\n"
    )
    return str(path)


def on(transport: str) -> list[str]:
    """A sandbox in which that transport's agent can live."""
    return ["--sandbox", "local"] if transport == "acp" else []


def test_two_terminals_that_cancel_at_once_close_it_once(tmp_path):
    """One of them changes something; both wait and see it closed."""
    process = start(tmp_path, agent(tmp_path, "slow", SLOW))
    until(process, "-> executing")
    others = [terminal("cancel", str(only(tmp_path)), "--json") for _ in range(2)]
    answers = [json.loads(other.communicate(timeout=60)[0]) for other in others]
    process.communicate(timeout=60)
    assert sorted(answer["changed"] for answer in answers) == [False, True]
    assert {answer["state"] for answer in answers} == {"closed/cancelled"}
    assert events(only(tmp_path)).count("Released") == 1
    assert process.returncode == 4


def test_a_pause_and_a_resume_from_elsewhere(tmp_path, capfd):
    """The view says who paused it; asking again changes nothing."""
    script = {"turns": [[{"say": "working"}, {"wait_cancel": 60}], [{"say": "done"}]]}
    process = start(tmp_path, agent(tmp_path, "two", script))
    until(process, "-> executing")
    folder = only(tmp_path)
    for command, said in (
        ("pause", "it is held before its next turn"),
        ("pause", "terminal holds it already: nothing changes"),
        ("interrupt", "the turn in flight is cancelled; the rollout goes on"),
    ):
        assert cli.main([command, str(folder)]) == 0
        assert said in capfd.readouterr().out
    until(process, "-> paused")
    assert cli.main(["show", str(folder)]) == 0
    assert "Paused by terminal" in capfd.readouterr().out
    assert cli.main(["resume", str(folder), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["changed"] is True
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["state"] == "closed/unverified"
    found = events(folder)
    assert found[found.index("Paused") : found.index("Paused") + 2] == ["Paused", "Resumed"]


@pytest.mark.parametrize("command", ["interrupt", "cancel", "pause", "resume"])
def test_what_cannot_be_asked_is_exit_code_2_and_one_sentence(tmp_path, capfd, command):
    """No such rollout; closed; and (but for resume, which takes it over) dead."""
    process = start(tmp_path, agent(tmp_path, "waits", WAITS))
    assert cli.main([command, str(tmp_path / "nothing")]) == 2
    assert "holds no rollout" in capfd.readouterr().err
    until(process, "-> executing")
    process.kill()
    process.communicate(timeout=60)
    folder = only(tmp_path)
    if command != "resume":
        assert cli.main([command, str(folder)]) == 2
        err = capfd.readouterr().err
        assert f"process {process.pid}, which did, is dead" in err
        assert f"rollout resume {folder}" in err
    assert cli.main(["reap", str(folder)]) == 0
    capfd.readouterr()
    assert cli.main([command, str(folder)]) == 2
    err = capfd.readouterr().err
    assert "is over: closed/failed" in err
    assert len(err.splitlines()) == 1


def test_further_presses_say_what_is_going_on(tmp_path):
    """The third ^C and those after it change nothing, and say where it is and what is waited for."""
    process = start(tmp_path, agent(tmp_path, "slow", SLOW))
    until(process, "-> executing")
    for said in (
        "stopping; once more cancels",
        "cancelling; everything is given back first",
        "it is being cancelled, in cancelling (at most 10 s): waiting for the agent to end its turn; kill -9 leaves",
        "waiting for the agent to end its turn",
    ):
        process.send_signal(signal.SIGINT)
        until(process, said)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4, err
    assert json.loads(out)["state"] == "closed/cancelled"


def test_a_waiting_cancel_can_be_left(tmp_path):
    """^C ends the waiting, not the cancelling."""
    process = start(tmp_path, agent(tmp_path, "slow", SLOW))
    until(process, "-> executing")
    other = terminal("cancel", str(only(tmp_path)))
    assert "cancelling" in other.stderr.readline()
    other.send_signal(signal.SIGINT)
    _, showed = other.communicate(timeout=60)
    assert other.returncode == 0
    assert "no longer waiting; it is being cancelled all the same, in cancelling" in showed
    process.communicate(timeout=60)
    assert process.returncode == 4


def test_a_rollout_that_was_stopped_is_closed_as_cancelled_by_its_operator(tmp_path, capfd):
    """Not as failed by the harness: the journal says who stopped it."""
    process = start(tmp_path, agent(tmp_path, "waits", WAITS))
    until(process, "-> executing")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert json.loads(out)["verdict"] == {
        "owner": "operator",
        "reason": "not over: in disconnected, stopped by SIGTERM",
    }
    folder = only(tmp_path)
    assert cli.main(["cancel", str(folder)]) == 2
    assert "it was stopped by SIGTERM; `rollout resume" in capfd.readouterr().err
    assert cli.main(["reap", str(folder), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["state"] == "closed/cancelled"
    assert json.loads((folder / "result.json").read_text())["verdict"]["owner"] == "operator"


def test_reaping_what_runs_names_the_command_that_ends_it(tmp_path, capfd):
    process = start(tmp_path, agent(tmp_path, "waits", WAITS))
    until(process, "-> executing")
    folder = only(tmp_path)
    assert cli.main(["reap", str(folder)]) == 1
    assert f"which is alive: `rollout cancel {folder}` ends it" in capfd.readouterr().out
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
