import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from nbengine.ops import OP_NAMES, Ops


@pytest.fixture
def ops():
    return Ops.default("cpu")


def test_a_cpu_uses_the_references(ops):
    assert ops.in_use() == dict.fromkeys(OP_NAMES, "reference")


def test_a_function_that_agrees_is_taken_and_can_be_given_back(ops):
    def my_linear(x, weight, bias=None):
        return F.linear(x, weight, bias)

    before = ops.linear
    ops.use("linear", my_linear)
    assert ops.linear is my_linear
    assert "my_linear" in ops.in_use()["linear"]
    ops.use("linear", "reference")
    assert ops.linear is before
    assert ops.in_use()["linear"] == "reference"


def test_two_sets_of_ops_share_nothing(ops):
    ops.use("linear", F.linear)
    assert Ops.default("cpu").in_use()["linear"] == "reference"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("linear", lambda x, weight, bias=None: F.linear(x, weight)),
        ("rms_norm", lambda x, weight, eps, offset=0.0, residual=None: F.rms_norm(x, weight.shape, weight, eps)),
        ("gated", lambda gate_up, activation: F.silu(gate_up[:, : gate_up.shape[1] // 2])),
        ("gated", lambda gate_up, activation: gate_up * float("nan")),
        ("gated", lambda gate_up, activation: gate_up),
        ("rope_store", lambda qkv, cache, *_: qkv.view(len(qkv), -1, cache.keys.shape[-1])[:, : -2 * cache.keys.shape[2]]),
        ("paged_attention", lambda q, *_: torch.zeros(len(q), q.shape[1] * q.shape[2])),
        ("copy_blocks", lambda caches, pairs: None),
    ],
)
def test_a_function_that_differs_is_refused_with_the_error_measured(ops, name, wrong):
    before = getattr(ops, name)
    with pytest.raises(ValueError, match=f"differs from {name}_reference: relative RMS error"):
        ops.use(name, wrong)
    assert getattr(ops, name) is before


def test_a_norm_that_forgets_to_write_the_residual_is_refused(ops):
    def forgetful(x, weight, eps, offset=0.0, residual=None):
        return F.rms_norm(x if residual is None else residual + x, weight.shape, weight + offset, eps)

    with pytest.raises(ValueError, match="relative RMS error"):
        ops.use("rms_norm", forgetful)


def test_a_function_that_raises_is_refused_with_its_op_and_line(ops):
    def linear_of_mine(*_):
        raise LookupError("where is the bias?")

    with pytest.raises(
        ValueError, match=r"linear_of_mine, given for linear, raised LookupError \(line \d+ of test_ops.py\): where is .*example 0"
    ):
        ops.use("linear", linear_of_mine)
    with pytest.raises(ValueError, match=r"given for gated, raised TypeError: .*takes 0 positional arguments.*example 0"):
        ops.use("gated", lambda: None)
    assert set(ops.in_use().values()) == {"reference"}


def test_several_are_exchanged_together_or_not_at_all(ops):
    with pytest.raises(ValueError, match="gated"):
        ops.use_all({"linear": F.linear, "gated": lambda gate_up, activation: gate_up})
    assert ops.in_use()["linear"] == "reference"


def test_mistaken_names_say_what_there_is(ops):
    with pytest.raises(ValueError, match="did you mean 'rms_norm'"):
        ops.use("rmsnorm", "reference")
    with pytest.raises(ValueError, match="choose 'reference'"):
        ops.use("linear", "cuda")
    with pytest.raises(TypeError, match="must be a function"):
        ops.use("linear", 3)
