"""The Triton kernels in Triton's interpreter, on small shapes, against float64 references. Its products know no bfloat16."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from kernel_cases import (
    BOUNDS,
    MIXES,
    Random,
    as_a_decode,
    attention,
    broken_rows,
    error,
    penalties,
    poisoned,
    relative_rms,
    rope_store,
    sampling,
    widened,
)

from nbengine import Engine, SamplingParams, startup
from nbengine.device_runner import DeviceRunner
from nbengine.kernels.copy_blocks import copy_blocks
from nbengine.kernels.linear import linear, linear_invariant
from nbengine.kernels.paged_attention import paged_attention, paged_attention_invariant
from nbengine.kernels.penalise import IN_PROMPT, penalise
from nbengine.kernels.rope_store import rope_store as store_kernel
from nbengine.kernels.sample import sample, sample_reference
from nbengine.ops import OP_NAMES, Ops
from nbengine.step_graphs import StepGraphs
from nbengine.step_inputs import LayerCache

pytest.importorskip("triton", "3.7", "the interpreter of Triton before 3.7 fails in loops under NumPy 2.4 and later")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of integers that wrap and of masked lanes

TELLING = ("paged_attention", "prepare_step", "update_tables", "keep_drawn", "rope_store")  # where a device's lengths and slots count
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype)[6:])
def random(request):
    return Random("cpu", request.param)


@pytest.fixture(params=DTYPES[:2], ids=lambda dtype: str(dtype)[6:])
def random_for_products(request):
    return Random("cpu", request.param)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (2, 63), (5, 1000)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(random, rows, width, offset):
    x, residual, weight = random(rows, width) * 3, random(rows, width), random(width)
    assert error("rms_norm", (x, weight, 0.1, offset)) < BOUNDS[random.dtype]
    assert error("rms_norm", (x, weight, 0.1, offset, residual)) < BOUNDS[random.dtype]


def test_rows_that_are_part_of_a_wider_tensor(random):
    wide = random(5, 200)
    assert error("rms_norm", (wide[:, :100], random(100), 0.1, 0.0, wide[:, 100:])) < BOUNDS[random.dtype]
    assert error("gated", (wide[:, :100], "silu")) < BOUNDS[random.dtype]


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 63), (2, 2100)])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gates(random, rows, width, activation):
    assert error("gated", (random(rows, 2 * width) * 3, activation)) < BOUNDS[random.dtype]


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "rotary_dim"),
    [(1, 14, 2, 64, 64), (5, 3, 3, 96, 48), (3, 8, 1, 256, 256), (2, 2, 1, 63, 62)],
)
@pytest.mark.parametrize("normed", [False, True])
def test_rotations_and_what_they_store(random, tokens, heads, kv_heads, head_dim, rotary_dim, normed):
    args = rope_store(tokens, heads, kv_heads, head_dim, rotary_dim, random, normed=normed, offset=1.0)
    assert error("rope_store", args) < BOUNDS[random.dtype]


def test_a_negative_slot_is_not_written(random):
    args = rope_store(3, 2, 1, 64, 64, random, normed=False)
    args[2].slots[1] = -1
    store_kernel(*args)
    assert int((~args[1].keys.isnan()).sum()) == int((~args[1].values.isnan()).sum()) == 2 * 64


@pytest.mark.parametrize("copies", [0, 1, 9])
def test_copies_of_blocks(random, copies):
    caches = [LayerCache(random(20, 16, 2, 40), random(20, 16, 2, 40)) for _ in range(2)]
    assert error("copy_blocks", (caches, random.order(20)[: 2 * copies].view(-1, 2).int())) == 0


def test_every_source_is_read_before_a_target_is_written():
    keys = torch.arange(4.0).view(4, 1, 1, 1)
    cache = LayerCache(keys.clone(), -keys)
    copy_blocks([cache], torch.tensor([[0, 1], [1, 2], [2, 3]], dtype=torch.int32))
    assert cache.keys.flatten().tolist() == [0, 0, 1, 2]
    assert cache.values.flatten().tolist() == [0, 0, -1, -2]


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize(("block_size", "window", "softcap"), [(16, None, None), (1, 24, None), (256, None, 3.0), (16, 7, 3.0)])
def test_attention_over_every_mix(rows, block_size, window, softcap):
    q, cache, inputs = attention(rows, 6, 2, 32, block_size, Random("cpu", torch.float32), window=window)
    assert error("paged_attention", (q, cache, inputs, 0.2, window, softcap)) < BOUNDS[torch.float32]


@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(1, 8, 1), (63, 3, 3), (80, 14, 2), (96, 4, 4), (128, 8, 2), (256, 4, 1)])
def test_attention_for_every_head_size(random_for_products, head_dim, heads, kv_heads):
    q, cache, inputs = attention([(1, 150), (40, 40), (9, 100)], heads, kv_heads, head_dim, 16, random_for_products)
    assert error("paged_attention", (q, cache, inputs, head_dim**-0.5)) < BOUNDS[random_for_products.dtype]


@pytest.mark.parametrize("rows", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, 3.0)])
def test_invariant_attention(rows, window, softcap):
    q, cache, inputs = attention(rows, 6, 2, 32, 16, Random("cpu", torch.float32), window=window)
    assert error("paged_attention", (q, cache, inputs, 0.2, window, softcap), paged_attention_invariant) < BOUNDS[torch.float32]


def test_a_rows_first_query_attends_the_same_to_the_bit_alone_and_with_others():
    """The others stand elsewhere in their tile, where NumPy's product may round otherwise: those are for a GPU."""
    q, cache, inputs = attention([(1, 300), (30, 30), (9, 200)], 6, 2, 32, 16, Random("cpu", torch.float32))
    same = {}
    for attend in (paged_attention_invariant, paged_attention):
        together = attend(q, cache, inputs, 0.2)
        alone = [(token, attend(q[token : token + 1], cache, as_a_decode(inputs, token), 0.2)[0]) for token in (0, 1, 31)]
        same[attend] = [torch.equal(result, together[token]) for token, result in alone]
    assert all(same[paged_attention_invariant])
    assert not all(same[paged_attention])  # or this would test nothing


def test_windows_of_two_layers_share_a_step():
    random = Random("cpu", torch.float32)
    q, cache, inputs = attention([(1, 63), (9, 40)], 6, 2, 32, 16, random)
    for window in (None, 9, 30, 9):
        expected = widened(inputs)
        assert error("paged_attention", (q, cache, expected, 0.2, window)) < BOUNDS[torch.float32]
        assert relative_rms(paged_attention(q, cache, inputs, 0.2, window), paged_attention(q, cache, expected, 0.2, window)) == 0


@pytest.mark.parametrize("attend", [paged_attention, paged_attention_invariant])
@pytest.mark.parametrize("rows", [[(1, 150)], [(1, 100), (1, 90)], [(17, 80)]])
def test_a_wrong_page_or_a_dropped_tail_of_the_context_would_be_seen(rows, attend):
    q, cache, inputs = attention(rows, 2, 1, 32, 16, Random("cpu", torch.float32))
    with poisoned():
        expected = attend(q, cache, inputs, 0.02)
    doubled, tail, short = widened(inputs), widened(inputs), widened(inputs)
    doubled.block_tables[:, 0] = doubled.block_tables[:, 1]
    last = (rows[0][1] - 1) // 16
    tail.block_tables[0, [0, last]] = tail.block_tables[0, [last, 0]]
    short.context_lens -= 1
    for broken in (doubled, tail, short):
        broken.scratch.clear()
        got = attend(q, cache, broken, 0.02)
        assert not relative_rms(got[: rows[0][0]], expected[: rows[0][0]]) < 1e-3


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16, 17])
@pytest.mark.parametrize(("width", "outs", "biased"), [(1, 1, False), (63, 33, True), (600, 70, False)])
def test_products(random_for_products, rows, width, outs, biased):
    args = (random_for_products(rows, width), random_for_products(outs, width), random_for_products(outs) if biased else None)
    for kernel in (linear, linear_invariant):
        assert error("linear", args, kernel) < BOUNDS[random_for_products.dtype]


def test_a_rows_product_is_the_same_to_the_bit_however_many_rows_there_are():
    random = Random("cpu", torch.float32)
    x, weight = random(70, 200), random(70, 200)
    together = linear_invariant(x, weight)
    for rows in (1, 5, 16, 65):
        assert torch.equal(linear_invariant(x[:rows], weight), together[:rows])
    assert not torch.equal(linear(x[:1], weight), together[:1])  # or this would test nothing


@pytest.mark.parametrize("kernel", [linear, linear_invariant])
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_a_dropped_tail_of_the_width_or_a_wrong_row_would_be_seen(random_for_products, kernel, rows):
    x, weight = random_for_products(rows, 130), random_for_products(40, 130)
    for broken in (
        lambda x, weight, bias: kernel(x[:, :128], weight[:, :128].contiguous()),
        lambda x, weight, bias: kernel(x, weight.roll(1, 0)),
        lambda x, weight, bias: kernel(torch.cat((x[:-1], x[:1] * 2)), weight),
    ):
        assert error("linear", (x, weight, None), broken) > 10 * BOUNDS[random_for_products.dtype]


@pytest.mark.parametrize(("rows", "vocab", "slots"), [(2, 64, 1), (3, 1, 3), (7, 1000, 3), (12, 2049, 9)])
def test_penalties(rows, vocab, slots):
    args = penalties(rows, vocab, slots, Random("cpu", torch.float32))
    assert error("penalise", args) < 1e-6
    wide = torch.full((rows, vocab + 3), float("nan"))
    logits = wide[:, :vocab]
    logits.copy_(args[0])
    penalise(logits, *args[1:])
    assert torch.equal(logits[0], args[0][0])  # it has no slot
    assert wide[:, vocab:].isnan().all()


def test_a_penalty_of_another_row_or_a_dropped_tail_of_the_vocabulary_would_be_seen():
    args = penalties(7, 2049, 3, Random("cpu", torch.float32))
    for broken in (
        lambda logits, counts, slots, rates: penalise(logits, counts, slots.roll(1), rates),
        lambda logits, counts, slots, rates: penalise(logits, counts.roll(1, 0), slots, rates),
        lambda logits, counts, slots, rates: penalise(logits, counts, slots, rates.roll(1, 0)),
        lambda logits, counts, slots, rates: (penalise(logits[:, :2048], counts, slots, rates), logits)[1],
        lambda logits, counts, slots, rates: penalise(logits, counts % IN_PROMPT, slots, rates),
    ):
        assert error("penalise", tuple(map(torch.clone, args)), broken) > 1e-5


@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (7, 63), (8, 5000)])
@pytest.mark.parametrize(("spread", "rounded"), [(0.1, False), (4.0, False), (2.0, True)])
def test_draws_are_the_references(rows, vocab, spread, rounded):
    args = sampling(rows, vocab, Random("cpu", torch.float32, seed=rows), spread=spread, rounded=rounded)
    with poisoned():
        assert torch.equal(sample(*args), sample_reference(*args))


def test_draws_from_broken_and_forbidden_rows():
    args = broken_rows(Random("cpu", torch.float32), 6)
    assert torch.equal(sample(*args), sample_reference(*args))
    assert sample(*args)[:3].tolist() == [-1] * 3


def test_the_kernels_can_be_chosen_op_by_op():
    ops = Ops.default("cpu")
    ops.use_all(dict.fromkeys(OP_NAMES, "triton"))
    assert set(ops.in_use().values()) == {"triton"}


def test_an_engine_runs_on_them_and_draws_the_same_tokens():
    params = SamplingParams(max_tokens=3, seed=3, top_p=0.9, top_k=20)
    found = []
    for name in ("reference", "triton"):
        with Engine("tales", dtype="float32", max_model_len=64, ops=dict.fromkeys(OP_NAMES, name)) as engine:
            found.append([output.outputs[0].token_ids for output in engine.generate(["Once upon a time", "The king"], params)])
    assert found[0] == found[1]


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 3, "n": 2, "repetition_penalty": 1.2}], ids="-".join)
def test_steps_padded_to_the_shapes_of_graphs_give_the_same_tokens(monkeypatch, params):
    shapes, ahead, made = [], [], []

    class Padded(StepGraphs):
        def run(self, shape, body):
            shapes.append(shape[:2])
            body()

        def capture(self, shape, body):
            ahead.append(shape[:2])
            body()

    class Runner(DeviceRunner):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.graphs = Padded(options["max_rows"], options["max_tokens"], None)
            made.append(self)

        def warm_up(self):  # as on a GPU
            self.device, device = SimpleNamespace(type="cuda"), self.device
            super().warm_up()
            self.device = device

    monkeypatch.setattr(startup, "_overlaps", lambda loaded: True)
    monkeypatch.setattr(Ops, "capturable", True)
    found = []
    for runner, ops in ((DeviceRunner, {}), (Runner, dict.fromkeys(TELLING, "triton"))):
        monkeypatch.setattr("nbengine.device_runner.DeviceRunner", runner)
        with Engine("tales", device="cpu", dtype="float32", max_model_len=96, max_num_seqs=8, max_num_batched_tokens=64, ops=ops) as engine:
            engine.pause()
            requests = []
            for prompt in ("Once upon a time", "The king had three sons, and the youngest", "The fox"):
                requests.append(engine.submit(prompt, SamplingParams(max_tokens=5, ignore_eos=True, **params)))
                engine.step()
            engine.resume()
            found.append([[completion.token_ids for completion in request.result().outputs] for request in requests])
    assert made
    assert ahead == [(1, 16), (1, 1), (8, 8), (4, 4), (2, 2)]
    assert (8, 16) in shapes
    assert any(rows == tokens for rows, tokens in shapes)
    assert found[0] == found[1]


@pytest.mark.parametrize("op", ["linear", "paged_attention"])
def test_products_of_bfloat16_are_refused_rather_than_wrong(op):
    random = Random("cpu", torch.bfloat16)
    args = (random(5, 64), random(8, 64)) if op == "linear" else (*attention([(5, 5)], 2, 1, 32, 16, random), 0.2)
    with pytest.raises(TypeError, match="dtype='float32'"):
        error(op, args)


def test_without_a_gpu_nor_the_interpreter_the_kernels_are_refused_and_triton_is_not_imported():
    code = """
import sys
from nbengine.ops import OP_NAMES, Ops
ops = Ops.default("cpu")
try:
    ops.use("gated", "triton")
except ValueError as e:
    assert "TRITON_INTERPRET=1" in str(e), e
else:
    raise AssertionError
assert ops.in_use() == dict.fromkeys(OP_NAMES, "reference")
assert "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})
