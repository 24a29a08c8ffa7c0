import math

import pytest
import torch

from nbengine.kernels.rms_norm import rms_norm_reference


def by_hand(x, weight, eps, offset):
    """Row after row in float64."""
    found = []
    for row in x.double():
        scale = 1 / math.sqrt(float(torch.dot(row, row)) / len(row) + eps)
        found.append(row * scale * (weight.double() + offset))
    return torch.stack(found)


def relative_rms(got, expected):
    return float((got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("rows", [1, 2, 63])
@pytest.mark.parametrize("width", [1, 63, 1000])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_equals_a_norm_by_hand(rows, width, offset, added, dtype, bound):
    generator = torch.Generator().manual_seed(rows * width)
    x, residual = ((torch.randn(rows, width, generator=generator) * 5).to(dtype) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(dtype)
    eps = 0.1  # large enough that leaving it out would be seen
    before, total = x.clone(), residual + x
    got = rms_norm_reference(x, weight, eps, offset, residual if added else None)
    assert got.dtype is dtype
    assert got.is_contiguous()
    assert relative_rms(got, by_hand(total if added else x, weight, eps, offset)) < bound
    assert torch.equal(x, before)
    if added:
        assert torch.equal(residual, total)


def test_a_bfloat16_weight_close_to_one_keeps_its_digits_with_an_offset():
    weight = torch.full((64,), 0.001, dtype=torch.bfloat16)  # 1 + 0.001 rounds to 1 in bfloat16
    x = torch.randn(4, 64).to(torch.bfloat16)
    got = rms_norm_reference(x.float(), weight.float(), 1e-6, 1.0)
    assert relative_rms(got, by_hand(x, weight, 1e-6, 1.0)) < 1e-6
    assert torch.equal(rms_norm_reference(x, weight, 1e-6, 1.0), got.to(torch.bfloat16))
