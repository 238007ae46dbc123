"""The verifier: the task's tests, run on a dead scene, and the reward that they leave.

The agent is assumed to be hostile, so nothing that it could have touched decides anything here. Each run has a trusted
handle of its own; `/tests` and `/logs/verifier` are emptied before the tests come in and after the reward is out; the
reward is read when everything that the tests started has ended. What the harness can harden for tests that run in the
agent's folder it does: see `_guarded_env`.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import anyio
import attrs

from orchestrator.redact import Redactor, secrets_of
from orchestrator.reward import read_reward
from orchestrator.tasks.task import Task, resolve_env
from states.errors import ExecTimeout, OrchestratorError, PathEscape, SandboxError, VerifierError
from states.ports import ExecResult, Sandbox, SandboxHandle

TESTS = "/tests"
LOGS = "/logs/verifier"
HOUSEKEEPING_SEC = 60.0
"""How long one command of ours (emptying a folder) may take."""
LEAVING_SEC = 30.0
"""How long ending a run may take, also when nobody waits for it any more."""
TAIL = 2_000
"""How much of stdout and stderr goes into an error, in characters."""

_EMPTY = f"""rm -rf -- {TESTS} {LOGS} 2>/dev/null
mkdir -p -- {TESTS} {LOGS}
for folder in {TESTS} {LOGS}; do
for left in "$folder"/* "$folder"/.[!.]* "$folder"/..?*; do
if [ -e "$left" ] || [ -L "$left" ] || [ -L "$folder" ] || [ ! -d "$folder" ]; then
echo "$folder is not empty" >&2; exit 1
fi
done
done"""
"""Little else than the shell itself: each program that it starts is time of every rollout."""

_LINKS = f'cd {LOGS} && for file in reward.json reward.txt; do if [ -L "$file" ]; then echo "$file"; fi; done'
_MODULES = """chmod u+rwx -- "$WORK"
cd -- "$WORK" || exit 0
for file in *.py *.pyc *.so */__init__.py; do if [ -e "$file" ]; then echo "$file"; fi; done
for file in *.dist-info/entry_points.txt *.egg-info/entry_points.txt; do
if [ -e "$file" ]; then grep -ls pytest11 "$file"; fi
done
true"""
"""An agent that shuts its own folder gets what is in there, not tests that cannot start."""

_IMPORTED = frozenset({*sys.stdlib_module_names, "pytest", "_pytest", "pluggy", "iniconfig", "pip", "usercustomize"})


@attrs.define(eq=False)
class TaskVerifier:
    """Verifies a task in its sandbox: a `states.ports.Verifier`.

    Each run keeps what it left in a folder of its own below `folder`, `run-N` or `check-N`: `stdout.txt`, `stderr.txt`,
    `logs/` (what stood in `/logs/verifier`) and `run.json` (exit code, seconds, rewards, notes).

    Example:
        >>> verifier = TaskVerifier(task, sandbox, out / "verifier")  # doctest: +SKIP
        >>> (await verifier.verify())["reward"]  # doctest: +SKIP
        1.0
    """

    task: Task
    sandbox: Sandbox
    folder: Path
    """Where artifacts go; made when it is needed."""
    given: Mapping[str, str] = attrs.field(factory=dict, kw_only=True, repr=False)
    """What the user gave (`--env`), for `${NAME}` in the task's env."""
    redactor: Redactor = attrs.field(factory=Redactor, kw_only=True, repr=False)
    """Takes secrets out of every artifact and error; it learns those of `given`."""
    env: Mapping[str, str] = attrs.field(init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        """Resolve the env now: what is missing has to be said before a sandbox exists. Raises `ConfigError`."""
        task = self.task
        self.redactor.add(*secrets_of(self.given))
        self.env = {
            **resolve_env(task.env, self.given, "environment.env"),
            **resolve_env(task.verification.env, self.given, "verifier.env"),
        }

    async def verify(self) -> Mapping[str, float]:
        """Run the tests and read the reward; `reward` is the reward, other names are details.

        May be called again: a run begins by ending the one before it and emptying its folders.

        Raises:
            VerifierError: The tests left no reward that can be trusted, or took too long; with their last words.
            SandboxError: The sandbox failed, not the tests.
        """
        return await self._run("run")

    async def check(self) -> Mapping[str, float]:
        """The same as feedback in the middle of a rollout. It is never a reward; `run.json` marks it as a check.

        Raises:
            VerifierError, SandboxError: As `verify` does, and when the tests cannot be proven to be gone again.
        """
        return await self._run("check")

    async def _run(self, kind: Literal["run", "check"]) -> dict[str, float]:
        run = _Run(self, kind, _next_number(self.folder))
        try:
            await run.enter()
            await run.execute()
            rewards = await run.read()
        except BaseException as error:
            run.error = _said(error)
            raise
        finally:
            with anyio.CancelScope(shield=True):
                left = await run.leave()
                await anyio.to_thread.run_sync(run.write)
        if left and kind == "check":
            raise SandboxError(f"the tests of a check may still be in the sandbox: {'; '.join(left)}")
        return rewards


async def remove_tests(sandbox: Sandbox) -> None:
    """Empty `/tests` and `/logs/verifier`: gives the lease on them back, whoever took it.

    Raises:
        SandboxError: They cannot be emptied; says why.
    """
    handle = sandbox.handle("verifier-cleanup", trusted=True)
    await handle.open()
    try:
        await _empty(handle)
    finally:
        await handle.end()


def _hides(path: str) -> bool:
    """Whether a file at the top of the work is imported instead of a module of Python's or pytest's, or by pytest."""
    return path.endswith("entry_points.txt") or path.partition("/")[0].split(".")[0] in _IMPORTED


async def _empty(handle: SandboxHandle, then: str = "true", **env: str) -> ExecResult:
    """Empty the folders; `then` goes on in the same shell, since each command of ours is time of every rollout."""
    result = await handle.exec(f"{_EMPTY}\n{then}", cwd="/", env=env, timeout_sec=HOUSEKEEPING_SEC)
    if result.return_code:
        raise SandboxError(f"{TESTS} and {LOGS} cannot be emptied: {result.stderr.strip()[-TAIL:]}")
    return result


def _next_number(folder: Path) -> int:
    """One more than the last run's, also when that one belonged to a process that is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = [int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"(?:run|check)-(\d+)", path.name))]
    return max(taken, default=0) + 1


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, OrchestratorError) else type(error).__name__


# --- one run -------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class _Run:
    """One run of the tests, from empty folders to empty folders."""

    verifier: TaskVerifier
    kind: Literal["run", "check"]
    number: int
    started: float = attrs.field(factory=time.monotonic)
    result: ExecResult = attrs.field(factory=lambda: ExecResult("", "", -1))
    modules: ExecResult = attrs.field(factory=lambda: ExecResult("", "", 0))
    """What `_MODULES` found in the work, before anything of the tests ran."""
    rewards: dict[str, float] = attrs.Factory(dict)
    error: str = ""
    notes: list[str] = attrs.Factory(list)
    folder: Path = attrs.field(init=False)
    tests: SandboxHandle = attrs.field(init=False)
    after: SandboxHandle = attrs.field(init=False)
    """Ours alone, for when the tests are dead: nothing of theirs can reach into it."""

    def __attrs_post_init__(self) -> None:
        self.folder = self.verifier.folder / f"{self.kind}-{self.number}"
        self.folder.mkdir()  # before anything else: the next run finds our number, and with it our handle
        self.tests = self._handle(f"verifier-{self.number}")
        self.after = self._handle(f"verifier-{self.number}-after")

    def _handle(self, name: str) -> SandboxHandle:
        return self.verifier.sandbox.handle(name, trusted=True)

    async def enter(self) -> None:
        """End the run before this one, empty the folders, look at the work, bring the tests in."""
        if self.number > 1:
            await self._handle(f"verifier-{self.number - 1}").end()
        await self.tests.open()
        self.modules = await _empty(self.tests, _MODULES, WORK=self.verifier.sandbox.cwd)
        await self.verifier.sandbox.upload(self.verifier.task.verification.folder, TESTS)

    async def execute(self) -> None:
        """Run the tests in the task's folder, then end everything that they started."""
        verification = self.verifier.task.verification
        cwd = self.verifier.sandbox.cwd
        env = self._guarded_env(cwd)
        command = f"chmod +x {TESTS}/*.sh 2>/dev/null; {verification.command}"
        limit = verification.timeout_sec
        try:
            self.result = await self.tests.exec(command, cwd=cwd, env=env, timeout_sec=limit)
        except ExecTimeout as error:
            self.result = ExecResult(error.stdout, error.stderr, -1)
            said = self._redacted(f"the tests outlasted their {limit:g} s{self._last_words()}")
            raise VerifierError(said) from error
        await self._end()

    async def _end(self) -> None:
        """End what the tests started: while any of it lives, it may still write."""
        try:
            with anyio.fail_after(LEAVING_SEC):
                await self.tests.end()
        except TimeoutError as error:
            raise VerifierError(f"what the tests started did not end within {LEAVING_SEC:g} s") from error

    async def read(self) -> dict[str, float]:
        """Bring `/logs/verifier` home and read the reward there."""
        logs = self.folder / "logs"
        logs.mkdir()
        await self.after.open()
        try:
            await self._download(logs)
            self.rewards = read_reward(logs, self.verifier.task.verification.range)
        except VerifierError as error:
            raise VerifierError(self._redacted(f"{error}{self._last_words()}")) from error
        if self.result.return_code:
            self.notes.append(f"the tests exited with {self.result.return_code}; the reward that they wrote counts")
        return self.rewards

    async def _download(self, logs: Path) -> None:
        """Copy `/logs/verifier` out. What its links lead to is nothing that this run wrote."""
        links = await self.after.exec(_LINKS, cwd="/", timeout_sec=HOUSEKEEPING_SEC)
        if links.stdout.strip():
            found = " and ".join(links.stdout.split())
            raise VerifierError(f"expected a file that the verifier wrote, found a link: {found}")
        try:
            await self.verifier.sandbox.download(LOGS, logs)
        except PathEscape as error:
            raise VerifierError(f"{LOGS} holds a link that leads out of it: {error}") from error
        except SandboxError as error:
            await self.after.exec("true", cwd="/", timeout_sec=HOUSEKEEPING_SEC)  # raises if the sandbox is gone
            raise VerifierError(f"the verifier left no {LOGS}: {error}") from error

    async def leave(self) -> list[str]:
        """End what runs and empty the folders, bounded; returns what could not be done, as sentences."""
        left = [f"emptying was not done within {LEAVING_SEC:g} s"]
        with anyio.move_on_after(LEAVING_SEC):
            try:
                await self.tests.end()
                await self.after.open()
                await _empty(self.after)
                await self.after.end()
                left.clear()
            except OrchestratorError as error:
                left[:] = [str(error)]
        self.notes += left
        return left

    def _guarded_env(self, cwd: str) -> dict[str, str]:
        """The env of the tests. The task's own env wins over every guard: its author knows best.

        pytest takes its settings from where the tests lie; `--confcutdir` also keeps a `/conftest.py` out.
        `PYTHONSAFEPATH` would keep a planted `/app/json.py` out of `python3 -c`, but also keeps an honest `main.py`
        from importing its neighbours. So it is set only where the work holds a module that hides one of Python's own
        or of pytest's, which the task did not bring itself.
        """
        task = self.verifier.task
        guards = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONNOUSERSITE": "1", "PYTHONBREAKPOINT": "0"}
        guards["PYTEST_ADDOPTS"] = f"--confcutdir={TESTS}"  # no conftest.py from above the tests
        if task.format == "benchflow":
            guards |= {"BENCHFLOW_VERIFIER_DIR": TESTS, "BENCHFLOW_WORKSPACE": cwd}
        if hidden := self._hidden_modules():
            guards["PYTHONSAFEPATH"] = "1"
            self.notes.append(f"the work hides Python modules ({hidden}): tests import nothing from {cwd}")
        return {**guards, **self.verifier.env}

    def _hidden_modules(self) -> str:
        """The modules at the top of the work by the name of one that tests import; "" when there is none."""
        listed, task = self.modules, self.verifier.task
        names = {line for line in listed.stdout.splitlines() if _hides(line)}
        if names and task.environment is not None:
            names -= {path.relative_to(task.environment).as_posix() for path in task.environment.rglob("*")}
        if listed.truncated:
            names.add("too many to list")
        return ", ".join(sorted(names)[:5])

    def _last_words(self) -> str:
        """Exit code and the ends of stderr and stdout, for an error."""
        words = [f"; exit code {self.result.return_code}"] if self.result.return_code >= 0 else []
        for name, text in (("stderr", self.result.stderr), ("stdout", self.result.stdout)):
            if text.strip():
                words.append(f"; {name} ends: {text.strip()[-TAIL:]}")
        return "".join(words)

    def _redacted(self, text: str) -> str:
        return self.verifier.redactor(text.encode("utf-8", "backslashreplace")).decode()

    def write(self) -> None:
        """Keep what happened."""
        for name, text in (("stdout.txt", self.result.stdout), ("stderr.txt", self.result.stderr)):
            (self.folder / name).write_text(self._redacted(text), encoding="utf-8")
        self.verifier.redactor.folder(self.folder / "logs")
        record: dict[str, Any] = {
            "checked_during_run": self.kind == "check",
            "command": self.verifier.task.verification.command,
            "exit_code": None if self.result.return_code == -1 else self.result.return_code,
            "seconds": round(time.monotonic() - self.started, 3),
            "output_truncated": self.result.truncated,
            "rewards": self.rewards or None,
            "error": self._redacted(self.error) or None,
            "notes": self.notes,
        }
        (self.folder / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
