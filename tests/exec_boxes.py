"""A host's sandbox that can only start, exec, upload and download, as many are: over a local one, hiding nothing."""

from __future__ import annotations

import attrs

from orchestrator.sandboxes.local import LocalSandbox


@attrs.define(eq=False, slots=False)
class Box:
    """Satisfies `ExecSandbox`, and no more: one namespace for all commands, one disk, files one at a time."""

    inner: LocalSandbox
    has_environment: bool = True
    commands: list[str] = attrs.field(factory=list)

    async def start(self):
        await self.inner.start()
        self.handle_inside = self.inner.handle("host", trusted=True)
        await self.handle_inside.open()

    async def stop(self):
        await self.inner.stop()

    async def exec(self, command, *, timeout_sec=None):
        self.commands.append(command)
        return await self.handle_inside.exec(command, timeout_sec=timeout_sec)

    async def upload(self, source, target):
        assert source.is_file()
        await self.handle_inside.write_file(target, source.read_bytes())

    async def download(self, source, target):
        target.write_bytes(await self.handle_inside.read_file(source))
