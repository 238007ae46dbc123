"""Parts of the supervisor that can be tried outside a sandbox; the whole is in the conformance suite."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.sandboxes import supervisor
from orchestrator.sandboxes.supervisor import TAIL_BYTES, disk_usage, find, pump, read_tail, write_tail


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 2 * TAIL_BYTES)), max_size=6))
def test_ring_holds_the_last_of_whatever_was_written(writes):
    """Any sequence of writes, also ones longer than the ring, leaves the last 64 KiB in order."""
    fd = os.memfd_create("ring")
    try:
        os.ftruncate(fd, 8 + TAIL_BYTES)
        total, wanted = 0, b""
        for value, size in writes:
            data = bytes([value]) * size
            total = write_tail(fd, total, data)
            wanted = (wanted + data)[-TAIL_BYTES:]
        assert read_tail(fd) == wanted
    finally:
        os.close(fd)


def test_disk_usage_counts_what_hides(tmp_path):
    """Files, folders, empty files, files that were deleted while open; hard links once."""
    empty = disk_usage([str(tmp_path)])
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    os.link(tmp_path / "a", tmp_path / "b")
    one = disk_usage([str(tmp_path)])
    assert 100_000 <= one - empty <= 120_000
    for number in range(100):
        (tmp_path / str(number)).touch()
    assert disk_usage([str(tmp_path)]) - one >= 100 * supervisor.FILE_BYTES
    with tempfile.TemporaryFile(dir=tmp_path) as hidden:
        before = disk_usage([str(tmp_path)])
        hidden.write(b"x" * 1_000_000)
        hidden.flush()
        assert disk_usage([str(tmp_path)]) - before >= 900_000


def test_what_is_bound_there_is_not_counted(tmp_path):
    """An agent's installation below /tmp is the host's, and as large as it likes."""
    empty = disk_usage([str(tmp_path)])
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "big").write_bytes(b"x" * 1_000_000)
    assert disk_usage([str(tmp_path)]) - empty >= 1_000_000
    assert disk_usage([str(tmp_path)], frozenset({str(tmp_path / "installed")})) == empty


def test_nest_without_a_path_counts_as_too_much(tmp_path):
    """A place that cannot be looked into is no place to hide in."""
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(40):
        os.mkdir("d" * 200, dir_fd=here)
        inner = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    assert disk_usage([str(tmp_path)]) > 1 << 60


def test_programs_are_found_on_the_path_of_the_command(tmp_path):
    """Not on PID 1's own; folders and files that cannot be run are passed over."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    (tmp_path / "one/tool").write_text("not executable")
    (tmp_path / "one/other").mkdir()
    (tmp_path / "two/tool").write_text("#!/bin/sh\n")
    (tmp_path / "two/tool").chmod(0o755)
    path = f"{tmp_path}/one:{tmp_path}/two"
    assert find("tool", path) == f"{tmp_path}/two/tool"
    assert find("/any/where", path) == "/any/where"
    with pytest.raises(FileNotFoundError, match="other"):
        find("other", path)


def test_pump_ends_one_direction_only():
    """The end of one side is passed on as the end of that direction; the other one goes on."""
    (ours, client), (server, theirs) = socket.socketpair(), socket.socketpair()
    with ours, client, server, theirs:
        thread = threading.Thread(target=pump, args=(client, server))
        thread.start()
        ours.sendall(b"request")
        ours.shutdown(socket.SHUT_WR)
        thread.join(10)
        assert theirs.recv(100) == b"request"
        assert theirs.recv(100) == b""
        theirs.sendall(b"answer")
        pumped = threading.Thread(target=pump, args=(server, client))
        pumped.start()
        assert ours.recv(100) == b"answer"
        theirs.close()
        pumped.join(10)
        assert ours.recv(100) == b""


@pytest.mark.parametrize("program", ["supervisor", "container"])
def test_it_starts_fast(program):
    """It imports none of the modules that would double its start; nor does PID 1 of a container, files included."""
    heavy = "socket signal json subprocess threading pathlib contextlib collections functools typing enum re selectors"
    code = f"import sys, {program}; print(*sorted(set({heavy!r}.split()) & set(sys.modules)))"
    folder = Path(supervisor.__file__).parent
    argv = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({str(folder)!r}); {code}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
