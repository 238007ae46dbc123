"""One call of the host's to a handle's keeper, inside the sandbox: hands over the request, prints the answer.

See `exec_child.py`, whose keeper listens. A channel makes a call for all that it does, so this one imports next to
nothing: `json`, `socket` and `ctypes` would cost several times what the rest of it does, which is why their C halves
are used, and why the request is passed on as it is.
"""

# pathlib costs more than the call.
# ruff: noqa: PTH123

from __future__ import annotations

import _ctypes
import _socket
import sys

ANSWER_BYTES = 500_000
"""A longer answer is left in a file to be downloaded: hosts cut what a command prints."""
GONE = b'{"error": "its keeper is gone", "kind": "ended"}\n'


def main(word: str, folder: str) -> None:
    """Ask the keeper of the handle in `folder`; `word` is the request, or `@` and the file that holds it."""
    undumpable()
    if word.startswith("@"):
        with open(word[1:], "rb") as file:
            request = file.read()
    else:
        request = word.encode(errors="surrogateescape")
    answer = asked(request + b"\n", f"{folder}/socket")
    if len(answer) > ANSWER_BYTES:
        path = f"{folder}/answer-{id(answer):x}-{len(answer):x}"
        with open(path, "wb") as file:
            file.write(answer)
        answer = f'{{"answer": "{path}"}}\n'.encode()
    sys.stdout.buffer.write(b"\nrollout: " + answer)
    sys.stdout.buffer.flush()


def asked(request: bytes, path: str) -> bytes:
    """What the keeper answers: one line."""
    heard = bytearray()
    try:
        conn = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        conn.connect(path)
        conn.sendall(request)
        while data := conn.recv(1 << 20):
            heard += data
    except OSError:
        return GONE
    return bytes(heard) if heard.endswith(b"\n") else GONE


def undumpable() -> None:
    """Whoever runs as the same user cannot look into us, or make us do something: `prctl(PR_SET_DUMPABLE, 0)`."""
    own = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]  # None is this program itself
    _ctypes.call_function(_ctypes.dlsym(own, "prctl"), (4, 0, 0, 0, 0))


if __name__ == "__main__":
    main(*sys.argv[1:3])
