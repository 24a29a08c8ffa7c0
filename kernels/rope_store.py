"""From the merged projection to rotated queries, and to keys and values in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from nbengine.step_inputs import LayerCache, StepInputs


def rope_store_reference(
    qkv: torch.Tensor,
    cache: LayerCache,
    inputs: StepInputs,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> torch.Tensor:
    """Take qkv [tokens, (heads + 2 * kv_heads) * head_dim] apart: returns queries, stores the rest.

    Queries [tokens, heads, head_dim] may be a view of a larger tensor; keys and values go to the cache at inputs.slots.
    Query and key heads are first normed where q_norm and k_norm [head_dim] are given (as rms_norm does, with eps and offset).
    Then their first cos.shape[-1] numbers turn: x * cos + swapped(x) * sin, where swapped exchanges the two halves of these;
    cos and sin [tokens, 1, rotary_dim], float32, come from Rope.cos_sin.
    """
    tokens, (_, _, kv_heads, head_dim) = qkv.shape[0], cache.keys.shape
    heads = qkv.view(tokens, -1, head_dim)  # [tokens, heads + 2 * kv_heads, head_dim]
    turning, values = heads[:, :-kv_heads], heads[:, -kv_heads:]
    if q_norm is not None and k_norm is not None:
        turning = _norm_heads(turning, kv_heads, q_norm, k_norm, eps, offset)
    turning = _turn(turning, cos, sin)
    cache.keys.view(-1, kv_heads, head_dim).index_copy_(0, inputs.slots, turning[:, -kv_heads:])
    cache.values.view(-1, kv_heads, head_dim).index_copy_(0, inputs.slots, values)
    return turning[:, :-kv_heads]


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotary_dim = cos.shape[-1]
    part = x if rotary_dim == x.shape[-1] else x[..., :rotary_dim]
    turned = torch.roll(part, rotary_dim // 2, -1).float().mul_(sin).addcmul_(part.float(), cos).to(x.dtype)
    return turned if part is x else torch.cat((turned, x[..., rotary_dim:]), dim=-1)


def _norm_heads(x: torch.Tensor, kv_heads: int, q_norm: torch.Tensor, k_norm: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    normed = F.rms_norm(x.float(), x.shape[-1:], None, eps)
    queries, keys = normed[:, :-kv_heads], normed[:, -kv_heads:]
    for part, weight in ((queries, q_norm), (keys, k_norm)):
        part.mul_(weight if not offset else weight.float() + offset)
    return normed.to(x.dtype)


def example_inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]]:
    """Arguments to try, each with those of its tensors that the op writes to."""
    device = generator.device

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    for tokens, heads, kv_heads, head_dim, rotary_dim, block_size, normed in (
        (1, 4, 2, 64, 64, 16, False),
        (63, 6, 2, 64, 64, 1, True),
        (9, 3, 3, 96, 48, 256, False),
        (5, 8, 1, 32, 32, 16, True),
    ):
        blocks = -(-2 * tokens // block_size) + 1
        cache = LayerCache(*random(2, blocks, block_size, kv_heads, head_dim))
        angles = random(tokens, 1, rotary_dim // 2).float() * 3
        cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
        counts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        inputs = StepInputs(
            tokens=torch.zeros(tokens, dtype=torch.int64, device=device),
            positions=torch.arange(tokens, device=device),
            slots=torch.randperm(blocks * block_size, generator=generator, device=device)[:tokens],
            block_tables=torch.zeros((1, blocks), dtype=torch.int32, device=device),
            query_starts=counts,
            context_lens=counts[1:],
            block_size=block_size,
            query_lens_host=[tokens],
            context_lens_host=[tokens],
        )
        norms = (random(head_dim), random(head_dim), 1e-6, 1.0) if normed else ()
        yield (random(tokens, (heads + 2 * kv_heads) * head_dim), cache, inputs, cos, sin, *norms), (cache.keys, cache.values)
