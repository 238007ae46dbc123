"""What a rollout was begun with: said in its journal without secrets, and the same when it goes on.

`identity` is the hash of the inputs alone. Where models are served, what the variables' values are and who asks for it
may change; a task, an agent or a limit may not, and which one did is said by its name.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from typing import Any

import attrs
import msgspec

from orchestrator.journal import encode_any
from orchestrator.owners import owner
from orchestrator.resolved import Resolved
from states.errors import ConfigError
from states.journal import Header


def about(found: Resolved) -> dict[str, Any]:
    """What `config.json` and the journal's header say of the config: no secrets, by construction."""
    inputs = found.inputs()
    return {
        **inputs,
        "identity": hashlib.sha256(encode_any(inputs)).hexdigest(),
        "tracked": found.tracking.tracked,
        "made_from": dict(found.config.made_from),
        "owner": owner(),
        "scratch": tempfile.gettempdir(),
    }


def check_same(was: Header, now: Header) -> None:
    """Raise `ConfigError` when a rollout is to go on with other inputs than it began with; says which."""
    differs = [name for name in _rules_of(now) if _rules_of(was)[name] != _rules_of(now)[name]]
    if was.info.get("identity") != now.info["identity"]:
        given: dict[str, Any] = msgspec.json.decode(encode_any(now.info))
        differs += [key for key in given if key not in _NO_INPUT and was.info.get(key) != given[key]] or ["identity"]
    if differs:
        rules = (_rules_of(was), _rules_of(now))
        before, after = {**was.info, **rules[0]}, {**now.info, **rules[1]}
        said = ", ".join(_differs(key, before.get(key), after.get(key)) for key in differs)
        raise ConfigError(f"rollout {was.rollout} was begun with other inputs, and cannot go on with these: {said}")


_NO_INPUT = frozenset({"identity", "tracked", "made_from", "owner", "scratch"})


def _rules_of(header: Header) -> dict[str, Any]:
    return attrs.asdict(header.rules)


def _differs(key: str, was: Any, now: Any) -> str:
    """What of an input is another one, in a few words: of a role which of its settings, of an agent its manifest."""
    if key == "roles" and isinstance(was, Mapping) and isinstance(now, Mapping):
        names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
        return ", ".join(_differs_of_role(name, was.get(name), now.get(name)) for name in names)
    texts = [encode_any(value).decode() for value in (was, now)]
    if key.endswith("digest") or max(map(len, texts)) > BRIEF:
        return key
    return f"{key} (was {texts[0]}, is {texts[1]})"


def _differs_of_role(name: str, was: Any, now: Any) -> str:
    if not was or not now:
        return f"roles ({name} {'is new' if now else 'is gone'})"
    keys = [_differs(key, was.get(key), now[key]) for key in now if key != "agent_digest" and was.get(key) != now[key]]
    manifest = was["agent_digest"] != now["agent_digest"] and was["agent"] == now["agent"]
    changed = [f"the manifest of agent {now['agent']}"] if manifest else []
    return f"roles ({name}: {', '.join([*changed, *keys])})"


BRIEF = 80
"""The longest value that is quoted of an input that changed, in characters of JSON."""
