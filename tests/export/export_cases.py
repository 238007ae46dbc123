"""Rollouts on disk, of every kind that an export has to hold for: each way out, metered scenes, killed ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import attrs
import msgspec
from harness import TRANSPORTS, Stand, build
from test_ways_out import NOT_THERE, WAYS

from orchestrator import ExecResult, Role, Rollout, RolloutConfig, Scene, Turn, Usage
from orchestrator.config import DirectorRole
from orchestrator.gateway.prices import Prices
from orchestrator.gateway.script import Fail, Say, Shell, Steps
from orchestrator.gateway.scripted import ScriptedUpstream
from orchestrator.gateway.upstream import Upstream
from orchestrator.journal import encode, to_json
from orchestrator.sandboxes.fake import FakeSandbox

KEY = "provider-key-that-stays-out"
PRICES = Prices(3e-6, 15e-6, 3e-7, 3.75e-6)
REVIEW = "REVIEW it."


@attrs.frozen
class Case:
    """A rollout's folder, and what its provider counted where there was one."""

    folder: Path
    provider: Usage | None = None


class House:
    """A host's own scoring."""

    async def verify(self) -> dict[str, float]:
        return {"reward": 0.5, "style": 1.0}

    async def check(self) -> dict[str, float]:
        return await self.verify()


def of_way(way: str, transport: str, folder: Path) -> Case | None:
    """One of the ways out, its journal and trajectory written as the kernel would."""
    if (way, transport) in NOT_THERE:
        return None
    return _written(WAYS[way](transport), folder)


def _written(stand: Stand, folder: Path) -> Case:
    anyio.run(stand.rollout.run)
    folder.mkdir(parents=True)
    lines = [encode(to_json(record)) for record in stand.rollout.journal]
    (folder / "journal.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    steps = stand.rollout._world._trajectory._sink.lines
    (folder / "trajectory.jsonl").write_bytes(b"".join(line + b"\n" for line in steps))
    return Case(folder)


def ways(root: Path) -> dict[str, Case]:
    """Every way out, over both transports."""
    found = {f"{way}-{t}": of_way(way, t, root / f"{way}-{t}") for way in WAYS for t in TRANSPORTS}
    return {name: case for name, case in found.items() if case is not None}


RICH = {
    "turns": [
        [
            {"think": "First I look."},
            {"say": "Looking \ud83d\ude00 at </script> & co."},
            {"shell": "ls", "ask": True},
            {
                "tool": "t1",
                "kind": "edit",
                "title": "mend",
                "content": [{"type": "diff", "path": "/a", "newText": "b"}],
            },
            {"tool_update": "t1", "status": "failed"},
            {"think": "That went wrong."},
            {"elicit": {"message": "Shall I go on?", "options": ["yes", "no"]}},
            {"compact": 1},
            {"say": "I am done."},
            {"late": [{"say": "one more thing"}]},
        ]
    ]
}
"""Everything that a step can be."""


def rich(root: Path) -> dict[str, Case]:
    """Thoughts, questions, edits, a compaction and an afterthought, over both transports."""
    return {f"rich-{t}": _written(build(t, RICH), root / t) for t in TRANSPORTS}


def reply(conversation: Any) -> Any:
    """A coder who works in two steps, a reviewer who looks once, and a user who leads for one turn."""
    if "Say DONE" in conversation.user:
        return Say("Please do it." if conversation.prompts == 1 else "Thanks.\nDONE")
    if REVIEW in conversation.user:
        return Steps(Shell("cat answer.txt"), Say("It is <b>right</b>."))(conversation)
    return Steps(Shell("make it"), Shell("make it again"), Say("Done."))(conversation)


async def _metered(root: Path, name: str, script: Any, **config: Any) -> Case:
    async with ScriptedUpstream(script, apis=["openai-chat"], prices=PRICES, api_key=KEY) as provider:
        upstream = Upstream("scripted", provider.url, ["openai-chat"], api_key=KEY, prices=PRICES)
        base: Mapping[str, Any] = {
            "prompt": "Do it.",
            "agent": "minimal",
            "sandbox": FakeSandbox(on_exec=lambda call: ExecResult(f"did {call.command}\n", "", 0)),
            "verifier": House(),
            "out": root,
            "upstream": upstream,
            "new_id": lambda: name,
        }
        rollout = Rollout(RolloutConfig(**{**base, **config}))
        with anyio.fail_after(60):
            result = await rollout.run()
        assert result.folder is not None
        return Case(result.folder, provider.usage)


def metered(root: Path) -> dict[str, Case]:
    """Rollouts whose model calls went through the gateway: one role, two roles in three turns, one that is void."""
    scene = Scene(
        (Role("coder", "minimal"), Role("reviewer", "minimal")),
        (Turn("coder"), Turn("reviewer", REVIEW), Turn("coder", "MEND it.")),
    )
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "one_role": (reply, {}),
        "two_roles": (reply, {"agent": None, "scene": scene}),
        "void": (lambda _conversation: Fail(500, "down"), {}),
        "unverified": (reply, {"verifier": None}),
        "led": (
            reply,
            {
                "agent": None,
                "scene": Scene((Role("coder", "minimal"),), ()),
                "director": DirectorRole(Role("user", "minimal"), "You want it done."),
            },
        ),
    }
    cases = {}
    for name, (script, config) in kinds.items():
        cases[name] = anyio.run(lambda n=name, s=script, c=config: _metered(root, n, s, **c))
    return cases


def cut(case: Case, folder: Path, records: int) -> Case:
    """The same rollout as a kill had left it after so many records of its journal, each file's last line torn."""
    folder.mkdir(parents=True)
    journal = (case.folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    turns = sum(b'"event":"Prompted"' in line for line in journal[:records])
    now = msgspec.json.decode(journal[records - 1])["time"]
    steps = (case.folder / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    calls = (case.folder / "llm.jsonl").read_bytes().splitlines(keepends=True)
    for name, whole, kept in (
        ("journal.jsonl", journal, journal[:records]),
        ("trajectory.jsonl", steps, [line for line in steps if msgspec.json.decode(line)["segment"] <= turns]),
        ("llm.jsonl", calls, [line for line in calls if msgspec.json.decode(line)["time"] <= now]),
    ):
        (folder / name).write_bytes(b"".join(kept) + whole[-1][:20])
    return Case(folder)


def every(root: Path) -> dict[str, Case]:
    """All of them."""
    cases = {**ways(root / "ways"), **rich(root / "rich"), **metered(root / "metered")}
    whole = (cases["two_roles"].folder / "journal.jsonl").read_bytes().count(b"\n")
    cases |= {f"killed_{n}": cut(cases["two_roles"], root / "killed" / str(n), n) for n in range(1, whole, 9)}
    return cases
