"""Leases: what a rollout holds and must give back, journaled before it is taken and after it is returned.

A lease is intended under a name that we choose, held with whatever finds it again, and open until it is returned. What
is still open when a rollout closes is leaked: a reaper finds it in the journal, also after `kill -9`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import attrs

from states.errors import ConfigError
from states.journal import LeaseRecord
from states.ports import Lease

GiveBack = Callable[[Lease], Awaitable[tuple[str, ...]]]
"""Gives a lease back, whether it was only intended, held, or is gone already; returns the evidence."""


@attrs.define(eq=False)
class JournaledLeases:
    """`states.ports.Leases` over a journal, given back by `way`."""

    _write: Callable[[Callable[[int, float], LeaseRecord]], None]
    _way: GiveBack
    _open: dict[tuple[str, str], Lease] = attrs.field(factory=dict)

    def intend(self, kind: str, name: str) -> None:
        """We are about to take it."""
        self._record("intended", Lease(kind, name))  # type: ignore[arg-type]

    def hold(self, kind: str, name: str, handle: Mapping[str, Any]) -> None:
        """We have it; `handle` finds it again."""
        self._record("held", Lease(kind, name, dict(handle)))  # type: ignore[arg-type]

    def returned(self, kind: str, name: str) -> None:
        """It was given back. Said again, nothing happens."""
        if (kind, name) in self._open:
            self._record("returned", Lease(kind, name))  # type: ignore[arg-type]

    def _record(self, action: Any, lease: Lease) -> None:
        self._write(lambda seq, time: LeaseRecord(seq, time, action, lease))
        key = (lease.kind, lease.name)
        if action == "returned":
            self._open.pop(key, None)
        else:
            self._open[key] = lease

    def open(self, kind: str | None = None) -> tuple[Lease, ...]:
        """What is not returned yet, oldest first."""
        return tuple(lease for lease in self._open.values() if kind in (None, lease.kind))

    async def give_back(self, lease: Lease) -> tuple[str, ...]:
        """Give it back and journal that; raises what went wrong, and then it stays open."""
        evidence = await self._way(lease)
        self.returned(lease.kind, lease.name)
        return evidence

    def close(self) -> None:
        """The rollout is closed: let go of who gave back, so that it is freed without waiting for a collector."""
        self._way = _closed


async def _closed(lease: Lease) -> tuple[str, ...]:
    raise ConfigError(f"{lease.kind} {lease.name} is for `rollout reap` to give back: its rollout is closed")
