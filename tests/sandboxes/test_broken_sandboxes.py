"""A clause that no sandbox can fail proves nothing: for each there is a sandbox that is broken in just that way.

Each is a real sandbox with one thing bent, as it is bent in systems that people use: a client that mixes stderr into
stdout, an exec whose timeout kills the shell and not what it started, a copy that follows links. A bend raises nothing
because of what a clause asks: it is the clause that has to see what came of it, and to say so as a `ClauseError`.
"""
# Bends touch local files of a few bytes.
# ruff: noqa: ASYNC240

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest

from orchestrator.conformance import CLAUSE_SEC, SANDBOX_CLAUSES, ClauseError
from orchestrator.conformance import sandbox as clauses
from orchestrator.sandboxes.fake import FakeSandbox
from orchestrator.sandboxes.local import LocalSandbox
from states.errors import ExecTimeout, SandboxError

pytestmark = pytest.mark.anyio

Bend = Callable[..., Any]
"""Takes what it bends (the real part), then the arguments of the call."""


class Bent:
    """A sandbox, a handle or a channel whose named methods are replaced; everything else is the real one's."""

    def __init__(self, real: Any, bends: dict[str, Bend]) -> None:
        self.real, self.bends = real, bends

    def __getattr__(self, name: str) -> Any:
        if name in self.bends:
            return lambda *args, **named: self.bends[name](self.real, *args, **named)
        found = getattr(self.real, name)
        if name == "handle":
            return lambda *args, **named: Bent(found(*args, **named), self.bends)
        if name == "spawn":
            return self._spawned
        return found

    def attach(self, *args: Any) -> Any:
        """A Protocol is looked for by name, without asking `__getattr__`."""
        return self.__getattr__("attach")(*args)

    def leave(self) -> Any:
        """The same."""
        return self.__getattr__("leave")()

    async def _spawned(self, *args: Any, **named: Any) -> Any:
        return Bent(await self.real.spawn(*args, **named), self.bends)


def bent(**bends: Bend) -> dict[str, Bend]:
    """Named methods, of whichever part has them."""
    return bends


# --- exec ---


async def mixes_outputs(real, command, **named):
    result = await real.exec(command, **named)
    return attrs.evolve(result, stdout=result.stdout + result.stderr, stderr="")


async def starts_at_the_root(real, command, *, cwd=None, **named):
    return await real.exec(command, cwd=cwd or "/", **named)


async def forgets_env(real, command, *, env=None, **named):
    return await real.exec(command, **named)


async def joins_lists(real, command, **named):
    return await real.exec(command if isinstance(command, str) else " ".join(command), **named)


async def forgets_the_user(real, command, *, user=None, **named):
    return await real.exec(command, **named)


async def kills_the_shell_only(real, command, *, timeout_sec=None, **named):
    if timeout_sec is None or not isinstance(command, str):
        return await real.exec(command, timeout_sec=timeout_sec, **named)
    kept = "(setsid sh -c 'exec 9>lock; flock 9; exec sleep 100000' </dev/null >/dev/null 2>&1 &)"
    await real.exec(f"{kept}; while flock -n lock true; do sleep 0.01; done")
    raise ExecTimeout("too long", stdout="begun\n", stderr="odd\n")


async def never_says_that_it_cut(real, command, **named):
    return attrs.evolve(await real.exec(command, **named), truncated=False)


async def passes_an_argument(real, command, **named):
    return await real.exec(["sh", "-c", command] if isinstance(command, str) else command, **named)


async def waits_for_the_pipe(real, command, **named):
    return await real.exec(f"( {command} ) | cat", **{**named, "timeout_sec": 2})


async def keeps_stdin_open(real, command, **named):
    held = "mkfifo /tmp/stdin; exec 0<>/tmp/stdin"
    return await real.exec(f"{held}; {command}", **{**named, "timeout_sec": 2})


async def drops_odd_bytes(real, command, **named):
    result = await real.exec(command, **named)
    return attrs.evolve(result, stdout=result.stdout.replace("\ufffd", ""))


async def answers_with_the_last(real, command, **named):
    result = await real.exec(command, **named)
    return attrs.evolve(result, stdout=re.sub(r"^\d+$", "19", result.stdout, flags=re.MULTILINE))


async def leaves_cancelled_commands(real, command, **named):
    if isinstance(command, str) and command.startswith("exec 9>"):
        await real.exec(f"(setsid sh -c '{command}' </dev/null >/dev/null 2>&1 &)")
        await anyio.sleep_forever()
    return await real.exec(command, **named)


# --- spawn ---


async def cuts_long_lines(real, data):
    await real.send(data if len(data) < 5_000_000 else data[:4_095])
    if len(data) >= 5_000_000:
        await real.close_stdin()


async def cooks_lines(real, data):
    await real.send(data if len(data) <= 4_096 else data[:4_095])
    if len(data) > 4_096:
        await real.close_stdin()


async def decodes_what_it_sends(real, data):
    await real.send(data.decode(errors="replace").encode())


async def holds_a_little_back(real, max_bytes=262_144):
    data = await real.receive(max_bytes)
    return data if data.endswith(b"\n") or len(data) > 10 else b""


async def takes_everything(_real, _data):
    await anyio.lowlevel.checkpoint()


async def sends_to_nobody(real, data):
    try:
        await real.send(data)
    except SandboxError:
        return


async def asks_politely(real):
    await real.close_stdin()


async def exits_well(_real):
    return 0


async def forgets_spawn_env(real, argv, *, env=None, cwd=None):
    return await real.spawn(argv, cwd=cwd)


async def starts_a_shell(real, argv, **named):
    return await real.spawn(["sh", "-c", 'exec "$@"', "sh", *argv], **named)


# --- files ---


async def forgets_modes(real, source, target):
    await real.download(source, target)
    for path in [Path(target), *Path(target).rglob("*")]:
        if path.is_file():
            path.chmod(0o644)


async def writes_text(real, path, data, **named):
    await real.write_file(path, data.decode(errors="replace").encode(), **named)


async def forgets_the_mode(real, path, data, *, mode=0o644):
    await real.write_file(path, data)


async def reads_nothing_where_nothing_is(real, path):
    try:
        return await real.read_file(path)
    except SandboxError:
        return b""


async def follows_paths_out(real, path):
    return Path("/etc/passwd").read_bytes() if ".." in path else await real.read_file(path)


async def follows_links_out(real, source, target):
    try:
        await real.download(source, target)
    except SandboxError:
        if source.endswith("/file"):
            shutil.copyfile("/etc/passwd", target)
            return
        raise


async def copies_links(real, source, target):
    await real.download(source, target)
    for path in Path(target).rglob("*"):
        if path.is_symlink() and path.is_dir():
            path.unlink()
            path.mkdir()
            (path / "file").write_text("yes\n")


async def brings_pipes(real, source, target):
    await real.download(source, target)
    os.mkfifo(Path(target, "pipe"))


# --- who sees what ---


def trusts_everybody(real, name, *, trusted=False):
    return real.handle(name, trusted=True)


def shares_one_handle(real, name, *, trusted=False):
    return real.handle("the-one", trusted=trusted)


# --- life and death ---


async def starts_twice(real):
    return {**await real.start(), "started": os.urandom(4).hex()}


async def reaps_nothing(_found):
    """Says that it did, like a service that queues what it is asked for."""


async def is_reaped_by_nobody(real):
    return {**await real.start(), "kind": f"{__name__}:Careless"}


class Careless:
    """What is found by the kind of such a sandbox."""

    reap = staticmethod(reaps_nothing)


async def ends_nothing(_real):
    return ("it is surely gone",)


async def says_nothing(real):
    await real.end()
    return ()


async def stops_only_itself(_real):
    return None


async def comes_up_anew(real, _found):
    await real.start()
    return ("nothing was there",)


async def lets_it_run(_real):
    return None


async def ends_everybody(real):
    sandbox = real._sandbox
    for handle in list(sandbox._handles.values()):
        await handle.end()
    return ("everything of the sandbox is gone",)


@attrs.define(eq=False)
class WedgedOnceCancelled:
    """Whatever was cancelled in the middle cannot be done again, with this or with `any` other: a lock is left."""

    operation: str
    any: bool = False
    wedged: set[Any] = attrs.field(factory=set)

    async def __call__(self, real: Any) -> Any:
        lock = "any" if self.any else real
        if lock in self.wedged:
            raise SandboxError("its lock is held")
        self.wedged.add(lock)
        await anyio.lowlevel.checkpoint()
        done = await getattr(real, self.operation)()
        self.wedged.remove(lock)
        return done


BROKEN: dict[str, dict[str, Bend]] = {
    "output_and_exit_code_come_back": bent(exec=mixes_outputs),
    "commands_start_in_the_task_folder": bent(exec=starts_at_the_root),
    "environment_is_handed_over": bent(exec=forgets_env),
    "a_list_is_no_shell_command": bent(exec=joins_lists),
    "root_is_accepted_and_strangers_are_not": bent(exec=forgets_the_user),
    "timeout_ends_the_command": bent(exec=kills_the_shell_only),
    "a_long_output_is_cut_in_the_middle": bent(exec=never_says_that_it_cut),
    "a_command_may_be_longer_than_an_argument": bent(exec=passes_an_argument),
    "a_background_process_holds_nobody_up": bent(exec=waits_for_the_pipe),
    "stdin_of_a_command_is_empty": bent(exec=keeps_stdin_open),
    "output_that_is_no_text_is_decoded": bent(exec=drops_odd_bytes),
    "commands_run_at_the_same_time": bent(exec=answers_with_the_last),
    "a_cancelled_command_dies": bent(exec=leaves_cancelled_commands),
    "a_channel_carries_lines": bent(send=cooks_lines),
    "a_channel_carries_a_line_of_64_mib": bent(send=cuts_long_lines),
    "a_line_over_the_cap_ends_nothing": bent(send=cuts_long_lines),
    "characters_may_be_split_anywhere": bent(send=decodes_what_it_sends),
    "stderr_never_mixes_and_never_blocks": bent(stderr_tail=lambda real: real.stderr_tail()[-100:]),
    "a_process_may_end_in_mid_line": bent(receive=holds_a_little_back),
    "a_writer_waits_for_a_slow_reader": bent(send=takes_everything),
    "stdin_can_be_closed": bent(send=sends_to_nobody),
    "a_process_can_be_killed": bent(kill=asks_politely, wait=exits_well),
    "several_may_wait_for_an_exit": bent(wait=exits_well),
    "spawn_takes_env_and_cwd": bent(spawn=forgets_spawn_env),
    "a_missing_program_is_named": bent(spawn=starts_a_shell),
    "files_and_folders_go_up_and_down": bent(download=forgets_modes),
    "a_handle_reads_and_writes_files": bent(write_file=writes_text),
    "processes_see_written_files": bent(write_file=forgets_the_mode),
    "a_missing_path_is_named": bent(read_file=reads_nothing_where_nothing_is),
    "no_path_escapes": bent(read_file=follows_paths_out),
    "no_link_is_followed_out": bent(download=follows_links_out),
    "links_that_stay_inside_work": bent(download=copies_links),
    "odd_files_never_block": bent(download=brings_pipes),
    "tests_are_for_trusted_handles": bent(handle=trusts_everybody),
    "agents_cannot_reach_the_tests": bent(handle=trusts_everybody),
    "home_and_tmp_are_private": bent(handle=shares_one_handle),
    "processes_have_private_homes": bent(handle=shares_one_handle),
    "start_and_stop_are_idempotent": bent(start=starts_twice),
    "handles_open_and_end_idempotently": bent(end=says_nothing),
    "an_ended_handle_does_nothing_more": bent(end=ends_nothing),
    "ending_a_handle_ends_all_that_it_started": bent(end=ends_nothing),
    "services_of_the_task_live_on": bent(end=ends_everybody),
    "other_handles_live_on": bent(end=ends_everybody),
    "stop_ends_open_handles": bent(stop=stops_only_itself),
    "a_cancelled_start_leaves_nothing": bent(start=WedgedOnceCancelled("start", any=True)),
    "a_cancelled_open_leaves_nothing": bent(open=WedgedOnceCancelled("open")),
    "what_a_dead_owner_left_is_reaped": bent(start=is_reaped_by_nobody),
    "what_a_dead_owner_left_can_be_attached_to": bent(attach=comes_up_anew),
    "what_is_left_can_be_looked_into": bent(leave=lets_it_run),
}
"""By clause: what is bent so that the clause fails."""


def test_each_clause_has_a_sandbox_that_fails_it():
    """No clause without its broken sandbox."""
    assert set(BROKEN) == {clause.name for clause in SANDBOX_CLAUSES}


@pytest.fixture
async def broken(tmp_path, monkeypatch):
    """`broken(clause)`: makes sandboxes that are bent so that the clause fails; all are stopped."""
    monkeypatch.setattr(clauses, "DEAD_SEC", 2.0)  # what a bend keeps alive does not die later
    made: list[Any] = []

    def make(clause):
        number = len(made)
        real = FakeSandbox() if not clause.needs else LocalSandbox(name=f"box-{number}", root=tmp_path / str(number))
        made.append(real)
        return Bent(real, BROKEN[clause.name])

    yield lambda clause: lambda: make(clause)
    for real in made:
        await real.stop()


@pytest.mark.sandbox
@pytest.mark.parametrize("clause", SANDBOX_CLAUSES, ids=str)
async def test_a_sandbox_broken_in_that_way_fails_at_that_clause(clause, broken):
    """With that one thing bent, the clause says what it saw; an error that it merely passes on proves nothing."""
    with anyio.fail_after(CLAUSE_SEC), pytest.raises((ClauseError, ExceptionGroup)) as caught:
        await clause.check(broken(clause))
    assert _is_of_the_clause(caught.value), caught.value


def _is_of_the_clause(error: BaseException) -> bool:
    if isinstance(error, ExceptionGroup):
        return any(map(_is_of_the_clause, error.exceptions))
    return isinstance(error, ClauseError)


@pytest.mark.sandbox
@pytest.mark.parametrize(
    "name",
    [
        "a_command_may_be_longer_than_an_argument",
        "a_background_process_holds_nobody_up",
        "stdin_of_a_command_is_empty",
        "a_writer_waits_for_a_slow_reader",
        "what_a_dead_owner_left_is_reaped",
    ],
)
async def test_a_clause_that_asserts_nothing_passes_its_broken_sandbox(name, broken, monkeypatch):
    """And so would be found out by the test above: what is bent fails at assertions, and nowhere else."""
    for assertion in ("same", "true"):
        monkeypatch.setattr(clauses, assertion, lambda *_seen: None)
    for assertion in ("_works", "_refused"):
        monkeypatch.setattr(clauses, assertion, lambda *_wanted, **_named: contextlib.suppress(Exception))
    (clause,) = [clause for clause in SANDBOX_CLAUSES if clause.name == name]
    with anyio.fail_after(CLAUSE_SEC):
        await clause.check(broken(clause))
