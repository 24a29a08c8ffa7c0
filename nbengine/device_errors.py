"""What an error of a GPU means: no memory for this step, nothing that runs there can go on, or neither."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nbengine.errors import DeviceLostError, DeviceMemoryError

NO_MEMORY = re.compile(r"out of memory|ALLOC_FAILED|CUDA error 2\b|can't allocate memory")  # as the driver, its libraries and a CPU say it


def told_apart(error: BaseException, device: torch.device) -> BaseException:
    """The error to raise in its place; itself where there is no better one."""
    if isinstance(error, torch.OutOfMemoryError):
        return DeviceMemoryError(str(error).split(". ")[0])
    if not isinstance(error, RuntimeError):
        return error
    first = (str(error).splitlines() or [""])[0]
    if device.type == "cuda" and _lost(device):
        return DeviceLostError(
            f"the GPU met an error after which it answers this process no more ({first}). Restart the kernel; "
            "nothing that runs on this GPU can go on without that"
        )
    return DeviceMemoryError(first) if NO_MEMORY.search(first) else error


@contextmanager
def at_rest(device: torch.device) -> Iterator[None]:
    """Around what changes what lies on a device: its work is done, and an error is told as what it means."""
    try:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # first: on a GPU that is lost, to free a graph would end the process
        yield
    except RuntimeError as error:
        found = told_apart(error, device)
        if found is error:
            raise
        raise found from None


def _lost(device: torch.device) -> bool:
    """Whether the card fails at everything now: such an error stays until the process ends."""
    try:
        torch.cuda.current_stream(device).synchronize()
    except RuntimeError:
        return True
    return False
