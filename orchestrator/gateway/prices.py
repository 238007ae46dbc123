"""What tokens cost. An unknown price is None, never 0: a sum with an unknown part is unknown.

A user gives a table of his own (`Prices(input=3e-6, output=15e-6)`); otherwise `known` reads the table that litellm
ships, as a file: litellm itself is never imported here (that costs seconds and stalls a loop).
"""

from __future__ import annotations

import importlib.util
import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import attrs

from states.events import Usage

_TIER = re.compile(r"input_cost_per_token_above_(\d+)k_tokens")
_TABLE = "model_prices_and_context_window_backup.json"


@attrs.frozen
class Prices:
    """US dollars a token. Cached tokens cost what `input` costs where no price of their own is given.

    >>> Prices(input=2.0, output=10.0, cache_read=0.5).cost(Usage(1, 0, 10, 1, cache_read_input_tokens=4))
    24.0
    """

    input: float
    output: float
    cache_read: float | None = None
    cache_creation: float | None = None
    tiers: tuple[tuple[int, Prices], ...] = ()
    """Other prices for calls with more input tokens than this, the lowest first."""

    def cost(self, usage: Usage) -> float:
        """The price of one call, in US dollars. `usage.input_tokens` includes cached ones."""
        for above, prices in reversed(self.tiers):
            if usage.input_tokens > above:
                return prices.cost(usage)
        read, creation = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        fresh = usage.input_tokens - read - creation
        dollars = (
            fresh * self.input
            + read * (self.input if self.cache_read is None else self.cache_read)
            + creation * (self.input if self.cache_creation is None else self.cache_creation)
            + usage.output_tokens * self.output
        )
        return round(dollars, 12)

    @classmethod
    def known(cls, model: str) -> Self | None:
        """The list price of a model (`openai/gpt-x`, `gpt-x`); None where it is unknown."""
        table = _table()
        entry = table.get(model) or table.get(model.partition("/")[2])
        if not entry or "input_cost_per_token" not in entry or "output_cost_per_token" not in entry:
            return None
        base = cls._of(entry, "")
        steps = sorted(int(found.group(1)) for key in entry if (found := _TIER.fullmatch(key)))
        tiers = tuple((step * 1000, cls._of(entry, f"_above_{step}k_tokens", base)) for step in steps)
        return attrs.evolve(base, tiers=tiers)

    @property
    def dearest_output(self) -> float:
        """The most that a token of output costs, whatever the call's size."""
        return max([self.output, *(prices.output for _, prices in self.tiers)])

    @classmethod
    def _of(cls, entry: dict[str, Any], suffix: str, base: Prices | None = None) -> Self:
        """The prices under names with this suffix, those of `base` where there are none."""

        def price(name: str, otherwise: Any) -> Any:
            return entry.get(f"{name}{suffix}", otherwise)

        return cls(
            price("input_cost_per_token", base and base.input),
            price("output_cost_per_token", base and base.output),
            price("cache_read_input_token_cost", base and base.cache_read),
            price("cache_creation_input_token_cost", base and base.cache_creation),
        )


def most_output(model: str) -> int | None:
    """How many tokens a model (`openai/gpt-x`, `gpt-x`) can write in one reply; None where that is unknown."""
    table = _table()
    entry = table.get(model) or table.get(model.partition("/")[2]) or {}
    found = entry.get("max_output_tokens")
    return found if isinstance(found, int) and found > 0 else None


@lru_cache(maxsize=1)
def _table() -> dict[str, dict[str, Any]]:
    """The table of prices that litellm ships; empty without the extra."""
    spec = importlib.util.find_spec("litellm")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / _TABLE
        if path.is_file():
            found: dict[str, dict[str, Any]] = json.loads(path.read_bytes())
            return found
    return {}
