"""One rollout's view of the gateway: its keys, who used what, what may still be used, and its lines of `llm.jsonl`.

Before a call is made it is held against the budgets of tokens and cost that hold for whoever makes it:

- Spent: it is refused, and no provider hears of it.
- Otherwise its output limit is at most what is left, so that nothing is overspent but by what goes in.
- What calls in flight may still write is set aside. A call that would be cut short only by that waits for them.

So what is spent when the last call is over exceeds a budget by no more than the input of the calls that were in flight
when it was reached, which is one call for an agent that makes one at a time (and by 15 tokens, as providers take no
output limit under 16). Only a model of which nobody knows how much it can write (`Upstream.max_output`) can exceed
that, for a client that sets no limit itself: until so much is left, it is expected to write `LONGEST` at most.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Any

import attrs

from orchestrator.budgets import METERED, Budgets, Limit, Limits, limits_of
from orchestrator.gateway.formats import FORMATS, LEAST_OUTPUT, Format
from orchestrator.gateway.llm_log import Interner, redact
from orchestrator.gateway.upstream import Upstream
from states.errors import OrchestratorError
from states.events import Share, Usage

JSON = dict[str, Any]
Sink = Callable[[JSON], None]

LONGEST = 16_384
"""Tokens that a call may write which sets no limit, of a model of which no limit is known."""

REFUSED = "refused"
"""By what way a call went that was not made: none of it counts."""

_AGENTS_OWN = frozenset({400, 413, 422})
"""A provider that answers this has not failed: the agent asked for something that cannot be."""


@attrs.frozen
class Grant:
    """What a key stands for."""

    meter: RolloutMeter
    role: str
    upstream: Upstream


@attrs.define(eq=False)
class Call:
    """A model call on its way; it becomes one line.

    `chunks` are the bytes of a stream as they came. Where LiteLLM makes the call, what it asks of the provider comes
    back through this gateway: those are its `legs`, each a call with this one as `parent`, and usage is read there.
    `turn` is the turn of its role in which it began, `limits` are the budgets that hold for it, `most` is what it may
    write, `lowered` the same where that is less than it asked for. `refused` says why nobody was called.
    """

    grant: Grant
    format: Format
    request: JSON
    number: int
    turn: int = 0
    limits: tuple[Limit, ...] = ()
    most: int = 0
    lowered: int | None = None
    refused: str | None = None
    via: str = "passthrough"
    began: float = attrs.field(factory=time.time)
    clock: float = attrs.field(factory=time.perf_counter)
    status: int = 0
    first_byte_sec: float | None = None
    chunks: list[bytes] = attrs.field(factory=list)
    reply: JSON | None = None
    usage: Usage | None = None
    error: str | None = None
    own_error: OrchestratorError | None = None
    retry_after: str | None = None
    hung_up: bool = False
    parent: Call | None = None
    legs: list[Call] = attrs.field(factory=list)
    tasks: set[asyncio.Task[Any]] = attrs.field(factory=set)

    @property
    def streamed(self) -> bool:
        """Whether the client asked for a stream."""
        return bool(self.request.get("stream"))

    @property
    def failed(self) -> bool:
        """Whether the provider refused it, broke off, or was never reached."""
        return self.error is not None or not 200 <= self.status < 300

    def arrived(self) -> None:
        """The first byte of the answer is here."""
        if self.first_byte_sec is None:
            self.first_byte_sec = time.perf_counter() - self.clock

    def counted(self) -> Usage:
        """What this call adds to the sums. An unknown price makes the sum of costs unknown."""
        if self.refused:
            return Usage()
        if self.usage is None:
            return Usage(1, 1, cost=0.0) if self.failed else Usage(1, cost=None)
        return attrs.evolve(self.usage, calls=1, failed_calls=int(self.failed))


class RolloutMeter:
    """Issues keys for one rollout and counts what is called with them. A `states.ports.Meter`. Made by `Gateway.open`.

    `key` serves a rollout with one role; `key_for(role)` gives each role its own, so that every call is attributed
    by the key that it came with.
    """

    def __init__(
        self,
        rollout_id: str,
        upstream: Upstream,
        sink: Sink,
        *,
        grants: dict[str, Grant],
        drain_sec: float,
        limits: Limits,
    ) -> None:
        self.rollout_id, self.limits = rollout_id, limits
        self._upstream, self._sink, self._grants, self._drain_sec = upstream, sink, grants, drain_sec
        self._keys: dict[tuple[str, Upstream], str] = {}
        self._used: dict[tuple[str, int], Usage] = {}
        self._turns: dict[str, tuple[int, tuple[Limit, ...]]] = {}
        self._admitted: set[Call] = set()
        self._freed = asyncio.Event()
        self._seen = Interner()
        self._number = 0
        self._inflight: set[asyncio.Task[Any]] = set()
        self._last_failure: tuple[int, str] | None = None
        self._sink_error: OrchestratorError | None = None
        self._own_failure: OrchestratorError | None = None

    def __repr__(self) -> str:
        return f"<RolloutMeter of {self.rollout_id}: {self.usage()}>"

    @property
    def key(self) -> str:
        """The key of the rollout itself, for calls of no particular role."""
        return self.key_for("")

    def key_for(self, role: str, upstream: Upstream | None = None) -> str:
        """The key with which `role` calls `upstream` (the rollout's own by default); the same one when asked again."""
        wanted = (role, upstream or self._upstream)
        if wanted not in self._keys:
            key = f"sk-rollout-{secrets.token_urlsafe(32)}"
            self._keys[wanted] = key
            self._grants[key] = Grant(self, *wanted)
        return self._keys[wanted]

    def close(self) -> None:
        """Revoke every key: whoever comes with one gets 401. Idempotent; what is in flight is still counted."""
        for key in self._keys.values():
            self._grants.pop(key, None)
        self._grants = {}  # a key that is asked for from now on opens nothing

    def usage(self, role: str | None = None) -> Usage:
        """What was used so far, by one role or by all; it only grows."""
        return sum((used for (who, _), used in self._used.items() if role in (None, who)), Usage())

    def shares(self) -> tuple[Share, ...]:
        """The same by role and turn."""
        return tuple(Share(role, turn, used) for (role, turn), used in self._used.items())

    def turn_began(self, role: str, turn: int, budgets: Budgets) -> None:
        """From here on calls with this role's key are of this turn, which has budgets of its own."""
        self._turns[role] = turn, limits_of("turn", budgets, str(turn))

    async def settle(self) -> Usage:
        """The usage once every call in flight is counted, or after a little more than the gateway's `drain_sec`."""
        if self._inflight:
            await asyncio.wait(set(self._inflight), timeout=self._drain_sec + 0.5)
        return self.usage()

    @property
    def error(self) -> OrchestratorError | None:
        """What went wrong on our side, if anything.

        A line that could not be written; or, while no call has succeeded since, a LiteLLM that is missing or died.
        """
        return self._sink_error or self._own_failure

    def provider_failure(self) -> str | None:
        """The last thing the provider said when it failed and nothing succeeded since; None otherwise.

        A request that a provider rightly rejects (400, 413, 422) is its failure only if nothing ever succeeded.
        """
        if self._last_failure is None:
            return None
        status, message = self._last_failure
        total = self.usage()
        return message if status not in _AGENTS_OWN or total.calls == total.failed_calls else None

    def hindered(self, error: OrchestratorError) -> None:
        """Something of ours kept calls from coming in: that is our `error`, until a call succeeds again."""
        self._own_failure = error

    # --- for the gateway ---------------------------------------------------------------------------------------

    def began(self, grant: Grant, form: Format, request: JSON) -> Call:
        """A call came in."""
        self._number += 1
        turn, own = self._turns.get(grant.role, (0, ()))
        limits = tuple(limit for limit in (*self.limits.holding(grant.role), *own) if limit.kind in METERED)
        return Call(grant, form, request, self._number, turn, limits)

    async def admit(self, call: Call) -> str | None:
        """Wait until a call may be made, and set aside what it may write; why it is refused, if it is."""
        if not call.limits:
            return None
        call.refused = "its client was gone before it could begin"
        asked = call.format.output_limit(call.request)
        expected = next(each for each in (asked, call.grant.upstream.max_output, LONGEST) if each is not None)
        while True:
            if gone := next(self.limits.gone(call.limits, self.shares()), None):
                call.refused = f"{gone}: no further model call is made. Stop here."
            if gone or call.hung_up:
                return call.refused
            most = min(expected, self._left(call))
            if most <= self._left(call, self._admitted):
                break
            await self._freed.wait()
        call.refused, call.most = None, expected
        if most < expected:
            call.most = call.lowered = max(LEAST_OUTPUT, int(most))
        self._admitted.add(call)
        return None

    def _left(self, call: Call, others: Iterable[Call] = ()) -> float:
        """How many tokens a call may write until one of its budgets is spent, if `others` write all they may."""
        shares, left = self.shares(), math.inf
        for limit in call.limits:
            spent = self.limits.amount(limit, shares) or 0.0
            spent += sum(other.most * _each(other, limit) for other in others if limit in other.limits)
            if each := _each(call, limit):
                left = min(left, (limit.limit - spent) // each)
        return left

    def track(self, task: asyncio.Task[Any]) -> None:
        """`settle` waits for this task."""
        self._inflight.add(task)
        task.add_done_callback(self._inflight.discard)

    def forget(self, task: asyncio.Task[Any]) -> None:
        """`settle` waits for this task no longer."""
        self._inflight.discard(task)

    def ended(self, call: Call) -> None:
        """Count a call and write its line. A sink that fails is remembered in `error`: the agent's call is answered."""
        if call.legs:
            call.usage = _sum(leg.usage for leg in call.legs)
        self._admitted.discard(call)
        account, price = (call.grant.role, call.turn), call.grant.upstream.prices
        if call.usage is not None and price:
            call.usage = attrs.evolve(call.usage, cost=price.cost(call.usage))
        if not call.refused:
            self._used[account] = self._used.get(account, Usage()) + call.counted()
        self._freed.set()
        self._freed = asyncio.Event()
        call.error = redact(call.error, [*self._keys.values(), *call.grant.upstream.secrets])
        if not call.refused:  # nobody was called, so nobody failed
            self._judge(call)
        try:
            self._sink(self._line(call))
        except OrchestratorError as error:
            self._sink_error = self._sink_error or error
        except Exception as error:
            wrapped = OrchestratorError(f"a line of llm.jsonl of {self.rollout_id} could not be written: {error}")
            wrapped.__cause__ = error
            self._sink_error = self._sink_error or wrapped

    def restored(self, lines: Iterable[JSON]) -> None:
        """Go on where an earlier process of the rollout stopped: by the lines of `llm.jsonl` that it had written."""
        for line in lines:
            grant = Grant(self, line["role"], self._upstream)
            call = Call(grant, FORMATS[line["api"]], {}, line["call"], turn=line.get("turn", 0))
            call.status, call.error, call.hung_up = line["status"], line["error"], line["hung_up"]
            call.usage = Usage(**line["usage"]) if line["usage"] else None
            self._number = call.number
            if line["via"] != REFUSED:
                account = grant.role, call.turn
                self._used[account] = self._used.get(account, Usage()) + call.counted()
                self._judge(call)

    def _judge(self, call: Call) -> None:
        """Remember who failed; a call that succeeds makes up for those before it."""
        if call.own_error:
            self._own_failure = call.own_error
        elif call.failed and call.hung_up:
            pass  # its client went away, as it does when its turn is cancelled: that says nothing of the provider
        elif call.failed:
            answered = f"HTTP {call.status}" if call.status else "no answer"
            self._last_failure = call.status, f"{answered} from {call.grant.upstream.model}: {call.error}"
        else:
            self._last_failure = None
            if not call.hung_up:  # else nobody heard the answer: what kept it from its agent is still to be said
                self._own_failure = None

    def _line(self, call: Call) -> JSON:
        secret = [*self._keys.values(), *call.grant.upstream.secrets]
        keys, used = call.format.interned, call.usage
        said = redact({"request": call.request, "response": call.reply}, secret)
        return {
            "call": call.number,
            "role": call.grant.role,
            "turn": call.turn,
            "time": call.began,
            "latency_sec": round(time.perf_counter() - call.clock, 6),
            "first_byte_sec": call.first_byte_sec and round(call.first_byte_sec, 6),
            "api": call.format.api,
            "via": REFUSED if call.refused else call.via,
            "model": said["request"].get("model"),
            "upstream_model": call.grant.upstream.model,
            "streamed": call.streamed,
            "lowered_to": call.lowered,
            "hung_up": call.hung_up,
            "status": call.status,
            "usage": used and attrs.asdict(used, filter=lambda a, _: a.name not in {"calls", "failed_calls"}),
            "error": call.error,
            "request": self._seen.compact(said["request"], keys),
            "response": said["response"] and self._seen.compact(said["response"], keys),
        }


def _each(call: Call, limit: Limit) -> float:
    """What one more token of output takes of a budget."""
    if limit.kind == "tokens":
        return 1.0
    prices = call.grant.upstream.prices
    return prices.dearest_output if prices else 0.0


def _sum(usages: Iterable[Usage | None]) -> Usage | None:
    known = [usage for usage in usages if usage is not None]
    return sum(known[1:], known[0]) if known else None
