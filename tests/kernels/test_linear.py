import numpy as np
import pytest
import torch

from nbengine.kernels.linear import linear_reference


def relative_rms(got, expected):
    got, expected = np.asarray(got.double()), np.asarray(expected)
    return np.sqrt(np.square(got - expected).mean() / np.square(expected).mean())


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 63, 1000])
@pytest.mark.parametrize(("width", "out"), [(1, 63), (63, 1), (64, 1000)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_equals_a_float64_product_and_is_contiguous(rows, width, out, biased, dtype, bound):
    generator = torch.Generator().manual_seed(rows + width)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((rows, width), (out, width), (out,)))
    got = linear_reference(x, weight, bias if biased else None)
    expected = np.einsum("rk,nk->rn", np.asarray(x.double()), np.asarray(weight.double())) + biased * np.asarray(bias.double())
    assert got.dtype is dtype
    assert got.is_contiguous()
    assert relative_rms(got, expected) < bound


def test_a_rows_result_does_not_hang_on_how_many_stand_beside_it():
    x, weight = torch.randn(40, 96), torch.randn(50, 96)
    whole = linear_reference(x, weight)
    for rows in (1, 2, 5, 8, 39):
        assert relative_rms(linear_reference(x[:rows], weight), whole[:rows].double()) < 1e-6


def test_a_view_of_a_larger_tensor_is_read_right():
    wide, weight = torch.randn(9, 128), torch.randn(33, 64)
    for rows in (1, 4, 9):
        expected = linear_reference(wide[:rows, 64:].contiguous(), weight)
        assert relative_rms(linear_reference(wide[:rows, 64:], weight), expected.double()) < 1e-6
