"""The Docker engine, over its API: the one seam to aiodocker, where its errors become ours.

Needs asyncio. Every request is counted (`Engine.calls`), since their number is what a rollout in Docker costs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Any, Final, Self

import aiodocker
import aiohttp
import anyio
import attrs
from aiodocker.exceptions import DockerError

from states.errors import ConfigError, SandboxError

SOCKETS: Final = ("/run/docker.sock", "/var/run/docker.sock", "~/.docker/run/docker.sock")


@attrs.define(eq=False)
class Engine:
    """A connection to an engine. Made by `Engine.open`, given back by `close`.

    Attributes:
        url: Which engine, as errors and handles name it.
        calls: How many requests were sent so far.
    """

    url: str
    calls: int = 0
    _docker: aiodocker.Docker = attrs.field(init=False)
    _session: aiohttp.ClientSession = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        """Make the client; nothing is sent."""
        trace = aiohttp.TraceConfig()
        trace.on_request_start.append(self._count)
        connector = aiohttp.UnixConnector(self.url.removeprefix("unix://"), limit=0)
        self._session = aiohttp.ClientSession(connector=connector, trace_configs=[trace])
        self._docker = aiodocker.Docker(self.url, session=self._session)

    async def _count(self, *_: object) -> None:
        self.calls += 1

    @classmethod
    def open(cls, url: str | None = None) -> Self:
        """Connect when first asked: `url`, else what DOCKER_HOST, the current context or the usual socket says.

        Raises:
            ConfigError: This is not asyncio, or the URL is of no kind that is known here.
            SandboxError: There is no engine that could be meant.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError as exc:
            raise ConfigError(
                "the docker sandbox needs asyncio: its client runs on no other loop, such as trio"
            ) from exc
        url = url or engine_url()
        check_engine(url)
        return cls(url)

    @property
    def closed(self) -> bool:
        """Whether the connection was given back."""
        return self._session.closed

    @property
    def api(self) -> tuple[int, ...]:
        """Which version of the API it speaks; known once it was asked something."""
        return tuple(map(int, self._docker.api_version.removeprefix("v").split(".")))

    async def close(self) -> None:
        """Give the connection back, also when we are cancelled. Idempotent."""
        with anyio.CancelScope(shield=True):
            await self._docker.close()
            await self._session.close()

    @contextlib.contextmanager
    def says(self, what: str) -> Iterator[aiodocker.Docker]:
        """Ask it something; an error of the engine, or on the way there, is a `SandboxError` that names `what`."""
        try:
            yield self._docker
        except DockerError as exc:
            raise EngineError(self._complaint(what, exc), status=exc.status) from exc
        except (aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise EngineError(f"{what}: the engine at {self.url} went away ({said(exc)})") from exc

    async def build(self, tag: str, context: IO[bytes]) -> AsyncIterator[dict[str, Any]]:
        """Build an image of a packed folder with BuildKit, which the client does not know of. Yields what it says.

        Inside `says`. Images that it starts from have to be there already: BuildKit pulls without credentials.
        """
        how = {"version": "2", "t": tag, "rm": "1", "forcerm": "1"}
        kind = {"Content-Type": "application/x-tar"}
        patient = aiohttp.ClientTimeout(total=None)
        async with self._session.post(
            "http://docker/build", params=how, data=context, headers=kind, timeout=patient
        ) as answer:
            if answer.status >= 400:
                raise DockerError(answer.status, (await answer.json())["message"])
            rest = b""
            async for data in answer.content.iter_any():  # a line may be longer than a reader of lines takes
                *lines, rest = (rest + data).split(b"\n")
                for line in filter(None, map(bytes.strip, lines)):
                    said = json.loads(line)
                    if error := said.get("error"):
                        raise DockerError(answer.status, error)
                    yield said

    def _complaint(self, what: str, exc: DockerError) -> str:
        if exc.status != 900:
            return f"{what}: the engine says: {exc.message.strip()}"
        cause = getattr(exc.__context__, "os_error", None)
        number = getattr(cause, "errno", None)
        if number in (errno.EACCES, errno.EPERM):
            advice = "permission denied; join the group that owns the socket (usermod -aG docker USER), or run as root"
        elif number == errno.ENOENT:
            advice = "there is no such socket; start dockerd, or say where it listens with DOCKER_HOST"
        elif number == errno.ECONNREFUSED:
            advice = "nobody listens on that socket; is dockerd running?"
        else:
            advice = said(exc.__context__ or exc)
        return f"{what}: no engine answers at {self.url}: {advice}"


class EngineError(SandboxError):
    """The engine refused, failed or is not there. `status` is its HTTP status, 0 without an answer."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = 0 if status == 900 else status


def said(exc: BaseException) -> str:
    """What an error says, in one line; some of aiohttp's say nothing."""
    return " ".join(str(exc).split()) or type(exc).__name__


def check_engine(url: str | None = None) -> None:
    """Raise `ConfigError` when `url`, else what DOCKER_HOST or the current context says, is no engine on this machine.

    Nobody is asked, and where nothing is said nothing is wrong yet.
    """
    url = url or os.environ.get("DOCKER_HOST") or _context_url()
    if url and not url.startswith("unix://"):
        raise ConfigError(
            f"the engine at {url} cannot see this machine's folders, which a docker sandbox binds: give one that "
            "runs here, as unix:///PATH (DOCKER_HOST, or --sandbox-option engine=...)"
        )


def engine_url() -> str:
    """Which engine is meant where nothing was said: DOCKER_HOST, the CLI's current context, or a usual socket.

    Raises:
        ConfigError: The context that was chosen cannot be read.
        SandboxError: There is nothing to be meant.
    """
    if url := os.environ.get("DOCKER_HOST") or _context_url():
        return url
    for place in SOCKETS:
        path = Path(place).expanduser()
        if path.is_socket():
            return f"unix://{path}"
    raise SandboxError(
        f"there is no Docker engine here: no socket at {', '.join(SOCKETS)}, and DOCKER_HOST is not set; install "
        "Docker (Debian: docker.io) and start dockerd"
    )


def docker_config() -> dict[str, Any]:
    """The CLI's own settings, `~/.docker/config.json`; empty where there are none. Raises `ConfigError`."""
    folder = os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker"
    file = Path(folder, "config.json")
    try:
        found = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file} cannot be read: {said(exc)}") from exc
    return found if isinstance(found, dict) else {}


def _context_url() -> str | None:
    """Where the current context of the CLI leads, None for the default one."""
    name = os.environ.get("DOCKER_CONTEXT") or docker_config().get("currentContext") or "default"
    if name == "default":
        return None
    folder = os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker"
    file = Path(folder, "contexts/meta", hashlib.sha256(name.encode()).hexdigest(), "meta.json")
    try:
        return str(json.loads(file.read_bytes())["Endpoints"]["docker"]["Host"])
    except (OSError, ValueError, LookupError, TypeError) as exc:
        raise ConfigError(f"the Docker context {name} cannot be read from {file}: {said(exc)}") from exc
