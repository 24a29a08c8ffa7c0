"""The gated activation between an MLP's two products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere


def gated_reference(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """gate_up [tokens, 2 * width] -> activation(gate) * up, contiguous [tokens, width]; silu, gelu or gelu_tanh."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "silu":
        return F.silu(gate).mul_(up)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none").mul_(up)


def example_inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]]:
    """Arguments to try, each with those of its tensors that the op writes to."""
    for rows, width, activation in ((1, 64, "silu"), (63, 1000, "silu"), (5, 63, "gelu_tanh"), (3, 96, "gelu")):
        yield (torch.randn(rows, 2 * width, generator=generator, device=generator.device, dtype=dtype) * 3, activation), ()
