"""The gated activation between an MLP's two products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from nbengine.kernels._triton import chained, follow, jit

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it


def gated_reference(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """gate_up [tokens, 2 * width] -> activation(gate) * up, contiguous [tokens, width]; silu, gelu or gelu_tanh."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate).mul_(up)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)


_BLOCK = 2048


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """As gated_reference, in one pass over the memory and in float32 until the end."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    assert activation in {"silu", "gelu", "gelu_tanh"}
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        gated_kernel[(rows, -(-width // _BLOCK))](
            gate_up, out, gate_up.stride(0), width, activation=activation, block=_BLOCK, **chained(out.device)
        )
    return out


@jit()
def gated_kernel(
    p_x: tl.tensor,
    p_out: tl.tensor,
    x_stride: int,
    width: int,
    activation: tl.constexpr,
    block: tl.constexpr,
    following: tl.constexpr = False,
) -> None:
    follow(following)
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * block + tl.arange(0, block)
    m = o < width
    gate = tl.load(p_x + i_row * x_stride + o, mask=m, other=0.0).to(tl.float32)
    up = tl.load(p_x + i_row * x_stride + width + o, mask=m, other=0.0).to(tl.float32)
    if activation == "silu":
        gate *= tl.sigmoid(gate)
    elif activation == "gelu":
        gate *= 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    else:  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        gate *= tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    tl.store(p_out + i_row * width + o, gate * up, mask=m)


def example_inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]]:
    """Arguments to try, each with those of its tensors that the op writes to."""
    for rows, width, activation in ((1, 64, "silu"), (63, 1000, "silu"), (5, 63, "gelu_tanh"), (3, 96, "gelu")):
        yield (torch.randn(rows, 2 * width, generator=generator, device=generator.device, dtype=dtype) * 3, activation), ()
