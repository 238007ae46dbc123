"""The image that a docker sandbox runs: prebuilt, or built once from a task's Dockerfile however many rollouts want it.

A build has a tag that says what it was built from, `rollout-orchestrator/<folder>:<hash of Dockerfile and context>`, so
that the next rollout, here or in another process, finds it. Tags are never removed by us: a rollout may be using them.
So has the image with the task's folder made the agents' (`given_tag`), which the sandbox makes of any of them.
An image map lets a local image stand for one that cannot be had; what was mapped, and that something was built, goes
to `note`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

import anyio
import anyio.to_thread
import attrs

from orchestrator.dockerfile import instructions
from orchestrator.install import cache_root, locked
from orchestrator.sandboxes._buildkit import Words
from orchestrator.sandboxes._docker_engine import Engine, EngineError, docker_config
from orchestrator.sandboxes._image_map import Note, map_bases, mapped
from states.errors import ConfigError, SandboxError

DOCKERFILE: Final = "Dockerfile"
REPOSITORY: Final = "rollout-orchestrator"
TAIL_LINES: Final = 25
LINE: Final = 400
"""How much of a build's log goes into an error: so many lines, and so much of the end of each, in characters."""

_HEREDOC_API: Final = (1, 42)
"""The API of the first engine whose own builder knows here-documents: 23.0."""

_SYNTAX: Final = re.compile(r"\s*#\s*syntax\s*=", re.IGNORECASE)
_SECRET: Final = re.compile(r"--mount=\S*\btype=(?:secret|ssh)\b")
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@attrs.frozen
class Image:
    """What the engine knows of an image: what its commands see, and what it starts."""

    id: str
    env: Mapping[str, str]
    entrypoint: tuple[str, ...]
    user: str
    workdir: str

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Image:
        """From the engine's own words."""
        config = found.get("Config") or {}
        return cls(
            id=found["Id"],
            env=dict(pair.split("=", 1) for pair in config.get("Env") or () if "=" in pair),
            entrypoint=tuple(config.get("Entrypoint") or ()),
            user=config.get("User") or "",
            workdir=config.get("WorkingDir") or "/",
        )


async def find_image(
    engine: Engine, *, image: str | None, build: Path | None, image_map: Mapping[str, str], note: Note
) -> Image:
    """The image to run; pulled or built where it is not there.

    Args:
        engine: Where it has to be.
        image: A prebuilt one; wins over `build`.
        build: A folder with a Dockerfile.
        image_map: Images that stand for others, by the name of these.
        note: Is told what was mapped and what was built.

    Raises:
        SandboxError: It cannot be had; with the engine's words, and the end of the build's log.
        ConfigError: Neither image nor build was given, or the Dockerfile has what cannot be built here.
    """
    notes: list[str] = []
    if image is not None:
        found = mapped(image, image_map, notes.append)
        _tell(notes, note)
        return await _pulled(engine, found)
    if build is None:
        raise ConfigError("a docker sandbox needs an image: the task brings no Dockerfile and names none; give --image")
    recipe = await anyio.to_thread.run_sync(read_build, build, image_map, notes.append)
    _tell(notes, note)
    return await inspected(engine, recipe.tag) or await _built(engine, recipe, note)


def _tell(notes: list[str], note: Note) -> None:
    """Notes are told by the loop, not by the thread that reads files."""
    for text in dict.fromkeys(notes):
        note(text)


async def inspected(engine: Engine, name: str) -> Image | None:
    """The image of that name, None where it is not there."""
    try:
        with engine.says(f"image {name}") as docker:
            return Image.of(await docker.images.inspect(name))
    except EngineError as exc:
        if exc.status == 404:
            return None
        raise


async def _pulled(engine: Engine, name: str) -> Image:
    if found := await inspected(engine, name):
        return found
    advice = f"load or build it, or give one that is here: --image-map {name}=LOCAL"
    try:
        with engine.says(f"image {name} is not here and cannot be pulled") as docker:
            login = await registry_login(name)
            await docker.images.pull(f"{registry_of(name)}/{_path_of(name)}" if login else name, auth=login)
    except EngineError as exc:
        raise EngineError(f"{exc}; {advice}", status=exc.status) from exc
    found = await inspected(engine, name)
    if found is None:
        raise SandboxError(f"image {name} was pulled and is not there; {advice}")
    return found


# --- images whose folders are the agents' ---


def given_tag(image: Image, user: str, folders: Sequence[str]) -> str:
    """The name of the image that is `image` with `folders` made the user's, which no container has to do then."""
    said = json.dumps([image.id, user, list(folders)])
    return f"{REPOSITORY}/given:{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def given_lock(tag: str) -> Path:
    """The lock of whoever makes it."""
    folder = cache_root() / "builds"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"given-{tag.rpartition(':')[2]}.lock"


# --- registries ---


def registry_of(image: str) -> str:
    """The host that an image comes from.

    >>> registry_of("debian"), registry_of("me/debian"), registry_of("ghcr.io/me/debian"), registry_of("localhost/x")
    ('docker.io', 'docker.io', 'ghcr.io', 'localhost')
    """
    host, slash, _ = image.partition("/")
    return host if slash and (host == "localhost" or "." in host or ":" in host) else "docker.io"


def _path_of(image: str) -> str:
    path = image.removeprefix(f"{registry_of(image)}/")
    return f"library/{path}" if registry_of(image) == "docker.io" and "/" not in path else path


async def registry_login(image: str) -> dict[str, str] | None:
    """What `docker login` left for the registry of `image`: in `config.json`, or with a credential helper.

    Raises:
        ConfigError: The helper that the settings name fails, or they cannot be read.
    """
    config, host = docker_config(), registry_of(image)
    logins, helpers = config.get("auths") or {}, config.get("credHelpers") or {}
    for name in (host, f"https://{host}", *(("https://index.docker.io/v1/",) if host == "docker.io" else ())):
        entry = logins.get(name)
        if helper := helpers.get(name) or (config.get("credsStore") if entry is not None else None):
            return await _helped(helper, name)
        if entry and "auth" in entry:
            return _login(name, *_written(entry["auth"], name), entry.get("identitytoken"))
    return None


def _login(name: str, user: str, password: str, token: str | None) -> dict[str, str]:
    if token:
        return {"identitytoken": token, "serveraddress": name}
    return {"username": user, "password": password, "serveraddress": name}


def _written(text: str, name: str) -> tuple[str, str]:
    try:
        user, _, password = base64.b64decode(text, validate=True).decode().partition(":")
    except ValueError as exc:
        raise ConfigError(f"what `docker login` left for {name} cannot be read: log in again") from exc
    return user, password


async def _helped(helper: str, name: str) -> dict[str, str]:
    command = [f"docker-credential-{helper}", "get"]
    try:
        done = await anyio.run_process(command, input=name.encode(), check=False)
        found = json.loads(done.stdout)
        secret = found["Secret"]
        return _login(name, found["Username"], secret, secret if found["Username"] == "<token>" else None)
    except (OSError, ValueError, LookupError) as exc:
        raise ConfigError(f"`{' '.join(command)}` gives no credentials for {name}: {exc}") from exc


# --- builds ---


@attrs.frozen
class Build:
    """A build, read: its Dockerfile with images mapped, the files of its context, and the tag that says all that."""

    folder: Path
    dockerfile: str
    bases: tuple[str, ...]
    """The images that it starts from, as mapped."""
    files: tuple[Path, ...]
    tag: str

    @property
    def log(self) -> Path:
        """Where the engine's words are kept."""
        return cache_root() / "builds" / f"{self.tag.rpartition('/')[2].replace(':', '-')}.log"


def read_build(folder: Path, image_map: Mapping[str, str], note: Note) -> Build:
    """Read a folder with a Dockerfile. Blocks. Raises `SandboxError` where it cannot be read."""
    try:
        text = (folder / DOCKERFILE).read_text(encoding="utf-8")
        files = tuple(_context(folder))
        dockerfile, bases = map_bases(text, image_map, note, folder / DOCKERFILE)
        digest = hashlib.sha256(dockerfile.encode())
        for path in files:
            digest.update(f"\n{path.relative_to(folder).as_posix()} {path.lstat().st_mode & 0o170100:o} ".encode())
            digest.update(str(path.readlink()).encode() if path.is_symlink() else _file_digest(path))
    except OSError as exc:
        raise SandboxError(f"the image of {folder} cannot be built: {exc}") from exc
    name = re.sub(r"[^a-z0-9]+", "-", folder.resolve().parent.name.lower()).strip("-") or "task"
    tag = f"{REPOSITORY}/{name}:{digest.hexdigest()[:16]}"
    return Build(folder, dockerfile, bases, files, tag)


def _file_digest(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _context(folder: Path) -> Iterator[Path]:
    """What is sent to the engine, in an order that does not change: all but what `.dockerignore` names."""
    ignored = _Ignored.read(folder / ".dockerignore")
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if relative != DOCKERFILE and not ignored.matches(relative) and not _is_odd(path):
            yield path


def _is_odd(path: Path) -> bool:
    return not (path.is_symlink() or path.is_dir() or path.is_file())


@attrs.frozen
class _Ignored:
    """The patterns of a `.dockerignore`: the last that matches a path, or a folder above it, decides.

    https://docs.docker.com/build/concepts/context/#dockerignore-files
    """

    patterns: tuple[tuple[re.Pattern[str], bool], ...] = ()

    @classmethod
    def read(cls, file: Path) -> _Ignored:
        if not file.is_file():
            return cls()
        lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
        return cls(tuple(cls._pattern(line) for line in lines if line and not line.startswith("#")))

    @staticmethod
    def _pattern(line: str) -> tuple[re.Pattern[str], bool]:
        keeps = line.startswith("!")
        parts = re.split(r"(\*\*/?|\*|\?|\[[^\]]*\])", line.removeprefix("!").strip().strip("/").removeprefix("./"))
        words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        body = "".join(words.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts)
        return re.compile(f"{body}(?:/.*)?"), keeps

    def matches(self, path: str) -> bool:
        ignored = False
        for pattern, keeps in self.patterns:
            if pattern.fullmatch(path):
                ignored = not keeps
        return ignored


async def _built(engine: Engine, build: Build, note: Note) -> Image:
    """Build it, while others that want the same wait."""
    build.log.parent.mkdir(parents=True, exist_ok=True)
    waits = f"waiting: the image {build.tag} is being built by another rollout; log: {build.log}"
    async with locked(build.log.with_suffix(".lock"), lambda: note(waits)):
        if found := await inspected(engine, build.tag):
            return found
        _refuse_what_cannot_be_built(build, engine.api)
        began = time.monotonic()
        for base in build.bases:
            await _pulled(engine, base)
        note(f"building the image {build.tag}; log: {build.log}")
        await _run(engine, build)
        found = await inspected(engine, build.tag)
        if found is None:
            raise SandboxError(f"the image of {build.folder} was not built: its engine stopped early; log: {build.log}")
        note(f"built the image {build.tag} in {time.monotonic() - began:.1f} s")
        return found


def _refuse_what_cannot_be_built(build: Build, api: tuple[int, ...]) -> None:
    """Raise `ConfigError` for what the engine would say no more of than that it does not work."""
    knows_heredocs = api >= _HEREDOC_API or _SYNTAX.match(build.dockerfile)
    for found in instructions(build.dockerfile, build.folder / DOCKERFILE):
        if found.word == "RUN" and _SECRET.search(found.rest):
            lacks = "a mount of type secret or ssh, which nobody gives it here"
        elif found.has_heredoc and not knows_heredocs:
            lacks = "a here-document, which this engine's builder does not know (23.0 does, or a `# syntax=` line)"
        else:
            continue
        raise ConfigError(
            f"{build.folder / DOCKERFILE}:{found.line} has {lacks}: build the image yourself, and give --image"
        )


async def _run(engine: Engine, build: Build) -> None:
    context = await anyio.to_thread.run_sync(_packed, build)
    with context, build.log.open("w", encoding="utf-8") as log:

        def say(text: str) -> None:
            log.write(text)
            log.flush()

        try:
            words = Words()
            with engine.says(f"the image of {build.folder} cannot be built"):
                async for line in engine.build(build.tag, context):
                    say(words.of(line))
        except EngineError as exc:
            quoted = "".join(f"\n  {line}" for line in last_lines(_end_of(build.log)))
            say(f"\n{exc}\n")
            raise EngineError(f"{_middle_out(str(exc))}; log: {build.log}{quoted}", status=exc.status) from exc


def _end_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - (64 << 10)))
        return file.read().decode(errors="replace")


def last_lines(log: str) -> list[str]:
    r"""The end of a build's log, as a terminal would leave it: what went wrong is in its last lines, at their ends.

    >>> last_lines("\x1b[91mone\ntwo\n\n10%\r100%\n\x1b[0m")
    ['one', 'two', '100%']
    """
    lines = (line.rstrip("\r").rpartition("\r")[2].rstrip() for line in _ESCAPES.sub("", log).split("\n"))
    told = [line if len(line) <= LINE else f"... {line[-LINE:]}" for line in lines if line]
    return told[-TAIL_LINES:]


def _middle_out(text: str) -> str:
    """The engine quotes the command that failed, however long that is, before it says what it returned."""
    return text if len(text) <= 2 * LINE else f"{text[:LINE]} ... {text[-LINE:]}"


def _packed(build: Build) -> IO[bytes]:
    """The context as a tar, in memory while it is small: owned by root and without times, as the cache wants it."""
    file = tempfile.SpooledTemporaryFile(max_size=16 << 20)  # noqa: SIM115 - the caller closes it
    with tarfile.open(fileobj=file, mode="w") as tar:
        _add(tar, tarfile.TarInfo(DOCKERFILE), build.dockerfile.encode())
        for path in build.files:
            info = tar.gettarinfo(path, path.relative_to(build.folder).as_posix())
            if info.isfile():
                with path.open("rb") as content:
                    _plain(tar, info, content)
            else:
                _plain(tar, info, None)
    file.seek(0)
    return file


def _add(tar: tarfile.TarFile, info: tarfile.TarInfo, data: bytes) -> None:
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _plain(tar: tarfile.TarFile, info: tarfile.TarInfo, content: IO[bytes] | None) -> None:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    tar.addfile(info, content)
