"""In bfloat16 on a CPU the products' weights lie in oneDNN's own layout, and nobody but the product notices."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.nn import functional

from nbengine import SamplingParams
from nbengine.kernels.linear import laid_out, linear_reference
from nbengine.models.decoder import Decoder

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this CPU has no bfloat16 products of oneDNN's",
)


def tokens(engine) -> list[int]:
    return engine.generate([{"prompt_token_ids": [5, 6, 7, 8]}], GREEDY)[0].outputs[0].token_ids


def laid_out_weights(engine) -> dict[str, bool]:
    """Which matrices of the only engine in bfloat16 are in oneDNN's layout."""
    del engine  # the only one there is: its decoder is found from outside, since nobody but its thread holds it
    gc.collect()
    decoders = [found for found in gc.get_objects() if type(found) is Decoder and found.weights["embed"].dtype is torch.bfloat16]
    assert len(decoders) == 1
    return {name: weight.is_mkldnn for name, weight in decoders[0].weights.items() if weight.dim() == 2}


@onednn
@pytest.mark.parametrize(("rows", "width", "out", "biased"), [(1, 63, 33, True), (5, 64, 96, False), (63, 128, 257, True)])
def test_the_layout_changes_no_product(rows, width, out, biased):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((rows, width), (out, width), (out,)))
    expected = functional.linear(x.double(), weight.double(), bias.double() if biased else None)
    packed = laid_out(weight)
    assert packed.is_mkldnn
    assert torch.equal(packed.to_dense(), weight)
    got = linear_reference(x, packed, bias if biased else None).double()
    assert float((got - expected).norm() / expected.norm()) < 4e-3


def test_float32_stays_as_it_is():
    weight = torch.randn(8, 8)
    assert laid_out(weight) is weight


@onednn
def test_an_engine_in_bfloat16_lays_out_what_only_products_read(make_engine):
    engine = make_engine(dtype="bfloat16")
    found = laid_out_weights(engine)
    assert found.pop("embed") is False
    assert found
    assert all(found.values())


@onednn
def test_new_weights_and_a_users_own_product_work_in_bfloat16(make_engine):
    engine = make_engine(dtype="bfloat16")
    before = tokens(engine)
    engine.use(ops={"linear": lambda x, weight, bias=None: functional.linear(x, weight, bias)})  # gets plain tensors
    assert tokens(engine) == before
    assert not any(laid_out_weights(engine).values())
    engine.use(ops={"linear": "reference"})
    assert tokens(engine) == before
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(ValueError, match=r"shape"):
        engine.update_weights({name: torch.zeros(1, 1)})
    assert tokens(engine) == before
