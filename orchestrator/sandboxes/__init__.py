"""Sandboxes: where a rollout runs. `make_sandbox` makes the one that a config names.

A kind that ships is a module of this package, named as the kind is, imported only when it is asked for:

    OPTIONS: Mapping[str, str]                      its options, each with a sentence (`RolloutConfig.sandbox_options`)
    NETWORKS                                        which of `Network` it can give; all, where it says nothing
    make(spec: SandboxSpec) -> Sandbox              starts nothing; raises `ConfigError`
    async reap(handle: Mapping[str, Any]) -> None   gives back what `Sandbox.start` returned, or would have; idempotent
    async sweep(options) -> tuple[str, ...]         gives back what dead orchestrators left, and no more: sentences,
                                                    or an error, once all were seen to
    async def reopen(handle) -> Sandbox             of one that was kept: up for a look inside, then `leave`
    LACKS: frozenset[str]                           needs of conformance clauses that it cannot meet, by design

A sandbox that is brought along may have `exec`, `upload` and `download` only: `exec_only` makes the rest.

`handle["kind"]` says whose `reap` it is. A sandbox of a user's own is `module:Class`, or anything that can be called
with a `SandboxSpec`; its `reap`, an attribute of it, is called where there is one.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

import attrs

from orchestrator._words import shown
from states.errors import ConfigError, MissingExtra, SandboxError
from states.ports import ExecSandbox, Sandbox

Network = Literal["gateway-only", "bridge", "host", "none"]
Reaper = Callable[[Mapping[str, Any]], Awaitable[None]]

KINDS: Mapping[str, str] = {"local": "", "docker": "docker", "daytona": "daytona-sdk", "fake": ""}
"""The kinds that ship, and the extra of ours that each needs."""


def _unheard(_text: str) -> None:
    """Nobody listens."""


@attrs.frozen
class SandboxSpec:
    """What a sandbox is made from. A `module:Class` or a callable of a user's own gets this as its one argument.

    Attributes:
        sandbox: What the config named.
        name: Chosen for it, and journaled before anything exists.
        cwd: Where tasks work.
        gateway_port: Where the model gateway listens on the host's loopback; None when nothing is metered.
        gateway_socket: The unix socket on which it listens, too.
        network: What it may reach.
        cpus: Limits; None was not asked for. The same for `memory_mb`, `storage_mb`, `pids`, `gpus`.
        image: A prebuilt image.
        build: A folder with a `Dockerfile`, to be built where there is no `image`.
        image_map: Images that stand for others, which cannot be had here: the `FROM` of a Dockerfile, or `image`.
        labels: What is written on it, so that a reaper finds it: rollout, owner's host, pid and start.
        ttl_sec: How long it may live at most, whatever happens to us.
        binds: Host folders that agents need, to be visible read-only at their own paths.
        options: Words of its kind, checked against the `OPTIONS` of that kind.
        note: Says something worth knowing (an image that was built, a limit that cannot be kept) in the journal.
        lost: Says why the sandbox is gone, when it goes by itself: the rollout fails, and does not wait for an agent.
    """

    sandbox: str | Sandbox | ExecSandbox | Callable[..., Sandbox]
    name: str
    cwd: str = "/app"
    gateway_port: int | None = None
    gateway_socket: Path | None = None
    network: Network = "gateway-only"
    cpus: float | None = None
    memory_mb: int | None = None
    storage_mb: int | None = None
    pids: int | None = None
    gpus: int | None = None
    image: str | None = None
    build: Path | None = None
    image_map: Mapping[str, str] = attrs.field(factory=dict)
    labels: Mapping[str, str] = attrs.field(factory=dict)
    ttl_sec: float | None = None
    binds: tuple[str, ...] = ()
    options: Mapping[str, str] = attrs.field(factory=dict)
    note: Callable[[str], None] = _unheard
    lost: Callable[[str], None] = _unheard

    def __repr__(self) -> str:
        """Short, since it stands in messages: what was asked for, without what every rollout gets.

        >>> SandboxSpec("docker", "rollout-1", image="debian", options={"user": "root"}, labels={"rollout": "1"})
        <SandboxSpec rollout-1: docker, image='debian', options={'user': 'root'}>
        """
        fields = attrs.fields_dict(type(self))
        asked = {name: getattr(self, name) for name in _ASKED if getattr(self, name) != fields[name].default}
        settings = [f"{name}={value!r:.60}" for name, value in asked.items() if value not in (None, {}, ())]
        kind = self.sandbox if isinstance(self.sandbox, str) else shown(self.sandbox)
        return f"<SandboxSpec {', '.join([f'{self.name}: {kind}', *settings])}>"


_ASKED = ("cwd", "network", "cpus", "memory_mb", "storage_mb", "pids", "gpus", "image", "image_map", "options")
"""What of a spec is worth showing."""


def check_sandbox(
    wanted: str | Sandbox | ExecSandbox | Callable[..., Sandbox],
    options: Mapping[str, str],
    network: Network = "gateway-only",
) -> None:
    """Raise `ConfigError` when a config names a sandbox, an option or a network of one, that there is not."""
    if isinstance(wanted, str) and ":" in wanted:
        _check_factory(_imported(wanted), f"sandbox {wanted!r} is")
    elif isinstance(wanted, str):
        kind = _kind(wanted)
        known, networks = kind.OPTIONS, getattr(kind, "NETWORKS", get_args(Network))
        if network not in networks:
            raise ConfigError(f"network of a {wanted} sandbox is {', '.join(networks)}, not {network!r}")
        if unknown := sorted(set(options) - set(known)):
            has = ", ".join(known) or "none"
            raise ConfigError(f"sandbox {wanted} has no option {unknown[0]!r}; it has {has}")
    elif _is_factory(wanted):
        _check_factory(wanted, "RolloutConfig: sandbox is")
    else:
        _check_brought(wanted, "RolloutConfig: sandbox")
        if options:
            raise ConfigError("sandbox_options are for a sandbox that is made here, not for one that is brought")


def check_made(spec: SandboxSpec) -> None:
    """Raise `ConfigError` where a kind that ships knows, without asking anybody, that what is asked for cannot be.

    What a user brings is not made for a trial: we do not know what that would do.
    """
    if isinstance(spec.sandbox, str) and spec.sandbox in KINDS:
        _kind(spec.sandbox).make(spec)


def make_sandbox(spec: SandboxSpec) -> Sandbox:
    """The sandbox that `spec` asks for; nothing is started. Raises `ConfigError` for a name that means nothing."""
    wanted: Any = spec.sandbox
    if isinstance(wanted, str):
        wanted = (_imported(wanted) if ":" in wanted else _kind(wanted).make)(spec)
    elif _is_factory(wanted):
        wanted = wanted(spec)
    _check_brought(wanted, f"what {shown(spec.sandbox)} made")
    if _is_exec_only(wanted):
        from orchestrator.sandboxes.exec_only import ExecOnlySandbox

        wanted = ExecOnlySandbox(wanted, name=spec.name, cwd=getattr(wanted, "cwd", spec.cwd), binds=spec.binds)
    return cast(Sandbox, wanted)


def reaper(kind: str) -> Reaper:
    """What gives back a sandbox of this kind whose orchestrator is dead. Raises `SandboxError` when nobody knows."""
    if kind in KINDS:
        return cast(Reaper, _kind(kind).reap)
    reap = getattr(_imported(kind), "reap", None) if ":" in kind else None
    if reap is None:
        raise SandboxError(f"nobody knows how to reap a sandbox of the kind {kind!r}")
    return cast(Reaper, reap)


def lacks(wanted: str) -> frozenset[str]:
    """What a sandbox cannot do by design, in the words of `Clause.needs`: `LACKS` of its module or class."""
    part = _imported(wanted) if ":" in wanted else _kind(wanted)
    return frozenset(getattr(part, "LACKS", ()))


async def reopen(handle: Mapping[str, Any]) -> Sandbox:
    """A sandbox that was kept, up again from what its `start` returned, for a look inside; `leave` it then.

    Raises `ConfigError` for a kind that keeps none, `SandboxError` when it is gone.
    """
    kind = handle.get("kind", "")
    reopen = getattr(_kind(kind), "reopen", None) if kind in KINDS else None
    if reopen is None:
        raise ConfigError(f"a sandbox of the kind {kind!r} cannot be looked into from here")
    return cast(Sandbox, await reopen(handle))


async def sweep(kind: str, options: Mapping[str, str]) -> tuple[str, ...]:
    """Give back every sandbox of this kind that a dead orchestrator of this machine left: a sentence each.

    What was kept is left alone. Raises `SandboxError`, once all were seen to, for those that cannot be given back.
    """
    check_sandbox(kind, options)
    return cast(tuple[str, ...], await _kind(kind).sweep(options))


_EXEC_ONLY = ("start", "exec", "upload", "download")
_WHOLE = ("start", "stop", "handle", "upload", "download", "name", "cwd", "gateway_url", "has_environment")


def _check_brought(made: object, what: str) -> None:
    """Raise `ConfigError` for an object that is no sandbox; says what it lacks. No property of it is read."""
    whole = callable(getattr(made, "handle", None))
    lacks = [
        name for name in (_WHOLE if whole else _EXEC_ONLY) if not (hasattr(type(made), name) or hasattr(made, name))
    ]
    if lacks:
        needs = "a Sandbox" if whole else "a kind, module:Class, or an object with start, exec, upload and download"
        raise ConfigError(f"{what} must be {needs}; {shown(made)} lacks {', '.join(lacks)}")


def _check_factory(wanted: Any, what: str) -> None:
    """Raise `ConfigError` for a class, or a function, that cannot be called with a `SandboxSpec`."""
    try:
        signature = inspect.signature(wanted)
    except (TypeError, ValueError):  # builtins have none
        return
    try:
        signature.bind(None)
    except TypeError as error:
        brought = what.startswith("RolloutConfig") and isinstance(wanted, type)
        hint = f"; or give an object, {wanted.__name__}(...)" if brought else ""
        raise ConfigError(
            f"{what} {shown(wanted)}, which cannot be called with one SandboxSpec ({error}){hint}"
        ) from error


def _is_factory(wanted: object) -> bool:
    return callable(wanted) and (isinstance(wanted, type) or not hasattr(wanted, "start"))


def _is_exec_only(made: object) -> bool:
    """Whether it is an `ExecSandbox`: it can exec by itself, and has no handles."""
    able = all(callable(getattr(made, name, None)) for name in _EXEC_ONLY)
    return able and not callable(getattr(made, "handle", None))


def _kind(name: str) -> Any:
    """The module of a kind that ships."""
    if name not in KINDS:
        raise ConfigError(f"sandbox {name!r} is not known; give {', '.join(KINDS)}, or module:Class")
    try:
        return importlib.import_module(f"orchestrator.sandboxes.{name}")
    except ImportError as error:
        if not KINDS[name]:
            raise
        raise MissingExtra(f"sandbox {name}: {error}; pip install 'rollout-orchestrator[{KINDS[name]}]'") from error


def _imported(name: str) -> Callable[[SandboxSpec], Sandbox]:
    module, _, attribute = name.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"sandbox {name!r} cannot be imported: {error}") from error
    if not callable(made):
        raise ConfigError(f"sandbox {name!r} is a {type(made).__name__}, which cannot be called")
    return cast(Callable[[SandboxSpec], Sandbox], made)
