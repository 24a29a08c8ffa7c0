"""The ops a decoder is made of, and which implementation of each is in use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from nbengine.checks import told
from nbengine.errors import nearest
from nbengine.kernels._triton import why_not
from nbengine.step_inputs import LayerCache

OP_NAMES = (
    "linear",
    "rms_norm",
    "gated",
    "rope_store",
    "paged_attention",
    "copy_blocks",
    "prepare_step",
    "update_tables",
    "penalise",
    "sample",
    "keep_drawn",
)
_NEVER_ASKING = {"linear", "rms_norm", "gated"}  # whose references no host's value decides, and that take tokens without a slot
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative RMS error against the reference

Op = Callable[..., Any]


class Ops:
    """One attribute an op: call `ops.linear(x, weight)`. Each engine has its own.

    >>> ops = Ops.default("cpu")
    >>> ops.use("gated", lambda gate_up, activation: ...)  # checked against the reference first
    >>> ops.in_use()["linear"]
    'reference'
    """

    linear: Op
    rms_norm: Op
    gated: Op
    rope_store: Op
    paged_attention: Op
    copy_blocks: Op
    prepare_step: Op
    update_tables: Op
    penalise: Op
    sample: Op
    keep_drawn: Op

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._names: dict[str, str] = {}
        for name in OP_NAMES:
            self._set(name, "reference", _shipped(name)["reference"])

    @classmethod
    def default(cls, device: torch.device | str, *, invariant: bool = False) -> Ops:
        """Triton kernels on a GPU where an op has one, the references everywhere else.

        invariant: those kernels of which a row's result depends on that row alone, to the bit, where the fastest are not such.
        """
        ops = cls(torch.device(device))
        if ops.device.type == "cuda":
            for name in OP_NAMES:
                shipped = _shipped(name)
                label = "invariant" if invariant and "invariant" in shipped else "triton"
                if label in shipped:
                    ops._set(name, label, shipped[label])
        return ops

    def in_use(self) -> dict[str, str]:
        """The implementation of every op: 'reference', 'triton', 'invariant', or a user's function by its name."""
        return dict(self._names)

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may hold them all: none asks the host for anything while it runs."""
        return all(
            label in {"triton", "invariant"} or (label == "reference" and name in _NEVER_ASKING) for name, label in self._names.items()
        )

    def use(self, name: str, op: Op | str) -> None:
        """Exchange one op: for 'reference', 'triton', or a function, which must first agree with the reference on random inputs."""
        self.use_all({name: op})

    def use_all(self, ops: Mapping[str, Op | str]) -> None:
        """Exchange several ops, or none of them if one is refused."""
        chosen = {name: self._checked(name, op) for name, op in ops.items()}
        for name, (label, function) in chosen.items():
            self._set(name, label, function)

    def _set(self, name: str, label: str, op: Op) -> None:
        setattr(self, name, op)
        self._names[name] = label

    def _checked(self, name: str, op: Op | str) -> tuple[str, Op]:
        if name not in OP_NAMES:
            raise ValueError(f"no op is called {name!r}{nearest(name, OP_NAMES)}; the ops are {', '.join(OP_NAMES)}")
        if isinstance(op, str):
            shipped = _shipped(name)
            if op not in shipped:
                raise ValueError(f"{name} has no implementation {op!r}; choose {' or '.join(map(repr, shipped))}, or pass a function")
            if op != "reference" and (reason := why_not(self.device)):
                raise ValueError(f"{name} stays as it is: {reason}")
            return op, shipped[op]
        if not callable(op):
            raise TypeError(f"the implementation of {name} must be a function, 'reference' or 'triton', not {type(op).__name__}")
        if not hasattr(_module(name), "example_inputs"):
            raise ValueError(f"{name} cannot be exchanged: nbengine.kernels.{name} has no example_inputs to check a function with")
        label = getattr(op, "__qualname__", type(op).__name__)
        error, case = measure_error(name, op, self.device)
        dtype = _check_dtype(self.device)
        if not error <= _TOLERANCE[dtype]:
            raise ValueError(
                f"{label} differs from {name}_reference: relative RMS error {error:.3g}, allowed {_TOLERANCE[dtype]:g} in {str(dtype)[6:]}, "
                f"on example {case} of nbengine.kernels.{name}.example_inputs. Compare the two there; the op in use was left as it is"
            )
        return label, op


def measure_error(name: str, op: Op, device: torch.device, seed: int | None = None) -> tuple[float, int]:
    """The largest relative RMS error of an op against its reference on random inputs, and the example that it came from."""
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    reference = _shipped(name)["reference"]
    worst, case = 0.0, 0
    for index, example in enumerate(_module(name).example_inputs(generator, _check_dtype(device))):
        (args, written), (own_args, own_written) = example, copy.deepcopy(example)
        with torch.inference_mode():
            expected = [*_tensors(reference(*args)), *written]
            got = [*_tensors(_try(name, index, op, own_args)), *own_written]
        error = max([float("inf") if len(got) != len(expected) else 0.0, *map(_relative_rms, got, expected)])
        if not error <= worst:
            worst, case = error, index
    return worst, case


def _try(name: str, case: int, op: Op, args: Iterable[Any]) -> Any:
    try:
        return op(*args)
    except Exception as error:
        label = getattr(op, "__qualname__", type(op).__name__)
        raise ValueError(
            f"{label}, given for {name}, raised {told(error)}, on example {case} of nbengine.kernels.{name}.example_inputs. "
            f"It is called as {name}_reference is; the op in use was left as it is"
        ) from error


def _check_dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    difference, size = (got.double() - expected.double()).square().mean().sqrt(), expected.double().square().mean().sqrt()
    error = float(difference / size.clamp(min=1e-30))
    return error if error == error else float("inf")  # noqa: PLR0124 - NaN


def _tensors(result: Any) -> Iterable[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return (result,)
    if isinstance(result, LayerCache):
        return (result.keys, result.values)
    return tuple(tensor for part in result for tensor in _tensors(part)) if isinstance(result, tuple | list) else ()


def _module(name: str) -> ModuleType:
    return import_module(f"nbengine.kernels.{name}")


def _shipped(name: str) -> dict[str, Op]:
    """Implementations in the op's file: `<op>_reference`, `<op>` where there is a Triton kernel, `<op>_invariant` where that is another."""
    module = _module(name)
    shipped = {"reference": getattr(module, f"{name}_reference")}
    if hasattr(module, name):
        shipped["triton"] = getattr(module, name)
    if hasattr(module, f"{name}_invariant"):
        shipped["invariant"] = getattr(module, f"{name}_invariant")
    return shipped
