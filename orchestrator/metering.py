"""Whether model calls are counted: decided before a sandbox exists, with the reason where they are not."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from orchestrator.budgets import METERED, Budgets, Limits
from orchestrator.config import Role, RolloutConfig
from orchestrator.registry import AgentConfig
from orchestrator.sandboxes import KINDS
from states.errors import ConfigError, SandboxError
from states.events import Share, Usage
from states.ports import Leases, Sandbox


@attrs.frozen
class Cast:
    """A role with its agent resolved and its limits filled in: what `states.ports.Role` is here."""

    role: Role
    agent: AgentConfig
    upstream: Any
    env: Mapping[str, str] = attrs.field(repr=False)
    turn_sec: float
    idle_sec: float | None

    @property
    def name(self) -> str:
        """Its name in the scene."""
        return self.role.name

    @property
    def model(self) -> str:
        """The name under which the agent asks for its model."""
        return self.upstream.model if self.upstream is not None else self.role.model


@attrs.frozen
class Metering:
    """`tracked`: each call of each role that calls a model is seen at the gateway; otherwise `reason` says why not."""

    tracked: bool
    reason: str = ""


@attrs.define(eq=False)
class NoMeter:
    """Nothing is counted and nothing is concluded from that. A `states.ports.Meter`."""

    def usage(self) -> Usage:
        """Nothing."""
        return Usage()

    def shares(self) -> tuple[Share, ...]:
        """Nothing."""
        return ()

    def turn_began(self, role: str, turn: int, budgets: Budgets) -> None:
        """Nothing changes."""

    async def settle(self) -> Usage:
        """Nothing."""
        return Usage()

    @property
    def error(self) -> Exception | None:
        """Nothing can go wrong."""
        return None

    def provider_failure(self) -> str | None:
        """Nothing is known of the provider."""
        return None


def decide(config: RolloutConfig, cast: Sequence[Cast], limits: Limits) -> Metering:
    """Apply `usage_tracking` to this cast.

    Raises `ConfigError` when it is required and cannot be had, for a budget that nobody could keep, and for an agent
    whose model is out of its reach whether that is counted or not.
    """
    _check_network(config, cast)
    why = "usage_tracking is off" if config.usage_tracking == "off" else _why_not(config, cast)
    _check_budgets(config, cast, limits, why)
    if why and config.usage_tracking == "required":
        raise ConfigError(f"usage_tracking is required, but {why}")
    return Metering(not why, why)


def _check_network(config: RolloutConfig, cast: Sequence[Cast]) -> None:
    """A sandbox that we make without a network leaves an agent in it no model. What a user's own does is its affair."""
    if config.network != "none" or not (isinstance(config.sandbox, str) and config.sandbox in KINDS):
        return
    for member in cast:
        if member.agent.calls_model and member.agent.calls_from == "sandbox":
            raise ConfigError(
                f"agent {member.agent.name} calls its model from the sandbox, which network none leaves without any: "
                "say network gateway-only (--network gateway-only), which lets it reach its model and nothing else"
            )


def _check_budgets(config: RolloutConfig, cast: Sequence[Cast], limits: Limits, why: str) -> None:
    turns = config.the_scene().turns
    kinds = {limit.kind for limit in limits.all()}.union(*(turn.budgets.given() for turn in turns))
    if why and kinds & METERED:
        raise ConfigError(f"budgets of tokens and cost are kept by the gateway, but {why}")
    for member in cast:
        own = (turn.budgets.given() for turn in turns if turn.role == member.name)
        kinds = {limit.kind for limit in limits.holding(member.name)}.union(*own)
        if "cost" in kinds and member.upstream is not None and member.upstream.prices is None:
            raise ConfigError(
                f"a budget of cost needs the price of {member.upstream.model}, which is not known: bring an "
                "Upstream with prices=Prices(input=..., output=...), or set a budget of tokens"
            )


def _why_not(config: RolloutConfig, cast: Sequence[Cast]) -> str:
    callers = [member for member in cast if member.agent.calls_model]
    if not callers:
        return "no role calls a model"
    for member in callers:
        agent = member.agent
        if not agent.metered:
            return f"agent {agent.name} cannot be pointed at a gateway (its manifest names no api)"
        if config.network == "none" and agent.calls_from == "sandbox":
            return f"agent {agent.name} calls its model from a sandbox that has no network"
        if agent.calls_from == "sandbox" and (why := _out_of_reach(config)):
            return f"agent {agent.name} calls its model from a sandbox that cannot reach the gateway: {why}"
    return ""


def _out_of_reach(config: RolloutConfig) -> str:
    """Why a sandbox of this config does not reach the gateway, as far as that is known before it is made.

    Raises `ConfigError` when what was asked for can never be.
    """
    reach, sandbox = config.gateway_reach, config.sandbox
    if reach == "none":
        return "gateway_reach is none"
    if sandbox == "local" and config.network == "gateway-only":
        if reach != "auto":
            raise ConfigError(
                f"gateway_reach {reach}: in a local sandbox with network gateway-only each role has a loopback "
                "interface of its own, on which it finds the gateway by itself: leave it at auto"
            )
        shared = config.gateway is None or config.gateway.socket_path is not None
        return "" if shared else "the gateway that is brought has no socket_path"
    if isinstance(sandbox, str | type) or "://" in reach:
        return ""
    by_itself = reach == "auto" and getattr(sandbox, "gateway_url", None) is not None
    return "" if by_itself else why_no_relay(sandbox)


def why_no_relay(sandbox: Any) -> str:
    """Why no relay can serve this sandbox; empty when one can."""
    if getattr(sandbox, "shared_loopback", True):
        return ""
    return "each of its roles has a loopback interface of its own"


def upstream_for(config: RolloutConfig, role: Role, agent: AgentConfig) -> Any:
    """Where this role's model is called; None for a role that calls none, or when nobody said and nothing is metered.

    With `usage_tracking` off it is called directly, so it has to speak the agent's own wire format.
    """
    direct = config.usage_tracking == "off"
    if not agent.calls_model or not agent.metered or (direct and config.upstream is None):
        return None
    if config.upstream is None and not role.model:
        raise ConfigError(f"agent {agent.name} calls a model: give model, for example openai/gpt-5")
    from orchestrator.gateway.upstream import Upstream

    brought = config.upstream(role.model) if callable(config.upstream) else config.upstream
    upstream: Upstream = brought or Upstream.for_model(role.model, os.environ)
    if direct:
        upstream.check_direct(agent.api)
    else:
        upstream.check(agent.api)
    return upstream


SOCKET_FOLDER = "rollout-gateway-"
SOCKET = "gateway.sock"


def remove_socket(handle: Mapping[str, Any]) -> None:
    """Remove what a gateway of a dead process left: its socket, and the folder that held nothing else. Idempotent."""
    socket = Path(str(handle.get("socket", "")))
    if socket.name == SOCKET and socket.parent.name.startswith(SOCKET_FOLDER):
        socket.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # gone, or somebody else's things are in it
            socket.parent.rmdir()


@attrs.define(eq=False)
class ModelAccess:
    """One rollout's way to its models: a key at a gateway, which counts what is called with it.

    The gateway is the config's, shared with other rollouts; without one, one is started here and stopped on `close`.
    """

    _rollout: str
    _metering: Metering
    _config: RolloutConfig
    _sink: Callable[[dict[str, Any]], None]
    _limits: Limits = Limits()
    leases: Leases | None = None
    before: Callable[[], Iterable[dict[str, Any]]] = tuple
    """The lines of `llm.jsonl` that an earlier process had written."""
    _own: list[Any] = attrs.field(factory=list, init=False)
    _relays: list[Any] = attrs.field(factory=list, init=False)
    _folder: list[Path] = attrs.field(factory=list, init=False)
    _meters: list[Any] = attrs.field(factory=list, init=False)

    async def open(self, cast: Sequence[Cast]) -> None:
        """Get a key, starting a gateway where none was brought. Raises `ConfigError` off asyncio."""
        from orchestrator.gateway.server import Gateway

        if self._config.gateway is None:
            self._folder.append(Path(tempfile.mkdtemp(prefix=SOCKET_FOLDER)))
            socket = self._folder[0] / SOCKET
            if self.leases is not None:
                self.leases.hold("gateway-key", self._rollout, {"socket": str(socket)})
            gateway = Gateway(socket_path=socket, port=self._config.gateway_port, leases=self.leases)
            self._own.append(gateway)
            await gateway.start()
        upstream = next(member.upstream for member in cast if member.upstream is not None)
        meter = self.gateway.open(self._rollout, upstream=upstream, sink=self._sink, limits=self._limits)
        meter.restored(self.before())
        self._meters.append(meter)

    @property
    def gateway(self) -> Any:
        """The gateway in use; None when nothing is metered."""
        if not self._metering.tracked:
            return None
        return self._config.gateway if self._config.gateway is not None else self._own[0]

    @property
    def meter(self) -> Any:
        """The rollout's meter; one that knows nothing when nothing is metered, or not yet."""
        return self._meters[0] if self._meters else NoMeter()

    def used_by(self, role: str) -> Usage:
        """What was counted with the key of this role; nothing where nothing is metered."""
        return sum((meter.usage(role) for meter in self._meters), Usage())

    def key_for(self, member: Cast) -> str | None:
        """The key with which this role calls its model; None when it has none."""
        if not self._meters or member.upstream is None:
            return None
        key: str = self._meters[0].key_for(member.name, member.upstream)
        return key

    async def reach_from(self, sandbox: Sandbox, note: Callable[[str], None]) -> None:
        """Bring the gateway within reach of a sandbox that is up: start a relay where it needs one.

        Raises `SandboxError` when none starts. `note` is told when it ends before its time.
        """
        from orchestrator.gateway.relay_host import GatewayRelay

        reach = self._config.gateway_reach
        if reach != "relay" and (reach != "auto" or sandbox.gateway_url is not None):
            return
        if why := why_no_relay(sandbox):
            raise SandboxError(f"no relay to the model gateway can serve sandbox {sandbox.name}: {why}")
        self._relays.append(GatewayRelay(sandbox, self.gateway.port, note=note, hindered=self.meter.hindered))
        await self._relays[0].start()

    def url_from(self, sandbox: Sandbox) -> str | None:
        """The gateway as this sandbox sees it, without `/v1`; None where it does not."""
        reach = self._config.gateway_reach
        if "://" in reach:
            return reach.rstrip("/") if self._metering.tracked else None
        if reach == "none":
            return None
        url: str | None = self._relays[0].url if self._relays else sandbox.gateway_url
        return url

    async def leave(self) -> None:
        """End what runs in the sandbox for us. Idempotent."""
        while self._relays:
            await self._relays.pop().stop()

    async def close(self) -> None:
        """Revoke the key, and stop the gateway if it is ours. Idempotent."""
        for meter in self._meters:
            meter.close()
        try:
            await self.leave()
        finally:
            while self._own:
                await self._own.pop().stop()
            while self._folder:
                shutil.rmtree(self._folder.pop(), ignore_errors=True)
