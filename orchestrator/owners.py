"""Who drives a rollout, whether that process is there, and so whether a sandbox was left behind.

A process is known by its machine, its number and its start, so that a number that was given anew is nobody's. Machines
and containers share names ("localhost", "worker-0"), so a machine is its kernel's boot and the space that the number
counts in. That is written into the journal and onto every sandbox. It says who made the sandbox; who has the rollout
now may be another process, which holds the lock of its journal from before it does anything else.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from orchestrator.journal import JournalSink, read_journal
from states.errors import JournalError, OrchestratorError, SandboxError
from states.events import Recovered
from states.journal import Header, Record, Transition


def owner() -> dict[str, Any]:
    """Which process drives what this process drives: found alive or dead by whoever wants to take it over."""
    return {"host": socket.gethostname(), **_process(os.getpid())}


@functools.cache  # each rollout asks twice, and a process stays what it is
def _process(pid: int) -> Mapping[str, Any]:
    return {**_numbers(), "pid": pid, "started": started_at(pid)}


def _numbers() -> dict[str, str]:
    """Where process numbers mean what they do here: boot, and PID namespace; "" for what is not to be known."""
    place = {"boot": "", "space": ""}
    with contextlib.suppress(OSError):
        place["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        place["space"] = str(Path("/proc/self/ns/pid").stat().st_ino)
    return place


def is_of_here(owned: Mapping[str, Any]) -> bool:
    """Whether the process that `owner` described can be looked for here: its number means nothing elsewhere."""
    here = owner()
    return all(here[key] and owned.get(key) == here[key] for key in ("host", "boot", "space"))


def started_at(pid: int) -> str | None:
    """When a process of this machine started, in its kernel's own words; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[19]


def is_alive(owned: Mapping[str, Any]) -> bool:
    """Whether the process that `owner` described is there, on this machine."""
    return bool(owned.get("started")) and started_at(int(owned["pid"])) == owned["started"]


def owner_of(records: Iterable[Record]) -> Mapping[str, Any]:
    """Which process drives a rollout, or was the last to: `host`, `pid`, `started`."""
    known: Mapping[str, Any] = {}
    for record in records:
        match record:
            case Header(info=info):
                known = info.get("owner") or {}
            case Transition(event=Recovered(owner=found)) if found:
                known = found
    return known


def labels_of(rollout: str, folder: Path | None) -> dict[str, str]:
    """What is written on a sandbox: whose it is, who makes it, and where that rollout's journal is, if anywhere."""
    made = {f"owner-{key}": str(value) for key, value in owner().items()}
    return {"rollout": rollout, **made, **({"folder": str(folder.resolve())} if folder is not None else {})}


@contextlib.contextmanager
def left_behind(labels: Mapping[str, str], *, unknown: bool = False) -> Iterator[bool]:
    """Whether nobody has the sandbox with these labels any more; as long as this lasts, nobody takes it up.

    `unknown` is the answer where that cannot be known here: what was made elsewhere, under this machine's name too, is
    not ours to judge. Where there is its journal its lock decides, since who made the sandbox may be dead and who went
    on with the rollout alive.

    Raises `JournalError` when there is a journal that cannot be opened.

    >>> with left_behind({"owner-host": "elsewhere", "owner-pid": "7", "owner-started": "1"}) as left:
    ...     left
    False
    """
    maker = {key: labels.get(f"owner-{key}", "") for key in owner()}
    here, folder = is_of_here(maker) and maker["pid"].isdigit(), Path(labels.get("folder") or os.devnull)
    if here and is_alive(maker):
        yield False
    elif not (folder / "journal.jsonl").is_file() or not (here or _is_of(folder, labels)):
        yield here or unknown
    else:
        sink = JournalSink(folder / "journal.jsonl")
        try:
            whose = sink.claim()
            yield whose == "ours" or (whose == "unknown" and _is_gone(owner_of(read_journal(folder)), unknown))
        finally:
            sink.close()


def _is_of(folder: Path, labels: Mapping[str, str]) -> bool:
    """Whether the journal in `folder` is that of the rollout with these labels, made on a host of this name."""
    if labels.get("owner-host") != socket.gethostname():
        return False
    with contextlib.suppress(JournalError):
        return any(
            isinstance(record, Header) and record.rollout == labels.get("rollout") for record in read_journal(folder)
        )
    return False


def _is_gone(driver: Mapping[str, Any], unknown: bool) -> bool:
    return not is_alive(driver) if is_of_here(driver) else unknown


async def give_back_each(
    found: Iterable[tuple[contextlib.AbstractContextManager[bool], Callable[[], Awaitable[str]]]],
) -> tuple[str, ...]:
    """What a sweep does with the sandboxes that it found: whether each was left behind, and how it is given back.

    Returns what was said of each that was; nothing is said of one that is left as it is. One that cannot be given back
    keeps no other one from it.

    Raises `SandboxError`, once all were seen to, naming those that could not be given back, and those that were.
    """
    said, failed = [], []
    for is_left, give_back in found:
        try:
            with is_left as left:
                said.append(await give_back() if left else "")
        except OrchestratorError as error:
            failed.append(str(error))
    done = tuple(filter(None, said))
    if failed:
        raise SandboxError("\n".join((*done, *failed)))
    return done
