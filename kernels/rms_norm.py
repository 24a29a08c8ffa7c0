"""Root-mean-square norm, with or without the residual added first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from nbengine.kernels._triton import chained, follow, jit, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Norm x [tokens, width] -> x / rms(x) * (weight + offset), where rms(x)^2 = mean(x^2) + eps.

    With a residual [tokens, width], x is first added to it in place, and the sum is what is normed.
    """
    if residual is not None:
        x = residual.add_(x)
    if x.shape[0] == 1 and x.device.type == "cpu":  # half of F.rms_norm's time for one row
        wide = x.float()
        norm = float(torch.linalg.vector_norm(wide))
        return (wide * (norm * norm / x.shape[1] + eps) ** -0.5).mul_(weight.float() + offset if offset else weight).to(x.dtype)
    if not offset:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float() + offset, eps).to(x.dtype)  # 1 + w must not be rounded


# Rows, up to so many, beside which the next launch starts. More of them fill the card, and its programs would wait where theirs could run.
_FOLLOWED_ROWS = 64


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, residual: torch.Tensor | None = None) -> torch.Tensor:
    """As rms_norm_reference, each row read once and kept in registers by a program of its own."""
    rows, width = x.shape
    assert x.stride(1) == weight.stride(0) == 1
    assert residual is None or (residual.shape == x.shape and residual.stride(1) == 1)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if rows:
        block = next_power_of_2(width)
        strides = x.stride(0), 0 if residual is None else residual.stride(0)
        rms_norm_kernel[(rows,)](
            x, residual, weight, out, *strides, width, eps, offset, block=block, followed=rows <= _FOLLOWED_ROWS,
            num_warps=min(max(block // 512, 1), 16), **chained(x.device),
        )  # fmt: skip
    return out


@jit(do_not_specialize=("eps", "offset"))
def rms_norm_kernel(
    p_x: tl.tensor,
    p_residual: tl.tensor | None,
    p_weight: tl.tensor,
    p_out: tl.tensor,
    x_stride: int,
    residual_stride: int,
    width: int,
    eps: float,
    offset: float,
    block: tl.constexpr,
    followed: tl.constexpr = True,
    following: tl.constexpr = False,
) -> None:
    follow(following, followed)
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, block)
    m = o < width
    x = tl.load(p_x + i_row * x_stride + o, mask=m, other=0.0)
    if p_residual is not None:
        p_sum = p_residual + i_row * residual_stride + o
        x = (x.to(tl.float32) + tl.load(p_sum, mask=m, other=0.0).to(tl.float32)).to(x.dtype)  # what is normed is the sum as stored
        tl.store(p_sum, x, mask=m)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    weight = tl.load(p_weight + o, mask=m, other=0.0).to(tl.float32) + offset
    tl.store(p_out + i_row * width + o, wide * scale * weight, mask=m)


def example_inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]]:
    """Arguments to try, each with those of its tensors that the op writes to."""
    device = generator.device
    for rows, width, offset, added in ((1, 64, 0.0, False), (1, 63, 1.0, True), (63, 1000, 0.0, True), (7, 96, 1.0, False)):
        x, residual = (torch.randn(rows, width, generator=generator, device=device, dtype=dtype) * 3 for _ in range(2))
        weight = torch.randn(width, generator=generator, device=device, dtype=dtype)
        yield (x, weight, 1e-6, offset, residual if added else None), (residual,) if added else ()
