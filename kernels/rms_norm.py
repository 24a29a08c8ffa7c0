"""Root-mean-square norm, with or without the residual added first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere


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


def example_inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]]:
    """Arguments to try, each with those of its tensors that the op writes to."""
    device = generator.device
    for rows, width, offset, added in ((1, 64, 0.0, False), (1, 63, 1.0, True), (63, 1000, 0.0, True), (7, 96, 1.0, False)):
        x, residual = (torch.randn(rows, width, generator=generator, device=device, dtype=dtype) * 3 for _ in range(2))
        weight = torch.randn(width, generator=generator, device=device, dtype=dtype)
        yield (x, weight, 1e-6, offset, residual if added else None), (residual,) if added else ()
