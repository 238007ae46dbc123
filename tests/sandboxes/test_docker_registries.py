"""Images that a registry gives only to who logs in: what `docker login` left is found, rightly chosen, and sent."""

# What is imported below needs what is asked for first.
# ruff: noqa: E402

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import uuid

import pytest
import requirements
from docker_images import ask

requirements.module("aiodocker", "docker")

from orchestrator.sandboxes._docker_image import registry_login
from orchestrator.sandboxes.docker import DockerSandbox
from states.errors import ConfigError, SandboxError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    """The engine's client is asyncio only."""
    return "asyncio"


@pytest.fixture
def registry(docker_image):
    """A registry on loopback with the image `private/thing:1`, for who says `me` and `secret`: its address."""
    docker_image()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        folder = tarfile.TarInfo(f"only-{os.urandom(4).hex()}")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(folder)
    blobs: dict[str, bytes] = {}

    def kept(data: bytes) -> dict:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        blobs[digest] = data
        return {"digest": digest, "size": len(data)}

    layer = {"mediaType": "application/vnd.docker.image.rootfs.diff.tar", **kept(packed.getvalue())}
    rootfs = {"type": "layers", "diff_ids": [layer["digest"]]}
    config = kept(json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs, "config": {}}).encode())
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    about = {"mediaType": "application/vnd.docker.container.image.v1+json", **config}
    manifest = json.dumps({"schemaVersion": 2, "mediaType": kind, "config": about, "layers": [layer]}).encode()
    wanted = f"Basic {base64.b64encode(b'me:secret').decode()}"

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.headers.get("Authorization") != wanted:
                self._answer(401, b'{"errors": [{"code": "UNAUTHORIZED", "message": "who are you?"}]}')
            elif "/manifests/" in self.path:
                self._answer(200, manifest, kind)
            else:
                self._answer(200, blobs.get(self.path.rpartition("/")[2], b"{}"), "application/octet-stream")

        def do_HEAD(self) -> None:
            self.do_GET()

        def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            head = {"Content-Type": kind, "Content-Length": str(len(body))}
            head |= {"Docker-Content-Digest": f"sha256:{hashlib.sha256(body).hexdigest()}"}
            head |= {"Docker-Distribution-Api-Version": "registry/2.0", "WWW-Authenticate": 'Basic realm="here"'}
            for name, value in head.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing to print."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    yield address
    server.shutdown()
    server.server_close()
    thread.join()
    ask("DELETE", f"/images/{address}/private/thing:1?force=1")


@pytest.fixture
def logged_in(tmp_path, monkeypatch):
    """`logged_in(config)`: what `docker login` would have left."""

    def write(config: dict) -> None:
        folder = tmp_path / "docker-config"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        monkeypatch.setenv("DOCKER_CONFIG", str(folder))

    return write


@pytest.fixture
def helper(tmp_path, monkeypatch, registry):
    """`docker-credential-test`, which knows this registry."""
    program = tmp_path / "bin/docker-credential-test"
    program.parent.mkdir()
    answer = json.dumps({"ServerURL": registry, "Username": "me", "Secret": "secret"})
    program.write_text(f"#!/bin/sh\nread -r name; test \"$name\" = {registry} && echo '{answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return "test"


@pytest.mark.docker
@pytest.mark.parametrize("how", ["in the settings", "by a helper"])
async def test_an_image_that_wants_a_password_is_pulled_with_what_docker_login_left(registry, logged_in, helper, how):
    """Without it, the registry's own words; with it, in `config.json` or by a credential helper, it runs."""
    written = {"auths": {registry: {"auth": base64.b64encode(b"me:secret").decode()}}}
    for login in ({}, written if how == "in the settings" else {"credHelpers": {registry: helper}}):
        logged_in(login)
        sandbox = DockerSandbox(name=f"rollout-{uuid.uuid4().hex[:12]}", image=f"{registry}/private/thing:1")
        try:
            if login:
                await sandbox.start()
            else:
                with pytest.raises(SandboxError, match="is not here and cannot be pulled"):
                    await sandbox.start()
        finally:
            await sandbox.stop()


async def test_a_login_is_of_its_registry(logged_in):
    """A store or helper for another one is not asked, a token is sent as one, and what is no login is named."""
    here = "registry.invalid/a/b"
    logged_in({"credsStore": "none-such", "credHelpers": {"elsewhere.invalid": "none-such"}})
    assert await registry_login(here) is None
    assert await registry_login("debian") is None
    auth = base64.b64encode(b"me:").decode()
    logged_in({"auths": {"registry.invalid": {"auth": auth, "identitytoken": "token"}}})
    assert await registry_login(here) == {"identitytoken": "token", "serveraddress": "registry.invalid"}
    logged_in({"auths": {"registry.invalid": {"auth": "no base64"}}})
    with pytest.raises(ConfigError, match=r"left for registry.invalid cannot be read: log in again"):
        await registry_login(here)
    logged_in({"credsStore": "none-such", "auths": {"registry.invalid": {}}})
    with pytest.raises(ConfigError, match="`docker-credential-none-such get` gives no credentials"):
        await registry_login(here)
