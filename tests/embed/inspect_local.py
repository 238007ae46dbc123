"""A sandbox of Inspect that needs no Docker: our local sandbox behind Inspect's own interface, and the demo task.

Everything runs in one namespace, as in a container: what one command leaves behind is there for the next.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from inspect_ai import Task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Score, Target, mean, scorer
from inspect_ai.solver import TaskState
from inspect_ai.util import ExecResult, SandboxEnvironment, sandbox, sandboxenv

import orchestrator
from orchestrator.install import cache_root
from orchestrator.sandboxes.local import LocalSandbox
from orchestrator.tasks import demo_task, install, load_task
from states.errors import ExecTimeout, SandboxError

DEMO = load_task(demo_task())


@sandboxenv(name="rollout_local")
class LocalEnvironment(SandboxEnvironment):
    @classmethod
    async def sample_init(cls, task_name, config, metadata):
        environment = cls()
        await environment.start()
        return {"default": environment}

    @classmethod
    async def sample_cleanup(cls, task_name, config, environments, interrupted) -> None:
        for environment in environments.values():
            await environment.stop()

    async def start(self) -> None:
        binds = [Path(sys.base_prefix), Path(orchestrator.__file__).parent / "agents", cache_root() / "agents"]
        self.root = Path(tempfile.mkdtemp(prefix="inspect-local-"))
        self.local = LocalSandbox(
            name=f"inspect-{self.root.name}",
            root=self.root / "sandbox",
            network="none",
            binds=tuple((path, str(path)) for path in binds if not path.is_relative_to("/usr")),
        )
        await self.local.start()
        await install(DEMO, self.local)
        self.handle = self.local.handle("main", trusted=True)
        await self.handle.open()

    async def stop(self) -> None:
        await self.handle.end()
        await self.local.stop()
        self.root.rmdir()

    async def exec(
        self, cmd, input=None, cwd=None, env=None, user=None, timeout=None, timeout_retry=True, concurrency=True
    ) -> ExecResult[str]:
        assert input is None
        try:
            done = await self.handle.exec(cmd, cwd=cwd, env=env, timeout_sec=timeout)
        except ExecTimeout as error:
            raise TimeoutError(str(error)) from error
        return ExecResult(done.return_code == 0, done.return_code, done.stdout, done.stderr)

    async def write_file(self, file, contents) -> None:
        await self.handle.write_file(file, contents.encode() if isinstance(contents, str) else contents)

    async def read_file(self, file, text=True):
        try:
            data = await self.handle.read_file(file)
        except SandboxError as error:
            raise FileNotFoundError(str(error)) from error
        return data.decode() if text else data


@scorer(metrics=[mean()])
def by_the_tests():
    """The demo task's own tests, run in the sample's sandbox."""

    async def score(state: TaskState, target: Target) -> Score:
        for file in DEMO.verification.folder.iterdir():
            await sandbox().write_file(f"/tests/{file.name}", file.read_bytes())
        done = await sandbox().exec(["/bin/sh", "/tests/test.sh"])
        return Score(value=float(await sandbox().read_file("/logs/verifier/reward.txt")), explanation=done.stdout)

    return score


@scorer(metrics=[mean()])
def by_the_answer():
    """What stands in `answer.txt`, in a sandbox that has nothing else."""

    async def score(state: TaskState, target: Target) -> Score:
        return Score(value=float((await sandbox().read_file("answer.txt")).strip() == "42"))

    return score


def shipped(name: str, solver) -> Task:
    """A task in the sandbox of Inspect's that needs nothing: a folder and this machine's own processes."""
    sample = Sample(input="Add up the numbers.", files={"numbers.txt": "40\n2\n"})
    return Task(name=name, dataset=[sample], solver=solver, scorer=by_the_answer(), sandbox="local")


def demo(name: str, solver, **limits) -> Task:
    """The demo task, played by this solver."""
    return Task(
        name=name,
        dataset=[Sample(input=DEMO.instruction)],
        solver=solver,
        scorer=by_the_tests(),
        sandbox="rollout_local",
        **limits,
    )
