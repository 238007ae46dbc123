"""What BuildKit says while it builds: protobuf in base64, in lines of the engine's answer. Here it becomes text.

Only what a log needs is read: the steps that began, what they print, and how they failed.
https://github.com/moby/buildkit/blob/master/api/services/control/control.proto
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from typing import Any, Final

import attrs

TRACE: Final = "moby.buildkit.trace"
_VERTEXES, _LOGS = 1, 3
"""Of a StatusResponse."""
_DIGEST, _NAME = 1, 3
"""Of a Vertex, which is told anew whenever something of it changes."""
_MESSAGE = 4
"""Of a VertexLog."""


@attrs.define(eq=False)
class Words:
    """The text of one build's answer, piece by piece; each step is named once."""

    _named: set[bytes] = attrs.field(factory=set)

    def of(self, line: Mapping[str, Any]) -> str:
        """What a line of the answer adds to the log: of BuildKit, or of an engine that builds without it."""
        if line.get("id") == TRACE:
            return "".join(self._told(base64.b64decode(line["aux"])))
        return str(line.get("stream") or (f"{line['status']}\n" if line.get("status") else ""))

    def _told(self, status: bytes) -> Iterator[str]:
        for number, data in _fields(status):
            parts = dict(_fields(data)) if number in (_VERTEXES, _LOGS) else {}
            if number == _LOGS:
                yield parts.get(_MESSAGE, b"").decode(errors="replace")
            elif number == _VERTEXES and parts.get(_DIGEST, b"") not in self._named:
                self._named.add(parts.get(_DIGEST, b""))
                yield f"{parts.get(_NAME, b'').decode(errors='replace')}\n"


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message that hold bytes, by number; numbers are passed over."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        value, at = _varint(data, at)
        if key & 7 == 2:
            yield key >> 3, data[at : at + value]
            at += value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
