"""Whole cache blocks copied, in every layer: what copy-on-write needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from nbengine.kernels._triton import jit
from nbengine.step_inputs import LayerCache

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it


def copy_blocks_reference(caches: list[LayerCache], pairs: torch.Tensor) -> None:
    """Copy blocks by pairs [copies, 2] of source and target. All sources are read before any target is written."""
    sources, targets = pairs.long().unbind(1)
    for cache in caches:
        for blocks in (cache.keys, cache.values):
            blocks.index_copy_(0, targets, blocks.index_select(0, sources))


_TILE = 2048  # numbers that a program copies


def copy_blocks(caches: list[LayerCache], pairs: torch.Tensor) -> None:
    """As copy_blocks_reference, two launches a layer: sources to a place apart, from there to the targets."""
    copies = pairs.shape[0]
    if not copies:
        return
    pairs = pairs.contiguous()
    for cache in caches:
        assert cache.keys.is_contiguous() and cache.values.is_contiguous()  # noqa: PT018
        size = cache.keys[0].numel()
        apart = torch.empty((2, copies, size), dtype=cache.keys.dtype, device=cache.keys.device)
        grid = (copies, -(-size // _TILE), 2)
        copy_blocks_kernel[grid](cache.keys, cache.values, apart, pairs, size, out=False, tile=_TILE)
        copy_blocks_kernel[grid](cache.keys, cache.values, apart, pairs, size, out=True, tile=_TILE)


@jit()
def copy_blocks_kernel(
    p_keys: tl.tensor, p_values: tl.tensor, p_apart: tl.tensor, p_pairs: tl.tensor, size: int, out: tl.constexpr, tile: tl.constexpr
) -> None:
    i_copy = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * tile + tl.arange(0, tile)
    m = o < size
    i_kind = tl.program_id(2)
    block = tl.load(p_pairs + 2 * i_copy + (1 if out else 0)).to(tl.int64)
    p_cache = (p_keys if i_kind == 0 else p_values) + block * size + o
    p_kept = p_apart + (i_kind * tl.num_programs(0) + i_copy) * size + o
    if out:
        tl.store(p_cache, tl.load(p_kept, mask=m), mask=m)
    else:
        tl.store(p_kept, tl.load(p_cache, mask=m), mask=m)


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
