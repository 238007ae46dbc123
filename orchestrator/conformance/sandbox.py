"""What a sandbox has to do, as clauses that anybody can run on a sandbox of their own.

Each clause makes a sandbox, uses it through nothing but the Protocols of `states/ports.py`, gives it back, and raises
`ClauseError` saying what it saw. A clause names what it `needs`, so that a sandbox without real processes runs the
rest:

    outcomes = await run_clauses(SANDBOX_CLAUSES, lambda: MySandbox(...))
    assert all(outcome.passed for outcome in outcomes), [str(outcome) for outcome in outcomes if not outcome.passed]

or, in pytest, one test a clause:

    @pytest.mark.parametrize("clause", SANDBOX_CLAUSES, ids=str)
    async def test_my_sandbox(clause):
        await clause.check(make_my_sandbox)

Commands in clauses need a POSIX shell, coreutils and `flock`: a daemon is alive exactly as long as it holds a lock,
so that no clause has to sleep.
"""
# The host files that clauses touch are a few bytes in a temporary folder.
# ruff: noqa: ASYNC240

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import anyio

from orchestrator.conformance.clauses import Clause, ClauseError, same, true
from orchestrator.sandboxes import reaper
from orchestrator.transports.acp_wire import MAX_LINE, Lines, Oversize
from states.errors import ExecTimeout, PathEscape, SandboxError, said
from states.ports import Attachable, ByteChannel, Keepable, Sandbox, SandboxHandle

MakeSandbox = Callable[[], Sandbox]
Need = Literal["processes", "large", "reaping"]
"""`processes`: commands are real ones. `large`: 64 MiB go through a channel in reasonable time. `reaping`: what a dead
owner left is given back by what `start` returned; a sandbox that somebody else takes down lacks it."""

ABSENT: Final = "/app/no-such-folder/no-such-file"

DEAD_SEC: Final = 30.0
"""How long it may take until the death of a process that was killed is known."""


# --- what clauses are made of ---


@contextlib.contextmanager
def _refused(what: str, error: type[SandboxError] = SandboxError, naming: str = "") -> Iterator[None]:
    try:
        yield
    except error as exc:
        true(f"{what}: the error does not name {naming}: {exc}", naming in str(exc))
    except Exception as exc:
        raise ClauseError(f"{what}: expected {error.__name__}, saw {type(exc).__name__}: {exc}") from exc
    else:
        raise ClauseError(f"{what}: expected {error.__name__}, and nothing was raised")


@contextlib.contextmanager
def _works(what: str) -> Iterator[None]:
    """An error of the sandbox at this point is what the clause looks for, not an accident on its way."""
    try:
        yield
    except SandboxError as exc:
        raise ClauseError(f"{what}: {said(exc)}") from exc


@contextlib.asynccontextmanager
async def _up(make: MakeSandbox) -> AsyncIterator[Sandbox]:
    sandbox = make()
    try:
        await sandbox.start()
        yield sandbox
    finally:
        with anyio.CancelScope(shield=True):
            await sandbox.stop()


@contextlib.asynccontextmanager
async def _role(make: MakeSandbox, *, trusted: bool = False) -> AsyncIterator[SandboxHandle]:
    async with _up(make) as sandbox:
        yield await _opened(sandbox, "solver", trusted=trusted)


async def _opened(sandbox: Sandbox, name: str, *, trusted: bool = False) -> SandboxHandle:
    handle = sandbox.handle(name, trusted=trusted)
    await handle.open()
    return handle


async def _output(handle: SandboxHandle, command: str) -> str:
    result = await handle.exec(command, timeout_sec=60)
    same(f"exit code of {command!r} ({result.stderr})", result.return_code, 0)
    return result.stdout


async def _read(channel: ByteChannel, size: int) -> bytes:
    """Exactly `size` bytes, or what comes before the end."""
    taken = bytearray()
    while len(taken) < size and (data := await channel.receive()):
        taken += data
    return bytes(taken)


def _holding(lock: str, then: str = "exec sleep 100000") -> str:
    """A shell command that says so once it holds `lock`, and holds it for ever."""
    return f"exec 9>{lock}; flock 9; echo held > {lock}.held; {then}"


async def _held(handle: SandboxHandle, lock: str) -> None:
    await _output(handle, f"while [ ! -s {lock}.held ]; do sleep 0.01; done")


async def _is_free(handle: SandboxHandle, lock: str, *, wait_sec: int = 0) -> bool:
    """Whether nobody holds `lock` (any more, within `wait_sec`)."""
    result = await handle.exec(["flock", "-w", str(wait_sec), lock, "true"], timeout_sec=60)
    return result.return_code == 0


# --- exec ---


async def output_and_exit_code_come_back(make: MakeSandbox) -> None:
    """Both outputs come apart, with the exit code, and nothing is said to be cut."""
    async with _role(make) as handle:
        result = await handle.exec("echo out; echo err >&2; exit 7")
        seen = (result.stdout, result.stderr, result.return_code, result.truncated)
        same("result", seen, ("out\n", "err\n", 7, False))


async def commands_start_in_the_task_folder(make: MakeSandbox) -> None:
    """A command starts in the sandbox's cwd, or in the one that it is given; a missing one is a SandboxError."""
    async with _up(make) as sandbox:
        handle = await _opened(sandbox, "solver")
        same("cwd", (await handle.exec("pwd")).stdout.strip(), sandbox.cwd)
        same("given cwd", (await handle.exec("pwd", cwd="/usr")).stdout.strip(), "/usr")
        with _refused("missing cwd"):
            await handle.exec("pwd", cwd=ABSENT)


async def environment_is_handed_over(make: MakeSandbox) -> None:
    """`env` reaches the command byte for byte, and only that command; HOME and PATH are there."""
    async with _role(make) as handle:
        value = "spaces, 'quotes', \"more\", $HOME, ünïcode,\nand lines"
        seen = await handle.exec('printf %s "$ODD"', env={"ODD": value})
        same("value", seen.stdout, value)
        same("value in the next command", (await handle.exec('printf %s "$ODD"')).stdout, "")
        true("HOME or PATH is empty", (await handle.exec('test -n "$HOME" && test -n "$PATH"')).return_code == 0)


async def a_list_is_no_shell_command(make: MakeSandbox) -> None:
    """A list of arguments is run as it is; a string goes through the shell."""
    async with _role(make) as handle:
        same("list", (await handle.exec(["printf", "%s", "$HOME *"])).stdout, "$HOME *")
        same("string", (await handle.exec("printf %s a | tr a b")).stdout, "b")


async def root_is_accepted_and_strangers_are_not(make: MakeSandbox) -> None:
    """`user="root"` works (agents ask for it); a user that does not exist is a SandboxError."""
    async with _role(make) as handle:
        same("as root", (await handle.exec("echo yes", user="root")).stdout, "yes\n")
        with _refused("unknown user", naming="nobody-knows-me"):
            await handle.exec("true", user="nobody-knows-me")


async def timeout_ends_the_command(make: MakeSandbox) -> None:
    """ExecTimeout holds what was printed, and the command and its children are dead."""
    async with _role(make) as handle:
        try:
            await handle.exec("echo begun; echo odd >&2; exec 9>lock; flock 9; sleep 100000; true", timeout_sec=1.0)
        except ExecTimeout as exc:
            same("output so far", (exc.stdout, exc.stderr), ("begun\n", "odd\n"))
        else:
            raise ClauseError("the command ran on for longer than its limit")
        true("a child of the command still holds its lock", await _is_free(handle, "/app/lock", wait_sec=10))


async def a_long_output_is_cut_in_the_middle(make: MakeSandbox) -> None:
    """Of 20 MB the beginning and the end come back, and `truncated` says so."""
    async with _role(make) as handle:
        result = await handle.exec("echo FIRST; head -c 20000000 /dev/zero | tr '\\0' x; echo; echo LAST")
        true("not said to be truncated", result.truncated)
        true(f"{len(result.stdout)} characters came back", len(result.stdout) < 10_000_000)
        true("the first line is gone", result.stdout.startswith("FIRST\n"))
        true("the last line is gone", result.stdout.endswith("\nLAST\n"))


async def a_command_may_be_longer_than_an_argument(make: MakeSandbox) -> None:
    """A shell command of 3 MB works, as does an environment of 500 kB in five variables."""
    async with _role(make) as handle:
        command = f": '{'x' * 3_000_000}'; echo done; exit 4"
        with _works("a command of 3 MB"):
            result = await handle.exec(command)
            same("result", (result.stdout, result.return_code), ("done\n", 4))
        env = {f"V{number}": "y" * 100_000 for number in range(5)}
        same(
            "environment", (await handle.exec('printf %s "$V0$V1$V2$V3$V4" | wc -c', env=env)).stdout.strip(), "500000"
        )


async def a_background_process_holds_nobody_up(make: MakeSandbox) -> None:
    """The result comes when the command ends, although something that it started still has its stdout."""
    async with _role(make) as handle:
        with _works("a command whose stdout somebody else has too"):
            result = await handle.exec("sleep 100000 & echo started", timeout_sec=30)
            same("output", result.stdout, "started\n")


async def stdin_of_a_command_is_empty(make: MakeSandbox) -> None:
    """A command that reads stdin sees its end."""
    async with _role(make) as handle:
        with _works("a command that reads stdin"):
            same("output", (await handle.exec("cat; echo end", timeout_sec=30)).stdout, "end\n")


async def output_that_is_no_text_is_decoded(make: MakeSandbox) -> None:
    """Bytes that are not UTF-8 become replacement characters, not an exception."""
    async with _role(make) as handle:
        same("output", (await handle.exec("printf 'a\\377b'")).stdout, "a\ufffdb")


async def commands_run_at_the_same_time(make: MakeSandbox) -> None:
    """Twenty commands at once each get their own answer; two that wait for each other both end."""
    async with _role(make) as handle:
        seen: dict[int, str] = {}

        async def one(number: int) -> None:
            seen[number] = (await handle.exec(f"echo {number}", timeout_sec=60)).stdout

        async with anyio.create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(one, number)
        same("answers", seen, {number: f"{number}\n" for number in range(20)})
        await handle.exec("mkfifo pipe")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_output, handle, "echo x > pipe")
            tasks.start_soon(_output, handle, "cat pipe")


async def a_cancelled_command_dies(make: MakeSandbox) -> None:
    """Cancelling exec ends the command."""
    async with _role(make) as handle, anyio.create_task_group() as tasks:
        tasks.start_soon(handle.exec, _holding("/app/lock"))
        await _held(handle, "/app/lock")
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            true("it still holds its lock", await _is_free(handle, "/app/lock", wait_sec=10))


# --- spawn ---


async def _echoed(make: MakeSandbox, size: int) -> None:
    async with _role(make) as handle:
        channel = await handle.spawn(["cat"])
        line = b"0123456789abcdef" * (size // 16) + b"\n"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(channel.send, line)
            back = await _read(channel, len(line))
        true(f"{len(back)} bytes came back of a line of {len(line)}, or other ones", back == line)
        await channel.close_stdin()
        same("exit code", await channel.wait(), 0)


async def a_channel_carries_lines(make: MakeSandbox) -> None:
    """Lines of 8 kB, 100 kB and 1 MB come back whole."""
    for size in (8_192, 102_400, 1_048_576):
        await _echoed(make, size)


async def a_channel_carries_a_line_of_64_mib(make: MakeSandbox) -> None:
    """A line of 64 MiB comes back whole."""
    await _echoed(make, 64 << 20)


async def a_line_over_the_cap_ends_nothing(make: MakeSandbox) -> None:
    """One byte beyond what an ACP line may have is read as too long, at its length, and the next line as ever."""
    async with _role(make) as handle:
        channel = await handle.spawn(["cat"])
        lines, read = Lines(), list[bytes | Oversize]()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(channel.send, b"x" * (MAX_LINE + 1) + b"\nthe next\n")
            while len(read) < 2 and (data := await channel.receive()):
                read += lines.feed(data)
        same("lines", [getattr(line, "size", line) for line in read], [MAX_LINE + 1, b"the next"])
        await channel.close_stdin()
        same("exit code", await channel.wait(), 0)


async def characters_may_be_split_anywhere(make: MakeSandbox) -> None:
    """Bytes are bytes: a character sent one byte at a time arrives as it was."""
    async with _role(make) as handle:
        channel = await handle.spawn(["cat"])
        text = "€ 漢字 🦊".encode()
        for at in range(len(text)):
            await channel.send(text[at : at + 1])
        await channel.close_stdin()
        same("bytes", await _read(channel, len(text) + 1), text)


async def stderr_never_mixes_and_never_blocks(make: MakeSandbox) -> None:
    """A process that floods stderr is not held up, nothing of it is on stdout, and the last 64 KiB are kept."""
    async with _role(make) as handle:
        flood = "head -c 3000000 /dev/zero | tr '\\0' e >&2; printf LAST >&2; echo done; cat"
        channel = await handle.spawn(["sh", "-c", flood])
        same("stdout", await _read(channel, 5), b"done\n")
        await channel.close_stdin()
        same("exit code", await channel.wait(), 0)
        tail = channel.stderr_tail()
        same("end of stderr", tail[-6:], "eeLAST"[-6:])
        same("length of the tail", len(tail), 65_536)


async def a_process_may_end_in_mid_line(make: MakeSandbox) -> None:
    """What was written before the end arrives, then the end, then the exit code."""
    async with _role(make) as handle:
        channel = await handle.spawn(["sh", "-c", "printf half; printf why >&2; exit 5"])
        same("stdout", await _read(channel, 100), b"half")
        same("after the end", await channel.receive(), b"")
        same("exit code and stderr", (await channel.wait(), channel.stderr_tail()), (5, "why"))


async def a_writer_waits_for_a_slow_reader(make: MakeSandbox) -> None:
    """Of what nobody reads at most 16 MiB are taken, in both directions together; and all that was taken arrives."""
    async with _role(make) as handle, anyio.create_task_group() as tasks:
        channel = await handle.spawn(["cat"])
        writer = _Writer(channel)
        tasks.start_soon(writer.write)
        while writer.taken <= MOST_UNREAD and await writer.goes_on():
            pass
        true(f"{writer.taken} bytes were taken although nobody reads", writer.taken <= MOST_UNREAD)
        writer.enough = True
        back = 0
        while data := await channel.receive():
            true(f"other bytes came than were sent, after {back}", data == _numbered(back, len(data)))
            back += len(data)
        same("bytes that came back", back, writer.taken)
        same("exit code", await channel.wait(), 0)


MOST_UNREAD: Final = 16 << 20
PIECE: Final = 256 << 10
STILL_SEC: Final = 3.0
"""A writer that got nothing in for so long waits for a reader."""


class _Writer:
    """Writes until it is told that it is enough, then closes stdin; counts what was taken."""

    def __init__(self, channel: ByteChannel) -> None:
        self.channel, self.taken, self.enough, self._moved = channel, 0, False, anyio.Event()

    async def write(self) -> None:
        while not self.enough:
            await self.channel.send(_numbered(self.taken, PIECE))
            self.taken += PIECE
            self._moved.set()
            self._moved = anyio.Event()
        await self.channel.close_stdin()

    async def goes_on(self) -> bool:
        """Whether another piece is taken before long."""
        with anyio.move_on_after(STILL_SEC) as still:
            await self._moved.wait()
        return not still.cancelled_caught


def _numbered(at: int, size: int) -> bytes:
    """These bytes of an endless stream of numbers, eight digits each."""
    first = at // 8
    return b"".join(b"%08d" % number for number in range(first, first + size // 8 + 2))[at % 8 :][:size]


async def stdin_can_be_closed(make: MakeSandbox) -> None:
    """The process sees the end of its stdin; sending after that is a SandboxError; closing twice is nothing."""
    async with _role(make) as handle:
        channel = await handle.spawn(["sh", "-c", "cat; echo over"])
        await channel.send(b"words ")
        await channel.close_stdin()
        await channel.close_stdin()
        same("stdout", await _read(channel, 100), b"words over\n")
        with _refused("sending to a closed stdin"):
            await channel.send(b"more")


async def a_process_can_be_killed(make: MakeSandbox) -> None:
    """`kill` ends it at once, whatever it ignores; the exit code is the signal; killing twice is nothing."""
    async with _role(make) as handle:
        channel = await handle.spawn(["sh", "-c", "trap '' TERM INT HUP; echo ready; while :; do sleep 1000; done"])
        same("stdout", await _read(channel, 6), b"ready\n")
        await channel.kill()
        same("exit code", await channel.wait(), -9)
        same("exit code, asked again", await channel.wait(), -9)
        await channel.kill()
        same("stdout after the end", await channel.receive(), b"")


async def several_may_wait_for_an_exit(make: MakeSandbox) -> None:
    """Two tasks that wait for one process both get its exit code."""
    async with _role(make) as handle:
        channel = await handle.spawn(["sh", "-c", "read line; exit 3"])
        seen: list[int] = []

        async def wait() -> None:
            seen.append(await channel.wait())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            tasks.start_soon(wait)
            await channel.send(b"go\n")
        same("exit codes", seen, [3, 3])


async def spawn_takes_env_and_cwd(make: MakeSandbox) -> None:
    """A spawned process gets its environment and its folder."""
    async with _role(make) as handle:
        channel = await handle.spawn(["sh", "-c", 'printf "%s %s" "$WHO" "$PWD"'], env={"WHO": "me"}, cwd="/usr")
        same("stdout", await _read(channel, 100), b"me /usr")


async def a_missing_program_is_named(make: MakeSandbox) -> None:
    """Starting what does not exist is a SandboxError that names it, not a process that dies."""
    async with _role(make) as handle:
        with _refused("spawn", naming="no-such-program"):
            await handle.spawn(["no-such-program", "--acp"])


# --- files ---


async def files_and_folders_go_up_and_down(make: MakeSandbox) -> None:
    """A file, and a folder's content, come back byte for byte with their modes."""
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        source = here / "source"
        contents = {"run.sh": (b"#!/bin/sh\n", 0o755), "deep/er/data.bin": (bytes(range(256)) * 999, 0o640)}
        for path, (data, mode) in contents.items():
            (source / path).parent.mkdir(parents=True, exist_ok=True)
            (source / path).write_bytes(data)
            (source / path).chmod(mode)
        async with _up(make) as sandbox:
            await sandbox.upload(source, "/app")
            await sandbox.upload(source / "run.sh", "/app/other/name.sh")
            await sandbox.download("/app", here / "back")
            await sandbox.download("/app/other/name.sh", here / "single.sh")
        for path, wanted in {**contents, "other/name.sh": contents["run.sh"]}.items():
            back = here / "back" / path
            true(f"{path} did not come back", back.is_file())
            same(path, (back.read_bytes(), back.stat().st_mode & 0o777), wanted)
        same("the single file", (here / "single.sh").read_bytes(), b"#!/bin/sh\n")


async def a_handle_reads_and_writes_files(make: MakeSandbox) -> None:
    """`write_file` makes folders and replaces what is there; `read_file` gives it back."""
    async with _role(make) as handle:
        await handle.write_file("/app/new/folder/file", b"one")
        await handle.write_file("/app/new/folder/file", b"two\0\xff")
        same("content", await handle.read_file("/app/new/folder/file"), b"two\0\xff")


async def processes_see_written_files(make: MakeSandbox) -> None:
    """A written file is there for commands, with its mode, and may be changed and removed by them."""
    async with _role(make) as handle:
        await handle.write_file("/app/tools/hello", b"#!/bin/sh\necho hello\n", mode=0o755)
        same("running it", await _output(handle, "tools/hello"), "hello\n")
        await _output(handle, "echo more >> tools/hello && rm tools/hello && rmdir tools")


async def a_missing_path_is_named(make: MakeSandbox) -> None:
    """Reading, downloading or uploading what does not exist is a SandboxError that names it."""
    with tempfile.TemporaryDirectory() as name:
        async with _up(make) as sandbox:
            handle = await _opened(sandbox, "solver")
            with _refused("read_file", naming=ABSENT):
                await handle.read_file(ABSENT)
            with _refused("download", naming=ABSENT):
                await sandbox.download(ABSENT, Path(name, "x"))
            with _refused("upload", naming="no-such-source"):
                await sandbox.upload(Path(name, "no-such-source"), "/app/x")


async def no_path_escapes(make: MakeSandbox) -> None:
    """A path that climbs out with `..` is refused, whichever way it is used."""
    out = "/app/../../../../../../etc/passwd"
    with tempfile.TemporaryDirectory() as name:
        async with _up(make) as sandbox:
            handle = await _opened(sandbox, "solver")
            Path(name, "source").write_text("planted")
            with _refused("read_file"):
                await handle.read_file(out)
            with _refused("write_file"):
                await handle.write_file(out, b"planted")
            with _refused("download"):
                await sandbox.download(out, Path(name, "x"))
            with _refused("upload"):
                await sandbox.upload(Path(name, "source"), out)


async def no_link_is_followed_out(make: MakeSandbox) -> None:
    """A link that an agent plants leads neither a download nor a trusted read or write out of its folder."""
    with tempfile.TemporaryDirectory() as name:
        async with _up(make) as sandbox:
            handle = await _opened(sandbox, "solver")
            ours = await _opened(sandbox, "set-up", trusted=True)
            await ours.write_file("/tests/secret", b"secret")
            await _output(handle, "ln -s /etc/passwd file; ln -s / root; ln -s /tests tests; ln -s ../../etc up")
            for path in ("file", "root/etc/passwd", "tests/secret", "up/passwd", "root"):
                with _refused(f"download of {path}", PathEscape):
                    await sandbox.download(f"/app/{path}", Path(name, "x"))
            with _refused("trusted read", PathEscape):
                await ours.read_file("/app/tests/secret")
            with _refused("trusted write", PathEscape):
                await ours.write_file("/app/tests/planted", b"x")
            with _refused("upload", PathEscape):
                await sandbox.upload(Path(__file__), "/app/root/etc/planted")
            await sandbox.download("/app", Path(name, "all"))
            leaks = [path for path in Path(name, "all").rglob("*") if path.is_file()]
            same("files that a download of links brought", leaks, [])


async def links_that_stay_inside_work(make: MakeSandbox) -> None:
    """A link within the folder is followed when it is named, and stays a link in a download of the folder."""
    with tempfile.TemporaryDirectory() as name:
        async with _up(make) as sandbox:
            handle = await _opened(sandbox, "solver")
            await _output(handle, "mkdir real; echo yes > real/file; ln -s real alias; ln -s ../real/file real/self")
            same("read_file", await handle.read_file("/app/alias/file"), b"yes\n")
            await sandbox.download("/app", Path(name, "all"))
            same("through the copied link", Path(name, "all/alias/file").read_text(), "yes\n")
            true("the link became a copy", Path(name, "all/alias").is_symlink())


async def odd_files_never_block(make: MakeSandbox) -> None:
    """A FIFO, an unreadable file and a deep nest do not hang a download, nor does reading a FIFO."""
    with tempfile.TemporaryDirectory() as name:
        async with _up(make) as sandbox:
            handle = await _opened(sandbox, "solver")
            await _output(handle, "mkfifo pipe; echo kept > file; chmod 000 file; mkdir -p a/b/c; chmod 500 a/b")
            with anyio.fail_after(30):
                with _refused("read of a FIFO"):
                    await handle.read_file("/app/pipe")
                await sandbox.download("/app", Path(name, "all"))
            true("the FIFO came along", not Path(name, "all/pipe").exists())
            Path(name, "all/file").chmod(0o600)
            same("the unreadable file", Path(name, "all/file").read_text(), "kept\n")
            Path(name, "all/a/b").chmod(0o700)


# --- who sees what ---


async def tests_are_for_trusted_handles(make: MakeSandbox) -> None:
    """`/tests` and `/logs/verifier` are there for a trusted handle; an agent cannot read, list or make them."""
    with tempfile.TemporaryDirectory() as name:
        Path(name, "test.sh").write_text("exit 0\n")
        async with _up(make) as sandbox:
            await sandbox.upload(Path(name), "/tests")
            ours = await _opened(sandbox, "verifier", trusted=True)
            agent = await _opened(sandbox, "solver")
            await ours.write_file("/logs/verifier/reward.txt", b"1")
            same("trusted read", await ours.read_file("/tests/test.sh"), b"exit 0\n")
            for path in ("/tests/test.sh", "/logs/verifier/reward.txt"):
                with _refused(f"an agent's read of {path}"):
                    await agent.read_file(path)
            await sandbox.download("/logs/verifier/reward.txt", Path(name, "reward"))
            same("reward", Path(name, "reward").read_text(), "1")


async def agents_cannot_reach_the_tests(make: MakeSandbox) -> None:
    """No command of an agent sees `/tests` or `/logs/verifier`, and what it makes there is not what we see."""
    async with _up(make) as sandbox:
        ours = await _opened(sandbox, "verifier", trusted=True)
        agent = await _opened(sandbox, "solver")
        await ours.write_file("/tests/secret", b"secret")
        await ours.write_file("/logs/verifier/reward.txt", b"0")
        await agent.exec(
            "mkdir -p /tests /logs/verifier; echo 1 > /logs/verifier/reward.txt; echo bad > /tests/test.sh"
        )
        true("an agent read /tests", (await agent.exec("cat /tests/secret")).return_code != 0)
        same("the reward", await _output(ours, "cat /logs/verifier/reward.txt"), "0")
        same("/tests", await _output(ours, "ls /tests"), "secret\n")


async def home_and_tmp_are_private(make: MakeSandbox) -> None:
    """What one handle has in HOME and `/tmp` no other one sees; `/app` and `/logs/agent` are shared."""
    async with _up(make) as sandbox:
        one, two = await _opened(sandbox, "one"), await _opened(sandbox, "two")
        for path in ("/tmp/note", "/home/agent/.netrc"):  # noqa: S108 - in the sandbox
            await one.write_file(path, b"mine")
            same(path, await one.read_file(path), b"mine")
            with _refused(f"another handle's read of {path}"):
                await two.read_file(path)
        for path in ("/app/note", "/logs/agent/note"):
            await one.write_file(path, b"ours")
            same(path, await two.read_file(path), b"ours")


async def processes_have_private_homes(make: MakeSandbox) -> None:
    """HOME is a folder of the handle's own, for its commands too; `/app` is shared and writable by all."""
    async with _up(make) as sandbox:
        one, two = await _opened(sandbox, "one"), await _opened(sandbox, "two")
        await _output(one, 'echo mine > "$HOME/note"; echo mine > /tmp/note; echo ours > /app/note')
        same("the other's folders", await _output(two, 'ls "$HOME" /tmp | grep note || true'), "")
        same("the shared one", await _output(two, "cat /app/note; echo more >> /app/note"), "ours\n")


# --- life and death ---


async def start_and_stop_are_idempotent(make: MakeSandbox) -> None:
    """Starting or stopping twice is nothing, nor is stopping what never started; a handle in JSON comes from start."""
    await make().stop()
    sandbox = make()
    first = await sandbox.start()
    same("second start", dict(await sandbox.start()), dict(first))
    same("what start returned, as JSON", json.loads(json.dumps(dict(first))), dict(first))
    await sandbox.stop()
    await sandbox.stop()
    with _refused("start after stop"):
        await sandbox.start()


async def handles_open_and_end_idempotently(make: MakeSandbox) -> None:
    """Nothing works before `open` or after `end`; both may be called twice, and `end` on what never opened."""
    async with _up(make) as sandbox:
        never = sandbox.handle("never")
        with _refused("use before open"):
            await never.read_file("/app/x")
        true("no evidence of a handle that never opened", await never.end())
        handle = await _opened(sandbox, "solver")
        await handle.open()
        evidence = await handle.end()
        true("end gave no evidence", evidence and all(evidence))
        true("a second end gave no evidence", await handle.end())
        with _refused("use after end"):
            await handle.exec("true")


async def ending_a_handle_ends_all_that_it_started(make: MakeSandbox) -> None:
    """A command in flight, a process, and daemons (double fork, setsid) are dead after `end`; one of them keeps moving.

    It forks and exits in a loop, so that it is never where a list of processes says that it is.
    """
    hop = "h='[ -e /app/hopper.held ] || exit; sh -c \"$h\" &'"
    hopping = _holding("/app/hopper", 'eval "$h"')
    async with _up(make) as sandbox:
        handle, other = await _opened(sandbox, "solver"), await _opened(sandbox, "other")
        await _output(handle, f"(setsid sh -c '{_holding('/app/daemon')}' </dev/null >/dev/null 2>&1 &) ; true")
        await _output(handle, f"({hop} setsid sh -c '{hopping}' </dev/null >/dev/null 2>&1 &) ; true")
        channel = await handle.spawn(["sh", "-c", _holding("/app/spawned")])
        failed: list[SandboxError] = []

        async def in_flight() -> None:
            try:
                await handle.exec(_holding("/app/command"))
            except SandboxError as exc:
                failed.append(exc)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(in_flight)
            for name in ("daemon", "hopper", "spawned", "command"):
                await _held(other, f"/app/{name}")
                true(f"the lock of {name} is free too early", not await _is_free(other, f"/app/{name}"))
            await handle.end()
            for name in ("daemon", "hopper", "spawned", "command"):
                true(f"{name} is alive after end", await _is_free(other, f"/app/{name}"))
        true("the command in flight did not fail", failed)
        same("exit code of the process", await channel.wait(), -9)
        same("its stdout", await channel.receive(), b"")


async def an_ended_handle_does_nothing_more(make: MakeSandbox) -> None:
    """Whoever still holds a handle that was ended, or a channel of it, gets a SandboxError, and nothing happens."""
    async with _up(make) as sandbox:
        handle, other = await _opened(sandbox, "solver"), await _opened(sandbox, "other")
        await handle.write_file("/app/before", b"x")
        await handle.end()
        for what, call in (
            ("exec", lambda: handle.exec("echo late > /app/late")),
            ("spawn", lambda: handle.spawn(["sh", "-c", "echo late > /app/late"])),
            ("read_file", lambda: handle.read_file("/app/before")),
            ("write_file", lambda: handle.write_file("/app/late", b"late")),
            ("open", handle.open),
        ):
            with _refused(f"{what} after end"):
                await call()
        with _refused("what a late call wrote"):
            await other.read_file("/app/late")


async def services_of_the_task_live_on(make: MakeSandbox) -> None:
    """Ending an agent's handle leaves the services that we started for the task, detached ones too."""
    async with _up(make) as sandbox:
        ours = await _opened(sandbox, "set-up", trusted=True)
        await _output(ours, f"(setsid sh -c '{_holding('/app/service')}' </dev/null >/dev/null 2>&1 &) ; true")
        await _held(ours, "/app/service")
        agent = await _opened(sandbox, "solver")
        await _output(agent, "true")
        await agent.end()
        with _works("our own handle, once an agent's has ended"):
            true("the service is gone", not await _is_free(ours, "/app/service"))


async def other_handles_live_on(make: MakeSandbox) -> None:
    """Ending one handle leaves what others started alone."""
    async with _up(make) as sandbox:
        one, two = await _opened(sandbox, "one"), await _opened(sandbox, "two")
        channel = await two.spawn(["cat"])
        await one.exec("sleep 100000 & true")
        await one.end()
        with _works("what another handle started"):
            await channel.send(b"still here\n")
        same("answer", await _read(channel, 11), b"still here\n")
        await channel.close_stdin()
        same("exit code", await channel.wait(), 0)


async def stop_ends_open_handles(make: MakeSandbox) -> None:
    """`stop` ends handles that are still open, and nothing works afterwards."""
    sandbox = make()
    await sandbox.start()
    handle = await _opened(sandbox, "solver")
    channel = await handle.spawn(["cat"])
    await sandbox.stop()
    with _refused("use after stop"):
        await handle.exec("true")
    same("exit code", await channel.wait(), -9)


async def a_cancelled_start_leaves_nothing(make: MakeSandbox) -> None:
    """Cancelled soon after its begin, `start` can be followed by `stop`, and another sandbox comes up."""
    for seconds in (0.0, 0.0005, 0.001, 0.003, 0.01):
        sandbox = make()
        with _works("start, after others that were cancelled"), anyio.move_on_after(seconds):
            await sandbox.start()
        await sandbox.stop()
    with _works("start, after others that were cancelled"):
        async with _up(make) as sandbox:
            await _opened(sandbox, "solver")


async def what_a_dead_owner_left_is_reaped(make: MakeSandbox) -> None:
    """By what `start` returned a sandbox is given back without the object: what ran in it is dead; twice is nothing."""
    sandbox, later = make(), make()
    try:
        found = dict(await sandbox.start())
        handle = await _opened(sandbox, "solver")
        channel = await handle.spawn(["sh", "-c", "echo up; exec sleep 100000"])
        same("stdout", await _read(channel, 3), b"up\n")
        for _ in range(2):
            await reaper(found["kind"])(found)
        true("a process of it is alive after it was reaped", await _is_over(channel))
        with _refused("a command in what was reaped"):
            await handle.exec("true", timeout_sec=DEAD_SEC)
        if isinstance(later, Attachable):
            with _refused("attaching to what was reaped"):
                await later.attach(found)
    finally:
        with anyio.CancelScope(shield=True):
            await later.stop()
            await sandbox.stop()


async def _is_over(channel: ByteChannel) -> bool:
    """Whether its process was killed, or nothing can ever be known of it: that is known soon."""
    with anyio.move_on_after(DEAD_SEC):
        try:
            return await channel.wait() != 0
        except SandboxError:
            return True
    return False


async def _at_work(sandbox: Sandbox) -> SandboxHandle:
    """An agent's handle that has written a file, a daemon of it, and a service of ours that detached itself."""
    agent, ours = await _opened(sandbox, "solver"), await _opened(sandbox, "set-up", trusted=True)
    await agent.write_file("/app/work", b"done")
    for handle, lock in ((agent, "/app/daemon"), (ours, "/app/service")):
        await _output(handle, f"(setsid sh -c '{_holding(lock)}' </dev/null >/dev/null 2>&1 &) ; true")
        await _held(handle, lock)
    return agent


async def _taken_over(sandbox: Sandbox, found: object) -> None:
    """Attach to what was at work, by what its `start` had returned: its files are there, nothing is alive, it works."""
    assert isinstance(sandbox, Attachable)
    evidence = await sandbox.attach(json.loads(json.dumps(found)))
    true("attach gave no evidence", evidence and all(evidence))
    agent, ours = await _opened(sandbox, "solver"), await _opened(sandbox, "look", trusted=True)
    with _works("a file"):
        same("a file", await agent.read_file("/app/work"), b"done")
    for lock in ("/app/daemon", "/app/service"):
        true(f"who holds {lock} is alive", await _is_free(ours, lock))
    channel = await agent.spawn(["cat"])
    await channel.send(b"still here\n")
    same("answer", await _read(channel, 11), b"still here\n")


async def what_a_dead_owner_left_can_be_attached_to(make: MakeSandbox) -> None:
    """Where it is `Attachable`: a new object takes over the files of an old one, and proves all dead that ran there."""
    if isinstance(make(), Attachable):
        async with _up(make) as old:
            found = dict(await old.start())
            await _at_work(old)
            new = make()
            try:
                await _taken_over(new, found)
            finally:
                with anyio.CancelScope(shield=True):
                    await new.stop()


async def what_is_left_can_be_looked_into(make: MakeSandbox) -> None:
    """Where it is `Keepable`: after `leave`, said twice, it is of no use here, and there for whoever can attach."""
    if isinstance(make(), Keepable):
        async with _up(make) as old:
            assert isinstance(old, Keepable)
            found = dict(await old.start())
            try:
                agent = await _at_work(old)
                await old.leave()
                await old.leave()
                with _refused("use after leave"):
                    await agent.exec("true")
                await old.stop()
                if isinstance(new := make(), Attachable):
                    await _taken_over(new, found)
                    await new.stop()
            finally:
                with anyio.CancelScope(shield=True):
                    await reaper(found["kind"])(found)


async def a_cancelled_open_leaves_nothing(make: MakeSandbox) -> None:
    """Cancelled at any point, `open` leaves a handle that can be opened again, or ended."""
    async with _up(make) as sandbox:
        for number, seconds in enumerate((0.0, 0.001, 0.005, 0.01, 0.02, 0.04)):
            handle = sandbox.handle(f"role-{number}")
            with anyio.move_on_after(seconds):
                await handle.open()
            with _works(f"open, after one that was cancelled after {seconds} s"):
                await handle.open()
                await handle.write_file("/app/x", b"works")
            await handle.end()


def _clause(check: Callable[[MakeSandbox], Awaitable[None]], *needs: Need) -> Clause[MakeSandbox]:
    return Clause(check.__name__, (check.__doc__ or "").strip(), check, frozenset(needs))


SANDBOX_CLAUSES: Final = (
    *(
        _clause(check, "processes")
        for check in (
            output_and_exit_code_come_back,
            commands_start_in_the_task_folder,
            environment_is_handed_over,
            a_list_is_no_shell_command,
            root_is_accepted_and_strangers_are_not,
            timeout_ends_the_command,
            a_long_output_is_cut_in_the_middle,
            a_command_may_be_longer_than_an_argument,
            a_background_process_holds_nobody_up,
            stdin_of_a_command_is_empty,
            output_that_is_no_text_is_decoded,
            commands_run_at_the_same_time,
            a_cancelled_command_dies,
            a_channel_carries_lines,
            characters_may_be_split_anywhere,
            stderr_never_mixes_and_never_blocks,
            a_process_may_end_in_mid_line,
            a_writer_waits_for_a_slow_reader,
            stdin_can_be_closed,
            a_process_can_be_killed,
            several_may_wait_for_an_exit,
            spawn_takes_env_and_cwd,
            a_missing_program_is_named,
            processes_see_written_files,
            no_link_is_followed_out,
            links_that_stay_inside_work,
            odd_files_never_block,
            agents_cannot_reach_the_tests,
            processes_have_private_homes,
            ending_a_handle_ends_all_that_it_started,
            services_of_the_task_live_on,
            other_handles_live_on,
            stop_ends_open_handles,
            what_a_dead_owner_left_can_be_attached_to,
            what_is_left_can_be_looked_into,
        )
    ),
    _clause(a_channel_carries_a_line_of_64_mib, "processes", "large"),
    _clause(a_line_over_the_cap_ends_nothing, "processes", "large"),
    _clause(what_a_dead_owner_left_is_reaped, "processes", "reaping"),
    *(
        _clause(check)
        for check in (
            files_and_folders_go_up_and_down,
            a_handle_reads_and_writes_files,
            a_missing_path_is_named,
            no_path_escapes,
            tests_are_for_trusted_handles,
            home_and_tmp_are_private,
            start_and_stop_are_idempotent,
            handles_open_and_end_idempotently,
            an_ended_handle_does_nothing_more,
            a_cancelled_start_leaves_nothing,
            a_cancelled_open_leaves_nothing,
        )
    ),
)
"""Everything that a sandbox has to do."""
