"""Lines of `llm.jsonl`: one a model call, growing linearly with a conversation.

Clients send the whole conversation with every call. What stands in an earlier line of the same rollout is therefore
written as a reference, and `expand` puts it back:

- `{"sha256": h}` is a value (a message, a tool, a system prompt), `h` being the hash of its compact JSON;
- `{"sha256": h, "first": n}` at the head of a list is the first n members of an earlier list. `h` is their chain: the
  hash of the chain of the members before and of the last member's own hash (both as bytes), beginning with nothing.

A line of a growing conversation thus holds one reference and what is new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from states.events import Usage

JSON = dict[str, Any]
_REDACTED = "[redacted]"
_SMALL = 100
"""Bytes. A reference is 77 bytes long: what is not longer than this is written as it is."""


class Interner:
    """Remembers what one rollout has written."""

    def __init__(self) -> None:
        self._values: set[bytes] = set()
        self._chains: set[bytes] = set()

    def compact(self, body: JSON, keys: Collection[str]) -> JSON:
        """The body, its values under `keys` and the members of lists there replaced where they were seen before."""
        return {k: self._value(v) if k in keys else v for k, v in body.items()}

    def _value(self, value: Any) -> Any:
        if not isinstance(value, list):
            return self._one(value, msgspec.json.encode(value))
        raws = [msgspec.json.encode(member) for member in value]
        chains = list(_chain(raws))
        known = next((n for n in range(len(chains), 1, -1) if chains[n - 1] in self._chains), 0)
        self._chains.update(chains)
        head = [{"sha256": chains[known - 1].hex(), "first": known}] if known else []
        return [*head, *(self._one(value[i], raws[i]) for i in range(known, len(value)))]

    def _one(self, value: Any, raw: bytes) -> Any:
        if len(raw) <= _SMALL:
            return value
        digest = hashlib.sha256(raw).digest()
        if digest in self._values:
            return {"sha256": digest.hex()}
        self._values.add(digest)
        return value


def expand(lines: Iterable[JSON]) -> Iterator[JSON]:
    """The lines of one `llm.jsonl` with every reference resolved.

    >>> log = Interner()
    >>> call = {"messages": [{"role": "user", "content": "x" * 100}]}
    >>> written = [{"request": log.compact(call, ["messages"])} for _ in range(2)]
    >>> len(str(written[1])) < len(str(written[0])), [line["request"] == call for line in expand(written)]
    (True, [True, True])
    """
    reader = _Reader()
    for line in lines:
        out = dict(line)
        for part in ("request", "response"):
            if isinstance(line.get(part), dict):
                out[part] = {key: reader.value(value) for key, value in line[part].items()}
        yield out


def used_by(line: Mapping[str, Any]) -> Usage:
    """What a call adds to sums, read off its line. What was refused here never reached a model."""
    if line.get("via") == "refused":
        return Usage()
    failed = bool(line.get("error")) or not 200 <= (line.get("status") or 0) < 300
    if line["usage"] is None:
        return Usage(1, int(failed), cost=0.0 if failed else None)
    return Usage(1, int(failed), **line["usage"])


class _Reader:
    """Remembers what stood in the lines that were read. A chain leads to its last member and the chain before."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._chains: dict[str, tuple[str, Any]] = {}

    def value(self, value: Any) -> Any:
        """What was meant."""
        if isinstance(value, list):
            return self._remember([member for part in value for member in self._members(part)])
        if isinstance(value, dict) and set(value) == {"sha256"}:
            return self._values.get(value["sha256"], value)
        self._values[hashlib.sha256(msgspec.json.encode(value)).hexdigest()] = value
        return value

    def _members(self, part: Any) -> list[Any]:
        if not isinstance(part, dict) or set(part) != {"sha256", "first"}:
            return [self.value(part)]
        found, chain = [], part["sha256"]
        while chain in self._chains:
            chain, member = self._chains[chain]
            found.append(member)
        return found[::-1] or [part]

    def _remember(self, whole: list[Any]) -> list[Any]:
        before = ""
        for member, chain in zip(whole, _chain(msgspec.json.encode(m) for m in whole), strict=True):
            self._chains[chain.hex()] = before, member
            before = chain.hex()
        return whole


def redact(value: Any, secrets: Iterable[str]) -> Any:
    """A JSON value without these secrets in it, wherever they stood."""
    raw = msgspec.json.encode(value)
    found = [s for s in secrets if s and s.encode() in raw]
    for secret in found:
        raw = raw.replace(secret.encode(), _REDACTED.encode())
    return msgspec.json.decode(raw) if found else value


def _chain(raws: Iterable[bytes]) -> Iterator[bytes]:
    """The chain of each beginning of a list, given its members as JSON."""
    chain = b""
    for raw in raws:
        chain = hashlib.sha256(chain + hashlib.sha256(raw).digest()).digest()
        yield chain
