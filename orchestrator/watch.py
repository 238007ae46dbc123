"""Looking at a rollout while it runs: a follower of its files, and a view of two lines on a terminal.

Viewers follow the journal: the follower reads only what was appended since it last looked, so it works as well on a
rollout of another process. rich is imported when the view is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import attrs
import msgspec

from orchestrator.show import COLOURS, MARKS, one_line
from orchestrator.visits import duration
from states.machine import CLOSED, INITIAL

POLL_SEC = 0.1


@attrs.define(eq=False)
class Tail:
    """Whole lines of a file that grows, each one once."""

    path: Path
    _offset: int = 0

    def lines(self) -> Iterator[dict[str, Any]]:
        """What was appended since the last look; nothing while there is no such file."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            try:
                raw = msgspec.json.decode(line)
            except msgspec.DecodeError:
                continue  # torn by a kill
            if isinstance(raw, dict):
                yield raw


@attrs.define(eq=False)
class Follower:
    """What a rollout is doing, as far as its files say."""

    folder: Path
    rollout: str = ""
    where: tuple[str, float] = (INITIAL, 0.0)
    """The state that it is in, and when it came there, in seconds since the epoch."""
    turn: int = 0
    role: str = ""
    """Whose turn it is, or was; told where there are several."""
    roles: set[str] = attrs.field(factory=set)
    steps: int = 0
    tool_calls: int = 0
    tokens: dict[str, int] = attrs.field(factory=dict)
    """By role."""
    calls: int = 0
    last_step: str = ""
    paused_by: str = ""
    _tails: dict[str, Tail] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._tails = {
            name: Tail(self.folder / f"{name}.jsonl") for name in ("journal", "trajectory", "director", "llm")
        }

    @property
    def state(self) -> str:
        """Where it is."""
        return self.where[0]

    @property
    def closed(self) -> bool:
        """Whether it is over."""
        return self.state in CLOSED

    def look(self) -> list[dict[str, Any]]:
        """Read on. Returns the transitions that were new."""
        moved = []
        for record in self._tails["journal"].lines():
            if record.get("type") == "header":
                self.rollout, self.where = record["rollout"], (INITIAL, record["time"])
                self.roles.update(record.get("info", {}).get("roles", {}))
            elif record.get("type") == "transition":
                self._moved(record)
                moved.append(record)
        for line in self._tails["trajectory"].lines():
            self._stepped(line)
        for line in self._tails["director"].lines():
            self._directed(line)
        for line in self._tails["llm"].lines():
            usage, role = line.get("usage") or {}, str(line.get("role") or "")
            self.calls += line.get("via") != "refused"
            used = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
            self.tokens[role] = self.tokens.get(role, 0) + used
        return moved

    def _moved(self, record: dict[str, Any]) -> None:
        if record["event"] == "Prompted":
            self.turn, self.role = self.turn + 1, str(record["data"].get("role", ""))
        self.paused_by = record["data"]["by"] if record["event"] == "Paused" else ""
        if record["source"] != record["dest"] or record["cause"] not in {"outside", "recovery"}:
            self.where = (record["dest"], record["time"])

    def _stepped(self, line: dict[str, Any]) -> None:
        match line:
            case {"data": {"type": "question", "prompt": prompt}}:
                self.steps += 1
                self.last_step = one_line(f"? {prompt}", 200)
            case {"set": {"answer": answer, "by": by}}:
                self.last_step = one_line(f"{self.last_step} -> {answer} ({by})", 200)
            case {"data": {"type": kind, **step}}:
                self.steps += 1
                self.tool_calls += kind == "tool_call"
                if kind in MARKS:
                    self.last_step = one_line(str(step.get("title") or step.get("text") or kind), 200)
            case {"text": text}:
                self.last_step = one_line(f"{self.last_step} {text}", 2000)[-200:]

    def _directed(self, line: dict[str, Any]) -> None:
        """What a director says is the last that happened; what it was told is not."""
        match line:
            case {"data": {"type": "agent_message" | "agent_thought" as kind, "text": text}}:
                self.last_step = one_line(f"{MARKS[kind]} {text}", 200)
            case {"text": text}:
                self.last_step = one_line(f"{self.last_step} {text}", 2000)[-200:]

    def line(self, now: float) -> str:
        """Where it is, for how long, and what it has done so far."""
        since = self.where[1]
        age = "" if self.closed or not since else f" for {duration(max(0.0, now - since))}"
        by_role = ", ".join(f"{one_line(role, 40)} {used:,}" for role, used in self.tokens.items())
        who = f" ({by_role})" if len(self.tokens) > 1 else ""
        tokens = f", {sum(self.tokens.values()):,} tokens in {self.calls} calls{who}" if self.calls else ""
        several = len({*self.roles, *self.tokens}) > 1
        turn = f"turn {self.turn} ({one_line(self.role, 40)})" if several else f"turn {self.turn}"
        done = f"{turn}, {self.steps} steps, {self.tool_calls} tool calls{tokens}" if self.turn else ""
        by = f" by {self.paused_by}" if self.paused_by else ""
        return f"{self.state}{by}{age}" + (f"  |  {done}" if done else "")


async def follow(folder: Path, tell: Callable[[dict[str, Any]], None], clock: Callable[[], float] = time.time) -> None:
    """Show a rollout on this terminal until it is closed. `tell` gets each transition, to print it if it wishes."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    follower = Follower(folder)

    def view() -> Text:
        colour = COLOURS.get(follower.state.partition("/")[2], "blue")
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(follower.line(clock()), style=f"bold {colour}")
        if follower.last_step and not follower.closed:
            text.append(f"\n  {follower.last_step[-console.width + 4 :]}", style="dim")
        return text

    with Live(view(), console=console, refresh_per_second=10, transient=True, auto_refresh=False) as live:
        while True:
            for record in follower.look():
                tell(record)
            live.update(view(), refresh=True)
            if follower.closed:
                return
            await anyio.sleep(POLL_SEC)
