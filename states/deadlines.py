"""One table of deadlines: how long each state may take, and which event fires when it takes longer.

Deadlines are the kernel's safety nets, decided by its own clock; the other budgets of a turn (silence, tokens, cost,
tool calls) are policy of the `executing` handler. The same event fires, with the error in it, when a handler raises;
only a crash of `executing` is `Failed` instead, as no deadline has passed. States that score and tear down always get
their full time; the others are also bounded by what is left of the rollout.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping

import attrs

from states import events as ev
from states.errors import Owner
from states.events import Event, Failure, Scope
from states.machine import CAPTURING, SESSION

DAY = 24 * 3600.0

DEADLINES: Mapping[str, float] = types.MappingProxyType(
    {
        "provisioning": 600.0,
        "disconnected": 300.0,
        "connecting": 360.0,
        **dict.fromkeys(SESSION, 300.0),
        "executing": 900.0,
        "paused": DAY,
        "checking": 600.0,
        "cancelling": 10.0,
        **dict.fromkeys(CAPTURING, 30.0),
        "quiescing": 30.0,
        "verifying": 600.0,
        "releasing": 120.0,
    }
)
"""Seconds a state may take, unless the rollout's configuration says otherwise."""


@attrs.frozen
class Deadline:
    """How long a state may take from now, and whose limit that is."""

    seconds: float
    scope: Scope = "turn"


BOUNDED_BY_ROLLOUT = frozenset({"provisioning", "connecting", "executing", "checking"})
"""States whose deadline is at most what is left of the rollout. `disconnected` and the session states read the
remaining time themselves and end the plan; `paused` stops the rollout's clock."""

OWNERS: Mapping[str, Owner] = types.MappingProxyType(
    {
        **dict.fromkeys(DEADLINES, "harness"),
        "provisioning": "sandbox",
        "connecting": "agent",
        "paused": "operator",
        "cancelling": "agent",
        "checking": "verifier",
        "verifying": "verifier",
    }
)
"""Whose fault it is when a state takes longer than that."""

EXPIRY: Mapping[str, Callable[[Failure, Deadline], Event]] = types.MappingProxyType(
    {
        "provisioning": lambda failure, _: ev.SandboxFailed(failure),
        "disconnected": lambda failure, _: ev.Failed(failure),
        "connecting": lambda failure, _: ev.ConnectFailed(failure),
        **dict.fromkeys(SESSION, lambda failure, _: ev.Failed(failure)),
        "executing": lambda _, passed: ev.DeadlinePassed(passed.seconds, passed.scope),
        "paused": lambda failure, _: ev.Failed(failure),
        "checking": lambda failure, _: ev.Checked(None, failure),
        "cancelling": lambda failure, passed: ev.Unresponsive(passed.seconds, failure),
        **dict.fromkeys(CAPTURING, lambda *_: ev.Captured(complete=False, truncated=True)),
        "quiescing": lambda failure, _: ev.Unquiet(failure),
        "verifying": lambda failure, _: ev.VerifierFailed(failure),
        "releasing": lambda *_: ev.Released(leaked=("unknown: releasing did not finish",)),
    }
)
"""What fires when a state outlasts its deadline."""


def crashed(state: str, failure: Failure, deadline: Deadline) -> Event:
    """What fires when the handler of `state` raises."""
    return ev.Failed(failure) if state == "executing" else EXPIRY[state](failure, deadline)
