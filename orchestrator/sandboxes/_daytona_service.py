"""The Daytona service, as far as we use it: the real SDK, retried where a repetition is harmless, in our errors.

The SDK repeats neither a 429 nor a 502, and no POST. Every call of ours may be repeated: uploads replace, the keeper
in the sandbox does what it is asked for twice only once, frames of a channel are numbered, and a sandbox is created
under a name that nobody else has, so that one whose answer was lost is found again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import shlex
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import anyio
import anyio.to_thread
import attrs

from orchestrator.sandboxes.inside import keeper
from states.errors import ConfigError, HandleRevoked, OrchestratorError, PathEscape, QuietError, SandboxError

T = TypeVar("T")

TRIES: Final = 6
REACH_TRIES: Final = 2
"""Before anything is begun: a service that is not there is said to be away in seconds."""

FIRST_DELAY_SEC: Final = 0.25
MOST_DELAY_SEC: Final = 60.0
PASSING: Final = frozenset({408, 429, 500, 502, 503, 504})
"""Answers after which the same call may succeed."""

CALL_SEC: Final = 60
"""How long one call of the keeper may take on the service's side, in whole seconds."""

INLINE_BYTES: Final = 16_384
"""A longer request is uploaded, as is any that holds an environment."""

LABEL: Final = "rollout-sandbox"
MADE_BY: Final = {"made-by": "rollout-orchestrator"}
KEPT: Final = "rollout-kept"
"""The label of one that somebody wants to look into."""


class Gone(SandboxError):
    """The sandbox is not there any more: nothing that is asked of it can succeed."""


def sdk() -> Any:
    """The SDK. Its import takes seconds: call this in a thread first."""
    import daytona

    return daytona


@attrs.define(eq=False)
class Service:
    """One connection to the service. Made by `connect`; asyncio only."""

    client: Any
    api_url: str
    sleep: Callable[[float], Awaitable[None]] = anyio.sleep
    closed: bool = False

    @classmethod
    async def connect(cls, api_key: str, api_url: str, target: str | None) -> Service:
        """Make a client. Nothing is sent yet. Raises `ConfigError` under trio: the SDK knows asyncio only."""
        try:
            asyncio.get_running_loop()
        except RuntimeError as exc:
            raise ConfigError("a Daytona sandbox needs asyncio: its SDK does not run on trio") from exc
        daytona = await anyio.to_thread.run_sync(sdk)
        with warnings.catch_warnings():
            # A state is waited for twice in a sandbox's life: polling is quicker than events, which cost a websocket
            # for each client, and leak one wherever the service has none.
            warnings.simplefilter("ignore", DeprecationWarning)
            config = daytona.DaytonaConfig(
                api_key=api_key,
                api_url=api_url,
                target=target,
                connection_pool_maxsize=None,  # each channel holds a connection: a pool of them runs dry
                otel_enabled=False,
                use_deprecated_polling=True,
            )
            return cls(daytona.AsyncDaytona(config), api_url)

    async def close(self) -> None:
        """Let go of the connections. Bounded: a websocket that is half dead must not hold us up."""
        self.closed = True
        with anyio.move_on_after(5, shield=True):
            await self.client.close()

    async def steadily(
        self, what: str, call: Callable[[], Awaitable[T]], *, gone: str = "", connects: int = TRIES
    ) -> T:
        """Call, and call again after a passing failure. `gone` names the sandbox that a 404 means.

        `connects` is how often it is tried where there is no answer at all. Raises `SandboxError` with what the service
        said.
        """
        for attempt in range(TRIES):
            if self.closed:  # the SDK would open a new connection, and nobody would close that
                raise SandboxError(f"the connection to Daytona was closed before {what}")
            try:
                return await call()
            except sdk().DaytonaError as exc:
                tries = connects if isinstance(exc, sdk().DaytonaConnectionError) else TRIES
                if attempt >= tries - 1 or not is_passing(exc):
                    raise translated(what, exc, gone) from exc
                await self.sleep(delay_after(exc, attempt))
        raise AssertionError("unreachable")

    # --- sandboxes ---

    async def reach(self, name: str) -> None:
        """Find out that the service is there and lets us in, before it is asked for sandbox `name`."""
        await self.steadily(f"before making sandbox {name}", lambda: self._of_name(name), connects=REACH_TRIES)

    async def create(self, name: str, make: Callable[[], Any], log: Callable[[str], None]) -> Box:
        """A sandbox that has started. `make` makes its parameters anew: the SDK writes into them."""
        daytona = sdk()

        async def attempt() -> Any:
            if tried:
                found = await self._of_name(name)
                if found is not None:
                    await found.wait_for_sandbox_start(timeout=0)
                    return found
            tried.append(name)
            try:
                params = make()
                logs = {} if hasattr(params, "snapshot") else {"on_snapshot_create_logs": log}
                return await self.client.create(params, timeout=0, **logs)
            except daytona.DaytonaConflictError:
                found = await self._of_name(name)
                if found is None:
                    raise
                await found.wait_for_sandbox_start(timeout=0)
                return found

        tried: list[str] = []
        return Box(self, await self.steadily(f"creating sandbox {name}", attempt), name)

    async def _of_name(self, name: str) -> Any | None:
        async for found in self.client.list(sdk().ListSandboxesQuery(labels={LABEL: name})):
            return found
        return None

    async def get(self, box_id: str, name: str) -> Box:
        """A sandbox that is there, and up, by its id. Raises `Gone` where it is not."""
        found = await self.steadily("looking for it", lambda: self.client.get(box_id), gone=name)
        if found.state != sdk().SandboxState.STARTED:
            raise Gone(f"sandbox {name} is gone: Daytona says that it is {getattr(found.state, 'value', 'nothing')}")
        return Box(self, found, name)

    async def find(self, labels: Mapping[str, str]) -> list[Any]:
        """Every sandbox with these labels."""

        async def every() -> list[Any]:
            return [found async for found in self.client.list(sdk().ListSandboxesQuery(labels=dict(labels)))]

        return await self.steadily("listing sandboxes", every)

    async def delete(self, found: Any, name: str) -> None:
        """Delete a sandbox and wait until it is gone. One that is gone already is fine."""

        async def delete() -> None:
            with contextlib.suppress(sdk().DaytonaNotFoundError):
                await found.delete(timeout=60, wait=True)

        await self.steadily(f"deleting sandbox {name}", delete)


def is_passing(exc: Any) -> bool:
    """Whether the same call may succeed later."""
    return exc.status_code in PASSING or isinstance(exc, sdk().DaytonaConnectionError)


def delay_after(exc: Any, attempt: int) -> float:
    """Seconds to wait: what the service asks for, else twice as long each time, a little at random."""
    for name, value in exc.headers.items():
        if name.lower() == "retry-after" and (asked := seconds_until(value)) >= 0:
            return min(asked, MOST_DELAY_SEC)
    delay: float = FIRST_DELAY_SEC * 2**attempt
    return delay * random.uniform(0.8, 1.2)  # noqa: S311 - so that many do not come at once


def seconds_until(value: str) -> float:
    """A Retry-After, which is seconds or a date, as seconds from now: less than none for one that is neither."""
    with contextlib.suppress(ValueError):
        return float(value) if float(value) >= 0 else -1.0  # which nan is not
    with contextlib.suppress(ValueError):
        return parsedate_to_datetime(value).timestamp() - time.time()
    return -1.0


def translated(what: str, exc: Any, gone: str = "") -> SandboxError:
    """An error of the SDK as one of ours."""
    daytona = sdk()
    said = str(exc).strip() or type(exc).__name__
    if isinstance(exc, daytona.DaytonaAuthenticationError):
        return SandboxError(f"Daytona refused the key in DAYTONA_API_KEY, {what}: {said}")
    if gone and isinstance(exc, daytona.DaytonaNotFoundError) and exc.source != "DAYTONA_DAEMON":
        return Gone(f"sandbox {gone} is gone, {what}: Daytona said: {said}")
    if isinstance(exc, daytona.DaytonaConnectionError):
        return SandboxError(f"Daytona cannot be reached, {what}: {said}")
    status = f" ({exc.status_code})" if exc.status_code else ""
    return SandboxError(f"Daytona, {what}{status}: {said}")


# --- one sandbox ---


@attrs.define(eq=False)
class Box:
    """One sandbox: calls of the keeper in it, and files on their way."""

    service: Service
    remote: Any
    name: str
    library: str = attrs.field(factory=lambda: f"/tmp/rollout-{secrets.token_hex(8)}")  # noqa: S108 - in the sandbox
    python: str = "python3"
    lost: Callable[[str], None] = lambda _why: None
    """Is told why, when a call finds that the sandbox is gone."""
    unneeded: set[str] = attrs.field(factory=set)
    """Files of calls that will not be repeated any more: the next call has them removed."""

    async def steadily(self, what: str, call: Callable[[], Awaitable[T]]) -> T:
        """As `Service.steadily`, where a 404 means that the sandbox is gone: whoever finds that out tells its owner."""
        try:
            return await self.service.steadily(what, call, gone=self.name)
        except Gone as exc:
            self.lost(str(exc))
            raise

    def translated(self, what: str, exc: Any) -> SandboxError:
        """An error of the SDK, for calls that are repeated elsewhere."""
        error = translated(what, exc, self.name)
        if isinstance(error, Gone):
            self.lost(str(error))
        return error

    def launch(self, request: str) -> str:
        """The shell command that hands a request to the keeper."""
        words = [self.python, "-I", "-S", "-c", keeper.LAUNCH, self.library, request]
        return " ".join(shlex.quote(word) for word in words)

    async def request(self, asked: Mapping[str, Any], *, private: bool = False) -> str:
        """The request as an argument: what is long, or nobody else's to read, is uploaded."""
        text = json.dumps(asked)
        if not private and len(text) <= INLINE_BYTES:
            return text
        return "@" + await self.bring(text.encode())

    async def bring(self, source: bytes | Path) -> str:
        """Bring in what one call is about: its path there. Whoever made the call says when it is not needed."""
        path = f"{keeper.IN}/{secrets.token_hex(12)}"
        await self.upload({path: source})
        return path

    async def ask(
        self,
        what: str,
        asked: Mapping[str, Any],
        *,
        private: bool = False,
        sec: int = CALL_SEC,
        brought: Sequence[str] = (),
    ) -> Any:
        """The keeper's answer. `brought` is what was brought in for this. Raises `SandboxError` with its sentence."""
        forget = sorted(self.unneeded)
        request = await self.request({**asked, "forget": forget} if forget else asked, private=private)
        command = self.launch(request)
        # In the folder that is always there: the one where tasks work may be shut, or gone.
        call = lambda: self.remote.process.exec(command, cwd="/", timeout=sec)  # noqa: E731
        try:
            reply = await self.steadily(what, call)
            self.unneeded.difference_update(forget)
        finally:
            self.unneeded.update(brought, [request[1:]] if request.startswith("@") else [])
        return judged(what, self.name, answer_in(reply.result), reply.result)

    async def upload(self, files: Mapping[str, bytes | Path]) -> None:
        """Bring files in, all in one call."""
        daytona = sdk()

        def uploads() -> list[Any]:
            return [
                daytona.FileUpload(str(source) if isinstance(source, Path) else source, path)
                for path, source in files.items()
            ]

        await self.steadily("uploading", lambda: self.remote.fs.upload_files(uploads()))

    async def download(self, path: str, target: Path) -> None:
        """Bring one file home."""
        wanted = [sdk().FileDownloadRequest(source=path, destination=str(target))]
        (reply,) = await self.steadily("downloading", lambda: self.remote.fs.download_files(wanted))
        if reply.error:
            raise SandboxError(f"sandbox {self.name}: {path} cannot be downloaded: {reply.error}")


def answer_in(text: str) -> Any | None:
    """The keeper's answer: the last line of it, whatever a shell or sudo said before."""
    for line in reversed(text.splitlines()):
        if line.startswith("rollout: "):
            with contextlib.suppress(ValueError):
                return json.loads(line.removeprefix("rollout: "))
    return None


def judged(what: str, name: str, answer: Any | None, said: str) -> Any:
    """The answer, or the error that it is."""
    if answer is None:
        tail = said.strip()[-1_000:] or "nothing"
        raise SandboxError(f"sandbox {name}, {what}: its Python did not do its work, and said: {tail}")
    if "error" not in answer:
        return answer
    kinds: dict[str, type[OrchestratorError]] = {"escape": PathEscape, "ended": HandleRevoked, "unquiet": QuietError}
    error = kinds.get(answer.get("kind", ""), SandboxError)
    raise error(f"sandbox {name}, {what}: {answer['error']}")


def inside_files(library: str) -> dict[str, bytes]:
    """What runs inside, by the path where it belongs."""
    here = Path(keeper.__file__).parent
    place = f"{library}/orchestrator/sandboxes/inside"
    return {f"{place}/{file.name}": file.read_bytes() for file in sorted(here.glob("*.py"))}


def shell_words(command: str | Sequence[str]) -> list[str]:
    """A string goes through `/bin/sh -c`."""
    return ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
