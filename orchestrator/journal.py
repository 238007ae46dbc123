"""Journals on disk: one JSON object a line, appended before the next side effect, never rewritten.

A line that a kill tore in half is the last one: readers leave it out, and a writer that goes on starts a new line.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import attrs
import msgspec

from states.errors import JournalError
from states.events import Event
from states.journal import SCHEMA, Cause, Header, LeaseRecord, Note, Record, Stopped, Transition
from states.machine import EVENTS, Rules
from states.ports import Lease

encode = msgspec.json.Encoder().encode
"""One value of ours as compact JSON bytes."""

_LENIENT = msgspec.json.Encoder(enc_hook=repr)


def encode_any(value: Any) -> bytes:
    """One foreign value as compact JSON bytes; what JSON cannot say is kept as it prints. Never raises."""
    try:
        return _LENIENT.encode(value)
    except Exception:
        return encode(_sayable(value, _DEEPEST))


_DEEPEST = 64


def _sayable(value: Any, depth: int) -> Any:
    """A hostile value (lone surrogates, keys that are no text, cycles, a `repr` that raises) as JSON can say it."""
    try:
        if value is None or isinstance(value, bool | int | float | msgspec.Raw):
            return value
        if isinstance(value, str):
            return value.encode("utf-8", "replace").decode()
        if depth and attrs.has(type(value)):
            return {a.name: _sayable(getattr(value, a.name), depth - 1) for a in attrs.fields(type(value))}
        if depth and isinstance(value, Mapping):
            return {_sayable(str(k), 0): _sayable(v, depth - 1) for k, v in value.items()}
        if depth and isinstance(value, list | tuple | set | frozenset):
            return [_sayable(v, depth - 1) for v in value]
        return repr(value)[:10_000].encode("utf-8", "replace").decode()
    except Exception as error:
        return f"<a {type(value).__name__} that cannot be read: {type(error).__name__}>"


class Sink(Protocol):
    """Where lines go. An embedder brings its own to keep a journal elsewhere."""

    def write(self, line: bytes) -> None:
        """Append one line (without its newline). Raises `JournalError`; then the rollout stops as if killed."""

    def close(self) -> None:
        """Nothing more will come. Idempotent."""


@attrs.define(eq=False)
class MemorySink:
    """Lines kept in memory: for tests and for hosts that want no files."""

    lines: list[bytes] = attrs.field(factory=list)

    def write(self, line: bytes) -> None:
        """Keep it."""
        self.lines.append(line)

    def close(self) -> None:
        """Nothing to do."""


@attrs.define(eq=False)
class FileSink:
    """Lines appended to a file, each with one write: what was written survives the death of this process.

    The file is opened by the first line and closed by `close`; a line after that opens it again.
    """

    path: Path
    _fds: list[int] = attrs.field(factory=list, init=False)

    def write(self, line: bytes) -> None:
        """Append one line."""
        try:
            if not self._fds:
                self._open()
            _write_all(self._fds[0], line + b"\n")
        except OSError as error:
            self.close()  # whoever goes on all the same begins a new line behind one that is torn
            raise JournalError(f"{self.path} cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Give the descriptor back. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    def _open(self) -> None:
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._fds.append(fd)
        self._claim(fd)
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")  # a kill tore the last line; what follows must not be lost with it

    def _claim(self, fd: int) -> None:
        """Anybody may append."""


_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})
"""What file systems say that know no locks: there, whoever takes a rollout over goes by its owner's process alone."""


@attrs.define(eq=False)
class JournalSink(FileSink):
    """The journal itself, of which there is one writer: a lock that the kernel takes back when its process dies."""

    _unlocked: list[OSError] = attrs.field(factory=list, init=False)

    def claim(self) -> Literal["ours", "taken", "unknown"]:
        """Become its writer, until `close`: whether we are, or somebody else is, or the file system cannot say.

        Raises `JournalError` when it cannot be opened.
        """
        try:
            if not self._fds:
                self._open()
        except BlockingIOError:
            self.close()
            return "taken"
        except OSError as error:
            self.close()
            raise JournalError(f"{self.path} cannot be written: {error.strerror or error}") from error
        return "unknown" if self._unlocked else "ours"

    def _claim(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another process writes it, one at a time can") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._unlocked.append(error)


def _write_all(fd: int, data: bytes) -> None:
    written = os.write(fd, data)
    while written < len(data):
        data = data[written:]
        written = os.write(fd, data)


def to_json(record: Record) -> dict[str, Any]:
    """A record as JSON values."""
    match record:
        case Header():
            return {"type": "header", **{a.name: getattr(record, a.name) for a in attrs.fields(Header)}}
        case Transition():
            return {
                "type": "transition",
                "seq": record.seq,
                "time": record.time,
                "source": record.source,
                "event": record.event.name,
                "data": event_data(record.event),
                "dest": record.dest,
                "cause": record.cause,
            }
        case LeaseRecord(seq=seq, time=time, action=action, lease=lease):
            return {"type": "lease", "seq": seq, "time": time, "action": action, "lease": lease}
        case Note(seq=seq, time=time, text=text):
            return {"type": "note", "seq": seq, "time": time, "text": text}
        case Stopped(seq=seq, time=time, by=by):
            return {"type": "stopped", "seq": seq, "time": time, "by": by}


def event_data(event: Event) -> dict[str, Any]:
    """The journaled fields of an event."""
    fields = attrs.fields(type(event))
    return {a.name: getattr(event, a.name) for a in fields if "live" not in a.metadata}


def from_json(line: bytes) -> Record:
    """Read one line. Raises `JournalError` that says what is wrong with it."""
    try:
        raw = msgspec.json.decode(line)
        return _READERS[raw.pop("type")](raw)
    except (msgspec.MsgspecError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise JournalError(f"not a journal record: {line[:120]!r} ({type(error).__name__}: {error})") from error


def _read_header(raw: dict[str, Any]) -> Header:
    if raw.get("schema") != SCHEMA:
        return Header(raw["rollout"], Rules(), raw["time"], raw["schema"])
    return Header(raw["rollout"], msgspec.convert(raw["rules"], Rules), raw["time"], raw["schema"], raw["info"])


def _read_transition(raw: dict[str, Any]) -> Transition:
    event: Event = msgspec.convert(raw["data"], EVENTS[raw["event"]])
    return Transition(raw["seq"], raw["time"], raw["source"], event, raw["dest"], raw["cause"])


def _read_lease(raw: dict[str, Any]) -> LeaseRecord:
    return LeaseRecord(raw["seq"], raw["time"], raw["action"], msgspec.convert(raw["lease"], Lease))


def _read_note(raw: dict[str, Any]) -> Note:
    return Note(raw["seq"], raw["time"], raw["text"])


def _read_stopped(raw: dict[str, Any]) -> Stopped:
    return Stopped(raw["seq"], raw["time"], raw["by"])


_READERS: dict[str, Callable[[dict[str, Any]], Record]] = {
    "header": _read_header,
    "transition": _read_transition,
    "lease": _read_lease,
    "note": _read_note,
    "stopped": _read_stopped,
}


def read_lines(path: Path) -> Iterator[bytes]:
    """The whole lines of an append-only file; one that was torn by a kill is left out."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror or error}") from error
    for line in data.split(b"\n")[:-1]:
        if line:
            yield line


def read_journal(path: Path) -> list[Record]:
    """Every record of a journal, or of the rollout folder that holds one. Raises `JournalError`.

    >>> from states.journal import fold
    >>> fold(read_journal(Path("runs/demo"))).position.state  # doctest: +SKIP
    'closed/rewarded'
    """
    file = path / "journal.jsonl" if path.is_dir() else path
    records = []
    for number, line in enumerate(read_lines(file), start=1):
        try:
            records.append(from_json(line))
        except JournalError as error:
            if line.endswith(b"}"):
                raise JournalError(f"{file}:{number}: {error}") from error
            # A torn line in the middle: a writer was killed here and another went on.
    return records


@attrs.define(eq=False)
class JournalWriter:
    """Writes one rollout's journal, numbering its records, and keeps them for its fold.

    With `records` it goes on with a journal that is there; without, it begins one with `header`.
    """

    _sink: Sink
    _clock: Callable[[], float]
    header: Header
    records: list[Record] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        if not self.records:
            self._append(self.header)

    def _append(self, record: Record) -> None:
        self._sink.write(encode_any(to_json(record)))
        self.records.append(record)

    def write(self, make: Callable[[int, float], Record]) -> None:
        """Append the record that `make(seq, time)` returns."""
        self._append(make(len(self.records), self._clock()))

    def moved(self, source: str, event: Event, dest: str, cause: Cause) -> Transition:
        """Append a transition. What the event hands over is for the next state alone, and not kept here."""
        record = Transition(len(self.records), self._clock(), source, event.without_live(), dest, cause)
        self._append(record)
        return record

    def note(self, text: str) -> None:
        """Append a note."""
        self.write(lambda seq, now: Note(seq, now, text))

    def close(self) -> None:
        """Nothing more will come."""
        self._sink.close()
