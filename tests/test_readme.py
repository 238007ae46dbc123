"""The README and its neighbours say what is so: blocks run, shown output is real, tables are those of the code."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import attrs
import click
import pytest
from hosts import host_python, host_run

from orchestrator import cli
from orchestrator.config import Network, UsageTracking
from orchestrator.registry import default_registry
from states.machine import STATES

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
README = PAGES["README.md"]
BLOCK_SEC = 60
HOST_SEC = 300
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TASK_FILES = {"tests/test.sh"}
"""Paths in a task's folder that look like paths of this repository."""


# --- blocks ----------------------------------------------------------------------------------------------------


@attrs.frozen
class Block:
    """A fenced block of a page; `excuse` is the reason of a `not run` comment before it, `host` where it is run."""

    page: str
    line: int
    language: str
    text: str
    excuse: str
    host: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str) -> Iterator[Block]:
    """The blocks of a page, in order."""
    fence = re.compile(r"(?:<!-- (not run|in): (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for found in fence.finditer(PAGES[page]):
        line = PAGES[page].count("\n", 0, found.start(3)) + 1
        said = {found[1]: found[2] or ""}
        yield Block(page, line, found[3], found[4], said.get("not run", ""), said.get("in", ""))


ALL = [block for page in PAGES for block in blocks(page)]
PYTHON = [block for block in ALL if block.language == "python" and not (block.excuse or block.host)]
HOSTED = [block for block in ALL if block.language == "python" and block.host]
CONSOLE = [block for block in ALL if block.language == "console" and not block.excuse and block.page == "README.md"]


def run(argv: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run as a reader would, with the programs of this environment and without anybody's keys."""
    env = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=BLOCK_SEC, check=False)


@pytest.mark.sandbox
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_block_runs_as_it_stands(block, tmp_path, bwrap):
    """Saved as a file and run, it ends well; its asserts are the README's promises."""
    file = tmp_path / "block.py"
    file.write_text(block.text)
    done = run([sys.executable, "-W", "error", str(file)], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.hosts
@pytest.mark.parametrize("block", HOSTED, ids=str)
def test_python_block_runs_in_its_host(block, tmp_path):
    """The same, in the environment of the host that the comment before it names."""
    (tmp_path / "block.py").write_text(block.text)
    python = host_python(block.host)
    done = host_run(python, "python", "block.py", env={"TMPDIR": str(tmp_path)}, cwd=tmp_path, timeout=HOST_SEC)
    assert done.returncode == 0, done.stderr


@pytest.mark.sandbox
@pytest.mark.parametrize("block", CONSOLE, ids=str)
def test_commands_do_what_is_shown(block, tmp_path, bwrap):
    """Each command of a block works, in order, in one folder; where output is shown, it is the real one."""
    commands = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    for command in commands:
        line, _, shown = command.partition("\n")
        done = run(argv_of(line), tmp_path)
        assert done.returncode == 0, f"$ {line}\n{done.stderr}"
        if shown.strip():
            assert_shown(alike(done.stdout), alike(shown))


def argv_of(line: str) -> list[str]:
    """A command as it is run here: `make X` is what the Makefile does once everything is installed."""
    argv = shlex.split(line)
    if argv[0] == "make":
        recipe = MAKE_TARGETS[argv[1]]
        argv = [sys.executable, *shlex.split(recipe.removeprefix("$(BIN)/python"))]
    return argv


def alike(text: str) -> list[str]:
    """Lines without what differs from run to run: ids, seconds, folders."""
    text = re.sub(r"\S*/runs/", ".../runs/", text)
    text = re.sub(r"\b[0-9a-f]{12}\b", "ID", text)
    text = re.sub(r"\d+\.\d+ s\b", "N s", text)
    return [line.rstrip() for line in text.strip().splitlines()]


def assert_shown(real: list[str], shown: list[str]) -> None:
    """The lines are the real ones; a line of three dots stands for any number of them."""
    pattern = "".join("(?:.*\n)*" if line.strip() == "..." else re.escape(line) + "\n" for line in shown)
    assert re.fullmatch(pattern, "".join(f"{line}\n" for line in real)), "\n".join(real)


def test_almost_every_block_is_run():
    """A block that is not run has its reason, and there is next to none of them."""
    excused = [block for block in ALL if block.excuse]
    assert len(excused) <= 2, [f"{block}: {block.excuse}" for block in excused]
    assert len(PYTHON) >= 4
    assert len(CONSOLE) >= 4
    assert {block.language for block in ALL} <= {"python", "console", "toml", "text"}


# --- names that are mentioned ------------------------------------------------------------------------------------

MAKEFILE = (ROOT / "Makefile").read_text()
MAKE_TARGETS = dict(re.findall(r"^([a-z-]+):.*\n\t(.*)$", MAKEFILE, re.MULTILINE))


def said(page: str) -> list[str]:
    """What is set as code on a page: spans in its prose, and commands of its blocks."""
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks(page) for line in re.findall(r"^\$ (.*)$", block.text, re.MULTILINE)]
    return [*re.findall(r"`([^`\n]+)`", prose), *commands]


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_that_is_mentioned_exists(page):
    known = {*re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)}
    named = {words[1] for text in said(page) if (words := text.split())[:1] == ["make"] and len(words) > 1}
    assert named <= known


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_that_is_mentioned_exists(page):
    """`rollout X --y`: X is a command, or a group and its command, and --y one of its options."""
    for text in said(page):
        words = text.partition(" -- ")[0].split()  # what follows is a command of somebody else's
        if words[:1] != ["rollout"]:
            continue
        command: click.Command = cli.cli
        for word in words[1:]:
            if isinstance(command, click.Group) and not word.startswith("-"):
                assert word in command.commands, text
                command = command.commands[word]
        known = {name for parameter in command.params for name in parameter.opts} | {"-h", "--help"}
        assert {word.partition("=")[0] for word in words if word.startswith("-")} <= known, text


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere_in_this_repository(page):
    """Links are relative, so that they hold in every copy; their targets and anchors exist."""
    targets = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    assert targets
    for target in targets:
        path, _, anchor = target.partition("#")
        assert not re.match(r"[a-z]+:|/", target), f"{target} is not relative"
        assert (ROOT / path).exists(), f"{target} is not there"
        if anchor:
            text = (ROOT / (path or page)).read_text()
            headings = [
                re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
                for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            ]
            assert anchor in headings, target


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_is_mentioned_exists(page):
    """What looks like a file of this repository is one."""
    tops = r"states|orchestrator|tests|diagrams|\.ci"
    paths = {text for text in said(page) if re.fullmatch(rf"(?:{tops})/[\w./-]*", text)} - TASK_FILES
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_prose_that_can_be_read_in_a_terminal(page):
    """Lines are short, tables and output aside, and none names a host or a folder of one machine."""
    lines = [line for line in PAGES[page].splitlines() if not line.startswith(("|", "$"))]
    assert [line for line in lines if len(line) > 120] == []
    assert not re.search(r"https?://|(?<![\w.])/(?:root|work)/", PAGES[page])


# --- tables ------------------------------------------------------------------------------------------------------


def table(heading: str, text: str = README) -> list[list[str]]:
    """The rows of the first table whose header begins so."""
    body = text.partition(f"\n| {heading} |")[2].split("\n")[2:]
    rows = []
    for line in body:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows, f"no table begins with {heading}"
    return rows


def names(cell: str) -> list[str]:
    """The code spans of a cell."""
    return re.findall(r"`([^`]+)`", cell)


def test_the_states_are_those_of_the_table():
    told = [name for row in table("state") for name in names(row[0])]
    assert sorted(told) == sorted(STATES)


WAYS_OUT = {
    "the agent ended its turn": ("end_turn", "refusal"),
    "deadline, silence or a budget": ("deadline_settled", "idle", "budget_of_tool_calls"),
    "deadline, and the agent did not answer": ("deadline_unresponsive",),
    "the agent crashed": ("crash", "turn_error"),
    "every model call failed": ("void_by_the_provider", "void_by_the_agent"),
    "the provider failed while": ("provider_fails_at_work",),
    "no session came up": ("connect_fails_to_the_limit",),
    "the sandbox died": ("sandboxfailed_in_executing", "sandboxfailed_in_session", "unquiet"),
    "the tests left no reward": ("verifier_fails_twice",),
    "the host verifies": ("unverified",),
    "cancelled": ("cancelled_in_executing",),
}
"""The rows of the README's table of ways out, and the recorded ways that show each."""


@pytest.mark.parametrize("transport", ["acp", "session-factory"])
@pytest.mark.parametrize("told", WAYS_OUT)
def test_a_rollout_ends_as_the_ways_out_say(told, transport):
    """The traces of tests/test_ways_out.py pass those states in that order, close there, and verify only there."""
    (row,) = [row for row in table("what happened") if row[0].startswith(told)]
    for way in WAYS_OUT[told]:
        trace = (ROOT / "tests/__snapshots__/test_ways_out" / f"test_way[{way}-{transport}].txt").read_text()
        passed = iter(re.findall(r"--> (\S+)", trace))
        for state in (*names(row[1]), *names(row[2])):
            assert state in passed, f"{way}: {state} is not passed, or not in this order"
        assert ("--Verified-->" in trace) == (row[3] == "as verified"), way
        assert ("verifying --" in trace) == ("verifying" in names(row[1])), way


def test_every_way_out_of_the_readme_has_been_recorded():
    """No row without a trace, and no ending without a row."""
    rows = table("what happened")
    assert len(rows) == len(WAYS_OUT)
    closed = {state for state in STATES if state.startswith("closed/")}
    assert {name for row in rows for name in names(row[2])} == closed


def test_the_agents_are_those_that_ship():
    """Their transports, wire formats and versions are those of the manifests."""
    registry, rows = default_registry(), table("name")
    assert sorted(names(row[0])[0] for row in rows) == sorted(
        name for name in registry.names() if (ROOT / "orchestrator/agents" / f"{name}.toml").exists()
    )
    for name, transport, package, api, _ in rows:
        agent = registry.get(names(name)[0])
        assert transport == agent.protocol
        assert api == (", ".join(agent.api) if agent.calls_model else "no model")
        if agent.install:
            version = package.split()[-1]
            wanted = agent.install.packages[0]
            assert wanted.startswith(names(package)[0])
            assert wanted.endswith(version), f"{name}: the manifest installs {wanted}"


def test_the_exit_codes_are_those_of_the_program():
    assert {int(code): meaning for code, meaning in table("exit code")} == dict(cli.EXIT_CODES)


def test_the_choices_are_those_of_the_configuration():
    for choices, heading in ((UsageTracking, "`usage_tracking`"), (Network, "`--network`")):
        assert {name for row in table(heading) for name in names(row[0])} == set(get_args(choices))


def test_the_extras_are_those_of_the_package():
    assert sorted(name for row in table("extra") for name in names(row[0])) == sorted(PROJECT["optional-dependencies"])


@pytest.mark.sandbox
def test_the_artifacts_are_those_of_a_rollout(tmp_path, bwrap):
    """Every file of a finished rollout is in the table, and nothing else is (`llm.jsonl` comes with the first call)."""
    done = run(["rollout", "run", "demo", "--agent", "oracle", "--quiet"], tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    found = {path.name + ("/" if path.is_dir() else "") for path in folder.iterdir()}
    told = {name for row in table("in `runs/<id>/`") for name in names(row[0])}
    assert told - {"llm.jsonl"} == found - {"llm.jsonl"}


@pytest.mark.sandbox
def test_a_kept_sandbox_is_given_back_when_its_folder_is_named(tmp_path, bwrap):
    """Not by reaping all of `runs`: somebody wanted to keep it."""
    assert run(shlex.split("rollout run demo --agent oracle --quiet --keep-sandbox always"), tmp_path).returncode == 0
    (folder,) = (tmp_path / "runs").iterdir()
    leases = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    (root,) = {
        line["lease"]["handle"]["root"] for line in leases if line.get("lease", {}).get("handle", {}).get("root")
    }
    try:
        assert Path(root).is_dir()
        run(["rollout", "reap", "runs"], tmp_path)
        assert Path(root).is_dir()
    finally:
        done = run(["rollout", "reap", str(folder)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert not Path(root).exists()


def test_the_bench_is_quoted_as_it_was_measured():
    """`make bench` writes tests/bench/results.md; the README shows that file, and every row passed."""
    quoted = README.partition("<!-- bench -->\n")[2].partition("<!-- /bench -->")[0]
    measured = (ROOT / "tests" / "bench" / "results.md").read_text(encoding="utf-8")
    assert quoted == measured, "`make bench` was run since: quote its table between the markers, or restore its file"
    assert "**miss**" not in quoted


# --- the rest ----------------------------------------------------------------------------------------------------


def test_the_license_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_changelog_knows_the_version_of_the_package():
    """Its newest entry is the version that pyproject.toml names."""
    newest = re.search(r"^## \[(\d[^\]]*)\]", PAGES["CHANGELOG.md"], re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"]
