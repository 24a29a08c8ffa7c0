"""A model of transformers' own classes with its weights in place: from safetensors by our loader, or by transformers'."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import logging as transformers_logging

from nbengine.errors import CheckpointError, UnsupportedModelError
from nbengine.models.checkpoint import Checkpoint
from nbengine.models.loader import Progress, dummy_weights, load_weights
from nbengine.models.spec import WeightSpec

_BUILDING = threading.Lock()  # transformers exchanges functions of torch while it builds a model; two at once would keep each other's


def empty_model(config: Any, device: torch.device, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """The model without its weights, which are on the meta device; what it computes for itself (rotary frequencies) is in place."""
    config = copy.deepcopy(config)  # a model writes into it
    with _BUILDING, torch.device(device), _EmptyOnMeta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval().requires_grad_(False)


def load_model(
    config: Any,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    dummy_seed: int | None,
    trust_remote_code: bool,
    progress: Progress | None,
) -> Any:
    """The model with its weights on `device` in `dtype`: the checkpoint's, or random ones where a seed is given."""
    model = empty_model(config, device, dtype, trust_remote_code=trust_remote_code)
    if dummy_seed is not None:
        _assign(model, dummy_weights(weight_specs(model, None), device, dtype, dummy_seed))
        if _on_meta(model):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot run with random weights (load_format='dummy'): {_on_meta(model)[0]} is unknown"
            )
        return model
    checkpoint = Checkpoint(folder)
    specs = weight_specs(model, checkpoint)
    if _maps_one_to_one(model, specs, checkpoint, dtype):
        _assign(model, load_weights(specs, checkpoint, device, dtype, progress))
        for name, buffer in _persistent_buffers(model):
            if name in checkpoint:
                checkpoint.read_into(name, buffer)
        return model
    del model
    return _from_pretrained(config, checkpoint, device, dtype, trust_remote_code, progress)


class _EmptyOnMeta(TorchFunctionMode):
    """Inside, `torch.empty` makes tensors without memory: weights come about that way, and what is computed does not."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _names(model: Any) -> list[list[str]]:
    """The names of every parameter; a tied one has several."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return list(found.values())


def weight_specs(model: Any, checkpoint: Checkpoint | None) -> list[WeightSpec]:
    """One weight for each parameter. Where the checkpoint holds different values for tied ones, it is believed: each gets its own."""
    specs = []
    for names in _names(model):
        shape = tuple(model.get_parameter(names[0]).shape)
        stored = [name for name in names if checkpoint is not None and name in checkpoint] or names[:1]
        apart = [name for name in stored[1:] if checkpoint is not None and not checkpoint.ties_head(stored[0], name)]
        specs += [WeightSpec(name, (name,), shape) for name in (stored[0], *apart)]
    return specs


def _maps_one_to_one(model: Any, specs: list[WeightSpec], checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
    keeps_float32 = model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict  # noqa: SLF001 - no public name
    return (
        all(spec.name in checkpoint for spec in specs)
        and not get_model_conversion_mapping(model, add_legacy=False)
        and (dtype is torch.float32 or not keeps_float32)
        and not any(buffer.is_meta for buffer in model.buffers())
    )


def _assign(model: Any, weights: dict[str, torch.Tensor]) -> None:
    for names in _names(model):
        loaded = {name: torch.nn.Parameter(weights[name], requires_grad=False) for name in names if name in weights}
        shared = next(iter(loaded.values()))
        for name in names:
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, loaded.get(name, shared))


def _persistent_buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    kept = model.state_dict()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _on_meta(model: Any) -> list[str]:
    return [name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if tensor.is_meta]


def _from_pretrained(
    config: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, trust_remote_code: bool, progress: Progress | None
) -> Any:
    """By transformers' own loader, which renames, merges and splits tensors where a checkpoint's layout is not its model's."""
    if progress is not None:
        progress("loading weights", 0, checkpoint.nbytes)
    loading: Any = AutoModelForCausalLM
    with _BUILDING, _no_progress_bars():
        model, report = loading.from_pretrained(
            checkpoint.folder,
            config=copy.deepcopy(config),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            trust_remote_code=trust_remote_code,
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{checkpoint.folder} holds no tensor {missing[0]} ({len(missing)} are missing). The checkpoint is incomplete, or its "
            "config.json is of another model: download it again, or pass load_format='dummy' to run with random weights"
        )
    model = model.eval().requires_grad_(False).to(device)
    if progress is not None:
        progress("loading weights", checkpoint.nbytes, checkpoint.nbytes)
    return model


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """The engine's thread prints nothing."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
