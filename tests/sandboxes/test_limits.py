"""Limits: which control groups are made, and what is said where none can be."""

from __future__ import annotations

import os

import pytest

from orchestrator.sandboxes import _limits
from orchestrator.sandboxes._limits import Cgroup, Limits, fallback, make_cgroup

ALL = Limits(cpus=1.5, memory_mb=64, pids=10, disk_mb=5)


@pytest.fixture
def version_2(tmp_path):
    """A hierarchy of version 2 in plain files, with all controllers given to children."""
    base = tmp_path / "cgroup"
    base.mkdir()
    (base / "cgroup.subtree_control").write_text("cpu memory pids\n")
    (tmp_path / "mounts").write_text(f"cgroup2 {base} cgroup2 rw 0 0\n")
    return base


def test_version_2_has_one_group_for_all_controllers(version_2, tmp_path):
    """Sizes in bytes, processors as a quota of each 100 ms."""
    group = make_cgroup("box", ALL, mounts=tmp_path / "mounts")
    assert set(group.folders.values()) == {version_2 / "box"}
    read = {path.name: path.read_text() for path in (version_2 / "box").iterdir()}
    assert read == {"memory.max": str(64 << 20), "pids.max": "10", "cpu.max": "150000 100000"}
    assert _limits.find_cgroup("box", mounts=tmp_path / "mounts").folders == {str(version_2): version_2 / "box"}
    group.attach(42)
    assert (version_2 / "box/cgroup.procs").read_text() == "42"


def test_controller_that_is_not_given_is_switched_on(version_2, tmp_path):
    """Where the parent may, it hands the controller down."""
    (version_2 / "cgroup.subtree_control").write_text("cpu\n")
    make_cgroup("box", Limits(pids=7), mounts=tmp_path / "mounts")
    assert (version_2 / "cgroup.subtree_control").read_text() == "+pids"


def test_processes_that_were_killed_for_memory_are_counted(tmp_path):
    """In the words of both versions; nothing is counted where there is no group, or a kernel that does not say."""
    told = {"memory.events": "low 0\noom 4\noom_kill 3\n", "memory.oom_control": "under_oom 0\noom_kill 2\n"}
    for name, text in told.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
    counted = [Cgroup({"memory": tmp_path / name}).killed_for_memory() for name in (*told, "nowhere")]
    assert counted == [3, 2, 0]
    assert Cgroup({}).killed_for_memory() == 0


def test_version_1_has_a_group_a_controller(tmp_path):
    """With its own names of files."""
    lines = []
    for name in ("memory", "pids", "cpu,cpuacct"):
        (tmp_path / name).mkdir()
        lines.append(f"cgroup {tmp_path / name} cgroup rw,{name} 0 0\n")
    (tmp_path / "mounts").write_text("".join(lines))
    group = make_cgroup("box", ALL, mounts=tmp_path / "mounts")
    assert (group.folders["memory"] / "memory.limit_in_bytes").read_text() == str(64 << 20)
    assert (group.folders["cpu"] / "cpu.cfs_quota_us").read_text() == "150000"
    assert len(set(group.folders.values())) == 3


def test_what_cannot_be_made_is_left_out(tmp_path):
    """No hierarchy, or one that refuses: no group, no exception, nothing left behind."""
    assert make_cgroup("box", ALL, mounts=tmp_path / "none").folders == {}
    (tmp_path / "mounts").write_text(f"cgroup2 {tmp_path / 'missing'} cgroup2 rw 0 0\n")
    assert make_cgroup("box", ALL, mounts=tmp_path / "mounts").folders == {}


def test_every_limit_without_a_group_is_said():
    """Memory and processors are limited by half measures, which are named; so are processes of root."""
    found = fallback(ALL, Cgroup({}), own_uid=False)
    assert [text.partition(":")[0] for text in found.unenforced if "pids" not in text] == ["memory", "cpus"]
    assert found.rlimits["RLIMIT_DATA"] == 64 << 20
    assert found.rlimits["RLIMIT_FSIZE"] == 5 << 20
    assert 1 <= len(found.cpus) <= 2
    assert ("RLIMIT_NPROC" in found.rlimits) == (os.geteuid() != 0)


def test_uid_of_its_own_makes_the_limit_on_processes_hold(monkeypatch):
    """The kernel counts any user but root; before 5.14 over all sandboxes, so it is said instead."""
    assert fallback(ALL, Cgroup({}), own_uid=True).rlimits["RLIMIT_NPROC"] == 10
    monkeypatch.setattr(_limits, "_kernel", lambda: (5, 10))
    old = fallback(ALL, Cgroup({}), own_uid=True)
    assert "RLIMIT_NPROC" not in old.rlimits
    assert any(text.startswith("pids:") for text in old.unenforced)


def test_limits_that_a_group_keeps_need_no_fallback(tmp_path):
    """Only what no control group limits file by file: core dumps and the size of one file."""
    group = Cgroup(dict.fromkeys(("memory", "pids", "cpu"), tmp_path))
    found = fallback(ALL, group, own_uid=True)
    assert (found.unenforced, found.cpus) == ((), ())
    assert set(found.rlimits) == {"RLIMIT_CORE", "RLIMIT_FSIZE"}
