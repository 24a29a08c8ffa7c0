"""Triton, imported when a kernel is first launched: a program that launches none neither needs it nor waits for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it


class Kernel:
    """A function in Triton's language, made by `jit`; `kernel[grid](...)` launches it as Triton's own would."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.function = function
        self.options = options
        self.__doc__ = function.__doc__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.jitted[grid]

    @cached_property
    def jitted(self) -> Any:
        """Triton's own object. From here on it stands in the kernel's module too, as do those of the kernels beside it."""
        names = self.function.__globals__
        names["tl"] = import_module("triton.language")
        self.__dict__["jitted"] = jitted = import_module("triton").jit(self.function, **self.options)
        for name, value in list(names.items()):
            if isinstance(value, Kernel):
                names[name] = value.jitted
        return jitted


def jit(*, do_not_specialize: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Mark a kernel, or a function that kernels call; the module's name `tl` is Triton's language by the time it runs.

    A program is compiled once for an integer argument's being 1, a multiple of 16, or neither, but for those not to be specialised.
    """
    return lambda function: Kernel(function, do_not_specialize=list(do_not_specialize))


@cache
def chained(device: torch.device) -> dict[str, bool]:
    """How a kernel is launched that calls `follow`: from Hopper on so that its programs start while the launch before still runs.

    That hides what each launch takes to begin, a large part of a step of few rows. NBENGINE_CHAINED=0 does without.
    """
    if device.type != "cuda" or os.environ.get("NBENGINE_CHAINED") == "0" or torch.cuda.get_device_capability(device)[0] < 9:
        return {}
    return {"following": True, "launch_pdl": True}


@jit()
def follow(following: tl.constexpr, followed: tl.constexpr = True) -> None:
    """Wait for the launch before, before anything is read that it writes, or written that it reads; let the next start too, or not yet."""
    if following:
        if followed:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def why_not(device: torch.device) -> str | None:
    """What keeps Triton's kernels from running on a device; None: nothing."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton's kernels run on NVIDIA GPUs, and this engine is on {device.type!r}; set TRITON_INTERPRET=1 to interpret them"
    if find_spec("triton") is None:
        return "Triton is not installed; pip install 'nbengine[triton]'"
    return None


def check_product(x: torch.Tensor) -> None:
    """Refuse what Triton's interpreter would multiply wrongly, without a word."""
    if x.dtype is torch.bfloat16 and x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        raise TypeError("Triton's interpreter does not multiply bfloat16; make the engine with dtype='float32'")


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


def multiprocessors(device: torch.device) -> int:
    """Programs that run at the same time, at least; on a CPU, where programs are interpreted, few enough to be quick."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have."""
    properties: Any = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return properties.shared_memory_per_block_optin if properties else 227 << 10
