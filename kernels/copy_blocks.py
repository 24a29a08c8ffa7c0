"""Whole cache blocks copied, in every layer: what copy-on-write needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nbengine.step_inputs import LayerCache


def copy_blocks_reference(caches: list[LayerCache], pairs: torch.Tensor) -> None:
    """Copy blocks by pairs [copies, 2] of source and target. All sources are read before any target is written."""
    sources, targets = pairs.long().unbind(1)
    for cache in caches:
        for blocks in (cache.keys, cache.values):
            blocks.index_copy_(0, targets, blocks.index_select(0, sources))


def example_inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]]:
    """Arguments to try, each with those of its tensors that the op writes to."""
    device = generator.device
    for layers, blocks, block_size, copies in ((1, 4, 1, 1), (3, 40, 16, 9)):
        shape = (2, blocks, block_size, 2, 24)
        caches = [LayerCache(*torch.randn(shape, generator=generator, device=device, dtype=dtype)) for _ in range(layers)]
        pairs = torch.randperm(blocks, generator=generator, device=device)[: 2 * copies].view(copies, 2).int()
        yield (caches, pairs), tuple(tensor for cache in caches for tensor in (cache.keys, cache.values))
