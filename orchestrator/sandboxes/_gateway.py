"""How sandboxes on this machine reach the model gateway: its unix socket, and a port of their own loopback."""

from __future__ import annotations

from pathlib import Path

import attrs

from states.errors import SandboxError


@attrs.frozen
class GatewayReach:
    """How the model gateway is reached: its unix socket on this host, and the port at which sandboxes find it."""

    socket: Path
    port: int

    def admit_all(self) -> None:
        """Open the socket to users other than ours, as sandboxes have them; its keys still guard the gateway.

        Raises:
            SandboxError: It is not there, or not ours to open.
        """
        try:
            mode = self.socket.stat().st_mode
            if mode & 0o006 != 0o006:
                self.socket.chmod(mode | 0o666)
        except OSError as exc:
            raise SandboxError(f"the gateway's socket {self.socket} cannot be used: {exc.strerror}") from exc
