"""x @ weight.T + bias: every dense product of a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

_FEW = 8  # rows; from here on oneDNN's product is the faster one


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply x [tokens, in] by weight [out, in], add bias [out]: contiguous [tokens, out].

    In float32 on a CPU F.linear reads the weight at 6 to 13 GB/s where few rows are multiplied; written as weight @ x.T with
    two rows or more (a lone one is doubled) it reaches 25 to 35, and for many rows oneDNN takes a third less time.
    """
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    rows = x.shape[0]
    if rows >= _FEW:
        if torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001 - what torch.compile calls here
        return F.linear(x, weight, bias)
    out = torch.mm(weight, (torch.cat((x, x)) if rows == 1 else x).t())  # [out, rows or 2]
    out = out.t()[:rows].contiguous()
    return out if bias is None else out.add_(bias)


def example_inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]]:
    """Arguments to try, each with those of its tensors that the op writes to."""
    device = generator.device
    for rows, width, out, biased in ((1, 64, 96, False), (5, 63, 33, True), (63, 128, 257, True), (1, 200, 1000, True)):
        x = torch.randn(rows, width, generator=generator, device=device, dtype=dtype)
        weight = torch.randn(out, width, generator=generator, device=device, dtype=dtype)
        bias = torch.randn(out, generator=generator, device=device, dtype=dtype) if biased else None
        yield (x, weight, bias), ()
