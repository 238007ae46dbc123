"""Tasks that outlive the coroutine which started them, a race between waits, and a bell that ends some.

A session's reader and a prompt in flight live longer than the state handler that started them (`Rollout.step` returns
between states), and a prompt that swallows its cancellation must be left behind without holding up the rollout. No
task group can do either, so these run as tasks of the loop itself, in a cancel scope of their own, and whoever starts
one is answerable for its end.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio
import attrs

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

_KEPT: set[asyncio.Task[None]] = set()  # asyncio itself only keeps weak references to its tasks


PATIENCE = 100
"""How often a cancelled task may swallow its cancellation before it is not resumed any more."""


class Abandoned(Exception):
    """The task was cancelled by its owner before it had a result."""


class StrayCancellation(Exception):
    """Code that is not ours raised a cancellation which nobody had asked of the task that it runs in."""


@contextlib.contextmanager
def foreign() -> Iterator[None]:
    """Around code that is not ours: what it raises is its error, also where that looks like our own cancellation.

    On asyncio whoever awaits something that was cancelled raises `CancelledError`, and some client libraries let it
    out. Taken for the host's word it would end a rollout, and a host's task, that nobody had cancelled. It is raised as
    `StrayCancellation`; a cancellation of this task, by a scope or by its host, goes through.
    """
    try:
        yield
    except anyio.get_cancelled_exc_class() as error:
        if _is_being_cancelled():
            raise
        raise StrayCancellation("what it waited for was cancelled, and nobody had cancelled the rollout") from error


def _is_being_cancelled() -> bool:
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return True  # nobody else can make a trio.Cancelled
    import asyncio

    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


@attrs.define(eq=False)
class Detached(Generic[T]):
    """A task of the running loop (asyncio or trio), started once, awaited by any number, cancelled at will.

    Whatever the function raises, `SystemExit` included, is its outcome and never reaches the loop.
    """

    fn: Callable[..., Awaitable[T]]
    args: tuple[Any, ...] = ()
    name: str = "detached"
    started: bool = attrs.field(default=False, init=False)
    _scope: anyio.CancelScope = attrs.field(factory=anyio.CancelScope, init=False)
    _finished: anyio.Event = attrs.field(factory=anyio.Event, init=False)
    _results: list[T] = attrs.field(factory=list, init=False)
    _errors: list[BaseException] = attrs.field(factory=list, init=False)

    def start(self) -> Detached[T]:
        """Start it on the loop that runs."""
        self.started = True
        trio = sys.modules.get("trio")
        if trio is not None and trio.lowlevel.in_trio_run():
            trio.lowlevel.spawn_system_task(self._run, name=self.name, context=contextvars.copy_context())
        else:
            import asyncio

            task = asyncio.get_running_loop().create_task(self._run(), name=self.name)
            _KEPT.add(task)
            task.add_done_callback(_KEPT.discard)
        return self

    async def _called(self) -> T:
        return await self.fn(*self.args)

    async def _run(self) -> None:
        try:
            with self._scope:
                self._results.append(await _Reined(self._called(), self._scope))
        except anyio.get_cancelled_exc_class() as error:
            # The loop is going down (or, on asyncio, foreign code raised its own CancelledError).
            self._errors.append(error)
            if "trio" in type(error).__module__:
                raise
        except BaseException as error:
            self._errors.append(error)
        finally:
            if not self._results and not self._errors:
                self._errors.append(Abandoned(f"{self.name} was cancelled"))
            self._finished.set()

    @property
    def done(self) -> bool:
        """Whether it has an outcome."""
        return self._finished.is_set()

    def cancel(self) -> None:
        """Ask it to stop. Idempotent; nobody has to wait for a task that swallows this, and it is soon not resumed."""
        self._scope.cancel()

    async def wait(self) -> T:
        """Its result, or its error raised: `Abandoned` when it was cancelled first. May be awaited again."""
        await self._finished.wait()
        return self.outcome()

    def outcome(self) -> T:
        """The same, of one that is `done`."""
        for error in self._errors:
            raise _as_exception(error)
        return self._results[0]


@attrs.frozen(eq=False)
class _Reined(Generic[T]):
    """Awaits a coroutine, but no longer resumes one that keeps swallowing the cancellation of `scope`.

    Both loops deliver a scope's cancellation again at every step of its task, so code that swallows it would keep a
    core busy for ever.
    """

    coroutine: Coroutine[Any, Any, T]
    scope: anyio.CancelScope

    def __await__(self) -> Generator[Any, Any, T]:
        steps = self.coroutine.__await__()
        swallowed = 0
        resume: Callable[[], Any] = functools.partial(next, steps)
        while True:
            try:
                trap = resume()
            except StopIteration as returned:
                result: T = returned.value
                return result
            try:
                sent = yield trap
            except BaseException as error:
                thrown: BaseException | None = error
                resume = functools.partial(steps.throw, error)
            else:
                thrown = getattr(sent, "error", None)  # trio sends an outcome that is unwrapped inside
                resume = functools.partial(steps.send, sent)
            if self.scope.cancel_called and isinstance(thrown, anyio.get_cancelled_exc_class()):
                swallowed += 1
                if swallowed > PATIENCE:
                    with contextlib.suppress(BaseException):  # it may swallow this too
                        steps.close()
                    raise thrown


def _as_exception(error: BaseException) -> BaseException:
    """Errors that would steer the waiter's own loop are handed over as an ordinary error with their cause."""
    if isinstance(error, Exception):
        return error
    wrapped = Abandoned(f"ended by {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped


async def first_of(*waits: Callable[[], Awaitable[T]]) -> T:
    """The result of the first wait to finish; the others are cancelled. The earliest listed wins a tie.

    An error of any of them is raised as it is, not in a group.
    """
    if len(waits) == 1:
        return await waits[0]()
    results: dict[int, T] = {}
    errors: list[Exception] = []

    async with anyio.create_task_group() as group:

        async def run(number: int, wait: Callable[[], Awaitable[T]]) -> None:
            try:
                with foreign():
                    results[number] = await wait()
            except Exception as error:
                errors.append(error)
            except anyio.get_cancelled_exc_class():
                if not results and not errors:
                    raise  # from outside; our own ends here, as its traceback would hold all that it went through
            group.cancel_scope.cancel()

        for number, wait in enumerate(waits):
            group.start_soon(run, number, wait)
    if results:
        return results[min(results)]
    raise errors[0]


@attrs.define(eq=False)
class Bell:
    """Wakes whoever waits for something to have changed."""

    _rung: anyio.Event | None = attrs.field(default=None, init=False)
    """What those who wait are woken by; there while somebody does."""

    def ring(self) -> None:
        """Something changed."""
        if self._rung is not None:
            self._rung.set()
            self._rung = None

    async def until(self, changed: Callable[[], T | None]) -> T:
        """What `changed` returns, as soon as that is not None."""
        while (found := changed()) is None:
            if self._rung is None:
                self._rung = anyio.Event()
            await self._rung.wait()
        return found
