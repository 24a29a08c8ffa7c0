"""Against complex numbers in float64: a pair (x[i], x[i + half]) is x[i] + j x[i + half], and turning multiplies by e^(j angle)."""

import numpy as np
import pytest
import torch

from nbengine.kernels.rope_store import rope_store_reference
from nbengine.step_inputs import LayerCache, StepInputs


def inputs_for(slots, block_size):
    tokens = len(slots)
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    blank = torch.zeros(tokens, dtype=torch.int64)
    return StepInputs(blank, blank, slots, torch.zeros(1, 1, dtype=torch.int32), ends, ends[1:], block_size, [tokens], [tokens])


def turned(x, angles):
    """x [tokens, heads, head_dim], angles [tokens, rotary_dim / 2], in numpy's float64."""
    half = angles.shape[1]
    spun = (x[..., :half] + 1j * x[..., half : 2 * half]) * np.exp(1j * angles)[:, None]
    return np.concatenate([spun.real, spun.imag, x[..., 2 * half :]], axis=-1)


def normed(x, weight, eps, offset):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (np.asarray(weight.double()) + offset)


def relative_rms(got, expected):
    got = np.asarray(got.double())
    return np.sqrt(np.square(got - expected).mean() / np.square(expected).mean())


def run(tokens, heads, kv_heads, head_dim, rotary_dim, block_size, dtype=torch.float32, norms=()):
    generator = torch.Generator().manual_seed(tokens + head_dim)
    blocks = -(-2 * tokens // block_size) + 1
    cache = LayerCache(*torch.full((2, blocks, block_size, kv_heads, head_dim), float("nan"), dtype=dtype))
    slots = torch.randperm(blocks * block_size, generator=generator)[:tokens]
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator).to(dtype)
    angles = torch.rand(tokens, rotary_dim // 2, generator=generator, dtype=torch.float64) * 100
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1).float(), torch.cat((-angles.sin(), angles.sin()), -1).float()
    q = rope_store_reference(qkv, cache, inputs_for(slots, block_size), cos[:, None], sin[:, None], *norms)
    split = np.asarray(qkv.double()).reshape(tokens, -1, head_dim)
    return q, cache, slots, split[:, :heads], split[:, heads : heads + kv_heads], split[:, heads + kv_heads :], np.asarray(angles)


@pytest.mark.parametrize("tokens", [1, 63, 1000])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "rotary_dim"), [(4, 4, 64, 64), (9, 3, 64, 64), (8, 1, 96, 48), (2, 1, 6, 2)])
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_queries_keys_and_values_land_turned_where_they_belong(tokens, heads, kv_heads, head_dim, rotary_dim, block_size):
    got, cache, slots, q, k, v, angles = run(tokens, heads, kv_heads, head_dim, rotary_dim, block_size)
    assert got.shape == (tokens, heads, head_dim)
    assert relative_rms(got, turned(q, angles)) < 1e-6
    flat_keys, flat_values = cache.keys.view(-1, kv_heads, head_dim), cache.values.view(-1, kv_heads, head_dim)
    assert relative_rms(flat_keys[slots], turned(k, angles)) < 1e-6
    assert np.array_equal(np.asarray(flat_values[slots].double()), v)
    assert int(flat_keys.isnan().all(-1).all(-1).sum()) == len(flat_keys) - tokens  # no other slot was touched
    assert int(flat_values.isnan().all(-1).all(-1).sum()) == len(flat_values) - tokens


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("tokens", [1, 63])
def test_heads_are_normed_before_they_turn(offset, tokens):
    q_norm, k_norm = torch.randn(64), torch.randn(64)
    got, cache, slots, q, k, _, angles = run(tokens, 6, 2, 64, 64, 16, norms=(q_norm, k_norm, 0.1, offset))
    assert relative_rms(got, turned(normed(q, q_norm, 0.1, offset), angles)) < 1e-6
    assert relative_rms(cache.keys.view(-1, 2, 64)[slots], turned(normed(k, k_norm, 0.1, offset), angles)) < 1e-6


def test_bfloat16_is_rounded_once_at_the_end():
    got, _, _, q, _, _, angles = run(63, 4, 2, 64, 64, 16, dtype=torch.bfloat16)
    assert got.dtype is torch.bfloat16
    assert relative_rms(got, turned(q, angles)) < 2e-3


def test_angles_of_the_wrong_sign_would_be_seen():
    got, _, _, q, _, _, angles = run(63, 4, 2, 64, 64, 16)
    assert relative_rms(got, turned(q, -angles)) > 0.1
