"""A Daytona service as tests see it: on loopback, or the real one that the environment names."""

from __future__ import annotations

import os
from typing import Any

import attrs
import pytest

from orchestrator.sandboxes import SandboxSpec, make_sandbox
from orchestrator.sandboxes._daytona_service import LABEL, MADE_BY
from orchestrator.sandboxes._daytona_service import Service as Client
from orchestrator.sandboxes.daytona import access


@attrs.define(eq=False)
class Service:
    """What tests need of a service. `server` is the loopback one, None for the real one."""

    server: Any = None
    prefix: str = ""
    notes: list[str] = attrs.Factory(list)

    @classmethod
    def live(cls):
        """The one that the environment names."""
        if not (os.environ.get("DAYTONA_API_KEY") and os.environ.get("DAYTONA_API_URL")):
            pytest.skip("set DAYTONA_API_KEY and DAYTONA_API_URL to run at the real service")
        return cls(prefix=f"test-{os.urandom(4).hex()}-")

    def sandbox(self, name="box", *, channel="session", options=None, **spec):
        """A sandbox that was not started; its notes are kept."""
        spec = {"ttl_sec": 900.0, "note": self.notes.append, **spec}
        name = self.prefix + name
        return make_sandbox(SandboxSpec("daytona", name, options={"channel": channel, **(options or {})}, **spec))

    async def left(self):
        """The names of the sandboxes that these tests left there."""
        client = await Client.connect(*access(), None)
        try:
            names = [found.labels[LABEL] for found in await client.find(MADE_BY)]
        finally:
            await client.close()
        return [name for name in names if name.startswith(self.prefix)]
