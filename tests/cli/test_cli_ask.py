"""`--policy ask` on a terminal: a person answers the agent's questions."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.sandbox

AGENT = """
protocol = "acp"
launch = ["${python}", "${agents}/scripted_acp.py", "${home}/script.json"]
calls_model = false
[files]
"${home}/script.json" = '''{"turns": [[{"shell": "echo 6 > answer.txt; touch asked", "ask": true}]]}'''
"""


def run_on_a_terminal(tmp_path, typed):
    """What a run under `--policy ask` shows on a terminal at which somebody types `typed` when it is asked."""
    (tmp_path / "asker.toml").write_text(AGENT)
    out, argv = tmp_path / "runs", [sys.executable, "-m", "orchestrator.cli", "run", "demo", "--policy", "ask"]
    controller, terminal = os.openpty()
    argv += ["--agent", str(tmp_path / "asker.toml"), "--out", str(out)]
    child = subprocess.Popen(argv, stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True)
    os.close(terminal)
    shown, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        ready, _, _ = select.select([controller], [], [], 1)
        try:
            piece = os.read(controller, 4096) if ready else b""
        except OSError:  # the other side is closed: it has ended
            break
        shown += piece
        if b"\n> " in piece or piece.endswith(b"> "):
            os.write(controller, typed + b"\n")
    os.close(controller)
    assert child.wait(10) == 0, shown.decode()
    return (next(out.iterdir()) / "trajectory.jsonl").read_text()


@pytest.mark.parametrize(("typed", "option", "status"), [(b"1", "allow", "completed"), (b"2", "reject", "failed")])
def test_a_person_at_the_terminal_answers(tmp_path, typed, option, status):
    """The number typed chooses the option; the trajectory says that the terminal answered, and what came of it."""
    trajectory = run_on_a_terminal(tmp_path, typed)
    assert f'"answer":"{option}","by":"terminal"' in trajectory
    assert f'"status":"{status}"' in trajectory


def test_without_a_terminal_the_default_answers_and_the_result_notes_it(tmp_path):
    """Nobody was asked: whoever reads the result must not think that somebody was."""
    (tmp_path / "asker.toml").write_text(AGENT)
    argv = [sys.executable, "-m", "orchestrator.cli", "run", "demo", "--policy", "ask", "--json"]
    argv += ["--agent", str(tmp_path / "asker.toml"), "--out", str(tmp_path / "runs")]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True)
    assert [note for note in json.loads(done.stdout)["notes"] if "no terminal to ask on" in note]
