"""A runtime of verifiers that needs no Docker: our local sandbox behind its interface, and the demo task."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import verifiers.v1 as vf
from verifiers.v1.runtimes import ProgramResult, Runtime
from verifiers.v1.runtimes.subprocess import SubprocessConfig, SubprocessRuntimeInfo

import orchestrator
from orchestrator.sandboxes.local import LocalSandbox
from orchestrator.tasks import demo_task, install, load_task

DEMO = load_task(demo_task())


class LocalRuntime(Runtime):
    """One namespace, as in a container: what one command leaves behind is there for the next."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SubprocessConfig()
        self.info = SubprocessRuntimeInfo()

    async def start(self) -> None:
        binds = [Path(sys.base_prefix), Path(orchestrator.__file__).parent / "agents"]
        self.root = Path(tempfile.mkdtemp(prefix="verifiers-local-"))
        self.sandbox = LocalSandbox(
            name=f"verifiers-{self.root.name}",
            root=self.root / "sandbox",
            network="host",  # the interception server is called directly
            binds=tuple((path, str(path)) for path in binds if not path.is_relative_to("/usr")),
        )
        await self.sandbox.start()
        await install(DEMO, self.sandbox)
        self.handle = self.sandbox.handle("main", trusted=True)
        await self.handle.open()

    async def teardown(self) -> None:
        await self.handle.end()
        await self.sandbox.stop()
        self.root.rmdir()

    async def run(self, argv, env) -> ProgramResult:
        done = await self.handle.exec(argv, env=self.process_env(env))
        return ProgramResult(done.return_code, done.stdout, done.stderr)

    async def _read(self, path, max_bytes=None) -> bytes:
        return (await self.handle.read_file(path))[:max_bytes]

    async def write(self, path, data) -> None:
        await self.handle.write_file(path, data)


class AnswerTask(vf.Task):
    """Scored by what stands in `answer.txt`, in a runtime that has nothing else."""

    async def setup(self, runtime: Runtime) -> None:
        await runtime.write("numbers.txt", b"40\n2\n")

    @vf.reward
    async def by_the_answer(self, runtime: Runtime) -> float:
        return float((await runtime.read("answer.txt")).strip() == b"42")


class DemoTask(vf.Task):
    """The demo task, scored by its own tests."""

    @vf.reward
    async def by_the_tests(self, runtime: Runtime) -> float:
        for file in DEMO.verification.folder.iterdir():
            await runtime.write(f"/tests/{file.name}", file.read_bytes())
        await runtime.run(["/bin/sh", "/tests/test.sh"], {})
        return float(await runtime.read("/logs/verifier/reward.txt"))
