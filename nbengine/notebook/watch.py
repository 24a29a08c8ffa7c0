"""Waiting for a generation in its cell: shown as it comes, and ended, with its text kept, by the stop button."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from nbengine.bell import Bell
from nbengine.errors import NBEngineError

if TYPE_CHECKING:
    from nbengine.notebook.generation import Generation
    from nbengine.notebook.live import View
    from nbengine.notebook.pump import Pump

LOOK = 0.02  # most seconds between two looks; also what lets an interrupt through where a kernel cannot wake its own loop
GRACE = 0.25  # seconds that a cancelled request may take to end before its cell is left


class Interrupted(Exception):  # noqa: N818 - what it is to those who read it
    """The stop button was pressed; the cell says so in one line.

    Not a KeyboardInterrupt: one that leaves a task goes on through the loop that runs it, and a kernel's loop ends the kernel.
    """

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class InterruptedHere(KeyboardInterrupt):
    """The same in a cell that nobody awaits, where no `except Exception` of the user's may swallow it."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


InterruptedHere.__name__ = Interrupted.__name__  # what a front end shows


def wait_here(generation: Generation, view: View, pump: Pump) -> None:
    """Wait in the calling thread."""
    bell = Bell()
    generation.on_end(bell.ring)
    try:
        while not generation.done:
            view.refresh()
            bell.wait(LOOK)
    except KeyboardInterrupt:
        _stop(generation)
        raise InterruptedHere(_told(generation)) from None
    finally:
        _leave(generation, view, pump)
    raise_in_one_line(generation)


async def wait_awaited(generation: Generation, view: View, pump: Pump) -> None:
    """`wait_here` for a cell that is awaited, so that its kernel hears a button meanwhile."""
    ended, loop = asyncio.Event(), asyncio.get_running_loop()

    def ring() -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed, and whoever waited in it is gone
            loop.call_soon_threadsafe(ended.set)

    generation.on_end(ring)
    try:
        while not generation.done:
            view.refresh()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK):
                    await ended.wait()
    except (asyncio.CancelledError, KeyboardInterrupt):
        _stop(generation)
        raise Interrupted(_told(generation)) from None
    finally:
        _leave(generation, view, pump)
    raise_in_one_line(generation)


def _stop(generation: Generation) -> None:
    generation.cancel()
    generation.settle(GRACE)


def _leave(generation: Generation, view: View, pump: Pump) -> None:
    if generation.done:
        view.finish()
    else:
        generation.cancel()
        pump.add(generation, view)  # the engine is in the middle of a long step: its end is shown when it comes


def _told(generation: Generation) -> str:
    tokens = sum(len(completion.token_ids) for handle in generation.handles for completion in handle.completions)
    return f"Interrupted: stopped by the user after {tokens} tokens"


def raise_in_one_line(generation: Generation) -> None:
    """A request's failure as one line under the cell."""
    try:
        generation.raise_error()
    except NBEngineError as error:
        message = str(error)
    else:
        return
    raise UsageError(message)


@contextlib.contextmanager
def ends_what_is_queued(queued: Callable[[], Generation | None]) -> Iterator[None]:
    """An interrupt in here leaves no request running."""
    try:
        yield
    except KeyboardInterrupt:
        generation = queued()
        if generation is not None:
            generation.cancel()
        raise


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Let an interrupt come after what is inside, so that it cannot fall between queueing a request and remembering it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, Any]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held and callable(before):
        before(*held[0])
