"""Looking at a rollout while it runs: a follower of its files, and a view of a few lines on a terminal.

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
    note: str = ""
    """The newest that was said of the sandbox while it comes up: an image that is built, an agent that is installed."""
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
        """Read on. Returns what was new of the journal: the transitions, and the notes on a sandbox that comes up."""
        new = []
        for record in self._tails["journal"].lines():
            if record.get("type") == "header":
                self.rollout, self.where = record["rollout"], (INITIAL, record["time"])
                self.roles.update(record.get("info", {}).get("roles", {}))
            elif record.get("type") == "transition":
                self._moved(record)
                new.append(record)
            elif record.get("type") == "note" and self.state == INITIAL:
                self.note = one_line(record["text"], 400)
                new.append(record)
        for line in self._tails["trajectory"].lines():
            self._stepped(line)
        for line in self._tails["director"].lines():
            self._directed(line)
        for line in self._tails["llm"].lines():
            usage, role = line.get("usage") or {}, str(line.get("role") or "")
            self.calls += line.get("via") != "refused"
            used = usage.get("input_tokens", 0) + usage.get("output_tokens", 0)
            self.tokens[role] = self.tokens.get(role, 0) + used
        return new

    def _moved(self, record: dict[str, Any]) -> None:
        if record["event"] == "Prompted":
            self.turn, self.role = self.turn + 1, str(record["data"].get("role", ""))
        self.paused_by = record["data"]["by"] if record["event"] == "Paused" else ""
        self.note = self.note if record["dest"] == INITIAL else ""
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

    def lines(self, width: int) -> list[str]:
        """The newest that is known of what it does: the ends of these lines, where they do not fit."""
        if self.closed:
            return []
        if not self.note:
            return [self.last_step[-width:]] if self.last_step else []
        said, _, log = self.note.partition("; log: ")
        return [one_line(text, width) for text in (said, f"log: {log}" if log else "", end_of(log)) if text]

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


def end_of(log: str) -> str:
    """The newest line of a log that still grows; "" where there is none."""
    try:
        with Path(log).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip()), "")


async def follow(folder: Path, tell: Callable[[dict[str, Any]], None], clock: Callable[[], float] = time.time) -> None:
    """Show a rollout on this terminal until it is closed. `tell` gets what `look` returns, to print it if it wishes."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True)
    follower = Follower(folder)

    def view() -> Text:
        colour = COLOURS.get(follower.state.partition("/")[2], "blue")
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(follower.line(clock()), style=f"bold {colour}")
        for line in follower.lines(console.width - 4):
            text.append(f"\n  {line}", style="dim")
        return text

    with Live(view(), console=console, refresh_per_second=10, transient=True, auto_refresh=False) as live:
        while True:
            for record in follower.look():
                tell(record)
            live.update(view(), refresh=True)
            if follower.closed:
                return
            await anyio.sleep(POLL_SEC)
