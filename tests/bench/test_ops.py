"""benchmarks/ops.py, as far as it goes without a GPU."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from nbengine.ops import OP_NAMES

pytest.importorskip("triton")
SAMPLED = (torch.ones(50), torch.zeros(50).long(), torch.ones(50).double(), torch.zeros(50).double(), torch.arange(50), torch.arange(50))


def all_but_the_last(drawn, rows, newest):
    newest[:-1] = drawn[:-1]


@pytest.fixture
def ops(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return import_module("ops")


def test_every_kernel_has_cases(ops):
    wrappers = {name for op in OP_NAMES for name in (op, f"{op}_invariant") if hasattr(import_module(f"nbengine.kernels.{op}"), name)}
    assert set(ops.OPS) == wrappers
    assert len(ops.OPS) == len(wrappers)


@pytest.mark.parametrize(
    ("op", "args", "wrong"),
    [
        ("gated", lambda: (torch.randn(5, 64), "silu"), lambda x, activation: x[:, :32].clone()),
        ("gated", lambda: (torch.randn(5, 64), "silu"), lambda x, activation: torch.full((5, 32), float("nan"))),
        ("linear_invariant", lambda: (torch.randn(5, 64), torch.randn(9, 64)), lambda x, weight: x @ weight.roll(1, 0).t()),
        ("keep_drawn", lambda: (torch.arange(900), torch.arange(900), torch.zeros(900).long()), all_but_the_last),
        ("sample", lambda: (torch.randn(50, 99), *SAMPLED), lambda logits, *cuts: logits.argmax(-1)),
    ],
)  # fmt: skip
def test_a_kernel_that_differs_is_not_reported(ops, monkeypatch, op, args, wrong):
    case = ops.Case(op, "small", args, 1, 1)
    monkeypatch.setattr(ops.Case, "kernel", property(lambda self: self.reference))
    assert ops.difference(case, args()) == 0
    monkeypatch.setattr(ops.Case, "kernel", property(lambda self: wrong))
    with pytest.raises(SystemExit, match=r"differs from its reference by .* nothing is reported"):
        ops.measure(case, {"B/s": 1.0})


def test_a_deterministic_kernel_stands_beside_the_usual_one(ops, monkeypatch):
    case = ops.Case("linear_invariant", "small", lambda: (torch.randn(5, 64), torch.randn(9, 64)), 1 << 30, 4e6)
    monkeypatch.setattr(ops, "seconds", lambda calls: 3e-6 if calls[0]().shape == (5, 9) else 2e-6)
    monkeypatch.setattr(ops.Case, "kernel", property(lambda self: self.reference))
    monkeypatch.setattr(ops.Case, "usual", property(lambda self: lambda x, weight: x))
    row = ops.measure(case, {"B/s": 4e12})
    assert (row["us"], row["usual_us"], row["of_usual"]) == (3.0, 2.0, 1.5)
    assert row["share"] == pytest.approx(1 / 3, abs=1e-3)
