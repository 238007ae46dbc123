"""What the three hosts have in common in their tests: the trials, and the provider whose count is the truth."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import attrs
from hosts import host_run
from late import WORDS

from orchestrator.gateway.script import Always, Conversation, Fail
from orchestrator.gateway.scripted import ScriptedUpstream, ShellScript
from orchestrator.tasks import DEMO_COMMAND, DEMO_WRONG_COMMAND
from states.events import Usage

HERE = Path(__file__).parent
KEY = "provider-key-that-no-sandbox-sees"
TRIAL_SEC = 400

RIGHT, WRONG = ShellScript(DEMO_COMMAND), ShellScript(DEMO_WRONG_COMMAND)


def late(asked: Conversation) -> object:
    """Says something, and then does nothing for longer than anybody waits."""
    return attrs.evolve(ShellScript(f"sleep 300; {DEMO_COMMAND}")(asked), text=WORDS)


def in_turns(asked: Conversation) -> object:
    """Wrong at first, right for whoever is asked to review."""
    return (RIGHT if "Review" in asked.user else WRONG)(asked)


def leaves_one_behind(asked: Conversation) -> object:
    """Writes the answer only while a process lives that would outlive its command; asked to be reviewed, it is right.

    That is for sandboxes which a host ships: nobody in there buries orphans.
    """
    answer = 42 if "Review" in asked.user or "scene" not in asked.model else 41
    orphan = f"setsid sh -c 'sleep 1000; {mark(asked.model)}' > /dev/null 2>&1"
    return ShellScript(f"{orphan} & kill -0 $! && echo {answer} > answer.txt")(asked)


def mark(model: str) -> str:
    """What is on the command line of the process that this model leaves behind."""
    return f": left by {model}"


SHIPPED = ("local-acp", "local-scene", "subprocess-acp", "subprocess-scene", "docker-acp", "docker-roles")
"""Trials in sandboxes that a host ships: Inspect's `local`, verifiers' subprocess and Docker runtimes."""

MODELS = {
    **dict.fromkeys(SHIPPED, leaves_one_behind),
    "coder": WRONG,
    "reviewer": RIGHT,
    "scene": in_turns,
    "late": late,
    "cancelled": late,
    "refused": Always(Fail(401, "this key is of no use")),
}
"""Scripts by the name of a model; any other is right. Each trial has a model of its own, so its count is known."""


def provider() -> ScriptedUpstream:
    """The models' provider."""
    return ScriptedUpstream(lambda asked: MODELS.get(asked.model, RIGHT)(asked), apis=["openai-chat"], api_key=KEY)


def run_counted(folder: Path, python: Path, program: str, *args: str, env: Callable[[str], dict[str, str]]) -> None:
    """Run a host's program beside the provider; `env` is told where that is. Its output and the counts are kept."""

    async def main() -> None:
        async with provider() as model:

            def call() -> str:
                where = {"PYTHONPATH": str(HERE), "TMPDIR": str(scratch(folder)), **env(f"{model.url}/v1")}
                done = host_run(python, program, *args, env=where, cwd=folder, timeout=TRIAL_SEC)
                return f"{done.returncode}\n{done.stdout}\n{done.stderr}"

            (folder / "output.txt").write_text(await anyio.to_thread.run_sync(call))
            counted: dict[str, Usage] = {}
            for one in model.calls:
                name = str(one.request["model"])
                counted[name] = counted.get(name, Usage()) + one.usage
            written = {name: attrs.asdict(used) for name, used in counted.items()}
            (folder / "counted.json").write_text(json.dumps(written))

    anyio.run(main)


def scratch(folder: Path) -> Path:
    """TMPDIR of a host's program: what it leaves there is ours to see."""
    path = folder / "tmp"
    path.mkdir(exist_ok=True)
    return path


def counted(folder: Path, *models: str) -> Usage:
    """What the provider counted for these models."""
    known = json.loads((folder / "counted.json").read_text())
    return sum((Usage(**known[name]) for name in models if name in known), Usage())


def passed(journal: Path) -> list[str]:
    """The states that a rollout went through."""
    records = map(json.loads, journal.read_text().splitlines())
    return [record["dest"] for record in records if "dest" in record]


def left_in(folder: Path, *prefixes: str) -> list[str]:
    """What a host's program left: sandboxes of its own, folders and sockets of ours in its TMPDIR, and processes."""
    names = [path.name for path in scratch(folder).iterdir() if path.name.startswith((*prefixes, "rollout"))]
    return [*names, *(f"process {pid}: {argv}" for pid, argv in processes_of(folder))]


def alive(model: str) -> list[int]:
    """Processes of this machine, its containers included, that this model left behind."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # it is gone by now
                if mark(model).encode() in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
    return found


def processes_of(folder: Path) -> list[tuple[str, str]]:
    """Processes that were started by a program that ran with this TMPDIR, or work below it."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # it is gone by now, or not ours
                said = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
                if str(scratch(folder)).encode() in said:
                    found.append((process.name, (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200]))
    return found
