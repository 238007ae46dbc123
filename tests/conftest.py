"""What every test may use: both event loops, and agents as data."""

from __future__ import annotations

import docker_images
import pytest
from requirements import missing
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
def docker_image():
    """`docker_image()`: a Debian in the engine; `docker_image(BARE)`: one without Python. Skips without an engine."""

    def get(name: str = docker_images.DEBIAN) -> str:
        try:
            return docker_images.make(name)
        except docker_images.NoEngine as error:
            missing("docker", str(error))

    return get
