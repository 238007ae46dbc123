"""A second terminal: what is asked of a rollout by its socket, in every state, and who is refused, in which words."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
from pathlib import Path

import anyio
import anyio.to_thread
import pytest
from harness import TRANSPORTS, build, on
from test_kernel import WAITS
from test_ways_out import REACH, hooked

from orchestrator import control
from orchestrator.control import ask, serve
from orchestrator.journal import read_journal
from states import events as ev
from states.errors import ConfigError
from states.journal import Transition

pytestmark = pytest.mark.anyio


@pytest.fixture(params=TRANSPORTS)
def transport(request):
    """Both transports."""
    return request.param


async def asked(folder, what, *, to_the_end=False):
    """What a second terminal is told; with `to_the_end`, also the states until the socket is gone."""

    def there():
        with ask(folder, what) as (said, states):
            return said, list(states) if to_the_end else []

    with anyio.fail_after(30):
        return await anyio.to_thread.run_sync(there, abandon_on_cancel=True)


def events(folder):
    """The events in its journal."""
    return [record.event for record in read_journal(folder) if isinstance(record, Transition)]


async def until(rollout, *states):
    """Wait until it is in one of these."""
    with anyio.fail_after(30):
        while rollout.state not in states:
            await anyio.lowlevel.checkpoint()


# --- what can be asked ----------------------------------------------------------------------------------------


async def test_a_cancel_is_journaled_as_the_terminals_and_told_until_it_is_closed(transport, tmp_path):
    """The answer at once, each state it passes, and the end of the line only when the result is written."""
    rollout = build(transport, WAITS, out=tmp_path).rollout
    heard = []

    async def second_terminal():
        await until(rollout, "executing")
        heard.extend(await asked(rollout.folder, "cancel", to_the_end=True))
        assert json.loads((rollout.folder / "result.json").read_text())["state"] == "closed/cancelled"

    async with anyio.create_task_group() as group:
        group.start_soon(second_terminal)
        async with serve(rollout):
            await rollout.run()
    said, states = heard
    assert (said.changed, said.state) == (True, "executing")
    assert said.said.startswith("cancelled")
    assert states[-2:] == ["releasing", "closed/cancelled"]
    assert states[0] == "cancelling"
    assert [event.by for event in events(rollout.folder) if isinstance(event, ev.Cancelled)] == ["terminal"]


async def test_a_second_cancel_changes_nothing_and_says_so(transport, tmp_path):
    """Wherever the first one has come to."""
    stand = build(transport, WAITS, out=tmp_path)
    rollout, heard = stand.rollout, []

    async def second_terminal():
        await until(rollout, "executing")
        heard.append((await asked(rollout.folder, "cancel"))[0])
        heard.append((await asked(rollout.folder, "cancel"))[0])
        held_up.set()

    held_up = anyio.Event()

    async def hook(moved):
        if moved.dest == "quiescing":
            await held_up.wait()

    hooked(stand, hook)
    async with anyio.create_task_group() as group:
        group.start_soon(second_terminal)
        async with serve(rollout):
            await rollout.run()
    assert [said.changed for said in heard] == [True, False]
    assert "already: nothing changes" in heard[1].said
    assert rollout.state == "closed/cancelled"


@pytest.mark.parametrize("state", sorted(REACH))
async def test_everything_may_be_asked_in_every_state(transport, state, tmp_path):
    """Each is answered, none breaks anything, and a cancel closes it."""
    stand = REACH[state](transport)
    rollout = stand.rollout
    said = []

    def at_once():
        said.extend(control.carry_out(rollout, what) for what in ("interrupt", "pause", "resume", "cancel", "cancel"))

    if state == "provisioning":
        at_once()
    name = {"acp": "session/acp", "session-factory": "session/factory"}[transport] if state == "session" else state
    hooked(stand, on(name, at_once))
    with anyio.fail_after(30):
        await rollout.run()
    assert len(said) == 5
    assert [answer.state for answer in said] == [said[0].state] * 5
    assert not said[-1].changed
    assert rollout.closed
    assert rollout.state == ("closed/rewarded" if state == "releasing" else "closed/cancelled")


async def test_an_interrupt_ends_the_turn_and_not_the_rollout(transport, tmp_path):
    """Asked again without a turn in flight, nothing happens, and that is said."""
    rollout = build(transport, WAITS, out=tmp_path).rollout
    heard = []

    async def second_terminal():
        await until(rollout, "executing")
        heard.append((await asked(rollout.folder, "interrupt"))[0])

    async with anyio.create_task_group() as group:
        group.start_soon(second_terminal)
        async with serve(rollout):
            await rollout.run()
    assert heard[0].changed
    assert rollout.state == "closed/rewarded"
    assert rollout.result().ended_by == "interrupted"
    assert [event.by for event in events(rollout.folder) if isinstance(event, ev.Interrupted)] == ["terminal"]
    assert control.carry_out(rollout, "interrupt").said == "no turn is in flight"


async def test_a_pause_holds_it_before_its_next_turn_and_a_resume_lets_it_go_on(transport, tmp_path):
    """Who paused and who resumed is in the journal; a second pause says who holds it."""
    rollout = build(transport, out=tmp_path).rollout
    heard = []

    async def second_terminal():
        heard.append((await asked(rollout.folder, "pause"))[0])
        heard.append((await asked(rollout.folder, "pause"))[0])
        group.start_soon(rollout.run)
        await until(rollout, "paused")
        heard.append((await asked(rollout.folder, "resume"))[0])

    async with serve(rollout), anyio.create_task_group() as group:
        group.start_soon(second_terminal)
    assert [said.changed for said in heard[:3]] == [True, False, True]
    assert heard[1].said == "terminal holds it already: nothing changes"
    found = events(rollout.folder)
    assert [event.by for event in found if isinstance(event, ev.Paused | ev.Resumed)] == ["terminal", "terminal"]
    assert rollout.state == "closed/rewarded"


# --- who is heard, and what of -----------------------------------------------------------------------------------


async def test_the_socket_is_ours_alone_and_goes_with_the_block(tmp_path):
    """Mode 0600 from its first moment, in a folder of ours; one that a killed process left is replaced."""
    rollout = build("acp", out=tmp_path).rollout
    path = rollout.folder / control.SOCKET
    with contextlib_socket(path):
        pass
    assert path.exists()
    async with serve(rollout):
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        assert control.is_driven(rollout.folder)
    assert not path.exists()
    await rollout.run()


def contextlib_socket(path):
    """A socket that its process left behind."""
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    return left


async def test_a_path_may_be_longer_than_a_socket_address(transport, tmp_path):
    """An address holds 107 bytes; a folder is reached by its descriptor."""
    deep = tmp_path / ("d" * 200) / ("e" * 200)
    rollout = build(transport, WAITS, out=deep).rollout

    async def second_terminal():
        await until(rollout, "executing")
        await asked(rollout.folder, "cancel", to_the_end=True)

    async with anyio.create_task_group() as group:
        group.start_soon(second_terminal)
        async with serve(rollout):
            await rollout.run()
    assert rollout.state == "closed/cancelled"


async def test_another_users_process_is_not_heard(tmp_path, monkeypatch):
    """What the kernel says of the peer counts, whatever the socket's mode."""
    rollout = build("acp", out=tmp_path).rollout
    monkeypatch.setattr(control, "_is_ours", lambda _connection: False)
    async with serve(rollout):
        with pytest.raises(ConfigError, match="hears nobody"):
            await asked(rollout.folder, "cancel")
    assert not rollout.facts.ending
    await rollout.run()


@pytest.mark.parametrize(
    "request_line",
    [b"\n", b"cancel\n", b'{"ask": "kill"}\n', b"x" * 5000 + b"\n", b'{"ask": "cancel"', b'["cancel"]\n'],
)
async def test_what_is_no_request_changes_nothing(tmp_path, request_line):
    """Rubbish, a word that is none, more bytes than a request has, one without an end: answered, and heard on."""
    rollout = build("acp", out=tmp_path).rollout
    async with serve(rollout):

        def speak():
            with socket.socket(socket.AF_UNIX) as line:
                line.settimeout(20)
                line.connect(str(rollout.folder / control.SOCKET))
                line.sendall(request_line)
                line.shutdown(socket.SHUT_WR)
                return line.recv(1000)

        answer = await anyio.to_thread.run_sync(speak)
        assert b"not understood; ask for one of interrupt, cancel, pause, resume" in answer
        assert (await asked(rollout.folder, "resume"))[0].said == "nobody holds it: it is not paused"
    assert not rollout.facts.ending
    await rollout.run()


async def test_more_callers_than_are_heard_at_a_time_wait_their_turn(tmp_path):
    """Watchers that stay hold a place each; one that leaves makes room."""
    rollout = build("acp", out=tmp_path).rollout
    waiting = []

    async def one_more():
        waiting.append((await asked(rollout.folder, "pause"))[0])

    async with serve(rollout), anyio.create_task_group() as group:
        watching = [ask(rollout.folder, "resume") for _ in range(control.CLIENTS)]
        for caller in watching:
            await anyio.to_thread.run_sync(caller.__enter__)
        group.start_soon(one_more)
        await anyio.wait_all_tasks_blocked()
        assert not waiting
        for caller in watching:
            caller.__exit__(None, None, None)
    assert waiting[0].changed
    rollout.resume()
    await rollout.run()


async def test_a_rollout_without_a_folder_has_no_control():
    with pytest.raises(ConfigError, match="keeps nothing on disk"):
        async with serve(build("acp").rollout):
            pass


async def test_what_is_raised_in_the_block_comes_out_as_it_is(tmp_path):
    """No group around it, and the socket is gone."""
    rollout = build("acp", out=tmp_path).rollout
    with pytest.raises(ZeroDivisionError):
        async with serve(rollout):
            raise ZeroDivisionError
    assert not (rollout.folder / control.SOCKET).exists()
    await rollout.run()


# --- why nobody hears ----------------------------------------------------------------------------------------------


async def test_there_is_one_sentence_for_a_folder_that_holds_no_rollout(tmp_path):
    with pytest.raises(ConfigError, match="holds no rollout"):
        await asked(tmp_path / "nothing", "cancel")


async def test_a_closed_rollout_can_be_asked_nothing(tmp_path):
    rollout = build("acp", out=tmp_path).rollout
    await rollout.run()
    with pytest.raises(ConfigError, match="rollout r1 is over: closed/rewarded"):
        await asked(rollout.folder, "cancel")


async def test_a_program_that_hears_nobody_is_named(tmp_path):
    rollout = build("acp", out=tmp_path).rollout
    with pytest.raises(ConfigError, match=rf"process {os.getpid()}, which drives .* orchestrator\.control\.serve"):
        await asked(rollout.folder, "cancel")
    await rollout.run()


async def test_a_stopped_rollout_says_who_stopped_it_and_what_helps(tmp_path):
    rollout = build("acp", WAITS, out=tmp_path).rollout
    rollout.stop("SIGINT")
    await rollout.run()
    await rollout.detach()
    with pytest.raises(
        ConfigError, match=r"it was stopped by SIGINT; `rollout resume .*r1` goes on with it, `rollout reap"
    ):
        await asked(rollout.folder, "cancel")


async def test_a_rollout_of_another_machine_is_asked_there(tmp_path):
    rollout = build("acp", out=tmp_path).rollout
    journal = rollout.folder / "journal.jsonl"
    journal.write_text(journal.read_text().replace(f'"host":"{socket.gethostname()}"', '"host":"elsewhere"'))
    with pytest.raises(ConfigError, match="is driven on 'elsewhere': ask it there"):
        await asked(rollout.folder, "cancel")
    await rollout.run()


DIES = """
import os, sys
from pathlib import Path
from orchestrator import Rollout, RolloutConfig
Rollout(RolloutConfig(prompt="hi", agent="noop", sandbox="fake", out=Path(sys.argv[1]), new_id=lambda: "dead"))
os.kill(os.getpid(), 9)
"""


async def test_a_dead_orchestrator_is_named_with_what_helps(tmp_path):
    """Its socket, if it left one, refuses."""
    await anyio.run_process([sys.executable, "-c", DIES, str(tmp_path)], check=False)
    folder = tmp_path / "dead"
    contextlib_socket(folder / control.SOCKET).close()
    with pytest.raises(ConfigError, match=r"process \d+, which did, is dead; `rollout resume .* `rollout reap"):
        await asked(folder, "pause")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
async def test_another_users_rollout_is_refused_by_the_kernel(tmp_path):
    """A process of another user gets one sentence: not permitted, and whose it is."""
    rollout = build("acp", out=tmp_path).rollout
    for folder in (rollout.folder, *rollout.folder.parents):
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)
    code = (
        "import os, sys; from pathlib import Path; from orchestrator.control import ask\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try: ask(Path(sys.argv[1]), 'cancel').__enter__()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    async with serve(rollout):
        done = await anyio.run_process([sys.executable, "-c", code, str(rollout.folder)], check=False)
    assert done.stdout.decode().startswith("ConfigError rollout r1 belongs to user 0: only they may ask it"), (
        done.stderr
    )
    await rollout.run()
