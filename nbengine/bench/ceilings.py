"""What this machine reaches at best, measured in the same run as everything else: a large copy and a large matrix product."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter

import torch

from nbengine.bench.limits import Card

ROUNDS = 15  # of which the median is taken


def ceilings(device: torch.device, quick: bool = False) -> Card:
    """Bytes a second of a copy, counted as read and as written, and operations a second of a bf16 product."""
    large = device.type == "cuda" and not quick
    card = Card(_copy(device, 1 << 30 if large else 1 << 22), _product(device, 8192 if large else 512))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return card


def _copy(device: torch.device, count: int) -> float:
    source = torch.randn(count, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(device, lambda: target.copy_(source))


def _product(device: torch.device, side: int) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))  # zeros would run faster
    out = torch.empty_like(left)
    return 2 * side**3 / _seconds(device, lambda: torch.mm(left, right, out=out))


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    timed = _by_events if device.type == "cuda" else _by_clock
    for _ in range(3):
        call()
    return statistics.median(timed(call) for _ in range(ROUNDS))


def _by_clock(call: Callable[[], object]) -> float:
    began = perf_counter()
    call()
    return perf_counter() - began


def _by_events(call: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(4):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 4e3
