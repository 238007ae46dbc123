"""The kit: our own Python, made to run in any Linux container, whatever its image holds.

`container.py` needs an interpreter. Images have another one, an old one or none, and a C library of their own, or
none. So the container gets this process's interpreter with its own dynamic loader and the few libraries that it
needs, in one folder that is bound read-only; the standard library is bound beside it. Nothing of the image is used.

    kit/bin/ld.so  kit/bin/python3.11  kit/lib/*.so  kit/code/*.py    made once, in the cache
    kit/lib/python3.11/                                               bound over an empty folder
"""

from __future__ import annotations

import functools
import hashlib
import importlib.machinery
import importlib.util
import os
import py_compile
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import attrs

from orchestrator.install import cache_root
from orchestrator.sandboxes.container import PLACE
from states.errors import SandboxError

CODE: Final = ("container.py", "supervisor.py", "_files.py")
KIT: Final = f"{PLACE}/kit"
IDLE: Final = f"{KIT}/bin/idle"
_IDLE_SCRIPT: Final = "#!/bin/sh\nwhile :; do sleep 1000000; done\n"
_PYTHON: Final = f"python{sys.version_info.major}.{sys.version_info.minor}"


@attrs.frozen
class Kit:
    """What a container gets: (folder of this host, its place there), all read-only, and what can be its PID 1."""

    binds: tuple[tuple[Path, str], ...]
    python: tuple[str, ...]

    def running(self, call: str) -> tuple[str, ...]:
        """The command whose process does `call` of `container.py`, with what it is given as a literal."""
        return (
            *self.python,
            "-c",
            f"import sys; sys.path.append({KIT + '/code'!r}); import container; container.{call}",
        )


@functools.cache
def make_kit() -> Kit:
    """The kit, made in the cache if it is not there. Blocks, for 50 ms the first time.

    Raises:
        SandboxError: This interpreter cannot be taken apart; says why.
    """
    python = _interpreter()
    loader = _loader(python)
    libraries = _libraries(loader, (python, *_extensions()))
    parts = (python, loader, *libraries.values(), *(Path(__file__).parent / name for name in CODE))
    folder = cache_root() / "kits" / _digest(parts)
    if not folder.is_dir():
        _build(folder, python, loader, libraries)
    stdlib = Path(sysconfig.get_path("stdlib"))
    return Kit(
        binds=((folder, KIT), (stdlib, f"{KIT}/{sys.platlibdir}/{_PYTHON}")),
        python=(
            *(f"{KIT}/bin/ld.so", "--library-path", f"{KIT}/lib", f"{KIT}/bin/{_PYTHON}"),
            *("-I", "-S", "-B", "-W", "ignore"),
        ),
    )


def _interpreter() -> Path:
    own = Path(sys.base_prefix, "bin", _PYTHON)
    found = own if own.exists() else shutil.which(_PYTHON)
    if not found:
        raise SandboxError(f"the docker sandbox found no {_PYTHON} under {sys.base_prefix} or on PATH to bring along")
    return Path(os.path.realpath(found))


def _extensions() -> Iterator[Path]:
    """The extension modules that are files of their own, and may want libraries: what `container.py` imports."""
    for name in ("_ctypes", "_socket", "select", "resource"):
        spec = importlib.util.find_spec(name)
        if spec is not None and isinstance(spec.loader, importlib.machinery.ExtensionFileLoader):
            yield Path(spec.loader.path)


def _loader(program: Path) -> Path:
    """The dynamic loader that an ELF program names: its PT_INTERP."""
    with program.open("rb") as file:
        head = file.read(64)
        if head[:5] != b"\x7fELF\x02":
            raise SandboxError(f"{program} is not a 64-bit ELF program, so that no container can run it")
        at, size, count = (int.from_bytes(head[a:b], sys.byteorder) for a, b in ((32, 40), (54, 56), (56, 58)))
        for number in range(count):
            file.seek(at + number * size)
            entry = file.read(size)
            if int.from_bytes(entry[:4], sys.byteorder) == 3:
                file.seek(int.from_bytes(entry[8:16], sys.byteorder))
                return Path(file.read(int.from_bytes(entry[32:40], sys.byteorder)).rstrip(b"\0").decode())
    raise SandboxError(f"{program} is linked statically, which this kit cannot bring along")


def _libraries(loader: Path, programs: tuple[Path, ...]) -> dict[str, Path]:
    """The libraries that these need, by name, as the loader itself says."""
    found: dict[str, Path] = {}
    for program in programs:
        done = subprocess.run([loader, "--list", program], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SandboxError(f"{loader} cannot say what {program} needs: {done.stderr.strip()[-500:]}")
        for line in done.stdout.splitlines():
            name, arrow, path = line.strip().partition(" => ")
            if arrow and path.startswith("/"):
                found[name] = Path(path.rpartition(" (")[0])
    return found


def _digest(parts: tuple[Path, ...]) -> str:
    """Which kit this is: another one as soon as a file that is in it was replaced."""
    digest = hashlib.sha256(sys.version.encode())
    for path in parts:
        info = path.stat()
        digest.update(f"{path} {info.st_size} {info.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _build(folder: Path, python: Path, loader: Path, libraries: Mapping[str, Path]) -> None:
    """Make it beside its place, and rename it there: several processes may."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    try:
        draft.chmod(0o755)
        for name in ("bin", "lib", "code", f"{sys.platlibdir}/{_PYTHON}"):
            (draft / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(loader, draft / "bin/ld.so")
        shutil.copy(python, draft / "bin" / _PYTHON)
        for name, library in libraries.items():
            shutil.copy(library, draft / "lib" / name)
        (draft / "bin/idle").write_text(_IDLE_SCRIPT)
        (draft / "bin/idle").chmod(0o755)
        for name in CODE:
            source = draft / "code" / name
            shutil.copy(Path(__file__).parent / name, source)
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(str(source), dfile=name, doraise=True, invalidation_mode=mode)
        draft.rename(folder)
    except OSError as exc:
        if not folder.is_dir():
            raise SandboxError(f"the docker sandbox cannot make its kit in {folder}: {exc}") from exc
    finally:
        shutil.rmtree(draft, ignore_errors=True)
