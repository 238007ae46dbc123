"""The other commands: help, agents, validate, init, diagram, show; and the table of exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from harness import build
from test_diagram import journal_of, write_journal

from orchestrator import cli
from orchestrator.cli import authoring, looking
from orchestrator.conformance import SANDBOX_CLAUSES
from orchestrator.journal import to_json
from orchestrator.registry import AgentConfig, Install, Registry
from orchestrator.result import TrackedUsage
from orchestrator.sandboxes import KINDS
from orchestrator.show import _step, one_line, plain, rollouts_in, story_of, table, tell, tell_shortly
from orchestrator.tasks import demo_task
from orchestrator.watch import Follower
from states.errors import ConfigError, JournalError
from states.events import Usage, Verified
from states.journal import LeaseRecord, Note, Transition
from states.machine import CLOSED
from states.ports import Lease

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def rollout(tmp_path, capfd, monkeypatch):
    """A command in this process, in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def go(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(list(arguments))
        said = capfd.readouterr()
        return code, re.sub("\x1b\\[[0-9;]*m", "", said.out), said.err

    return go


@pytest.fixture
def folder(tmp_path):
    """A rollout that swapped roles, on disk with two turns of its trajectory."""
    path = tmp_path / "runs" / "r1"
    path.mkdir(parents=True)
    write_journal(path, journal_of("a swap of roles, there and back, swaps transports"))
    lines = [
        {"segment": 1, "opened": {"role": "coder", "protocol": "acp"}},
        {"segment": 1, "step": 0, "data": {"type": "user_message", "text": "do it"}},
        *(
            {"segment": 1, "step": n, "data": {"type": "tool_call", "title": f"call {n}", "status": "completed"}}
            for n in range(1, 30)
        ),
        {"segment": 1, "sealed": {"steps": 30}},
        {"segment": 1, "step": 30, "late": True, "data": {"type": "agent_message", "text": "afterthought"}},
        {"segment": 2, "opened": {"role": "reviewer"}},
        {"segment": 2, "step": 0, "data": {"type": "agent_thought", "text": "\x1b[2J hm"}},
        {"segment": 2, "step": 1, "data": {"type": "session_update", "update": "usage_update"}},
        {"segment": 2, "step": 2, "data": {"type": "plan", "entries": [{"content": "look", "status": "pending"}]}},
        {"segment": 2, "step": 3, "data": {"type": "question", "prompt": "may I?", "answer": "yes", "by": "policy"}},
    ]
    (path / "trajectory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# --- help and codes ---------------------------------------------------------------------------------------------


def test_help_teaches_and_lists_the_exit_codes(rollout):
    for command in ([], ["run"]):
        code, out, _ = rollout(*command, "--help")
        assert code == 0
        for number, meaning in cli.EXIT_CODES.items():
            assert f"{number}  {meaning}" in out
    assert "rollout run demo --agent oracle" in rollout("--help")[1]


def test_every_ending_has_an_exit_code_of_the_table():
    assert {f"closed/{ending}" for ending in cli.ENDINGS if ending} == set(CLOSED)
    assert set(cli.ENDINGS.values()) <= set(cli.EXIT_CODES)


@pytest.mark.parametrize("command", sorted(set(cli.cli.commands) - {"init"}))
def test_every_command_has_json_and_help(rollout, command):
    code, out, _ = rollout(command, "--help")
    assert code == 0
    assert "--json" in out


def test_no_command_says_how_it_is_used(rollout):
    code, out, err = rollout()
    assert code == 2
    assert "Commands:" in out + err


def test_version_is_one_line(rollout):
    code, out, _ = rollout("--version")
    assert code == 0
    assert out.startswith("rollout")


def test_the_package_is_the_program():
    """`python -m orchestrator` says what `rollout` says, where its folder of scripts is not on the PATH."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("rollout ")


def test_help_loads_nothing_heavy():
    """What costs time is imported by the command that needs it."""
    code = "import sys\nfrom orchestrator.cli import main\nmain(['--help'])\n"
    code += "bad = {'litellm', 'daytona', 'aiohttp', 'rich', 'yaml', 'orchestrator.doctor', 'orchestrator.diagram'}\n"
    code += "sys.exit(' '.join(sorted(bad & set(sys.modules))) or 0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_help_loads_no_heavy_library():
    """What it costs is a row of `make bench`; what makes it cheap is that nothing heavy is imported."""
    code = "import sys; from orchestrator.cli import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = done.stdout.splitlines()[-1]
    assert not [name for name in ("litellm", "daytona", "aiohttp", "rich", "yaml") if f"'{name}'" in loaded]


def test_a_reader_that_closes_early_is_no_error():
    """`rollout agents | head -1`."""
    done = subprocess.run(
        f"{sys.executable} -m orchestrator.cli diagram --format svg | head -c 1",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


# --- agents -----------------------------------------------------------------------------------------------------


def test_agents_are_listed_with_what_they_speak_and_whether_they_are_installed(rollout):
    code, out, _ = rollout("agents")
    assert code == 0
    assert re.search(r"codex-acp +acp +openai-responses", out)
    assert re.search(r"oracle +session-factory +no model", out)
    rows = {row["name"]: row for row in json.loads(rollout("agents", "--json")[1])}
    assert rows["oracle"]["status"] == "nothing to install"
    assert set(rows["codex-acp"]) == {"name", "protocol", "api", "calls_model", "description", "status"}


def test_an_agent_that_cannot_work_is_listed_with_the_reason():
    registry = Registry({"broken": AgentConfig("broken", "acp", launch=("no-such-program-anywhere",))})
    row = authoring._agent_row(registry, "broken")
    assert row["status"].startswith("cannot work: agent 'broken': its program 'no-such-program-anywhere'")


def test_an_agent_that_was_never_installed_says_how(monkeypatch, tmp_path):
    monkeypatch.setenv("ROLLOUT_CACHE", str(tmp_path))
    install = Install("npm", ("some-agent@1.0.0",))
    registry = Registry({"some": AgentConfig("some", "acp", launch=("${install}/bin/some",), install=install)})
    assert (
        authoring._agent_row(registry, "some")["status"]
        == "installed on first use, or by: rollout agents --install some"
    )


def test_installing_what_needs_nothing_says_so(rollout):
    assert rollout("agents", "--install", "oracle") == (0, "oracle: nothing to install\n", "")
    assert json.loads(rollout("agents", "--install", "oracle", "--json")[1]) == {"oracle": ""}


def test_installing_an_unknown_agent_is_exit_code_2(rollout):
    code, _, err = rollout("agents", "--install", "nope")
    assert code == 2
    assert "unknown agent 'nope'" in err


# --- validate and init ------------------------------------------------------------------------------------------


def test_a_new_task_is_valid_as_it_is(rollout, tmp_path):
    code, out, _ = rollout("init", "task", "mine")
    assert code == 0
    assert "next: rollout validate mine && rollout run mine --agent oracle" in out
    assert rollout("validate", "mine")[0] == 0
    assert rollout("validate", "mine/task.toml")[0] == 0
    code, _, err = rollout("init", "task", "mine")
    assert code == 2
    assert "expected a new or an empty folder" in err


def test_a_malformed_task_is_an_error_that_says_where(rollout):
    rollout("init", "task", "mine")
    Path("mine/instruction.md").unlink()
    code, out, _ = rollout("validate", "mine")
    assert code == 1
    assert "instruction.md" in out
    document = json.loads(rollout("validate", "mine", "--json")[1])
    assert document["ok"] is False
    assert len(document["errors"]) == 1


def test_what_may_be_a_surprise_is_a_note_and_no_error(rollout):
    rollout("init", "task", "mine")
    Path("mine/solution/solve.sh").unlink()
    Path("mine/solution").rmdir()
    code, out, _ = rollout("validate", "mine")
    assert code == 0
    assert "no reference solution" in out


@pytest.mark.parametrize("protocol", ["acp", "session-factory"])
def test_a_new_agent_is_valid_as_it_is(rollout, protocol, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    code, out, _ = rollout("init", "agent", f"fresh_{protocol[:3]}", "--protocol", protocol, "--json")
    said = json.loads(out)
    written = said["written"]
    assert code == 0
    assert written[0] == f"fresh_{protocol[:3]}.toml"
    asked, ran = said["next"].split(" && ")  # the same as the head of the file says: with a model where one is needed
    assert [f"#   {asked}", f"#   {ran}"] == Path(written[0]).read_text().splitlines()[1:3]
    assert rollout("validate", written[0]) == (0, f"ok     {written[0]}\n", "")
    code, _, err = rollout("init", "agent", f"fresh_{protocol[:3]}", "--protocol", protocol)
    assert code == 2
    assert "exists; nothing was written" in err


def test_a_new_scene_is_valid_and_runs_as_it_is(rollout):
    """Every role speaks, without a model; every line that is commented out is one of the format, too."""
    code, out, _ = rollout("init", "scene", "--json")
    assert (code, json.loads(out)["written"]) == (0, ["rollout.toml"])
    assert rollout("validate", "rollout.toml")[1].endswith("ok     rollout.toml\n")
    code, out, err = rollout("run", "--prompt", "x", "--scene", "rollout.toml", "--sandbox", "fake", "--json")
    assert code == 0, err
    assert [share["role"] for share in json.loads(out)["usage"]["by_turn"]] == ["coder", "reviewer", "coder"]
    assert rollout("init", "scene")[0] == 2
    assert rollout("init", "scene", "scene.yaml")[0] == 2


def test_what_a_new_scene_has_commented_out_can_be_taken_in(rollout, monkeypatch):
    """Its commented settings are keys of the format; with the director the turns go, and a role of its name comes."""
    monkeypatch.setenv("TOKEN", "x")
    rollout("init", "scene", "all.toml")
    text = Path("all.toml").read_text()
    settings = re.sub(r"^# (\w+ = .*|\[director\].*)$", r"\1", text, flags=re.MULTILINE)
    settings = settings.replace('task = "tasks/sum"', f'task = "{demo_task()}"')
    head, tail = settings.split("[[turns]]")[0], settings[settings.index("\n[director]") :]
    Path("all.toml").write_text(f'{head}[[roles]]\nname = "user"\n\n{tail}')
    code, out, _ = rollout("validate", "all.toml")
    assert code == 0, out
    assert settings.count("\n# ") < text.count("\n# ") - 10


def test_a_new_agent_of_ones_own_runs(rollout, monkeypatch):
    """The session factory that `init` writes, in the fake sandbox."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    rollout("init", "agent", "runs_here", "--protocol", "session-factory")
    code, out, err = rollout("run", "--prompt", "sum", "--agent", "runs_here.toml", "--sandbox", "fake", "--json")
    assert code == 0, err
    assert json.loads(out)["tool_calls"] == 1


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ("x = [", "is no TOML"),
        ('protocol = "smoke"', "protocol"),
        ('protocol = "session-factory"', "needs session_factory"),
        ('protocol = "acp"\nlaunch = ["sh"]\ncolour = "red"', "colour: unknown key"),
    ],
)
def test_a_wrong_manifest_is_an_error_that_says_which_key(rollout, manifest, said):
    Path("bad.toml").write_text(manifest)
    code, out, _ = rollout("validate", "bad.toml")
    assert code == 1
    assert said in out


def test_a_message_of_many_lines_is_told_from_its_end(folder):
    """The end of a build's log says what went wrong; its first line what was to be done."""
    story = story_of(folder)
    message = "\n".join(
        ["the image cannot be built", *(f"  step {number}" for number in range(30)), "  no such package"]
    )
    error = {"state": "provisioning", "error": "SandboxError", "message": message}
    told = tell_shortly(attrs.evolve(story, result=attrs.evolve(story.result, errors=(error,))))
    assert "  provisioning  SandboxError: the image cannot be built\n      ...\n" in told
    assert "      no such package\n" in told
    assert "step 3\n" not in told


def test_a_traceback_is_told_from_its_end(folder):
    """The last frame is that of what a user brought, and the last line says what it raised."""
    story = story_of(folder)
    frames = [f'  File "/lib/ours.py", line {n}, in call' for n in range(30)]
    note = "\n".join(
        ["Traceback (most recent call last):", *frames, '  File "mine.py", line 7, in mine', "KeyError: 'x'"]
    )
    told = tell(attrs.evolve(story, result=attrs.evolve(story.result, notes=(note,))))
    assert 'File "mine.py", line 7, in mine' in told
    assert "KeyError: 'x'" in told
    assert "line 3, in call" not in told


# --- diagram ----------------------------------------------------------------------------------------------------


def test_the_machine_is_drawn_in_every_format(rollout):
    for form, begins in {
        "mermaid": "---\n",
        "dot": "digraph",
        "svg": "<svg",
        "html": "<!doctype",
        "table": "# ",
    }.items():
        code, out, _ = rollout("diagram", "--format", form)
        assert code == 0
        assert out.startswith(begins)


def test_a_run_is_painted_into_the_file_whose_name_tells_the_format(rollout, folder):
    code, out, _ = rollout("diagram", "--run", str(folder), "-o", "run.svg")
    assert (code, out) == (0, "wrote run.svg\n")
    assert "RoleSwapped ×2" in Path("run.svg").read_text()
    document = json.loads(rollout("diagram", "--run", str(folder), "--json")[1])
    assert document["format"] == "mermaid"


def test_the_name_of_a_diagrams_file_may_be_in_capitals(rollout):
    """An ending means the same however it is written."""
    assert rollout("diagram", "-o", "RUN.SVG")[0] == 0
    assert Path("RUN.SVG").read_text().startswith("<svg")


def test_a_file_that_cannot_be_written_is_exit_code_2(rollout):
    code, _, err = rollout("diagram", "-o", "no/such/folder.svg")
    assert code == 2
    assert "cannot be written: No such file or directory" in err


def test_a_folder_without_a_journal_is_an_error_of_one_line(rollout, tmp_path):
    for command in (
        ("diagram", "--run", str(tmp_path)),
        ("exec", str(tmp_path), "ls"),
        ("export", str(tmp_path), "--to", "atif"),
    ):
        code, _, err = rollout(*command)
        assert code == 2, command
        assert "holds no rollout" in err
        assert len(err.splitlines()) == 1


# --- show -------------------------------------------------------------------------------------------------------


def test_a_rollout_is_told_with_its_path_turns_usage_and_verdict(rollout, folder):
    code, out, _ = rollout("show", str(folder))
    assert code == 0
    assert out.startswith("r1  closed/rewarded  reward 1  in 25.0 s\n")
    assert re.search(r"\d+\.000 s  executing +1\.0 s  TurnEnded", out)
    assert "verdict   agent: verified; the last turn ended by end_turn" in out
    assert "Turn 1  coder: end_turn; 30 steps, 1 steps came late" in out
    assert "... 16 more steps ..." in out
    assert "? may I? -> yes (policy)" in out
    assert "usage     untracked" in out
    assert "usage_update" not in out
    assert "# look (pending)" in out
    everything = rollout("show", str(folder), "--all")[1]
    assert "... 16 more" not in everything
    assert "- usage_update" in everything


def test_nothing_that_an_agent_wrote_can_move_the_cursor(rollout, folder):
    """Its control characters are shown as question marks."""
    assert "~ ?[2J hm" in tell(story_of(folder))


def test_show_as_json_is_the_whole_story(rollout, folder):
    document = json.loads(rollout("show", str(folder), "--json")[1])
    assert [stay["state"] for stay in document["path"]][:2] == ["provisioning", "disconnected"]
    assert document["result"]["reward"] == 1.0
    assert len(document["turns"]) == 2
    assert document["turns"][0]["late"] == 1


def test_a_folder_of_rollouts_is_a_table(rollout, folder):
    (folder.parent / "torn").mkdir()
    (folder.parent / "torn" / "journal.jsonl").write_text("{nonsense}\n")
    code, out, _ = rollout("show")
    assert code == 0
    assert re.search(r"r1 +closed/rewarded +1 +end_turn", out.replace("  ", " "))
    assert "unreadable" in out
    assert len(json.loads(rollout("show", "--json")[1])) == 2


def test_a_folder_that_holds_nothing_or_is_not_there_is_exit_code_2(rollout, tmp_path):
    code, _, err = rollout("show", str(tmp_path))
    assert code == 2
    assert "holds no rollout" in err
    assert rollout("show", "nowhere")[0] == 2
    assert json.loads(rollout("show", str(tmp_path), "--json")[1]) == []


def test_an_empty_journal_and_a_missing_one_are_told_apart(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no journal\.jsonl"):
        story_of(tmp_path)
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(JournalError, match="ended before its first line"):
        story_of(tmp_path)


def test_a_rollout_that_runs_is_told_as_far_as_it_is(tmp_path):
    write_journal(tmp_path, journal_of("one turn over ACP")[:5])
    text = tell(story_of(tmp_path))
    assert "executing" in text
    assert "is here" in text
    assert "not over: in executing" in text


def test_errors_are_told_with_the_agents_last_words(tmp_path):
    write_journal(tmp_path, journal_of("no connect works"))
    text = tell(story_of(tmp_path))
    assert "Errors" in text
    assert "AgentError: it failed" in text


def test_usage_is_told_by_role_with_its_price(folder):
    story = story_of(folder)
    spent = Usage(
        calls=3, failed_calls=1, input_tokens=12_000, output_tokens=34, cache_read_input_tokens=900, cost=0.02
    )
    usage = TrackedUsage("metered", "", spent, {"coder": spent, "reviewer": Usage(cost=None)})
    text = tell_shortly(attrs.evolve(story, result=attrs.evolve(story.result, usage=usage)))
    assert "usage     3 calls (1 failed), 12,000 tokens in (900 cached), 34 out, $0.0200" in text
    assert "coder: 3 model calls, 12,034 tokens, $0.0200" in text
    unknown = TrackedUsage("metered", "", Usage(cost=None))
    text = tell_shortly(attrs.evolve(story, result=attrs.evolve(story.result, usage=unknown)))
    assert "price unknown" in text


def test_roles_rewards_notes_and_what_is_still_held_are_told(tmp_path):
    header, *rest = journal_of("one turn over ACP")
    roles = {"coder": {"agent": "codex-acp", "protocol": "acp", "model": "gpt-5"}}
    info = {"task": "sum", "roles": roles, "sandbox": "local", "network": "none", "tracked": True}
    verified = [
        attrs.evolve(r, event=Verified(0.5, {"reward": 0.5, "style": 1.0})) if r.event == Verified(1.0) else r
        for r in rest
    ]
    held = LeaseRecord(90, 1.0, "intended", Lease("sandbox", "box-1"))
    write_journal(tmp_path, [attrs.evolve(header, info=info), *verified, Note(91, 1.0, "a hook raised"), held])
    text = tell(story_of(tmp_path))
    assert "task      sum" in text
    assert "role      coder: codex-acp (acp, gpt-5)" in text
    assert "sandbox   local, network none" in text
    assert "rewards   reward 0.5, style 1" in text
    assert "a hook raised" in text
    assert "still held: sandbox box-1" in text


def test_what_was_untracked_says_why_once_the_rollout_is_over(folder):
    (folder / "result.json").write_text('{"usage": {"reason": "usage_tracking is off"}}')
    assert "usage     untracked: usage_tracking is off" in tell(story_of(folder))


def test_following_a_rollout_that_is_over_tells_its_story(rollout, folder):
    code, out, _ = rollout("show", "--follow", str(folder))
    assert code == 0
    assert "closed/rewarded" in out


def test_a_turn_that_is_not_sealed_says_so(tmp_path):
    write_journal(tmp_path, journal_of("one turn over ACP")[:5])
    line = {"segment": 1, "step": 0, "data": {"type": "tool_call", "kind": "execute", "status": "failed"}}
    (tmp_path / "trajectory.jsonl").write_text(json.dumps(line) + "\n")
    assert "open, not sealed; 1 steps" in tell(story_of(tmp_path))


@pytest.mark.anyio
async def test_a_question_that_was_declined_is_told_with_the_reason(tmp_path):
    """Who answered, with what, and why that and not something else."""

    async def handler(_request):
        raise RuntimeError("not today")

    stand = build("acp", {"turns": [[{"permission": {"title": "May I?"}}]]}, on_ask_user=handler, out=tmp_path)
    await stand.rollout.run()
    assert "-> reject (handler: declined: the handler raised RuntimeError: not today)" in tell(
        story_of(tmp_path / "r1")
    )
    assert _step({"type": "question", "prompt": "Sure?", "answer": None, "by": "nobody"}, plain) == (
        "? Sure? -> no answer (nobody)"
    )


def test_a_follower_reads_what_was_appended_and_no_half_line(tmp_path):
    """It works on a rollout of another process: files are all that it knows."""
    records = journal_of("one turn over ACP")
    follower = Follower(tmp_path)
    assert follower.look() == []
    write_journal(tmp_path, records[:5])
    assert [moved["dest"] for moved in follower.look()][-1] == "executing"
    assert follower.look() == []
    with (tmp_path / "trajectory.jsonl").open("w") as file:
        file.write('{"segment":1,"step":0,"data":{"type":"tool_call","title":"ls"}}\n{"segment":1,"st')
    refused = '{"via":"refused","usage":null}\n'
    (tmp_path / "llm.jsonl").write_text('{"usage":{"input_tokens":5,"output_tokens":2}}\n' + refused)
    follower.look()
    assert (follower.steps, follower.tool_calls, follower.last_step) == (1, 1, "ls")
    assert follower.line(follower.where[1] + 3.0) == (
        "executing for 3.0 s  |  turn 1, 1 steps, 1 tool calls, 7 tokens in 1 calls"
    )
    assert not follower.closed


def test_a_follower_tells_whose_turn_it_is_who_asked_who_answered_and_who_spent_what(tmp_path):
    """Roles, questions and a director, from the files alone."""
    write_journal(tmp_path, journal_of("one turn over ACP")[:4])
    prompted = {"type": "transition", "source": "session/acp", "dest": "executing", "cause": "handler", "time": 9.0}
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write(json.dumps({**prompted, "event": "Prompted", "data": {"role": "coder"}}) + "\n")
    lines = [{"segment": 1, "step": 1, "data": {"type": "question", "prompt": "May I?"}}]
    lines += [{"segment": 1, "step": 1, "set": {"answer": "allow", "by": "handler", "why": ""}}]
    calls = [{"role": role, "usage": {"input_tokens": 1000, "output_tokens": 0}} for role in ("user", "coder", "coder")]
    for name, content in (("trajectory", lines), ("llm", calls)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    follower = Follower(tmp_path)
    follower.look()
    assert follower.last_step == "? May I? -> allow (handler)"
    assert follower.line(9.0) == (
        "executing for <1 ms  |  turn 1 (coder), 1 steps, 0 tool calls, "
        "3,000 tokens in 3 calls (user 1,000, coder 2,000)"
    )
    said = [{"segment": 2, "step": 0, "data": {"type": "user_message", "text": "coder said: hm"}}]
    said += [{"segment": 2, "step": 1, "data": {"type": "agent_message", "text": "Go"}}]
    said += [{"segment": 2, "step": 1, "text": "on."}]
    (tmp_path / "director.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    follower.look()
    assert follower.last_step == "< Go on."


def test_a_follower_tells_what_a_sandbox_that_comes_up_is_doing(tmp_path):
    """The newest note, the log that it names and how that ends; nothing of it once the sandbox is up."""
    log = tmp_path / "build.log"
    log.write_bytes(b"[1/2] FROM debian\n[2/2] RUN make\n10%\r20%\n\n")
    records = journal_of("one turn over ACP")
    note = {"type": "note", "seq": 1, "time": 5.0}
    write_journal(tmp_path, records[:1])
    with (tmp_path / "journal.jsonl").open("a") as file:
        for text in ("the image a stands for b", f"building the image it:1; log: {log}"):
            file.write(json.dumps({**note, "text": text}) + "\n")
    follower = Follower(tmp_path)
    assert [new["text"].split()[0] for new in follower.look()] == ["the", "building"]
    assert follower.lines(1000) == ["building the image it:1", f"log: {log}", "20%"]
    log.unlink()
    assert follower.lines(1000) == ["building the image it:1", f"log: {log}"]
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write(json.dumps(to_json(next(one for one in records if isinstance(one, Transition)))) + "\n")
        file.write(json.dumps({**note, "text": "a note on what came later"}) + "\n")
    assert [new["type"] for new in follower.look()] == ["transition"]
    assert follower.lines(1000) == []


def test_rows_of_different_keys_are_one_table():
    assert table([{"a": 1.0, "b": None}, {"a": "x", "c": 2}]) == "a  b  c\n1  -  -\nx  -  2\n"


def test_rollouts_are_listed_the_oldest_first(tmp_path):
    for name, age in (("new", 10), ("old", 20)):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "journal.jsonl"
        file.touch()
        os.utime(file, (1_000_000 - age, 1_000_000 - age))
    assert [path.name for path in rollouts_in(tmp_path)] == ["old", "new"]


def test_a_line_is_cut_where_it_must_be():
    assert one_line("x" * 300, 20) == "x" * 16 + " ..."
    assert one_line("a\tb\n\nc", 20) == "a b c"


# --- conformance --------------------------------------------------------------------------------------------------


def muddled(spec):
    """A sandbox of a user's own that loses what is written to it."""
    from orchestrator.sandboxes.fake import FakeSandbox
    from states.errors import SandboxError

    return FakeSandbox(name=spec.name, faults={"read_file": SandboxError("it was here a moment ago")})


muddled.LACKS = ("processes",)


def test_a_sandbox_that_conforms_is_told_clause_by_clause(rollout):
    """The clauses that it cannot meet by design are counted, not passed over."""
    code, out, _ = rollout("conformance", "fake")
    assert code == 0
    name, asserts = re.search(r"pass  (\w+): (Starting or stopping twice is nothing)", out).groups()
    assert (name, asserts) in {(clause.name, clause.asserts[: len(asserts)]) for clause in SANDBOX_CLAUSES}
    assert rollout("conformance", "fake", "-k", name)[0] == 0, "what is printed is what -k takes"
    assert re.search(r"\d+ of \d+ clauses hold; \d+ left out", out)


CONFORMS = [
    pytest.param("local", "", marks=pytest.mark.sandbox),
    pytest.param("docker", "idempotent", marks=pytest.mark.docker),
    pytest.param("daytona", "idempotent", marks=[pytest.mark.sandbox, pytest.mark.daytona]),
]
"""What ships, and a word of the clauses that are run; all of them where they cost little."""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "word"), CONFORMS)
def test_a_sandbox_that_ships_conforms_by_its_name(rollout, request, kind, word):
    """The command makes it, uses it and gives it back: exit code 0, and every clause that was asked for holds."""
    if kind == "daytona":
        request.getfixturevalue("daytona_apart")
    image = ["--image", request.getfixturevalue("docker_image")()] if kind == "docker" else []
    code, out, err = rollout("conformance", kind, "-k", word, "--json", *image)
    assert code == 0, (out, err)
    told = json.loads(out)
    wanted = [clause.name for clause in SANDBOX_CLAUSES if word in clause.name]
    assert [row["clause"] for row in told["clauses"]] == wanted != []
    assert told["left_out"] == 0


def test_what_can_be_held_against_the_clauses_is_in_the_help(rollout):
    """Every kind that ships."""
    code, out, _ = rollout("conformance", "--help")
    assert code == 0
    assert all(kind in out for kind in KINDS)


def test_a_sandbox_of_ones_own_that_does_not_conform_is_told_where(rollout, monkeypatch):
    """Exit code 1, and each failed clause with what was seen."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    code, out, _ = rollout("conformance", "test_cli_commands:muddled", "--json")
    rows = json.loads(out)["clauses"]
    assert code == 1
    failed = {row["clause"]: row["said"] for row in rows if not row["passed"]}
    assert "it was here a moment ago" in failed["a_handle_reads_and_writes_files"]
    assert any(row["passed"] for row in rows)


@pytest.mark.parametrize(
    "arguments", [("nobody",), ("fake", "-k", "nothing-like-it"), ("fake", "--sandbox-option", "x")]
)
def test_conformance_of_what_there_is_not_is_a_mistake(rollout, arguments):
    """A sentence and exit code 2."""
    code, _, err = rollout("conformance", *arguments)
    assert code == 2
    assert arguments[-1] in err


@pytest.mark.parametrize(
    ("kind", "said"), [("docker", "a docker sandbox needs an image"), ("daytona", "set DAYTONA_API_KEY")]
)
def test_conformance_of_a_sandbox_that_cannot_be_made_says_so_once(rollout, monkeypatch, kind, said):
    """Not once a clause: exit code 2, one line, and nothing was started."""
    monkeypatch.delenv("DAYTONA_API_KEY", raising=False)
    code, out, err = rollout("conformance", kind)
    assert (code, out) == (2, "")
    assert err.count(said) == 1


@pytest.mark.parametrize("name", ["picture.png", "picture"])
def test_a_diagrams_file_whose_name_says_no_format_is_a_sentence(rollout, tmp_path, name):
    """A file called .png that held text would fool whoever opens it."""
    code, out, err = rollout("diagram", "-o", name)
    assert (code, out) == (2, "")
    assert "no diagram is written as" in err
    assert ".svg (svg)" in err
    assert not (tmp_path / name).exists()
    assert rollout("diagram", "-o", name, "--format", "dot")[0] == 0, "but a format that is given stands"


@pytest.mark.parametrize(("suffix", "form"), looking.SUFFIXES.items())
def test_a_diagrams_format_is_what_the_name_of_its_file_says(rollout, tmp_path, suffix, form):
    assert rollout("diagram", "-o", f"d{suffix}")[0] == 0
    assert (tmp_path / f"d{suffix}").read_text() == rollout("diagram", "--format", form)[1]
