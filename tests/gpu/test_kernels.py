"""The Triton kernels on a GPU against float64 references: `make test-gpu`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from nbengine.kernels.copy_blocks import copy_blocks
from nbengine.kernels.linear import linear_invariant
from nbengine.kernels.paged_attention import paged_attention, paged_attention_invariant
from nbengine.kernels.sample import sample, sample_reference
from nbengine.ops import OP_NAMES, Ops
from nbengine.step_inputs import LayerCache

sys.path.append(str(Path(__file__).resolve().parents[1] / "kernels"))
from kernel_cases import (
    BOUNDS,
    MIXES,
    Random,
    as_a_decode,
    attention,
    broken_rows,
    error,
    penalties,
    relative_rms,
    rope_store,
    sampling,
    widened,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype)[6:])
def random(request):
    if request.param is torch.bfloat16 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this card has no bfloat16")
    return Random("cuda", request.param)


def bound(random):
    return BOUNDS[random.dtype]


def test_a_gpu_uses_the_kernels():
    assert Ops.default("cuda").in_use() == dict.fromkeys(OP_NAMES, "triton")


@pytest.mark.parametrize("rows", [1, 2, 63, 1000])
@pytest.mark.parametrize("width", [1, 63, 1000, 4096, 12288])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(random, rows, width, offset):
    x, residual, weight = random(rows, width) * 3, random(rows, width), random(width)
    assert error("rms_norm", (x, weight, 0.1, offset)) < bound(random)
    assert error("rms_norm", (x, weight, 0.1, offset, residual)) < bound(random)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 14336), (63, 1000), (1000, 63), (70000, 8)])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gates(random, rows, width, activation):
    assert error("gated", (random(rows, 2 * width) * 3, activation)) < bound(random)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "rotary_dim"),
    [(1, 32, 8, 128, 128), (63, 14, 2, 64, 64), (9, 3, 3, 96, 48), (1000, 8, 1, 256, 256), (5, 9, 3, 80, 20), (3, 2, 1, 63, 62)],
)
@pytest.mark.parametrize("normed", [False, True])
def test_rotations_and_what_they_store(random, tokens, heads, kv_heads, head_dim, rotary_dim, normed):
    args = rope_store(tokens, heads, kv_heads, head_dim, rotary_dim, random, normed=normed, offset=1.0)
    assert error("rope_store", args) < bound(random)


@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize("copies", [0, 1, 63])
def test_copies_of_blocks(random, block_size, copies):
    caches = [LayerCache(random(130, block_size, 2, 40), random(130, block_size, 2, 40)) for _ in range(3)]
    assert error("copy_blocks", (caches, random.order(130)[: 2 * copies].view(-1, 2).int())) == 0


def test_every_source_is_read_before_a_target_is_written(random):
    cache = LayerCache(random(2000, 256, 8, 128), random(2000, 256, 8, 128))
    before = cache.keys.clone()
    copy_blocks([cache], torch.stack((torch.arange(1999), torch.arange(1, 2000)), 1).int().cuda())
    assert torch.equal(cache.keys[1:], before[:-1])
    assert torch.equal(cache.keys[0], before[0])


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("block_size", [1, 16, 256])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (24, None), (None, 3.0), (7, 3.0), (1, None)])
def test_attention_over_every_mix(random, rows, block_size, window, softcap):
    q, cache, inputs = attention(rows, 6, 2, 64, block_size, random, window=window)
    assert error("paged_attention", (q, cache, inputs, 0.2, window, softcap)) < bound(random)


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads"),
    [(16, 4, 2), (63, 3, 3), (64, 14, 2), (80, 32, 8), (96, 32, 32), (128, 32, 8), (128, 28, 4), (128, 32, 1), (256, 8, 4), (256, 16, 1)],
)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (150, 20.0)])
def test_attention_for_every_head_size(random, head_dim, heads, kv_heads, window, softcap):
    q, cache, inputs = attention(
        [(1, 500), (300, 300), (1, 70), (40, 900), (129, 129)], heads, kv_heads, head_dim, 16, random, window=window
    )
    assert error("paged_attention", (q, cache, inputs, head_dim**-0.5, window, softcap)) < bound(random)


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (24, 3.0)])
def test_invariant_attention(random, rows, window, softcap):
    q, cache, inputs = attention(rows, 6, 2, 64, 16, random, window=window)
    assert error("paged_attention", (q, cache, inputs, 0.2, window, softcap), paged_attention_invariant) < bound(random)


def test_a_query_attends_the_same_to_the_bit_alone_and_among_its_prompts(random):
    q, cache, inputs = attention([(1, 900), (90, 90), (9, 500)], 6, 2, 64, 16, random)
    differing = {}
    for attend in (paged_attention_invariant, paged_attention):
        together = attend(q, cache, inputs, 0.2)
        alone = [attend(q[token : token + 1], cache, as_a_decode(inputs, token), 0.2)[0] for token in range(len(q))]
        differing[attend] = sum(not torch.equal(*pair) for pair in zip(alone, together, strict=True))
    assert differing[paged_attention_invariant] == 0
    assert differing[paged_attention] > 0  # or this would test nothing


@pytest.mark.parametrize(("rows", "width", "outs"), [(1, 64, 96), (5, 1000, 33), (63, 4096, 257), (300, 63, 1000)])
def test_invariant_products(random, rows, width, outs):
    x, weight = random(rows, width), random(outs, width)
    assert error("linear", (x, weight, random(outs)), linear_invariant) < bound(random)
    together = linear_invariant(x, weight)
    for first in {0, rows // 2, rows - 1}:
        assert torch.equal(linear_invariant(x[first : first + 1], weight), together[first : first + 1])


@pytest.mark.parametrize(("rows", "vocab", "slots"), [(2, 64, 1), (5, 1000, 3), (63, 151936, 9)])
def test_penalties(rows, vocab, slots):
    assert error("penalise", penalties(rows, vocab, slots, Random("cuda", torch.float32))) < 1e-6


@pytest.mark.parametrize(
    "rows", [[(1, 30000)], [(1, 2000)] * 40, [(1, 1 + 17 * i % 900) for i in range(300)], [(4000, 5000)], [(2, 20000)]]
)
@pytest.mark.parametrize("window", [None, 1000])
def test_attention_over_long_and_many_rows(random, rows, window):
    q, cache, inputs = attention(rows, 8, 2, 128, 16, random, window=window)
    assert error("paged_attention", (q, cache, inputs, 0.1, window)) < bound(random)


@pytest.mark.parametrize("attend", [paged_attention, paged_attention_invariant])
@pytest.mark.parametrize("rows", [[(1, 150)], [(1, 100), (1, 90)], [(17, 80), (70, 170)]])
def test_a_wrong_page_or_a_dropped_tail_of_the_context_would_be_seen(random, rows, attend):
    q, cache, inputs = attention(rows, 6, 2, 64, 16, random)
    expected = attend(q, cache, inputs, 0.02)
    doubled, tail = widened(inputs), widened(inputs)
    doubled.block_tables[:, 0] = doubled.block_tables[:, 1]
    last = (rows[0][1] - 1) // 16
    tail.block_tables[0, [0, last]] = tail.block_tables[0, [last, 0]]
    short = widened(inputs)
    short.context_lens -= 1
    for broken in (doubled, tail, short):
        broken.scratch.clear()
        got = attend(q, cache, broken, 0.02)
        assert not relative_rms(got[: rows[0][0]], expected[: rows[0][0]]) < 2 * bound(random)


def test_a_captured_step_stays_right_when_its_lengths_change():
    random = Random("cuda", torch.float16)
    q, cache, inputs = attention([(1, 900)] * 20, 8, 2, 64, 16, random)
    inputs.context_lens.fill_(1)
    paged_attention(q, cache, inputs, 0.2)
    inputs.scratch.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(q, cache, inputs, 0.2)
        again = paged_attention(q, cache, inputs, 0.2)
    for lengths in ([1] * 20, [900] * 20, [1 + 41 * i for i in range(20)], [3] * 19 + [850]):
        now = widened(inputs)
        now.scratch.clear()
        now.context_lens_host = lengths
        now.context_lens.copy_(torch.tensor(lengths))
        inputs.context_lens.copy_(now.context_lens)
        out.fill_(float("nan"))
        again.fill_(float("nan"))
        graph.replay()
        assert error("paged_attention", (q, cache, now, 0.2), lambda *_: out) < BOUNDS[torch.float16]
        assert torch.equal(out, again)


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 17, 33, 63, 64, 65])
@pytest.mark.parametrize(
    ("width", "outs"), [(63, 33), (128, 257), (1000, 4096), (1536, 9000), (4096, 6144), (14336, 1024), (20000, 64), (1, 1)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_products(random, rows, width, outs, biased):
    args = (random(rows, width), random(outs, width), random(outs) if biased else None)
    assert error("linear", args) < bound(random)


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (7, 63), (40, 1000), (200, 32000), (33, 151936)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("rounded", [False, True])
def test_draws_are_the_references(rows, vocab, spread, rounded):
    args = sampling(rows, vocab, Random("cuda", torch.float32, seed=rows), spread=spread, rounded=rounded)
    expected = sample_reference(*args)
    differing = int((sample(*args) != expected).sum())
    assert differing <= rows // 100  # a tie to the last bit of a logarithm may fall either way


def test_draws_from_broken_and_forbidden_rows():
    args = broken_rows(Random("cuda", torch.float32), 8)
    assert torch.equal(sample(*args), sample_reference(*args))
    assert sample(*args)[:3].tolist() == [-1] * 3


def test_no_kernel_waits_for_the_device():
    random = Random("cuda", torch.float16)
    mixed = attention(MIXES["mixed"], 6, 2, 64, 16, random)
    rope = rope_store(9, 4, 2, 64, 64, random, normed=True)
    draws = sampling(9, 5000, Random("cuda", torch.float32))
    x, weight, rows = random(9, 128), random(128), random(64, 128)
    ops = Ops.default("cuda")

    def everything():
        ops.rms_norm(x, weight, 1e-6, 0.0, x.clone())
        ops.gated(x, "silu")
        ops.rope_store(*rope)
        ops.paged_attention(*mixed, 0.2)
        ops.copy_blocks([mixed[1]], pairs)
        ops.linear(x, rows)
        ops.linear(x[:1], rows)
        ops.sample(*draws)

    pairs = torch.tensor([[0, 1]], dtype=torch.int32, device="cuda")
    everything()  # compiles
    mixed[2].scratch.clear()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    mixed[2].scratch.clear()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        everything()
