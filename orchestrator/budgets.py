"""Budgets: what a rollout, its scene, a role and a turn may spend, and how much of it is gone.

A `Budgets` says how much of each kind; each that is set is one `Limit` of somebody's. How much was spent is a fold of
the journal's shares (`states.events.Share`: who spent what, by role and turn), brought up to date by the gateway's
meter. No counter is kept anywhere else.

>>> limits = Limits(rollout=Budgets(tokens=1000), roles={"coder": Budgets(turns=1)})
>>> shares = [Share("coder", 1, Usage(calls=1, input_tokens=700)), Share("user", 0, Usage(calls=1, input_tokens=300))]
>>> [str(spent) for spent in limits.gone(limits.holding("coder"), shares)]
["the rollout's budget of 1,000 tokens is spent (1,000)", "coder's budget of 1 turn is spent (1)"]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import attrs

from states.errors import ConfigError
from states.events import BudgetSpent, Scope, Share, Usage

Kind = Literal["tokens", "cost", "tool_calls", "turns", "wall_sec", "idle_sec"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WHOLE: frozenset[str] = frozenset({"tokens", "tool_calls", "turns"})
"""Kinds that are counted, not measured."""
METERED: frozenset[str] = frozenset({"tokens", "cost"})
"""Kinds that only the gateway can keep."""


def _positive(instance: Any, attribute: Any, value: Any) -> None:
    whole = attribute.name in WHOLE
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < math.inf):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{type(instance).__name__}: {attribute.name} must be {kind} > 0 or None, not {value!r}")


def _kind() -> Any:
    return attrs.field(default=None, validator=_positive)


@attrs.frozen(repr=False)
class Budgets:
    """How much may be spent, of each kind; None means no such limit.

    `tokens` are input and output tokens, `cost` is US dollars: both are metered, so they need the gateway, and `cost`
    needs a known price. `turns` are prompts. `wall_sec` is seconds: of a rollout all of them up to verification, of
    a scene or a role those of its turns. `idle_sec` is the longest silence in a turn: silences are not added up.

    Raises:
        ConfigError: a limit is no number, or not above 0.
    """

    tokens: int | None = _kind()
    cost: float | None = _kind()
    tool_calls: int | None = _kind()
    turns: int | None = _kind()
    wall_sec: float | None = _kind()
    idle_sec: float | None = _kind()

    def __repr__(self) -> str:
        return f"Budgets({', '.join(f'{kind}={limit!r}' for kind, limit in self.given().items())})"

    def given(self) -> dict[str, float]:
        """Those that are set, by kind."""
        return {kind: limit for kind in KINDS if (limit := getattr(self, kind)) is not None}

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Budgets:
        """The opposite of `given`; a journal holds it so. Raises `ConfigError` for a kind that there is not."""
        known: dict[str, Any] = {}
        for kind, limit in given.items():
            if kind not in KINDS:
                import difflib

                near = difflib.get_close_matches(str(kind), KINDS, 1, cutoff=0.6)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KINDS)}"
                raise ConfigError(f"no budget is called {kind!r}; {hint}")
            counted = kind in WHOLE and isinstance(limit, float) and limit.is_integer()  # as JSON may have it
            known[kind] = int(limit) if counted else limit
        return cls(**known)


_UNITS: Mapping[str, str] = {
    "tokens": "{:,.12g} tokens", "cost": "${:.12g}", "tool_calls": "{:,.12g} tool calls", "turns": "{:,.12g} turns",
    "wall_sec": "{:,.12g} s", "idle_sec": "{:,.12g} s of silence",
}  # fmt: skip


@attrs.frozen
class Limit:
    """One budget of somebody's. `of` names the role, or the turn by its number; it is empty for scene and rollout."""

    scope: Scope
    kind: str
    limit: float
    of: str = ""

    def __str__(self) -> str:
        whose = {"turn": f"turn {self.of}'s", "role": f"{self.of}'s"}.get(self.scope, f"the {self.scope}'s")
        unit = _UNITS[self.kind].format(self.limit)
        return f"{whose} budget of {unit.removesuffix('s') if self.limit == 1 and self.kind in WHOLE else unit}"


@attrs.frozen
class Gone:
    """A budget that is spent, and how much was."""

    limit: Limit
    spent: float

    def __str__(self) -> str:
        return f"{self.limit} is spent ({round(self.spent, 6):,.12g})"

    def event(self) -> BudgetSpent:
        """The same as what happened."""
        return BudgetSpent(self.limit.scope, self.limit.kind, self.limit.limit, self.spent)


def limits_of(scope: Scope, budgets: Budgets, of: str = "") -> tuple[Limit, ...]:
    """The limits that these budgets are, when they are those of `scope`."""
    return tuple(Limit(scope, kind, limit, of) for kind, limit in budgets.given().items())


@attrs.frozen
class Limits:
    """Every budget that outlives a turn. `roles` names all roles of the scene, those without budgets too.

    A director that is an agent takes no turns in the scene: it spends of the rollout's budgets and its own.
    """

    rollout: Budgets = Budgets()
    scene: Budgets = Budgets()
    roles: Mapping[str, Budgets] = attrs.field(factory=dict)
    directors: Mapping[str, Budgets] = attrs.field(factory=dict)

    def __attrs_post_init__(self) -> None:
        for name, budgets in self.directors.items():
            if never := sorted(set(budgets.given()) - METERED):
                raise ConfigError(f"the director {name!r} takes no turns, so no {never[0]}: give it tokens or cost")

    def all(self) -> tuple[Limit, ...]:
        """All of them, the widest first."""
        named = (*self.roles.items(), *self.directors.items())
        roles = (limit for role, budgets in named for limit in limits_of("role", budgets, role))
        return (*limits_of("rollout", self.rollout), *limits_of("scene", self.scene), *roles)

    def holding(self, role: str | None = None) -> tuple[Limit, ...]:
        """Those that hold for what `role` does; without one, those that hold for every role of the scene."""
        scopes = ("rollout", "scene") if role is None or role in self.roles else ("rollout",)
        return tuple(limit for limit in self.all() if limit.scope in scopes or (limit.of and limit.of == role))

    def amount(self, limit: Limit, shares: Iterable[Share]) -> float | None:
        """How much of this limit the shares spent; None where that is not known (a price, the length of a silence)."""
        mine = [share for share in shares if self._covers(limit, share)]
        match limit.kind:
            case "tokens":
                return sum(share.usage.tokens for share in mine)
            case "cost":
                return sum((share.usage for share in mine), Usage()).cost
            case "tool_calls":
                return sum(share.tool_calls for share in mine)
            case "turns":
                return sum(share.turn > 0 for share in mine)
            case "wall_sec":
                return round(sum(share.seconds for share in mine), 6)
            case _:
                return None

    def gone(self, limits: Iterable[Limit], shares: Iterable[Share]) -> Iterator[Gone]:
        """Those of `limits` that are spent."""
        shares = tuple(shares)
        for limit in limits:
            spent = self.amount(limit, shares)
            if spent is not None and spent >= limit.limit:
                yield Gone(limit, spent)

    def _covers(self, limit: Limit, share: Share) -> bool:
        match limit.scope:
            case "rollout":
                return True
            case "scene":
                return share.role in self.roles
            case "role":
                return share.role == limit.of
            case _:  # turn
                return str(share.turn) == limit.of


def brought_up(ledger: Iterable[Share], counted: Iterable[Share]) -> dict[tuple[str, int], Share]:
    """The journal's shares with the usage that the meter has counted by now."""
    shares = {(share.role, share.turn): share for share in ledger}
    for share in counted:
        key = (share.role, share.turn)
        shares[key] = attrs.evolve(shares.get(key, share), usage=share.usage)
    return shares
