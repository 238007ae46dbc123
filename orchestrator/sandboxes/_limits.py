"""What a sandbox may use, and who enforces it: control groups where we may make one, else limits of each process.

What neither can enforce is said, in `unenforced`, never passed over.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread
import attrs

from states.errors import ConfigError, SandboxError

CPU_PERIOD_US: Final = 100_000
CONTROLLERS: Final = ("memory", "pids", "cpu")


LEAST_MEMORY_MB: Final = 16
"""What a sandbox's own processes need, with a shell. A task needs more."""


def check_memory(memory_mb: int | None, kind: str) -> None:
    """Raise `ConfigError` for a limit under which a sandbox cannot even come up."""
    if memory_mb is not None and memory_mb < LEAST_MEMORY_MB:
        raise ConfigError(
            f"the task's memory_mb = {memory_mb} is too little: a {kind} sandbox needs {LEAST_MEMORY_MB} MiB to come "
            "up, and the task's own programs need more; raise it in the task"
        )


@attrs.frozen(kw_only=True)
class Limits:
    """What a sandbox may use. None: not limited. Without being asked, a fork bomb and a disk filler are stopped.

    Attributes:
        cpus: Processors, as a number of whole or part ones.
        memory_mb: Memory of all its processes together, in MiB.
        pids: Processes and threads; a fork bomb stops here.
        disk_mb: What its folders may hold together, in MiB.
    """

    cpus: float | None = None
    memory_mb: int | None = None
    pids: int | None = 4096
    disk_mb: int | None = 10_240


@attrs.frozen
class Cgroup:
    """Control groups that hold a sandbox: one folder with version 2, one a controller with version 1."""

    folders: Mapping[str, Path]
    """By controller: `memory`, `pids`, `cpu`."""

    def attach(self, pid: int) -> None:
        """Put a process, and what it will start, under the limits. Raises `OSError`."""
        for folder in dict.fromkeys(self.folders.values()):
            (folder / "cgroup.procs").write_text(str(pid))

    def killed_for_memory(self) -> int:
        """How many of its processes the kernel has killed because the memory of all was used up."""
        if (folder := self.folders.get("memory")) is None:
            return 0
        file = folder / ("memory.events" if (folder / "memory.events").exists() else "memory.oom_control")
        try:
            words = file.read_text().split()
        except OSError:
            return 0
        return int(dict(zip(words[::2], words[1::2], strict=False)).get("oom_kill", 0))

    async def remove(self) -> None:
        """Remove the groups. The kernel needs a moment after the last process: bounded, then `SandboxError`."""
        for folder in dict.fromkeys(self.folders.values()):
            for attempt in range(60):
                try:
                    await anyio.to_thread.run_sync(folder.rmdir)  # the kernel takes its time
                except FileNotFoundError:
                    break
                except OSError as exc:
                    if attempt == 59:
                        raise SandboxError(f"control group {folder} is still in use: {exc.strerror}") from exc
                    await anyio.sleep(0.001 * (attempt + 1))
                else:
                    break


def wanted(limits: Limits) -> dict[str, dict[str, str]]:
    """By controller, the files to write; names are those of version 2, with version 1's after a bar."""
    files: dict[str, dict[str, str]] = {}
    if limits.memory_mb is not None:
        size = str(limits.memory_mb << 20)
        files["memory"] = {"memory.max|memory.limit_in_bytes": size, "memory.swap.max|": "0"}
    if limits.pids is not None:
        files["pids"] = {"pids.max|pids.max": str(limits.pids)}
    if limits.cpus is not None:
        quota = max(1000, round(limits.cpus * CPU_PERIOD_US))
        files["cpu"] = {"cpu.max|": f"{quota} {CPU_PERIOD_US}", "|cpu.cfs_quota_us": str(quota)}
    return files


def make_cgroup(name: str, limits: Limits, *, mounts: Path = Path("/proc/self/mounts")) -> Cgroup:
    """Make the groups that we may make; a controller that is missing from the result is not enforced by one."""
    folders: dict[str, Path] = {}
    for controller, files in wanted(limits).items():
        for version, base in _places(controller, mounts):
            folder = base / name
            try:
                if version == 2:
                    _delegate(base, controller)
                folder.mkdir(exist_ok=True)
                _write(folder, files, version)
            except OSError:
                _discard(folder, folders)
                continue
            folders[controller] = folder
            break
    return Cgroup(folders)


def _places(controller: str, mounts: Path) -> list[tuple[int, Path]]:
    """Where a group for `controller` might be made: below our own group first, then below the root of all."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found: list[tuple[int, Path]] = []
    for _, at, kind, options, *_ in lines:
        if kind == "cgroup" and controller in options.split(","):
            mine = [path for _, names, path in own if controller in names.split(",")]
            found += [(1, Path(at + path)) for path in mine if path != "/"] + [(1, Path(at))]
        elif kind == "cgroup2":
            mine = [path for number, _, path in own if number == "0" and path != "/"]
            found += [(2, Path(at + path)) for path in mine]
            found += [(2, Path(at + path).parent) for path in mine] + [(2, Path(at))]
    return found


def _delegate(base: Path, controller: str) -> None:
    """Version 2: children of `base` may have the controller. Raises `OSError` where they may not."""
    switched_on = (base / "cgroup.subtree_control").read_text().split()
    if controller not in switched_on:
        (base / "cgroup.subtree_control").write_text(f"+{controller}")


def _write(folder: Path, files: Mapping[str, str], version: int) -> None:
    for names, value in files.items():
        name = names.split("|")[0 if version == 2 else 1]
        if name == "memory.swap.max" and not (folder / name).exists():
            continue  # a kernel without swap accounting
        if name:
            (folder / name).write_text(value)


def _discard(folder: Path, folders: Mapping[str, Path]) -> None:
    if folder not in folders.values():
        try:
            folder.rmdir()
        except OSError:
            return


def find_cgroup(name: str, *, mounts: Path = Path("/proc/self/mounts")) -> Cgroup:
    """The groups of that name which there are: what a dead orchestrator left."""
    bases = {base for controller in CONTROLLERS for _, base in _places(controller, mounts)}
    return Cgroup({str(base): base / name for base in sorted(bases) if (base / name).is_dir()})


@attrs.frozen
class Fallback:
    """What limits each process where no control group does, and what that leaves open."""

    rlimits: Mapping[str, int]
    cpus: tuple[int, ...]
    unenforced: tuple[str, ...]


def fallback(limits: Limits, cgroup: Cgroup, *, own_uid: bool) -> Fallback:
    """Limits of single processes for what `cgroup` does not limit. `own_uid`: agents are not root to the kernel."""
    rlimits = {"RLIMIT_CORE": 0}
    cpus: tuple[int, ...] = ()
    said: list[str] = []
    why = "no control group can be made here (needs root, or a delegated cgroup)"
    if limits.disk_mb is not None:
        rlimits["RLIMIT_FSIZE"] = limits.disk_mb << 20
    if limits.memory_mb is not None and "memory" not in cgroup.folders:
        rlimits["RLIMIT_DATA"] = limits.memory_mb << 20
        said.append(f"memory: {why}; each process is limited to {limits.memory_mb} MiB, not all of them together")
    if limits.pids is not None and "pids" not in cgroup.folders:
        if os.geteuid() == 0 and not own_uid:
            said.append(f"pids: {why}, and the kernel never counts root's processes")
        elif _kernel() < (5, 14):
            said.append(f"pids: {why}, and this kernel counts a user's processes over all sandboxes")
        else:
            rlimits["RLIMIT_NPROC"] = limits.pids
    if limits.cpus is not None and "cpu" not in cgroup.folders:
        cpus = _some_cpus(limits.cpus)
        said.append(f"cpus: {why}; processes start on {len(cpus)} processor(s), and may move elsewhere")
    return Fallback(rlimits, cpus, tuple(said))


def _some_cpus(number: float) -> tuple[int, ...]:
    """Enough processors for `number`, not the same ones for every sandbox."""
    mine = sorted(os.sched_getaffinity(0))
    start = secrets.randbelow(len(mine))
    return tuple((mine + mine)[start : start + min(len(mine), math.ceil(number))])


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(char for char in minor if char.isdigit()) or 0)
