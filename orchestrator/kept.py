"""A look into a sandbox that a rollout kept (`keep_sandbox`): a command is run in it, and it is kept as it was."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orchestrator.journal import JournalSink, read_journal
from orchestrator.sandboxes import reopen
from states.errors import ConfigError
from states.journal import LeaseRecord, Record, fold
from states.ports import ExecResult, Lease


async def exec_in(folder: Path, command: Sequence[str], *, role: str | None = None) -> ExecResult:
    """Run a command in the sandbox that the rollout in `folder` kept.

    Args:
        folder: Of a rollout that is closed.
        command: A program and its arguments, run in the task's folder.
        role: As this role's agent, in its HOME and `/tmp`; None is as the verifier, who sees all.

    Raises:
        ConfigError: The rollout is not closed, holds no sandbox any more, or has no such role; or somebody else
            looks into its sandbox just now.
        SandboxError: The sandbox is gone, or cannot be brought up.

    >>> (await exec_in(Path("runs/1b2c3d"), ["cat", "answer.txt"])).stdout  # doctest: +SKIP
    '42'
    """
    _kept(folder, read_journal(folder))  # what cannot be had at all is said first
    with _alone(folder):
        records = read_journal(folder)
        lease = _kept(folder, records)
        name = _last_seat(records, role) if role is not None else "look"
        sandbox: Any = await reopen(lease.handle)
        try:
            handle = sandbox.handle(name, trusted=role is None)
            await handle.open()
            result: ExecResult = await handle.exec(list(command))
            await handle.end()
            return result
        finally:
            await sandbox.leave()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the journal's lock: whoever takes a sandbox up ends what runs in it, so one at a time does."""
    sink = JournalSink(folder / "journal.jsonl")
    try:
        if sink.claim() == "taken":
            raise ConfigError(
                f"{folder}: somebody else looks into this sandbox, or gives it back; wait until they have"
            )
        yield
    finally:
        sink.close()


def _kept(folder: Path, records: list[Record]) -> Lease:
    folded = fold(records)
    if not folded.position.closed:
        raise ConfigError(
            f"{folder}: the rollout stands in {folded.position.state}; a sandbox is looked into once it is closed"
        )
    held = [lease for lease in folded.leases.values() if lease.kind == "sandbox" and lease.handle]
    if not held:
        raise ConfigError(f"{folder}: its sandbox was given back; run it with --keep-sandbox always, or on-failure")
    return held[0]


def _last_seat(records: list[Record], role: str) -> str:
    """The name of the handle in which a role's agent was last."""
    names = [
        record.lease.name for record in records if isinstance(record, LeaseRecord) and record.lease.kind == "agent"
    ]
    found = [name for name in names if re.fullmatch(rf"{re.escape(role)}-\d+", name)]
    if not found:
        known = ", ".join(sorted({name.rpartition("-")[0] for name in names})) or "nobody"
        raise ConfigError(f"no role {role!r} was connected in this rollout; there was {known}")
    return found[-1]
