"""How foreign things are put into our sentences: a value by what it is, an exception by where it was raised."""

from __future__ import annotations

import inspect
import traceback

TRACE = 20_000
"""How much of a traceback is kept, in characters: its end, where the code of whoever raised it is."""


def shown(value: object) -> str:
    """A value in a sentence, short: itself where it is plain, else what it is.

    >>> shown(5), shown({}), shown(dict), shown(len)
    ('5', 'a dict', 'the class dict', 'the function len')
    """
    if value is None or isinstance(value, str | int | float):
        return f"{value!r:.80}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    kind = type(value).__qualname__
    return f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}"


def traced(error: BaseException) -> str:
    """Its traceback, as a note tells it. A foreign error may fail at that, too."""
    try:
        text = "".join(traceback.format_exception(error))
    except Exception as unreadable:
        text = f"{type(error).__name__}, whose traceback cannot be written: {type(unreadable).__name__}"
    if len(text) <= TRACE:
        return text
    tail = text[-TRACE:]
    tail = tail.partition("\n")[2] or tail  # a line that is cut may hold half of a secret, which nobody redacts
    return f"[... {len(text) - len(tail)} characters were cut here ...]\n{tail}"
