"""The ACP transport: an agent that is a process in the sandbox and speaks the Agent Client Protocol on its stdio.

The same methods as `orchestrator.transports.session_factory`, one a state: read the two files side by side. What is
special here: the agent is on the other side of a pipe, so everything that it says is read in order by one task (see
`acp_wire`), becomes steps there and then (`acp_steps`), and what it asks is answered beside that (`acp_client`).

Protocol version 1, the stable methods. `fs/*` and `terminal/*` are advertised where the launch turns them on.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

import anyio
import attrs
import msgspec

from orchestrator._tasks import Detached
from orchestrator.questions import Questions
from orchestrator.transports.acp_client import Client
from orchestrator.transports.acp_steps import NOWHERE, Recorder
from orchestrator.transports.acp_wire import MAX_LINE, MAX_OUTPUT, Peer
from orchestrator.transports.inflight import PromptTask, Turn, settled
from states.errors import AgentError, AgentLost, ConfigError, ConnectError, SandboxError
from states.events import AcpOpened, Failure, Lost, Settled, TurnEnded, TurnFailed
from states.ports import AskHandler, ByteChannel, Connection, OpenTurn, Seat, Segment

PROTOCOL_VERSION = 1
AUTH_REQUIRED = -32000
MAX_KEPT = 5
"""Different errors of an `on_change` that are kept for the evidence."""
CANNOT_RUN = (126, 127)
"""Exit codes of a shell that found no program, or could not run it: a second try must fail alike."""


def _absolute(_launch: AcpLaunch, _field: attrs.Attribute[str], cwd: str) -> None:
    if not cwd.startswith("/"):
        raise ConfigError(f"an ACP session's cwd must be absolute inside the sandbox, {cwd!r} is not")


@attrs.frozen
class AcpLaunch:
    """How one role's agent is started and spoken to; every value is final, no template is left in it.

    Times are seconds. `mode` and `config_options` are set after the session has been opened, by the ids that the
    agent offers (or by an option's category: `model`, `mode`, `thought_level`).

    Example:
        >>> AcpLaunch(argv=("codex-acp",), cwd="/app", mode="full-access").initialize_sec
        60.0
    """

    argv: tuple[str, ...]
    cwd: str = attrs.field(validator=_absolute)
    env: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    files: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    """Absolute path in the sandbox to content; written before the agent starts."""
    mode: str = ""
    config_options: Mapping[str, str | bool] = attrs.field(factory=dict)
    fs: bool = False
    terminal: bool = False
    meta: Mapping[str, Any] = attrs.field(factory=dict)
    """`_meta` of the client's capabilities, which some agents read."""
    mcp_servers: tuple[Mapping[str, Any], ...] = ()
    authenticate: str = ""
    """Id of the authentication method to use; empty: none."""
    load_session: str = ""
    """Id of a session to load instead of opening a new one; what it replays is no part of the trajectory."""
    initialize_sec: float = 60.0
    request_sec: float = 120.0
    """For each further request of the handshake."""
    close_sec: float = 3.0
    """For session/close, where the agent has it."""
    exit_sec: float = 2.0
    """For the agent to exit by itself once its stdin is closed."""
    max_line: int = MAX_LINE
    """Bytes of one message; a longer one is dropped."""
    max_output: int = MAX_OUTPUT
    """Bytes that the agent may write in all; then it is lost."""

    @property
    def name(self) -> str:
        """The agent's program, for messages."""
        return self.argv[0].rpartition("/")[2]


# --- the shapes of answers that are read ---------------------------------------------------------------------


class _Camel(msgspec.Struct, rename="camel"):
    """Field names as ACP writes them. What is optional may be anything: a broken extra breaks no handshake."""


class Initialized(_Camel):
    """The answer to initialize."""

    protocol_version: int
    agent_capabilities: Any = None
    agent_info: Any = None
    auth_methods: Any = None


class Opened(_Camel):
    """The answer to session/new; session/load gives the same without the id."""

    session_id: str = ""
    modes: Any = None
    config_options: Any = None


class Prompted(_Camel):
    """The answer to session/prompt."""

    stop_reason: str
    usage: Any = None
    meta: Any = msgspec.field(default=None, name="_meta")


# --- the session ---------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class AcpSession:
    """One live ACP session, as a `states.ports.Session`; `close` is there too, and happens once."""

    session_id: str
    agent: str
    _launch: AcpLaunch
    _peer: Peer
    _client: Client
    _closable: bool
    on_change: Callable[[Any], None] | None = None
    _closing: list[Detached[tuple[str, ...]]] = attrs.field(factory=list, init=False)
    _watchers_errors: dict[str, int] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._client.recorder.session_id = self.session_id
        self._client.recorder.changed = self._changed

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Everything that happened so far."""
        return self._client.recorder.steps

    def on_ask_user(self, handler: AskHandler | None) -> None:
        """Bind who answers questions; None goes back to the permission policy."""
        self._client.questions.bind(handler)

    def turn(self, segment: Segment, text: str) -> None:
        """From here on steps go to `segment`; the next `prompt` is its turn."""
        self._client.recorder.turn(segment, text)
        self._client.turn = Turn()

    async def prompt(self, text: str) -> str:
        """Send one prompt; returns its stop reason when the agent has answered it.

        Raises `AgentError` for an error that it answers with, `AgentLost` when it goes away.
        """
        turn = self._client.turn
        if turn.sent.is_set():  # nobody prepared this one
            self.turn(NOWHERE, text)
            turn = self._client.turn
        if turn.stopped.is_set():
            return "cancelled"  # before it was sent
        turn.sent.set()
        params = {"sessionId": self.session_id, "prompt": [{"type": "text", "text": text}]}
        try:
            # What comes behind the answer finds the turn over, however late this task is woken.
            answer = await self._peer.request("session/prompt", params, Prompted, arrived=turn.stopped.set)
        finally:
            turn.stopped.set()
        reported = {"usage": answer.usage, "_meta": answer.meta}
        self._client.recorder.reply({name: value for name, value in reported.items() if value is not None})
        return str(answer.stop_reason)

    async def cancel(self) -> None:
        """Ask the turn in flight to end; its open questions are answered `cancelled`. Without one: nothing."""
        turn = self._client.turn
        if turn.stopped.is_set():
            return
        if turn.sent.is_set():
            self._peer.notify("session/cancel", {"sessionId": self.session_id})
        turn.stopped.set()

    @property
    def prompted(self) -> bool:
        """Whether the last turn's prompt was sent; a turn that is cancelled before that has nothing to wait for."""
        return self._client.turn.sent.is_set()

    def stderr_tail(self) -> str:
        """The last that the agent's process wrote on its stderr."""
        return self._peer.channel.stderr_tail()

    async def drain(self) -> None:
        """Read what is in the pipe already."""
        await self._peer.drain()

    async def gone(self) -> Exception:
        """Return why the agent is gone, once it is."""
        return await self._peer.gone.wait()

    async def close(self) -> tuple[str, ...]:
        """Close the session and the agent's stdin, once, bounded; returns what is known of the end."""
        if not self._closing:
            self._closing.append(Detached(self._close, name=f"close:{self.agent}").start())
        try:
            return await self._closing[0].wait()
        finally:
            self._peer.end()

    async def _close(self) -> tuple[str, ...]:
        evidence: list[str] = []
        await self.cancel()
        if self._peer.gone.done:
            evidence.append(str(await self.gone()))
        else:
            evidence += [await self._close_session(), await self._hang_up()]
        await self._client.end()
        self._peer.end()
        await self._peer.ended()
        watcher = [f"{said} ({count} times)" for said, count in self._watchers_errors.items()]
        return (*evidence, *watcher, *filter(None, [str(self._peer.noise)]))

    async def _close_session(self) -> str:
        if not self._closable:
            return "the agent has no session/close"
        with anyio.move_on_after(self._launch.close_sec):
            try:
                await self._peer.request("session/close", {"sessionId": self.session_id})
            except AgentError as error:
                return f"session/close failed: {error}"
            return "session/close was answered"
        return f"session/close was not answered within {self._launch.close_sec:g} s"

    async def _hang_up(self) -> str:
        with anyio.move_on_after(self._launch.exit_sec):
            await self._peer.hang_up()
            code = await self._peer.channel.wait()
            return f"{self._launch.name} exited with code {code} after its stdin was closed"
        return f"{self._launch.name} still ran {self._launch.exit_sec:g} s after its stdin was closed"

    def _changed(self) -> None:
        if self.on_change is not None:
            try:
                self.on_change(self)
            except Exception as error:
                said = f"on_change raised {type(error).__name__}: {error}"[:500]
                if said in self._watchers_errors or len(self._watchers_errors) < MAX_KEPT:
                    self._watchers_errors[said] = self._watchers_errors.get(said, 0) + 1


# --- the transport -------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class AcpTransport:
    """Drives agents that speak ACP. `launch` says how one is started; `questions` answers what it asks."""

    launch: AcpLaunch
    questions: Questions
    keep_stderr: Callable[[str], None] = lambda _text: None
    name: Literal["acp", "session-factory"] = "acp"

    async def connecting(self, seat: Seat) -> AcpOpened:
        """Start the agent, shake hands, open a session.

        Raises `ConnectError` with the tail of its stderr: it did not start, went away, did not answer in time, speaks
        another version, wants authentication, or does not offer what the launch asks for.
        """
        channel = await self._spawn(seat)
        client = Client(
            Recorder(), self.questions, seat.handle, self.launch.cwd, fs=self.launch.fs, terminal=self.launch.terminal
        )
        updates = {"session/update": client.recorder.session_update}
        peer = Peer(
            channel, self.launch.name, client.requests, updates, self.launch.max_line, self.launch.max_output
        ).start()
        try:
            session = await _Handshake(self.launch, peer, client).session()
        except AgentError as error:
            peer.end()
            raise _connect_error(error, peer) from error
        except BaseException:
            peer.end()
            raise
        return AcpOpened(session.session_id, session.agent, live=Connection(seat, session))

    async def _spawn(self, seat: Seat) -> ByteChannel:
        await seat.handle.open()
        for path, content in self.launch.files.items():
            await seat.handle.write_file(path, content.encode(), mode=0o600)
        try:
            return await seat.handle.spawn(self.launch.argv, env=self.launch.env, cwd=self.launch.cwd)
        except SandboxError as error:
            raise ConnectError(f"{self.launch.name} did not start: {error}") from error

    def prepare(self, connection: Connection, segment: Segment, text: str) -> PromptTask:
        """A prompt that is ready to be sent; its steps will go to `segment`."""
        session: AcpSession = connection.session
        session.turn(segment, text)
        return PromptTask.of(session.prompt, text, segment)

    async def executing(self, turn: OpenTurn) -> TurnEnded | TurnFailed | Lost:
        """Send the prompt and wait for its answer."""
        turn.inflight.start()
        return await turn.inflight.outcome()

    async def cancelling(self, turn: OpenTurn) -> Settled | Lost:
        """Send session/cancel and wait for the prompt's answer; updates are taken until then."""
        session: AcpSession = turn.connection.session
        await session.cancel()
        return await settled(turn) if session.prompted else Settled("cancelled", turn.segment.steps)

    async def capturing(self, turn: OpenTurn) -> None:
        """Read what is in the pipe already; an ordered reader has nothing else to catch up with."""
        await turn.connection.session.drain()

    async def quiescing(self, connection: Connection) -> tuple[str, ...]:
        """Close the session, once, bounded by the launch's own limits."""
        session: AcpSession = connection.session
        try:
            return await session.close()
        finally:
            self.keep_stderr(session.stderr_tail())

    def watches(self, connection: Connection) -> tuple[Callable[[], Awaitable[Lost]]]:
        """One, of the agent's process."""

        async def lost() -> Lost:
            error = await connection.session.gone()
            return Lost(Failure.of(error), exit_code=getattr(error, "exit_code", None))

        return (lost,)


# --- the handshake -------------------------------------------------------------------------------------------


@attrs.frozen
class _Handshake:
    """From a process that runs to a session that takes prompts."""

    launch: AcpLaunch
    peer: Peer
    client: Client

    async def session(self) -> AcpSession:
        initialized = await self._initialize()
        capabilities = _mapping(initialized.agent_capabilities)
        opened = await self._open(capabilities, initialized.auth_methods)
        session_id = opened.session_id or self.launch.load_session
        closable = _mapping(capabilities.get("sessionCapabilities")).get("close") is not None
        session = AcpSession(
            session_id, _agent(initialized, self.launch), self.launch, self.peer, self.client, closable
        )
        await self._configure(session_id, opened)
        return session

    async def _request(self, method: str, params: Mapping[str, Any], answer: Any = Any) -> Any:
        limit = self.launch.initialize_sec if method == "initialize" else self.launch.request_sec
        with anyio.move_on_after(limit):
            return await self.peer.request(method, params, answer)
        raise ConnectError(
            f"{self.launch.name} did not answer {method} within {limit:g} s{self.peer.last_words()}",
            stderr=self.peer.channel.stderr_tail(),
        )

    async def _initialize(self) -> Initialized:
        capabilities = self.client.capabilities
        if self.launch.meta:
            capabilities["_meta"] = dict(self.launch.meta)
        params = {
            "protocolVersion": PROTOCOL_VERSION,
            "clientCapabilities": capabilities,
            "clientInfo": {"name": "rollout-orchestrator", "version": _version()},
        }
        initialized: Initialized = await self._request("initialize", params, Initialized)
        if initialized.protocol_version != PROTOCOL_VERSION:
            raise ConnectError(
                f"{self.launch.name} speaks ACP version {initialized.protocol_version}, we speak {PROTOCOL_VERSION}",
                retryable=False,
            )
        if self.launch.authenticate:
            await self._request("authenticate", {"methodId": self.launch.authenticate})
        return initialized

    async def _open(self, capabilities: Mapping[str, Any], auth_methods: Any) -> Opened:
        where = {"cwd": self.launch.cwd, "mcpServers": [dict(server) for server in self.launch.mcp_servers]}
        try:
            if self.launch.load_session:
                return await self._load(capabilities, where)
            opened: Opened = await self._request("session/new", where, Opened)
        except AgentError as error:
            if error.code != AUTH_REQUIRED:
                raise
            methods = ", ".join(_ids(auth_methods)) or "none"
            message = (
                f"{error}. It wants authentication: put a key in the role's env, or one of its methods ({methods})"
            )
            raise ConnectError(f"{message} in `authenticate`", retryable=False) from error
        if not opened.session_id:
            raise ConnectError(f"{self.launch.name} answered session/new without a sessionId")
        return opened

    async def _load(self, capabilities: Mapping[str, Any], where: Mapping[str, Any]) -> Opened:
        if capabilities.get("loadSession") is not True:
            raise ConnectError(f"{self.launch.name} cannot load sessions", retryable=False)
        answer = await self._request("session/load", {**where, "sessionId": self.launch.load_session})
        self.client.recorder.forget()
        return msgspec.convert(_mapping(answer), Opened)

    async def _configure(self, session_id: str, opened: Opened) -> None:
        options = _Options.read(opened.config_options)
        wanted: dict[str, str | bool] = dict(self.launch.config_options)
        if self.launch.mode:
            modes = _ids(_mapping(opened.modes).get("availableModes"))
            if self.launch.mode in modes:
                await self._request("session/set_mode", {"sessionId": session_id, "modeId": self.launch.mode})
            elif options.offers("mode", self.launch.mode):
                wanted = {"mode": self.launch.mode, **wanted}
            else:
                raise self._not_offered("mode", self.launch.mode, modes or options.values("mode"))
        for name, value in wanted.items():
            if not options.known(name):
                raise self._not_offered("configuration option", name, options.names)
            if not options.offers(name, value):
                raise self._not_offered(f"value for {name}", value, options.values(name))
            params = {"sessionId": session_id, **options.setting(name, value)}
            answer = await self._request("session/set_config_option", params)
            options = _Options.read(_mapping(answer).get("configOptions")) or options

    def _not_offered(self, what: str, asked: object, offered: list[str]) -> ConnectError:
        names = ", ".join(offered) or "none"
        return ConnectError(f"{self.launch.name} offers no {what} {asked!r}; it offers: {names}", retryable=False)


@attrs.frozen
class _Options:
    """A session's configuration options as the agent last said them."""

    listed: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def read(cls, value: Any) -> _Options:
        options = value if isinstance(value, list) else []
        return cls(tuple(o for o in options if isinstance(o, dict) and isinstance(o.get("id"), str)))

    def __bool__(self) -> bool:
        return bool(self.listed)

    @property
    def names(self) -> list[str]:
        return [str(option["id"]) for option in self.listed]

    def _named(self, name: str) -> Mapping[str, Any]:
        by_id = [o for o in self.listed if o["id"] == name]
        by_category = [o for o in self.listed if o.get("category") == name]
        return (*by_id, *by_category, {})[0]

    def known(self, name: str) -> bool:
        return bool(self._named(name))

    def setting(self, name: str, value: str | bool) -> dict[str, Any]:
        """What session/set_config_option says; a manifest writes booleans as text."""
        option = self._named(name)
        if option.get("type") == "boolean":
            return {"configId": option["id"], "value": str(value).lower() == "true", "type": "boolean"}
        return {"configId": option["id"], "value": str(value)}

    def values(self, name: str) -> list[str]:
        option = self._named(name)
        if option.get("type") == "boolean":
            return ["true", "false"]
        found: list[str] = []
        for choice in _list(option.get("options")):
            grouped = _list(_mapping(choice).get("options"))
            found += [str(c["value"]) for c in grouped or [choice] if isinstance(c, dict) and "value" in c]
        return found

    def offers(self, name: str, value: str | bool) -> bool:
        """Whether it may be set; an option that lists no values takes any."""
        values = self.values(name)
        return self.known(name) and (not values or str(value) in values or str(value).lower() in values)


def _connect_error(error: AgentError, peer: Peer) -> ConnectError:
    if isinstance(error, AgentLost):
        return ConnectError(str(error), retryable=error.exit_code not in CANNOT_RUN, stderr=error.stderr)
    return ConnectError(f"{error}{peer.last_words()}", stderr=peer.channel.stderr_tail())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rollout-orchestrator")
    except PackageNotFoundError:  # run from a source tree
        return "0"


def _agent(initialized: Initialized, launch: AcpLaunch) -> str:
    info = _mapping(initialized.agent_info)
    return " ".join(str(info[key]) for key in ("name", "version") if info.get(key)) or launch.name


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _ids(value: Any) -> list[str]:
    return [str(item["id"]) for item in _list(value) if isinstance(item, dict) and "id" in item]
