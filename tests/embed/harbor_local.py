"""An environment of Harbor that needs no Docker: our local sandbox behind Harbor's own interface.

    harbor run -e harbor_local:LocalEnvironment    # with this folder on PYTHONPATH

To the agent under test it is any environment of Harbor: it can exec, upload and download. Everything runs in one
namespace, as in a container: what one command leaves behind is there for the next, the verifier's included.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from harbor.environments.base import BaseEnvironment, ExecResult
from harbor.environments.capabilities import EnvironmentCapabilities, EnvironmentResourceCapabilities

import orchestrator
from orchestrator.sandboxes.local import LocalSandbox
from orchestrator.tasks import install, load_task
from states.errors import ExecTimeout


class LocalEnvironment(BaseEnvironment):
    @staticmethod
    def type() -> str:
        return "local"

    @classmethod
    def resource_capabilities(cls) -> EnvironmentResourceCapabilities:
        return EnvironmentResourceCapabilities(
            cpu_limit=True, cpu_request=True, memory_limit=True, memory_request=True, fractional_cpus=True
        )

    @property
    def capabilities(self) -> EnvironmentCapabilities:
        return EnvironmentCapabilities(disable_internet=True)

    def _validate_definition(self) -> None:
        load_task(self.environment_dir.parent)

    async def start(self, force_build: bool) -> None:
        base = Path(sys.base_prefix)
        binds = [base, Path(orchestrator.__file__).parent / "agents"]
        self.root = Path(tempfile.mkdtemp(prefix="harbor-local-"))
        self.sandbox = LocalSandbox(
            name=f"harbor-{self.root.name}",
            root=self.root / "sandbox",
            network="none",
            binds=tuple((path, str(path)) for path in binds if not path.is_relative_to("/usr")),
        )
        await self.sandbox.start()
        await install(load_task(self.environment_dir.parent), self.sandbox)
        self.handle = self.sandbox.handle("main", trusted=True)
        await self.handle.open()

    async def stop(self, delete: bool) -> None:
        await self.handle.end()
        await self.sandbox.stop()
        self.root.rmdir()

    async def exec(self, command, cwd=None, env=None, timeout_sec=None, user=None) -> ExecResult:
        env = self._merge_env(env)
        try:
            done = await self.handle.exec(command, cwd=cwd, env=env, timeout_sec=timeout_sec)
        except ExecTimeout as error:
            raise RuntimeError(f"Command timed out after {timeout_sec} seconds") from error  # as its Docker does
        return ExecResult(stdout=done.stdout, stderr=done.stderr, return_code=done.return_code)

    async def upload_file(self, source_path, target_path) -> None:
        await self.handle.write_file(target_path, Path(source_path).read_bytes(), mode=Path(source_path).stat().st_mode)

    async def upload_dir(self, source_dir, target_dir) -> None:
        await self.sandbox.upload(Path(source_dir), target_dir)

    async def download_file(self, source_path, target_path) -> None:
        Path(target_path).write_bytes(await self.handle.read_file(source_path))

    async def download_dir(self, source_dir, target_dir) -> None:
        await self.sandbox.download(source_dir, Path(target_dir))
