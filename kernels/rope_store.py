"""From the merged projection to rotated queries, and to keys and values in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from nbengine.kernels._triton import chained, follow, jit, next_power_of_2
from nbengine.step_inputs import LayerCache, StepInputs

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it


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


_TILE = 2048  # most numbers of a token that a program takes


def rope_store(
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
    """As rope_store_reference in one pass: each program takes some heads of a token all the way. A slot below 0 is not written."""
    tokens, (_, _, kv_heads, head_dim) = qkv.shape[0], cache.keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    assert qkv.stride(1) == 1
    assert cache.keys.is_contiguous() and cache.values.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()  # noqa: PT018
    assert cos.dtype is sin.dtype is torch.float32
    queries = torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if tokens:
        block_dim = next_power_of_2(head_dim)
        block_heads = min(next_power_of_2(heads + 2 * kv_heads), max(_TILE // block_dim, 1))
        normed = q_norm is not None and k_norm is not None
        rope_store_kernel[(tokens, -(-(heads + 2 * kv_heads) // block_heads))](
            qkv, queries, cache.keys, cache.values, inputs.slots, cos, sin, q_norm if normed else None, k_norm if normed else None,
            qkv.stride(0), eps, offset, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=cos.shape[-1],
            block_heads=block_heads, block_dim=block_dim, **chained(qkv.device),
        )  # fmt: skip
    return queries


@jit(do_not_specialize=("eps", "offset"))
def rope_store_kernel(
    p_qkv: tl.tensor,
    p_queries: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_slots: tl.tensor,
    p_cos: tl.tensor,
    p_sin: tl.tensor,
    p_q_norm: tl.tensor | None,
    p_k_norm: tl.tensor | None,
    qkv_stride: int,
    eps: float,
    offset: float,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    rotary_dim: tl.constexpr,
    block_heads: tl.constexpr,
    block_dim: tl.constexpr,
    following: tl.constexpr = False,
) -> None:
    follow(following)
    i_token = tl.program_id(0).to(tl.int64)
    o_head = tl.program_id(1) * block_heads + tl.arange(0, block_heads)[:, None]
    o_dim = tl.arange(0, block_dim)[None, :]
    o_other = tl.where(o_dim < rotary_dim, (o_dim + rotary_dim // 2) % rotary_dim, o_dim)  # where the number to exchange with stands
    m_dim = o_dim < head_dim
    m = (o_head < heads + 2 * kv_heads) & m_dim
    p_row = p_qkv + i_token * qkv_stride + o_head * head_dim
    stored = tl.load(p_row + o_dim, mask=m, other=0.0)
    x = stored.to(tl.float32)
    other = tl.load(p_row + o_other, mask=m, other=0.0).to(tl.float32)
    if p_q_norm is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / head_dim + eps)[:, None]
        # norms are rounded as they would be in memory
        x = (x * scale * _norm_weight(p_q_norm, p_k_norm, o_head < heads, o_dim, m_dim, offset)).to(stored.dtype).to(tl.float32)
        other = (other * scale * _norm_weight(p_q_norm, p_k_norm, o_head < heads, o_other, m_dim, offset)).to(stored.dtype).to(tl.float32)
    m_turn = o_dim < rotary_dim
    cos = tl.load(p_cos + i_token * rotary_dim + o_dim, mask=m_turn, other=1.0)
    sin = tl.load(p_sin + i_token * rotary_dim + o_dim, mask=m_turn, other=0.0)
    turned = (x * cos + other * sin).to(stored.dtype)
    tl.store(p_queries + (i_token * heads + o_head) * head_dim + o_dim, turned, mask=m & (o_head < heads))
    slot = tl.load(p_slots + i_token)
    o_kv = slot * kv_heads * head_dim + o_dim
    m &= slot >= 0
    o_key, o_value = o_head - heads, o_head - heads - kv_heads
    tl.store(p_keys + o_kv + o_key * head_dim, turned, mask=m & (o_key >= 0) & (o_value < 0))
    tl.store(p_values + o_kv + o_value * head_dim, stored, mask=m & (o_value >= 0))


@jit()
def _norm_weight(
    p_q_norm: tl.tensor, p_k_norm: tl.tensor, is_query: tl.tensor, o_dim: tl.tensor, m_dim: tl.tensor, offset: float
) -> tl.tensor:
    q = tl.load(p_q_norm + o_dim, mask=m_dim, other=0.0).to(tl.float32)
    k = tl.load(p_k_norm + o_dim, mask=m_dim, other=0.0).to(tl.float32)
    return tl.where(is_query, q, k) + offset


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
