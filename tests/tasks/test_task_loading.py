"""Loading tasks: both formats, and every way to get one wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from orchestrator.tasks import Limits, Task, demo_task, load_task, load_tasks, resolve_env
from states.errors import ConfigError, TaskError

TOML = 'version = "1.0"\n'
MD = "---\nschema_version: '1.3'\n{keys}---\n\n## prompt\n\nDo it.\n"


def harbor(root: Path, toml: str = TOML, instruction: str | bytes | None = "Do it.", **files: str) -> Path:
    """A Harbor task in `root`; further files by name, `__` for a slash and `_dot_` for a dot."""
    (root / "tests").mkdir(parents=True)
    (root / "tests" / "test.sh").write_text("#!/bin/sh\necho 1 > /logs/verifier/reward.txt\n")
    (root / "task.toml").write_text(toml)
    if instruction is not None:
        (root / "instruction.md").write_bytes(instruction if isinstance(instruction, bytes) else instruction.encode())
    return with_files(root, **files)


def benchflow(root: Path, keys: str = "", body: str | None = None, **files: str) -> Path:
    """A `task.md` package in `root`."""
    (root / "verifier").mkdir(parents=True)
    (root / "verifier" / "test.sh").write_text("#!/bin/sh\necho 1 > /logs/verifier/reward.txt\n")
    (root / "task.md").write_text(body if body is not None else MD.format(keys=keys))
    return with_files(root, **files)


def with_files(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def complaint(root: Path) -> str:
    """What loading says, with the folder's own path left out."""
    with pytest.raises(TaskError) as caught:
        load_task(root)
    return str(caught.value).replace(f"{root.resolve()}/", "").replace(str(root.resolve()), "TASK")


# --- what loads ----------------------------------------------------------------------------------------------


def test_the_demo_task_loads_without_notes():
    """The task that ships is sound, and says everything that the format lets it say."""
    task = load_task(demo_task())
    assert (task.name, task.format, task.network) == ("rollout/sum-of-numbers", "harbor", "no-network")
    assert task.limits == Limits(cpus=1.0, memory_mb=1024, storage_mb=512)
    assert (task.verification.command, task.verification.timeout_sec) == ("/tests/test.sh", 30.0)
    assert task.agent_timeout_sec == 120.0
    assert task.solution is not None
    assert (task.notes, task.recipe.skipped) == ((), ())


def test_a_whole_task_toml_is_read(tmp_path):
    """Every section of Harbor's format ends up where it belongs."""
    toml = """
schema_version = "1.3"
source = "somewhere"
artifacts = ["/app/out"]
[task]
name = "org/thing"
version = "2"
authors = [{ name = "A", email = "a@b.c" }]
keywords = ["x"]
[metadata]
anything = { goes = [1, 2] }
day = 2025-02-03
[verifier]
timeout_sec = 12
env = { JUDGE = "${JUDGE:-none}" }
[agent]
timeout_sec = 34.5
[solution.env]
HOW = "well"
[environment]
build_timeout_sec = 99
docker_image = "image:1"
cpus = 2
memory = "2G"
storage_mb = 100
gpus = 0
network_mode = "allowlist"
allowed_hosts = ["example.org"]
workdir = "/work/"
[environment.env]
A = "b"
"""
    task = load_task(harbor(tmp_path / "t", toml, solution__solve_dot_sh="true\n"))
    assert task.name == "org/thing"
    assert task.limits == Limits(cpus=2.0, memory_mb=2048, storage_mb=100, gpus=0, build_timeout_sec=99.0)
    assert (task.network, task.allowed_hosts) == ("allowlist", ("example.org",))
    assert (task.workdir, task.docker_image, dict(task.env)) == ("/work", "image:1", {"A": "b"})
    assert task.verification.env == {"JUDGE": "${JUDGE:-none}"}
    assert task.solution is not None
    assert task.solution.env == {"HOW": "well"}
    assert task.metadata == {"anything": {"goes": [1, 2]}, "day": "2025-02-03"}
    assert task.extra == {"artifacts": ["/app/out"]}
    assert task.notes == ("task.toml: artifacts is not honoured",)


def test_a_task_without_limits_says_none_of_them(tmp_path):
    """What a task leaves open stays open: no default passes for the author's word."""
    task = load_task(harbor(tmp_path / "t"))
    assert (task.limits, task.network, task.agent_timeout_sec, task.environment) == (Limits(), None, None, None)
    assert (task.name, task.solution) == ("t", None)


@pytest.mark.parametrize("table", ["environment", "sandbox"])
def test_a_task_md_calls_its_sandbox_by_the_earlier_or_the_later_name(tmp_path, table):
    """BenchFlow renamed the table; packages of both kinds are about."""
    task = load_task(benchflow(tmp_path / "t", keys=f"{table}: {{cpus: 1}}\n"))
    assert (task.limits.cpus, task.notes) == (1.0, ())


def test_a_section_that_is_for_nobody_is_told_with_its_line(tmp_path):
    """A misspelt role would silently be asked something else."""
    body = (
        "---\nagents: {roles: {coder: {agent: scripted}}}\nscenes: [{name: work, roles: [coder]}]\n---\n\n"
        "Do it.\n\n## role:codr\nSlowly.\n\n## scene:work\nNow.\n"
    )
    task = load_task(benchflow(tmp_path / "t", body=body, prompts__scene_dot_wrok_dot_md="Then."))
    assert task.notes == (
        "task.md:8: ## role:codr: the task has no role of that name, so nobody is asked this; did you mean role:coder?",
        "prompts/scene.wrok.md: the task has no scene of that name, so nobody is asked this; did you mean scene:work?",
    )


@pytest.mark.parametrize(("allow", "mode"), [("true", "public"), ("false", "no-network")])
def test_the_older_allow_internet_is_understood(tmp_path, allow, mode):
    """Real datasets still use the deprecated key."""
    assert load_task(harbor(tmp_path / "t", f"[environment]\nallow_internet = {allow}\n")).network == mode


def test_marker_lines_are_not_shown_to_the_agent(tmp_path):
    """The canary by which leaked benchmarks are found is no part of the instruction."""
    text = "<!-- benchmark-canary GUID 1 -->\n# canary string\n\nDo it.\nThen stop.\n"
    assert load_task(harbor(tmp_path / "t", instruction=text)).instruction == "Do it.\nThen stop.\n"


def test_windows_line_ends_and_a_byte_order_mark_do_no_harm(tmp_path):
    """An editor's habits are no error."""
    assert load_task(harbor(tmp_path / "t", instruction=b"\xef\xbb\xbfDo\r\nit.\r\n")).instruction == "Do\nit.\n"


def test_a_task_md_package_loads_with_roles_and_scenes_kept(tmp_path):
    """What a later part of the project reads is kept as it stands; the rest means what it means in task.toml."""
    keys = """task: {name: org/multi}
metadata: {difficulty: easy, day: 2025-02-03}
verifier: {timeout_sec: 60.0, type: test-script, reward_range: [-1.0, 1.0], hardening: {cleanup_conftests: false}}
agent: {timeout_sec: 300.0}
sandbox: {cpus: 1, memory_mb: 2048, allow_internet: true, env: {A: b}}
oracle: {env: {HOW: well}}
agents: {roles: {coder: {agent: codex-acp}}}
scenes: [{name: one, turns: [{role: coder}]}]
benchflow: {document_version: '0.3'}
"""
    body = "---\n" + keys + "---\nbefore\n\n## prompt\n\nDo it.\n\\## prompt\n\n## role:coder\n\nYou code.\n"
    root = benchflow(tmp_path / "t", body=body, oracle__solve_dot_sh="true\n", prompts__scene_dot_one_dot_md="First.\n")
    task = load_task(root)
    assert (task.name, task.format, task.instruction) == ("org/multi", "benchflow", "Do it.\n## prompt")
    assert (task.limits.memory_mb, task.network, dict(task.env)) == (2048, "public", {"A": "b"})
    assert (task.verification.timeout_sec, task.verification.range) == (60.0, (-1.0, 1.0))
    assert task.solution is not None
    assert task.solution.folder == root.resolve() / "oracle"
    assert task.extra["agents"] == {"roles": {"coder": {"agent": "codex-acp"}}}
    assert task.extra["prompts"] == {"role:coder": "You code.", "scene:one": "First."}
    assert task.metadata == {"difficulty": "easy", "day": "2025-02-03"}


def test_a_task_md_without_headings_is_all_prompt(tmp_path):
    """The plain form: front matter, then the prompt."""
    task = load_task(benchflow(tmp_path / "t", body="---\nname: plain\nimage: debian\n---\n\nJust do it.\n"))
    assert (task.name, task.instruction, task.docker_image) == ("plain", "Just do it.", "debian")


def test_a_package_in_both_formats_is_read_as_task_md(tmp_path):
    """Packages of BenchFlow carry both; its loader prefers task.md, as this one does. Its tests may lie in tests/."""
    root = harbor(tmp_path / "t", "nonsense = [", task_dot_md=MD.format(keys=""), solution__solve_dot_sh="true\n")
    task = load_task(root)
    assert (task.format, task.verification.folder.name) == ("benchflow", "tests")
    assert task.solution is not None


def test_a_verifier_document_names_the_command(tmp_path):
    """Its script strategy runs in the verifier's folder, as in BenchFlow."""
    document = """---
document_version: '0.3'
verifier:
  default_strategy: pytest
  strategies:
    judge: {type: llm-judge, rubric: r.md}
    pytest: {type: script, command: ./run.sh --fast}
---
"""
    root = benchflow(tmp_path / "t", verifier__verifier_dot_md=document)
    assert load_task(root).verification.command == "cd /tests && ./run.sh --fast"
    (root / "verifier" / "verifier.md").write_text(document.replace("strategy: pytest", "strategy: judge"))
    assert "verifier.strategies.judge.type: only script is supported, found llm-judge" in complaint(root)
    (root / "verifier" / "verifier.md").write_text(document.replace("strategy: pytest", "strategy: nope"))
    assert "default_strategy: expected one of judge, pytest, found 'nope'" in complaint(root)
    (root / "verifier" / "verifier.md").write_text(document.replace("command: ./run.sh --fast", "command: ''"))
    assert "verifier.strategies.pytest.command: missing" in complaint(root)


def test_the_verifier_and_the_oracle_may_be_named_as_paths(tmp_path):
    """The authoring shorthand of task.md."""
    keys = "verifier: grading\noracle: answer/\n"
    root = benchflow(tmp_path / "t", keys, grading__test_dot_sh="x\n", answer__solve_dot_sh="y\n")
    task = load_task(root)
    assert task.solution is not None
    assert (task.verification.folder.name, task.solution.folder.name) == ("grading", "answer")
    assert "expected a folder inside the task, found '../x'" in complaint(benchflow(tmp_path / "u", "oracle: ../x\n"))
    assert "expected a folder nowhere in the task" in complaint(benchflow(tmp_path / "v", "verifier: nowhere\n"))


def test_what_is_not_honoured_is_said(tmp_path):
    """A key that this project cannot obey is a note, not a silence."""
    keys = "profile: reward-kit\nagent: {user: agent}\nsandbox: {healthcheck: {command: 'true'}}\n"
    root = benchflow(tmp_path / "t", keys, environment__docker_compose_dot_yaml="services: {}\n")
    (root / "environment" / "docker_compose.yaml").rename(root / "environment" / "docker-compose.yaml")
    assert load_task(root).notes == (
        "task.md: healthcheck is not honoured",
        "task.md: agent.user is not honoured",
        "task.md: profile is not expanded; its presets do not apply",
        "environment/docker-compose.yaml: its services are not started",
    )


# --- what does not load: one sentence each, which says where ---------------------------------------------------


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ("version = ", "task.toml: not valid TOML: "),
        ("version = '1.0'\nversion = '1.0'\n", "Cannot overwrite a value (at line 2"),
        (
            "[verifier]\ntimeout_secs = 3\n",
            "task.toml:2: verifier.timeout_secs is no key of this format; did you mean tim",
        ),
        ("verifer = 3\n", "task.toml:1: verifer is no key of this format; did you mean verifier?"),
        (
            "[sandbox]\ncpus = 1\n",
            "task.toml:1: sandbox is no key of this format; did you mean environment?",
        ),
        (
            "[environment]\nservices = []\n",
            "services is no key of this format; expected one of allow_internet, allowed_",
        ),
        ("\n[agent]\ntimeout_sec = 'x'\n", "task.toml:3: agent.timeout_sec: expected float, found 'x'"),
        ("[agent]\ntimeout_sec = true\n", "agent.timeout_sec: expected float, found True"),
        ("[verifier]\ntimeout_sec = -1\n", "task.toml:2: verifier.timeout_sec: expected float > 0.0, found -1"),
        ("[verifier]\ntimeout_sec = 0\n", "verifier.timeout_sec: expected float > 0.0, found 0"),
        ("[verifier]\ntimeout_sec = nan\n", "verifier.timeout_sec: expected float > 0.0, found nan"),
        ("[verifier]\ntimeout_sec = inf\n", "task.toml:2: verifier.timeout_sec: expected a finite number, found inf"),
        ("[environment]\ncpus = inf\n", "task.toml:2: cpus: expected a finite number, found inf"),
        ("[environment]\nmemory_mb = 1.5\n", "task.toml:2: environment.memory_mb: expected int, found 1.5"),
        ("[environment]\ngpus = -1\n", "environment.gpus: expected int >= 0, found -1"),
        (
            "[environment]\nmemory = 'lots'\n",
            "task.toml:2: memory: expected a size such as '512M' or '2G', found 'lots'",
        ),
        (
            "[environment]\nmemory = '2G'\nmemory_mb = 1\n",
            "task.toml:2: memory = '2G' and memory_mb = 1 disagree; keep memory_mb",
        ),
        (
            "[environment]\nnetwork_mode = 'none'\n",
            "task.toml:2: environment.network_mode: expected one of public, allowlist, no-network, found 'none'",
        ),
        (
            "[environment]\nallowed_hosts = ['a']\n",
            'task.toml:2: allowed_hosts: expected network_mode = "allowlist" beside it',
        ),
        ("[environment]\nworkdir = 'app'\n", "task.toml:2: workdir: expected an absolute path, found 'app'"),
        ("[environment]\nos = 'windows'\n", "task.toml:2: os: sandboxes with windows cannot be run here"),
        ("[environment.env]\nA = 1\n", "task.toml:2: environment.env.A: expected str, found 1"),
        ("[verifier.env]\n'A B' = 'x'\n", "task.toml:1: verifier.env: expected names of variables, found 'A B'"),
        (
            "[verifier]\nreward_range = [0.5, 1.0]\n",
            "task.toml:2: verifier.reward_range: expected [low, high] with low <= 0 and high >= 1",
        ),
        (
            "[verifier]\nenvironment_mode = 'separate'\n",
            "verifier.environment: a verifier in a sandbox of its own cannot",
        ),
        (
            "[verifier]\ntype = 'llm-judge'\n",
            "task.toml:2: verifier.type: a verifier that asks a model cannot be run here",
        ),
        ("[[steps]]\nname = 'a'\n", "task.toml:1: steps: tasks of several steps cannot be run here"),
        ("[task]\nversion = '1'\n", "task.toml:1: task.name is missing"),
        ("[environment]\nmcp_servers = 3\n", "task.toml:2: environment.mcp_servers: expected array, found 3"),
        ("[task]\nname = ''\n", "task.toml:2: task.name: expected str of length >= 1, found ''"),
        ("verifier = 3\n", "task.toml:1: verifier: expected table, found 3"),
    ],
)
def test_a_malformed_task_toml_names_key_expected_and_found(tmp_path, toml, said):
    """Each mistake is one line that can be acted on."""
    text = complaint(harbor(tmp_path / "t", toml))
    assert said.casefold() in text.casefold()
    assert "\n" not in text


STORAGE = TOML + "\n[environment]\nstorage_mb = 1\n"


@pytest.mark.parametrize(
    "dockerfile",
    [None, "FROM debian\nCOPY big /app/big\n", "FROM debian\nCOPY . .\n", "FROM debian\nADD big /app/\n"],
)
def test_a_task_whose_own_files_are_more_than_it_allows_is_refused(tmp_path, dockerfile):
    """Else every agent would be stopped over the task's files; both figures are said."""
    root = harbor(tmp_path, STORAGE, **{"environment/big": "x" * (3 << 20)})
    if dockerfile is not None:
        (root / "environment/Dockerfile").write_text(dockerfile)
    assert re.search(
        r"task\.toml:\d+: storage_mb: the task's own files take 3\.0 MB of the 1 MB that it allows", complaint(root)
    )


@pytest.mark.parametrize(
    "dockerfile", ["FROM debian\n", "FROM debian\nCOPY half /app/half\nCOPY half /app/half\nCOPY . /app\n"]
)
def test_files_that_are_not_copied_or_copied_twice_to_one_place_count_once_at_most(tmp_path, dockerfile):
    """What counts is what the sandbox will hold."""
    files = {"environment/half": "x" * (600 << 10), "environment/Dockerfile": dockerfile}
    assert load_task(harbor(tmp_path, STORAGE, **files)).limits.storage_mb == 1


def test_a_task_of_several_steps_is_refused_for_that(tmp_path):
    """It has no instruction.md of its own, and that is not what is wrong with it."""
    task = harbor(tmp_path / "t", "[[steps]]\nname = 'a'\n")
    (task / "instruction.md").unlink()
    assert "task.toml:1: steps: tasks of several steps cannot be run here" in complaint(task)


def test_a_task_that_gives_its_agent_a_past_is_refused(tmp_path):
    """Harbor seeds the agent's session with it; asked without it, the agent would be asked something else."""
    task = harbor(tmp_path / "t", "")
    (task / "trajectory.json").write_text("{}")
    assert "trajectory.json: an agent cannot be given a past here" in complaint(task)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("Just text\n", "task.md:1: expected front matter: a line '---', keys, a line '---'; found 'Just text'"),
        ("---\na: b\n", "task.md: the front matter has no closing '---' line"),
        ("---\nagent: [\n---\nx\n", "task.md:2: not valid YAML: "),
        ("---\n- a\n---\nx\n", "task.md:2: expected a mapping of keys to values"),
        (
            "---\nagent:\n  timeout_sec: 1\n  timeout_sec: 2\n---\nx\n",
            "task.md:4: agent.timeout_sec is set twice, first in line 3",
        ),
        ("---\nsandbox: {}\nenvironment: {}\n---\nx\n", "task.md: both sandbox and environment are set"),
        ("---\nenvironment:\n  cpu: 1\n---\nx\n", "task.md:3: environment.cpu is no key of this format; did you mean"),
        ("---\nenvironment:\n  workdir: a\n---\nx\n", "task.md:3: workdir: expected an absolute path, found 'a'"),
        ("---\nsandbox:\n  cpu: 1\n---\nx\n", "task.md:3: sandbox.cpu is no key of this format; did you mean cpus?"),
        (
            "---\nverifier:\n  timeout: 1\n---\nx\n",
            "task.md:3: verifier.timeout is no key of this format; did you mean timeout_sec?",
        ),
        ("---\nagent:\n  timeout_sec: soon\n---\nx\n", "task.md:3: agent.timeout_sec: expected float, found 'soon'"),
        ("---\noracle: {}\nsolution: {}\n---\nx\n", "task.md: both oracle and solution are set"),
        ("---\nmetadata: &a {x: 1}\nuser: *a\n---\nx\n", "task.md:3: *a is an alias, which task files may not use"),
        ("---\nname: x\n---\n\n", "task.md: the instruction is empty"),
        ("---\nname: x\n---\n## prompt\na\n## prompt\nb\n", "task.md: the section '## prompt' is there twice"),
        ("---\nname: x\n---\n## role:a\na\n## role:a\nb\n", "task.md: the section '## role:a' is there twice"),
        (
            "---\nname: !!python/object:os.system x\n---\nx\n",
            "task.md:2: not valid YAML: could not determine a constructor",
        ),
    ],
)
def test_a_malformed_task_md_names_line_and_key(tmp_path, body, said):
    """YAML keeps the last of two keys, expands aliases and constructs objects; none of that happens here."""
    text = complaint(benchflow(tmp_path / "t", body=body))
    assert said in text
    assert "\n" not in text


def test_missing_parts_are_named(tmp_path):
    """A folder that is no task, and one that lacks a part."""
    with pytest.raises(TaskError, match="expected the folder of a task, found nothing there"):
        load_task(tmp_path / "nowhere")
    with pytest.raises(TaskError, match="expected the folder of a task, found a file"):
        load_task(Path(__file__))
    assert complaint(tmp_path).startswith("TASK: no task: expected a task.toml")
    assert complaint(harbor(tmp_path / "a", instruction=None)) == "instruction.md: missing"
    assert complaint(harbor(tmp_path / "b", instruction=" \n")).startswith("instruction.md: the instruction is empty")
    no_script = harbor(tmp_path / "c")
    (no_script / "tests" / "test.sh").unlink()
    assert complaint(no_script) == "tests/test.sh: missing; expected the script that writes the reward"
    (no_script / "tests").rmdir()
    assert complaint(no_script) == "TASK: no tests: expected tests/test.sh"


def test_files_that_are_no_text_are_named(tmp_path):
    """Bytes that are no UTF-8, a folder or a pipe in a file's place, and a file without end."""
    assert complaint(harbor(tmp_path / "a", instruction=b"caf\xe9")) == "instruction.md: not UTF-8: byte 0xe9 at 3"
    folder = harbor(tmp_path / "b", instruction=None)
    (folder / "instruction.md").mkdir()
    assert complaint(folder) == "instruction.md: expected a file, found a folder"
    pipe = harbor(tmp_path / "c", instruction=None)
    os.mkfifo(pipe / "instruction.md")
    assert complaint(pipe) == "instruction.md: expected a file, found a pipe"
    assert "expected at most 1048576" in complaint(harbor(tmp_path / "d", instruction="x" * 1_048_577))
    pipes = harbor(tmp_path / "e")
    os.mkfifo(pipes / "tests" / "pipe")
    assert complaint(pipes).endswith("expected files, folders and links only, found a pipe")


@pytest.mark.parametrize("where", ["instruction.md", "tests/extra", "solution", "environment/data", "task.toml"])
def test_a_link_that_leads_out_of_the_task_is_refused(tmp_path, where):
    """A stranger's task must not read the files of whoever loads it."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "solve.sh").write_text("secret")
    root = harbor(tmp_path / "t", environment__keep="x", solution__solve_dot_sh="x")
    path = root / where
    if path.is_dir():
        (path / "solve.sh").unlink()
        path.rmdir()
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path / "secret")
    assert "a link leads out of the task's folder, to " in complaint(root)


def test_a_link_inside_the_task_is_fine_and_a_circle_is_not(tmp_path):
    """Only where a link leads counts."""
    root = harbor(tmp_path / "t", environment__data="x")
    (root / "tests" / "data").symlink_to("../environment/data")
    assert isinstance(load_task(root), Task)
    (root / "tests" / "data").unlink()
    (root / "tests" / "data").symlink_to("data")
    assert "cannot be resolved" in complaint(root) or "a link leads" in complaint(root)


# --- identity ------------------------------------------------------------------------------------------------


def test_the_digest_is_of_the_inputs_and_nothing_else(tmp_path):
    """A copy elsewhere is the same task; a byte, a name or an executable bit makes another; caches do not count."""
    one = load_task(harbor(tmp_path / "one", '[task]\nname = "a/b"\n', environment__x="1")).digest
    root = harbor(tmp_path / "two", '[task]\nname = "a/b"\n', environment__x="1")
    assert load_task(root).digest == one
    with_files(root, README_dot_md="about")
    (root / "tests" / "__pycache__").mkdir()
    (root / "tests" / "__pycache__" / "x.pyc").write_text("x")
    assert load_task(root).digest == one
    (root / "tests" / "test.sh").chmod(0o755)
    executable = load_task(root).digest
    (root / "environment" / "x").write_text("2")
    changed = load_task(root).digest
    (root / "environment" / "x").rename(root / "environment" / "y")
    assert len({one, executable, changed, load_task(root).digest}) == 4


# --- datasets ------------------------------------------------------------------------------------------------


def test_a_folder_of_tasks_loads_in_order_of_name(tmp_path):
    """A dataset: folders that are no task are left alone; one task is a dataset of one."""
    harbor(tmp_path / "b")
    benchflow(tmp_path / "a")
    (tmp_path / "notes").mkdir()
    assert [task.name for task in load_tasks(tmp_path)] == ["a", "b"]
    assert [task.name for task in load_tasks(tmp_path / "b")] == ["b"]


def test_a_dataset_names_each_broken_task(tmp_path):
    """One look shows all that has to be mended, twins included."""
    harbor(tmp_path / "a", "x = 1\n")
    harbor(tmp_path / "b", '[task]\nname = "o/n"\n')
    harbor(tmp_path / "c", '[task]\nname = "o/n"\n')
    with pytest.raises(TaskError) as caught:
        load_tasks(tmp_path)
    first, second = str(caught.value).splitlines()
    assert "a/task.toml:1: x is no key of this format" in first
    assert "c: the name 'o/n' is taken by " in second
    with pytest.raises(TaskError, match=r"no task: expected a task\.toml or a task\.md here"):
        load_tasks(tmp_path / "a" / "tests")


# --- env -----------------------------------------------------------------------------------------------------


def test_references_are_resolved_from_what_was_given_and_never_from_the_host(monkeypatch):
    """A task cannot ask for a key of the host by its name."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    env = {"A": "x${MODE:-fast}y", "B": "${MODE}", "C": "$HOME ${D:-}"}
    assert resolve_env(env, {"MODE": "m"}, "verifier.env") == {"A": "xmy", "B": "m", "C": "$HOME "}
    with pytest.raises(ConfigError, match=r"verifier.env: K needs \$\{OPENAI_API_KEY\}; give it with --env"):
        resolve_env({"K": "${OPENAI_API_KEY}"}, {}, "verifier.env")
