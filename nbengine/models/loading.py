"""From a model's folder to something that can run: config, weights, and which of the two implementations serves it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nbengine.errors import CheckpointError, UnsupportedModelError
from nbengine.memory import free_memory
from nbengine.models.checkpoint import Checkpoint
from nbengine.models.decoder import Decoder
from nbengine.models.families import spec_from_config, supported_architectures
from nbengine.models.loader import dummy_weights, load_weights
from nbengine.ops import Ops

if TYPE_CHECKING:
    from nbengine.config import EngineConfig
    from nbengine.models.spec import DecoderSpec
    from nbengine.step_inputs import CacheSpec

Progress = Callable[[str, int, int], None]


@dataclass(slots=True)
class LoadedModel:
    """A model in memory, and how to bring it there again."""

    model: Any  # Decoder, or the same interface over transformers' own code
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    cache_layers: list[CacheSpec]
    weight_bytes: int
    build: Callable[[], Any]
    spec: DecoderSpec | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def rope_by_length(self) -> bool:
        """Whether some token's rotation hangs on more than its position."""
        return self.spec is not None and any(rope.boundary is not None for rope in self.spec.ropes)

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block of keys and values in all layers."""
        return kv_bytes(self.cache_layers, self.dtype, block_size)

    def drop(self) -> None:
        """Let the weights go."""
        self.model = None

    def reload(self) -> Any:
        self.model = self.build()
        return self.model

    def update_weights(self, weights: Mapping[str, torch.Tensor] | Any) -> None:
        self.model.update_weights(dict(weights))


def kv_bytes(layers: list[CacheSpec], dtype: torch.dtype, tokens: int) -> int:
    """Bytes of this many tokens' keys and values in all layers."""
    return sum(2 * tokens * layer.kv_heads * layer.head_dim * dtype.itemsize for layer in layers)


def read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): download or save it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} does not hold a model's config: download or save it again")
    return config


def load_model(folder: Path, config: EngineConfig, max_model_len: Callable[[int], int], progress: Progress | None = None) -> LoadedModel:
    """Load a model as the engine's config says. `max_model_len` turns the checkpoint's limit into the engine's."""
    read = read_config(folder)
    device = pick_device(config.device)
    invariant = _invariant(config, device)
    if not has_spec(read, config.model_impl):
        if invariant:
            raise ValueError(
                "deterministic=True needs a model that nbengine's own code runs, and this one is run by transformers': leave it out"
            )
        from nbengine.models.transformers_model import load_transformers_model

        return load_transformers_model(folder, read, config, device, progress)
    spec = spec_from_config(read)
    checkpoint = None if config.load_format == "dummy" else Checkpoint(folder)
    spec = believe_weights(spec, checkpoint)
    dtype = pick_dtype(config.dtype, spec.dtype, device, spec.parameter_count())
    ops = Ops.default(device, invariant=invariant)
    length = max_model_len(spec.max_position_embeddings)

    def build() -> Decoder:
        if config.load_format == "dummy":
            return Decoder(spec, dummy_weights(spec.weights(), device, dtype, config.seed), ops, length)
        assert checkpoint is not None
        return Decoder(spec, load_weights(spec.weights(), checkpoint, device, dtype, progress), ops, length)

    return LoadedModel(
        model=build(),
        ops=ops,
        device=device,
        dtype=dtype,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        max_position_embeddings=spec.max_position_embeddings,
        cache_layers=spec.cache_layers(),
        weight_bytes=spec.parameter_count() * dtype.itemsize,
        build=build,
        spec=spec,
        info={"architecture": spec.architecture, "implementation": "nbengine", "parameters": spec.parameter_count()},
    )


def _invariant(config: EngineConfig, device: torch.device) -> bool:
    if config.deterministic and device.type != "cuda":
        raise ValueError("deterministic=True needs an NVIDIA GPU: on a CPU the libraries' products differ with the number of rows")
    return config.deterministic


def has_spec(read: Mapping[str, Any], model_impl: str) -> bool:
    """Whether nbengine's own decoder runs this config, and not transformers' code; as asked for, or else if it can."""
    architecture = (read.get("architectures") or ["?"])[0]
    known = architecture in supported_architectures()
    if model_impl == "nbengine" and not known:
        raise UnsupportedModelError(
            f"nbengine has no spec for {architecture}; leave model_impl='auto' to run it through transformers' own code. "
            f"With a spec: {', '.join(supported_architectures())}"
        )
    return known and model_impl != "transformers"


def believe_weights(spec: DecoderSpec, checkpoint: Checkpoint | None) -> DecoderSpec:
    """The spec with a head of its own where the checkpoint has one: the weights are believed over the config, as transformers does."""
    if checkpoint is not None and spec.tied_head and not checkpoint.ties_head():
        return dataclasses.replace(spec, tied_head=False)
    return spec


def pick_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {device!r}") from error
    if chosen.type not in {"cpu", "cuda"}:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}, but torch sees no GPU here; use device='auto' or 'cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if chosen.type == "cuda" and chosen.index is None else chosen


def pick_dtype(asked: str, declared: str | None, device: torch.device, parameters: int) -> torch.dtype:
    """What to compute in: as asked; else the checkpoint's own on a GPU that has it, and float32 on a CPU where that fits well."""
    if asked != "auto":
        return getattr(torch, asked)
    own = getattr(torch, declared or "float32")
    if device.type == "cpu":
        return torch.float32 if parameters * 4 < free_memory(device) // 2 else torch.bfloat16
    if own is torch.float32 or (own is torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0)):
        return torch.float16
    return own
