"""Waiting for many requests at once, with a progress bar, so that an interrupt or an error leaves none of them running."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nbengine.outputs import RequestOutput
    from nbengine.request import Request

LOOK = 0.1  # seconds between two looks at how many have ended or failed


def wait_all(requests: list[Request], *, show: bool | Callable[..., Any] = False) -> list[RequestOutput]:
    """The outputs of all, in their order. What is raised (an interrupt, a request's failure) first cancels the rest."""
    try:
        with _bar(show, len(requests)) if show else contextlib.nullcontext() as bar:
            looked = monotonic()
            for request in requests:
                while not request.wait(LOOK) or monotonic() - looked > LOOK:
                    _look(bar, requests)
                    looked = monotonic()
            _look(bar, requests)
            return [request.result() for request in requests]
    except BaseException:
        cancel_all(requests)
        raise


async def gather(requests: list[Request]) -> list[RequestOutput]:
    """`wait_all` for a running loop."""
    try:
        return list(await asyncio.gather(*(_output(request) for request in requests)))
    except BaseException:
        cancel_all(requests)
        raise


async def _output(request: Request) -> RequestOutput:
    return await request


def cancel_all(requests: list[Request]) -> None:
    for request in requests:
        request.cancel()


def _bar(show: bool | Callable[..., Any], total: int) -> Any:
    from tqdm.auto import tqdm

    return (show if callable(show) else tqdm)(
        total=total, desc="Processed prompts", unit="prompt", dynamic_ncols=True, postfix="generated: 0 tok/s"
    )


def _look(bar: Any, requests: list[Request]) -> None:
    """Let the bar tell how far it is, and raise what any of them has failed with."""
    for request in requests:
        request.raise_error()
    if bar is None:
        return
    ended = sum(request.finished for request in requests)
    tokens = sum(len(completion.token_ids) for request in requests for completion in request.completions)
    elapsed = bar.format_dict["elapsed"]
    if elapsed:
        bar.set_postfix_str(f"generated: {tokens / elapsed:.0f} tok/s", refresh=False)
    if ended > bar.n:
        bar.update(ended - bar.n)
