"""The relay, inside a sandbox: carries connections from the sandbox's loopback to a model gateway that it cannot see.

Runs there on whatever Python 3 the system has (3.6 or newer), as one file: the standard library, nothing of ours.

    python3 relay_child.py --port 8080 --unix /run/gateway.sock   each connection to a socket that is bound in
    python3 relay_child.py --stdio                                all connections over stdin and stdout, as frames

Its first line on stdout is `rollout-relay PORT`; without `--port` it takes a free one. It ends with its stdin under
`--stdio`, and else when it is killed. It knows no key and reads no HTTP.

A frame is kind (1 byte), stream (4), size (4, big-endian) and as many bytes. A stream is one connection, numbered by
this side. Both sides may send `WINDOW` bytes of `DATA` on a stream, and as many more as `CREDIT` (a number of 4 bytes)
has since allowed: so nobody ever has to stop reading frames, and memory is bounded. `END` says that no more `DATA`
follows, which the other direction survives; `RESET`, that the connection is gone.
"""

import argparse
import errno
import os
import select
import socket
import struct
import sys
import time

OPEN, DATA, END, RESET, CREDIT = range(1, 6)

WINDOW = 262144
"""Bytes that may be on their way on a stream, in each direction."""
CHUNK = 32768
"""Bytes of the largest frame."""
STREAMS = 256
"""Connections at once; further ones wait to be accepted."""

HEADER = struct.Struct(">BII")
NUMBER = struct.Struct(">I")
BACKLOG = 262144
"""Bytes that may wait for whoever reads our stdout, or a socket, before we stop taking more."""
CONNECT_SEC = 10.0


class FrameError(ValueError):
    """What came is no frame."""


def frame(kind: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return HEADER.pack(kind, stream, len(payload)) + payload


def credit(stream: int, count: int) -> bytes:
    """The frame that allows `count` more bytes."""
    return frame(CREDIT, stream, NUMBER.pack(count))


class Frames:
    """Frames, out of bytes that come in pieces of any size."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> "list[tuple[int, int, bytes]]":
        """The frames that are whole now: kind, stream, payload. Raises `FrameError`."""
        self._rest += data
        found, at = [], 0
        while len(self._rest) - at >= HEADER.size:
            kind, stream, size = HEADER.unpack_from(self._rest, at)
            start = at + HEADER.size
            _check(kind, size)
            if len(self._rest) < start + size:
                break
            at = start + size
            found.append((kind, stream, bytes(self._rest[start:at])))
        del self._rest[:at]
        return found


def _check(kind: int, size: int) -> None:
    allowed = {DATA: 1 <= size <= CHUNK, CREDIT: size == NUMBER.size}.get(kind, size == 0 and OPEN <= kind <= CREDIT)
    if not allowed:
        raise FrameError(f"a frame of kind {kind} with {size} bytes")


class Side:
    """One end of what is carried: a socket, and the bytes that wait to be written to it.

    Its peer is another `Side`, or the `Stream` that stands for one on the host: both take `push`, `finish`, `abort`.
    """

    def __init__(self, loop: "Loop", sock: socket.socket) -> None:
        sock.setblocking(False)
        self.loop, self.sock = loop, sock
        self.out = bytearray()
        self.reading = self.writing = True
        self.ending = False
        loop.sides[sock.fileno()] = self

    def joined(self, peer: "Side | Stream") -> None:
        """What comes here goes there."""
        self.peer = peer

    # what the peer does

    def room(self) -> int:
        """How many bytes it may push."""
        return BACKLOG - len(self.out)

    def push(self, data: bytes) -> None:
        """Write these bytes, now or later."""
        self.out += data
        self.flush()

    def finish(self) -> None:
        """Nothing more will be pushed."""
        self.ending = True
        self.flush()

    def abort(self) -> None:
        """The other end is gone: close at once."""
        self.loop.close(self)

    def taken(self, count: int) -> None:
        """The peer has written `count` bytes: whoever waits for room looks for it by itself."""

    # what the loop does

    def interest(self) -> int:
        """What to wait for; 0 while there is nothing to be done."""
        wants = select.POLLIN if self.reading and self.peer.room() > 0 else 0
        return wants | (select.POLLOUT if self.out else 0)

    def ready(self, events: int) -> None:
        """Something can be done."""
        if events & select.POLLOUT:
            self.flush()
        if self.reading and events & ~select.POLLOUT and not self.sock.fileno() < 0:
            self.read()

    def read(self) -> None:
        """Take what is there and hand it over."""
        room = min(CHUNK, self.peer.room())
        if room <= 0:
            return
        try:
            data = self.sock.recv(room)
        except BlockingIOError:
            return
        except OSError:
            self.fail()
            return
        if data:
            self.peer.push(data)
        else:
            self.reading = False
            self.peer.finish()
            self.settle()

    def flush(self) -> None:
        """Write as much as goes."""
        while self.out:
            try:
                count = self.sock.send(self.out)
            except BlockingIOError:
                return
            except OSError:
                self.fail()
                return
            del self.out[:count]
            self.peer.taken(count)
        if self.ending and self.writing:
            self.writing = False
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.fail()
            else:
                self.settle()

    def settle(self) -> None:
        """Both directions are over, each in its time: so is the socket."""
        if not self.reading and not self.writing:
            self.loop.close(self)

    def fail(self) -> None:
        """The socket broke."""
        self.loop.close(self)
        self.peer.abort()


class Stream:
    """What stands on this side for a connection of the host's: the peer of a `Side`, spoken to in frames."""

    def __init__(self, wire: "Wire", number: int) -> None:
        self.wire, self.number = wire, number
        self.credit, self.owed = WINDOW, 0
        wire.send(frame(OPEN, number))

    def room(self) -> int:
        """How many bytes the host takes."""
        return min(self.credit, self.wire.room())

    def push(self, data: bytes) -> None:
        """Send them."""
        self.credit -= len(data)
        self.wire.send(frame(DATA, self.number, data))

    def finish(self) -> None:
        """Nothing more will come."""
        self.wire.send(frame(END, self.number))

    def abort(self) -> None:
        """The client is gone."""
        self.wire.send(frame(RESET, self.number))

    def taken(self, count: int) -> None:
        """The client took them: now and then, the host is allowed as many more."""
        self.owed += count
        if self.owed >= WINDOW // 2:
            self.wire.send(credit(self.number, self.owed))
            self.owed = 0


class Wire:
    """stdin and stdout, which carry the frames of every stream."""

    def __init__(self) -> None:
        self.frames, self.out = Frames(), bytearray()
        self.streams = {}  # type: dict[int, tuple[Side, Stream]]
        self.numbers = {}  # type: dict[Side, int]
        self.count = 0
        for descriptor in (0, 1):
            os.set_blocking(descriptor, False)

    def opened(self, side: Side) -> None:
        """A client came."""
        self.count = self.count % 0xFFFFFFFF + 1
        stream = Stream(self, self.count)
        self.streams[self.count] = (side, stream)
        self.numbers[side] = self.count
        side.joined(stream)

    def closed(self, side: Side) -> None:
        """Its socket is gone."""
        del self.streams[self.numbers.pop(side)]

    def room(self) -> int:
        """How many bytes may wait to be written."""
        return BACKLOG - len(self.out)

    def send(self, data: bytes) -> None:
        """Write a frame when its turn comes."""
        self.out += data

    def interest(self, descriptor: int) -> int:
        """What to wait for on stdin, and on stdout."""
        return select.POLLIN if descriptor == 0 else select.POLLOUT if self.out else 0

    def ready(self, descriptor: int) -> None:
        """Frames have come, or can go. The end of either stream is our end: the host is gone."""
        try:
            if descriptor == 1:
                del self.out[: os.write(1, self.out)]
                return
            data = os.read(0, 4 * CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            sys.exit(0)
        for kind, number, payload in self.frames.feed(data):
            if number in self.streams:
                self.heard(kind, payload, *self.streams[number])

    def heard(self, kind: int, payload: bytes, side: Side, stream: Stream) -> None:
        """One frame for a stream that is there; those for others come late."""
        if kind == DATA:
            side.push(payload)
        elif kind == CREDIT:
            stream.credit += NUMBER.unpack(payload)[0]
        elif kind == END:
            side.finish()
        elif kind == RESET:
            side.abort()


class Loop:
    """Everything that goes on, in one thread: a sandbox may allow few."""

    def __init__(self, listener: socket.socket, wire: "Wire | None", path: str) -> None:
        self.listener, self.wire, self.path = listener, wire, path
        self.sides = {}  # type: dict[int, Side]
        self.poll, self.polled = select.poll(), {}  # type: tuple[select.poll, dict[int, int]]

    def run(self) -> None:
        """Until stdin ends."""
        while True:
            self.look_out()
            for descriptor, events in self.poll.poll():
                side = self.sides.get(descriptor)
                if side is not None:
                    side.ready(events)
                elif descriptor == self.listener.fileno():
                    self.accept()
                elif self.wire is not None and descriptor in (0, 1):
                    self.wire.ready(descriptor)

    def look_out(self) -> None:
        """Wait for just what can be handled: a hang-up that nobody could handle would be reported for ever."""
        wanted = {descriptor: side.interest() for descriptor, side in self.sides.items()}
        each = 1 if self.wire else 2
        wanted[self.listener.fileno()] = select.POLLIN if len(self.sides) < each * STREAMS else 0
        if self.wire:
            wanted.update({descriptor: self.wire.interest(descriptor) for descriptor in (0, 1)})
        for descriptor, events in wanted.items():
            if events != self.polled.get(descriptor, 0):
                if events:
                    self.poll.register(descriptor, events)
                else:
                    self.poll.unregister(descriptor)
                self.polled[descriptor] = events

    def accept(self) -> None:
        """A client comes."""
        try:
            client = self.listener.accept()[0]
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                time.sleep(0.05)  # nothing can be had until something is given back
            return
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.wire:
            self.wire.opened(Side(self, client))
        else:
            self.pair(client)

    def pair(self, client: socket.socket) -> None:
        """Join a client and the gateway's socket; a gateway that is not there is a connection that breaks."""
        gateway = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        gateway.settimeout(CONNECT_SEC)
        try:
            gateway.connect(self.path)
        except OSError as error:
            sys.stderr.write(f"rollout-relay: {self.path}: {error}\n")
            gateway.close()
            client.close()
            return
        here, there = Side(self, client), Side(self, gateway)
        here.joined(there)
        there.joined(here)

    def close(self, side: Side) -> None:
        """Forget a socket. Idempotent."""
        descriptor = side.sock.fileno()
        if descriptor < 0:
            return
        del self.sides[descriptor]
        if self.polled.pop(descriptor, 0):
            self.poll.unregister(descriptor)
        side.out.clear()
        side.sock.close()
        if self.wire:
            self.wire.closed(side)


def listen(port: int) -> socket.socket:
    """A listener on loopback, and nowhere else."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(128)
    listener.setblocking(False)
    return listener


def main() -> None:
    """Listen, say where, and carry."""
    parser = argparse.ArgumentParser(description="Carries connections on loopback to a model gateway.")
    parser.add_argument("--port", type=int, default=0, help="where to listen on 127.0.0.1; any free port by default")
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--unix", metavar="PATH", default="", help="carry each connection to this socket")
    way.add_argument("--stdio", action="store_true", help="carry all of them over stdin and stdout")
    asked = parser.parse_args()
    try:
        listener = listen(asked.port)
    except OSError as error:
        sys.exit(f"rollout-relay: cannot listen on 127.0.0.1:{asked.port}: {error}")
    os.write(1, f"rollout-relay {listener.getsockname()[1]}\n".encode())
    Loop(listener, Wire() if asked.stdio else None, asked.unix).run()


if __name__ == "__main__":
    main()
