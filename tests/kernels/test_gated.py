import math

import pytest
import torch

from nbengine.kernels.gated import gated_reference

BY_HAND = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
}


@pytest.mark.parametrize("activation", BY_HAND)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 1000), (63, 63)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_equals_the_formula(activation, rows, width, dtype, bound):
    gate_up = (torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(width)) * 3).to(dtype)
    before = gate_up.clone()
    got = gated_reference(gate_up, activation)
    by_hand = [[BY_HAND[activation](row[i]) * row[width + i] for i in range(width)] for row in gate_up.double().tolist()]
    expected = torch.tensor(by_hand, dtype=torch.float64)
    size = expected.square().mean().sqrt().clamp(min=0.1)  # a lone value near zero is a difference of larger ones
    assert (got.double() - expected).square().mean().sqrt() < bound * size
    assert torch.equal(gate_up, before)
    assert got.is_contiguous()


def test_the_two_gelus_are_told_apart():
    gate_up = torch.randn(9, 64) * 3
    assert (gated_reference(gate_up, "gelu") - gated_reference(gate_up, "gelu_tanh")).abs().max() > 1e-4
