"""`rollout run`: its exit codes, its one JSON document, its ^C, and what it shows meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal

from orchestrator import cli
from orchestrator.cli import options
from orchestrator.gateway.scripted import Always, Fail, ScriptedUpstream, ShellScript
from orchestrator.tasks import DEMO_COMMAND, demo_task

ROOT = Path(__file__).resolve().parents[2]


def agent(folder: Path, name: str, script: dict) -> str:
    """The manifest of an agent that plays a script in process; its path."""
    path = folder / f"{name}.toml"
    path.write_text(
        'protocol = "session-factory"\n'
        'session_factory = "orchestrator.agents.scripted:from_env"\n'
        "calls_model = false\n"
        f"[env]\nROLLOUT_SCRIPT = '''{json.dumps(script)}'''\n"
    )
    return str(path)


@pytest.fixture
def run(tmp_path, capfd, monkeypatch):
    """`rollout run` in this process, in a folder of its own, with a fake sandbox unless told otherwise."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments: str, sandbox: str = "fake") -> tuple[int, str, str]:
        code = cli.main(["run", *arguments, "--sandbox", sandbox])
        said = capfd.readouterr()
        return code, said.out, said.err

    return go


# --- what comes out ---------------------------------------------------------------------------------------------


def test_what_is_said_of_a_sandbox_that_comes_up_is_a_line_of_the_log(run, tmp_path):
    """Before it is up, and under the rollout's name: so that a build of minutes is seen."""
    shutil.copytree(demo_task(), tmp_path / "task")
    with (tmp_path / "task/environment/Dockerfile").open("a") as dockerfile:
        dockerfile.write("RUN make everything\n")
    _, _, err = run("task", "--agent", agent(tmp_path, "a", {"turns": [[{"say": "hello"}]]}))
    (folder,) = (tmp_path / "runs").iterdir()
    came_up = err.partition("provisioning -> disconnected")[0]
    assert re.search(rf"^{folder.name}  .*RUN make everything", came_up, re.MULTILINE), err


def test_a_rollout_without_a_verifier_exits_with_0_and_says_where_everything_is(run, tmp_path):
    code, out, err = run("--prompt", "say hello", "--agent", agent(tmp_path, "a", {"turns": [[{"say": "hello"}]]}))
    assert code == 0
    assert "closed/unverified" in out
    assert "> session/factory > executing > capturing/whole >" in out
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"artifacts {folder}" in out
    assert (folder / "diagram.html").read_text().startswith("<!doctype html>")
    assert "session/factory -> executing  (Prompted)" in err


def test_json_is_one_document_on_stdout_and_nothing_else_is(run, tmp_path):
    code, out, _ = run("--prompt", "hi", "--agent", agent(tmp_path, "a", {"turns": [[{"say": "hello"}]]}), "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["state"], document["turns"], document["reward"]) == ("closed/unverified", 1, None)
    assert Path(document["folder"]).parent == tmp_path / "runs"


def test_quiet_says_nothing_while_it_runs(run, tmp_path):
    _, _, err = run("--prompt", "hi", "--agent", agent(tmp_path, "a", {"turns": [[{"say": "hello"}]]}), "--quiet")
    assert err == ""


def test_a_failed_rollout_exits_with_1(run, tmp_path):
    """The fake sandbox has no verifier in it."""
    code, out, _ = run("demo", "--agent", agent(tmp_path, "a", {"turns": [[{"say": "hello"}]]}))
    assert code == 1
    assert "closed/failed" in out
    assert "VerifierError" in out


@pytest.mark.sandbox
def test_the_demo_task_is_solved_by_its_own_solution(run, bwrap):
    code, out, _ = run("demo", "--agent", "oracle", sandbox="local")
    assert code == 0, out
    assert "closed/rewarded  reward 1 " in re.sub("\x1b\\[[0-9;]*m", "", out)


@pytest.mark.sandbox
def test_a_metered_agent_is_solved_through_a_server_of_the_users_own(run, bwrap, monkeypatch):
    """--upstream-url, its wire format and its key; usage equals what the server reported."""
    monkeypatch.setenv("MY_KEY", "sk-the-servers-own-key")
    provider = ScriptedUpstream(ShellScript(DEMO_COMMAND), apis=["openai-chat"], api_key="sk-the-servers-own-key")
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(provider):
        code, out, _ = run(
            *("demo", "--agent", "minimal-acp", "--model", "scripted", "--usage-tracking", "required", "--json"),
            *("--upstream-url", f"{provider.url}/v1", "--upstream-api", "openai-chat", "--upstream-key-env", "MY_KEY"),
            sandbox="local",
        )
    result = json.loads(out)
    assert (code, result["state"], result["reward"]) == (0, "closed/rewarded", 1.0)
    assert result["usage"]["total"]["input_tokens"] == provider.usage.input_tokens > 0
    kept = b"".join(path.read_bytes() for path in Path(result["folder"]).rglob("*") if path.is_file())
    assert b"sk-the-servers-own-key" not in kept


@pytest.mark.sandbox
def test_a_model_that_refuses_everything_exits_with_3(run, bwrap):
    with start_blocking_portal() as portal:
        provider = ScriptedUpstream(Always(Fail(401)), apis=["openai-chat"])
        with portal.wrap_async_context_manager(provider):
            code, out, _ = run(
                *("demo", "--agent", "minimal-acp", "--model", "scripted", "--upstream-url", f"{provider.url}/v1"),
                *("--json", "--env", "PATH"),
                sandbox="local",
            )
    result = json.loads(out)
    assert (code, result["state"], result["verdict"]["owner"]) == (3, "closed/void", "provider")


# --- what cannot work is one sentence ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["demo", "--agent", "nop"], "unknown agent 'nop' (did you mean noop?)"),
        (["nowhere", "--agent", "noop"], "nowhere"),
        (["--agent", "noop"], "nothing to ask: give a task, or a prompt"),
        (["demo", "--agent", "missing.toml"], "missing.toml: cannot be read: No such file or directory"),
        (["demo", "--agent", "noop", "--env", "NOT_SET_ANYWHERE"], "--env NOT_SET_ANYWHERE: give NAME=VALUE"),
        (["demo", "--agent", "noop", "--env", "=v"], "--env =v: give NAME=VALUE"),
        (["demo", "--agent", "noop", "--timeout", "-1"], "--timeout -1: give seconds, a number above 0"),
        (["demo", "--agent", "noop", "--turn-timeout", "inf"], "--turn-timeout inf: give seconds, a number above 0"),
        (["demo", "--agent", "noop", "--upstream-api", "openai-chat"], "belong to --upstream-url"),
        (["demo", "--agent", "noop", "--upstream-url", "http://x", "--upstream-key-env", "NO_SUCH"], "NO_SUCH"),
        (["demo", "--agent", "minimal-acp"], "give model, for example openai/gpt-5"),
        (["demo", "--agent", "noop", "--usage-tracking", "required"], "usage_tracking is required, but no role"),
    ],
)
def test_a_mistake_is_exit_code_2_one_sentence_and_nothing_is_started(run, tmp_path, arguments, said):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_mistake_under_json_is_a_document_too(run):
    code, out, err = run("demo", "--agent", "nop", "--json")
    document = json.loads(out)["error"]
    assert (code, document["type"], document["exit_code"]) == (2, "ConfigError", 2)
    assert document["message"] in err


def test_an_unknown_option_is_exit_code_2(run):
    code, _, err = run("demo", "--agnet", "noop")
    assert code == 2
    assert "No such option" in err


def test_a_bug_of_ours_is_a_sentence_too(run, monkeypatch):
    monkeypatch.setattr(options, "_config", lambda *_, **__: 1 / 0)
    code, _, err = run("demo", "--agent", "noop")
    assert code == 1
    assert err == "rollout: this is a bug (ZeroDivisionError: division by zero); ROLLOUT_DEBUG=1 shows where\n"
    monkeypatch.setenv("ROLLOUT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("demo", "--agent", "noop")


# --- ^C and the terminal ----------------------------------------------------------------------------------------


def start(folder: Path, manifest: str, *arguments: str, **pipes) -> subprocess.Popen:
    """`rollout run` as a process of its own."""
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "orchestrator.cli",
            "run",
            "--prompt",
            "hi",
            "--agent",
            manifest,
            "--sandbox",
            "fake",
            "--json",
            *arguments,
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        **{"stderr": subprocess.PIPE, **pipes},
    )


def until(process: subprocess.Popen, said: str) -> None:
    """Read its stderr up to a line that holds this."""
    lines = []
    for line in process.stderr:
        lines.append(line.decode())
        if said in lines[-1]:
            return
    pytest.fail(f"it ended with {process.wait()} before it said {said!r}:\n{''.join(lines)}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_stops_the_rollout_captured_but_not_closed(tmp_path, number):
    """The turn in flight is cancelled and captured; exit code 5."""
    process = start(tmp_path, agent(tmp_path, "waits", {"turns": [[{"say": "working"}, {"wait_cancel": 60}]]}))
    until(process, "-> executing")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    result = json.loads(out)
    assert process.returncode == 5, err
    assert f"{number.name}: stopping; once more cancels".encode() in err
    assert (result["state"], result["ending"], result["ended_by"]) == ("disconnected", None, "interrupted")
    assert result["trajectory_source"] == "session"


def test_a_second_signal_cancels_and_everything_is_given_back(tmp_path):
    """Exit code 4, and a closed rollout."""
    process = start(tmp_path, agent(tmp_path, "slow", {"connect": [{"sleep": 60}], "turns": [[{"say": "never"}]]}))
    until(process, "-> connecting")
    process.send_signal(signal.SIGINT)
    until(process, "stopping")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    result = json.loads(out)
    assert process.returncode == 4, err
    assert b"cancelling; everything is given back first" in err
    assert (result["state"], result["leaked"]) == ("closed/cancelled", [])


def test_a_killed_rollout_is_reaped_and_a_living_one_is_not(tmp_path, capfd):
    """`rollout reap`: captured from what is on disk, given back, closed."""
    process = start(tmp_path, agent(tmp_path, "waits", {"turns": [[{"say": "working"}, {"wait_cancel": 60}]]}))
    until(process, "-> executing")
    assert cli.main(["reap", str(tmp_path / "runs")]) == 1
    assert f"is driven by process {process.pid}, which is alive" in capfd.readouterr().out
    process.kill()
    process.communicate(timeout=60)
    assert cli.main(["reap", str(tmp_path / "runs"), "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)
    assert (row["state"], row["leaked"], row["error"]) == ("closed/failed", [], None)
    assert cli.main(["show", str(tmp_path / "runs" / row["rollout"])]) == 0
    assert "Recovered" in capfd.readouterr().out
    assert row["changed"]
    folder = str(tmp_path / "runs" / row["rollout"])
    assert cli.main(["reap", folder]) == 0
    said = f"{row['rollout']}  closed/failed already, and it holds nothing: nothing to reap\n"
    assert capfd.readouterr().out == said
    assert cli.main(["reap", folder, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == [{**row, "changed": False}]
    assert cli.main(["reap", str(tmp_path / "runs")]) == 0
    assert capfd.readouterr().out == "nothing to reap\n"


def on_screen(written: bytes) -> list[str]:
    """What a terminal shows that got this: its lines, as far as a view of two lines moves the cursor."""
    lines, row = [""], 0
    for part in re.split(r"(\r\n|\r|\n|\x1b\[[0-9;?]*[A-Za-z])", written.decode()):
        if part == "\r":
            continue  # what follows one erases the line
        if part in ("\n", "\r\n"):
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\x1b[1A":
            row -= 1
        elif not part.startswith("\x1b"):
            lines[row] += part
    return lines


def test_what_is_said_of_each_signal_stays_on_a_terminal(tmp_path):
    """The view that is drawn again ten times a second does not take it away."""
    controller, terminal = os.openpty()
    script = {"turns": [[{"say": "working"}, {"ignore_cancel": True}, {"hang": True}]]}
    process = start(tmp_path, agent(tmp_path, "slow", script), stderr=terminal)
    os.close(terminal)
    seen, deadline = b"", time.monotonic() + 60

    def until_seen(word: bytes) -> None:
        nonlocal seen
        while word not in seen and time.monotonic() < deadline:
            seen += os.read(controller, 4096)

    until_seen(b"executing for")
    for word in (b"stopping; once", b"cancelling; everything", b"it is being cancelled"):
        process.send_signal(signal.SIGINT)
        until_seen(word)
    process.kill()
    process.wait(timeout=60)
    try:
        while more := os.read(controller, 4096):
            seen += more
    except OSError:
        pass  # the terminal is gone with its last user
    os.close(controller)
    process.stdout.close()
    shown = "\n".join(on_screen(seen))
    words = r"^rollout: SIGINT: stopping;.*\s+rollout: SIGINT: cancelling;.*\s+rollout: SIGINT: it is being cancelled"
    assert re.search(words, shown, re.MULTILINE), shown


def test_on_a_terminal_it_shows_state_age_last_step_and_goes_away(tmp_path):
    """On stderr, so that stdout stays one document."""
    controller, terminal = os.openpty()
    script = {"turns": [[{"think": "it is quiet here"}, {"wait_cancel": 60}]]}
    process = start(tmp_path, agent(tmp_path, "shows", script), stderr=terminal)
    os.close(terminal)
    seen = b""
    deadline = time.monotonic() + 60
    while b"it is quiet here" not in seen and time.monotonic() < deadline:
        seen += os.read(controller, 4096)
    process.send_signal(signal.SIGINT)
    out = process.stdout.read()
    process.wait(timeout=60)
    try:
        while more := os.read(controller, 4096):
            seen += more
    except OSError:
        pass  # the terminal is gone with its last user
    os.close(controller)
    process.stdout.close()
    text = seen.decode()
    assert re.search(r"executing for \d+ m?s", text)
    assert "turn 1, 2 steps, 0 tool calls" in text
    assert "\x1b[?25h" in text, "the cursor is there again"
    assert json.loads(out)["state"] == "disconnected"
