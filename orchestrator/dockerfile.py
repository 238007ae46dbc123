"""A Dockerfile, read: its instructions, whatever lines they are on. For whoever builds it, and whoever does not."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping

import attrs

from states.errors import TaskError

_HEREDOC = re.compile(r"(?<!<)<<(-?)\s*(['\"]?)([A-Za-z_]\w*)\2")
_VARIABLE = re.compile(r"\\\$|\$(?:\{([A-Za-z_]\w*)(?::([-+])([^}]*))?\}|([A-Za-z_]\w*))")


@attrs.frozen
class Instruction:
    """One instruction, its continued lines joined."""

    line: int
    """Where it begins; the first line is 1."""
    last: int
    """Where it ends, without its here-documents."""
    word: str
    rest: str
    has_heredoc: bool


def instructions(text: str, path: object) -> Iterator[Instruction]:
    r"""The instructions of a Dockerfile; comments, empty lines and the bodies of here-documents are none.

    Raises `TaskError` for a line that is none, with `path` and its number.

    >>> [(one.line, one.word, one.rest) for one in instructions("from a\nRUN b \\\n# c\n  FROM d", "Dockerfile")]
    [(1, 'FROM', 'a'), (2, 'RUN', 'b FROM d')]
    """
    lines = deque(enumerate(text.split("\n"), 1))
    while lines:
        number, line = lines.popleft()
        last, line = number, line.strip()
        if not line or line.startswith("#"):
            continue
        while line.endswith("\\") and lines:
            last, following = lines.popleft()
            if (following := following.strip()) and not following.startswith("#"):
                line = f"{line[:-1].rstrip()} {following}"
        word, rest = (*line.split(None, 1), "", "")[:2]
        if not re.fullmatch(r"[A-Za-z]+", word) or not rest:
            raise TaskError(
                f"{path}:{number}: expected a Dockerfile instruction and its arguments, found {line[:60]!r}"
            )
        bodies = sum(_drop_body(lines, *found) for found in _HEREDOC.findall(rest) if word.upper() in _WITH_BODIES)
        yield Instruction(number, last, word.upper(), rest.strip(), bool(bodies))


_WITH_BODIES = frozenset({"RUN", "COPY", "ADD"})


def _drop_body(lines: deque[tuple[int, str]], dash: str, _quote: str, end: str) -> bool:
    """Leave a here-document out; without its end it was none, but a shift such as `1 << n`."""
    bodies = [body.lstrip("\t") if dash else body for _, body in lines]
    if end not in bodies:
        return False
    for _ in range(bodies.index(end) + 1):
        lines.popleft()
    return True


def expand(text: str, known: Mapping[str, str]) -> str:
    r"""`text` with `$NAME` and `${NAME:-default}` replaced; an unknown name is empty, as in Docker.

    >>> expand(r"$a ${b} ${b:-c} ${a:+d} \$a", {"a": "1"})
    '1  c d $a'
    """

    def value(match: re.Match[str]) -> str:
        if match[0] == "\\$":
            return "$"
        found = known.get(match[1] or match[4], "")
        if match[2] == "-":
            return found or match[3]
        return (match[3] if found else "") if match[2] == "+" else found

    return _VARIABLE.sub(value, text)


def has_heredoc(rest: str) -> bool:
    """Whether the arguments of an instruction begin a here-document."""
    return _HEREDOC.search(rest) is not None
