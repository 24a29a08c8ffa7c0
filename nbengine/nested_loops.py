"""asyncio.run inside a notebook cell, for code that insists on it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

LIBRARIES = ("nest_asyncio2", "nest_asyncio")


def allow_nested_loops() -> None:
    """Let `asyncio.run` and `loop.run_until_complete` work in the cells of this notebook, for code of yours that calls them.

    nbengine itself never needs it: `engine.generate(...)` and `await engine.agenerate(...)` work in a cell as they are. Call it in
    a cell, once (again does no harm). Where no loop is running there is nothing to allow, and nothing is changed.

    Only the loop that runs the cell becomes re-entrant; the engine's loop, and any other, stays as it was. Some of it cannot be kept
    to one loop: nest-asyncio2 puts asyncio's tasks and futures in Python in the place of those in C for the whole process (before
    Python 3.14), which makes every loop's new tasks somewhat slower, and replaces `asyncio.run` (elsewhere than in the cell's
    loop it does what it did before). It cannot be undone without a new kernel. uvloop's loops cannot be nested.

    >>> nbengine.allow_nested_loops()  # doctest: +SKIP
    >>> asyncio.run(fetch())           # doctest: +SKIP
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    if hasattr(loop, "_nest_patched"):
        return
    if not isinstance(loop, asyncio.BaseEventLoop):
        raise TypeError(f"a {type(loop).__module__}.{type(loop).__qualname__} cannot be nested: await the coroutine instead of asyncio.run")
    library = _library()
    # The library patches the loop's class, and the engine's loop is of the same one: give this loop a class of its own to patch.
    loop.__class__ = type(type(loop).__name__, (type(loop),), {})
    plain = asyncio.run
    with _policy_kept():
        library.apply(loop)
    asyncio.run = _where_nested(asyncio.run, plain)


@contextlib.contextmanager
def _policy_kept() -> Iterator[None]:
    """The library's policy would patch the class of any thread's loop; it leaves policies alone from Python 3.14 on."""
    if sys.version_info >= (3, 14):
        yield
        return
    policy = type(asyncio.get_event_loop_policy())
    get_event_loop = policy.get_event_loop
    try:
        yield
    finally:
        policy.get_event_loop = get_event_loop  # type: ignore[method-assign]


def _library() -> ModuleType:
    for name in LIBRARIES:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            continue
    raise ImportError("allow_nested_loops needs nest-asyncio2: run `%pip install nest-asyncio2`, then call it again")


def _where_nested(nested: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """asyncio.run: nested inside a loop that allows it, as ever elsewhere."""

    @functools.wraps(plain)
    def run(main: Any, **options: Any) -> Any:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return plain(main, **options)
        return (nested if hasattr(loop, "_nest_patched") else plain)(main, **options)

    return run
