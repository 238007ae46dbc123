"""What every test may use: both event loops, and agents as data."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import docker_images
import pytest
from requirements import bubblewrap, missing
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode


class TraceExtension(SingleFileSnapshotExtension):
    """One readable file a case."""

    _write_mode = WriteMode.TEXT
    file_extension = "txt"


@pytest.fixture
def snapshot(snapshot):
    """Traces as text files."""
    return snapshot.use_extension(TraceExtension)


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    """Both loops; a test of a part that needs asyncio overrides this in its module."""
    return request.param


@pytest.fixture(scope="session")
def bwrap():
    """A bubblewrap that comes up."""
    bubblewrap()


@pytest.fixture(scope="session")
def docker_image():
    """`docker_image()`: a Debian in the engine; `docker_image(BARE)`: one without Python. Skips without an engine."""

    def get(name: str = docker_images.DEBIAN) -> str:
        try:
            return docker_images.make(name)
        except docker_images.NoEngine as error:
            missing("docker", str(error))

    return get


def allow_plain_http(monkeypatch):
    """Let the SDK's S3 client, a real one, speak to a loopback without a certificate: it has no setting for that."""
    from daytona._async import object_storage

    real = object_storage.S3Store

    def store(**settings):
        return real(**{**settings, "client_options": {**settings["client_options"], "allow_http": True}})

    monkeypatch.setattr(object_storage, "S3Store", store)


@pytest.fixture(params=["loopback", pytest.param("live", marks=pytest.mark.daytona_live)])
async def daytona_service(request, anyio_backend, tmp_path, monkeypatch):
    """A Daytona service: the one on loopback, and with `-m daytona_live` the one that the environment names."""
    if importlib.util.find_spec("daytona") is None:
        missing("daytona", "daytona is not installed: make install-all")
    from daytona_stand import Service

    if request.param == "live":
        yield Service.live()
        return
    from daytona_server import DaytonaServer

    (tmp_path / "service").mkdir()
    async with DaytonaServer(tmp_path / "service") as server:
        monkeypatch.setenv("DAYTONA_API_KEY", server.key)
        monkeypatch.setenv("DAYTONA_API_URL", server.url)
        allow_plain_http(monkeypatch)
        yield Service(server)


@pytest.fixture
def daytona_apart(tmp_path_factory, monkeypatch):
    """The service on loopback in a process of its own, for tests that run one loop after the other."""
    if importlib.util.find_spec("daytona") is None:
        missing("daytona", "daytona is not installed: make install-all")
    server, folder = Path(__file__).with_name("daytona_server.py"), tmp_path_factory.mktemp("service")
    argv = [sys.executable, str(server), str(folder)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        found = json.loads(process.stdout.readline())
        monkeypatch.setenv("DAYTONA_API_KEY", found["key"])
        monkeypatch.setenv("DAYTONA_API_URL", found["url"])
        yield
        process.stdin.close()


def pytest_collection_modifyitems(config, items):
    """What costs money at somebody's service runs when it is asked for by name."""
    if "daytona_live" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("daytona_live"):
            item.add_marker(pytest.mark.skip(reason="runs at the real service: pytest -m daytona_live"))


@pytest.fixture
def dockerd():
    """`dockerd(megabytes)`: an engine of the test's own, where one has to be; with a disk of that size, if given."""
    made: list[docker_images.Dockerd] = []

    def start(megabytes: int | None = None) -> docker_images.Dockerd:
        home = Path(tempfile.mkdtemp(prefix="engine-"))
        try:
            made.append(docker_images.Dockerd.start(home, megabytes))
        except OSError as error:
            shutil.rmtree(home, ignore_errors=True)
            missing("docker", f"no engine of the test's own comes up: {error}")
        return made[-1]

    yield start
    for engine in made:
        engine.stop()
        shutil.rmtree(engine.home)
