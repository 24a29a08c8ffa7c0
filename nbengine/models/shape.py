"""What can be known of a model before its weights are read: from its config, and from their headers where they are here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbengine.download import Download
from nbengine.errors import CheckpointError, UnsupportedModelError
from nbengine.hub import BUNDLED, _cache_folder, resolve_model
from nbengine.models.checkpoint import Checkpoint
from nbengine.models.families import spec_from_config
from nbengine.models.loading import believe_weights, has_spec, pick_dtype, read_config
from nbengine.step_inputs import CacheSpec

if TYPE_CHECKING:
    import torch

    from nbengine.config import EngineConfig


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's sizes, by the code that would load it."""

    architecture: str
    implementation: str  # "nbengine" or "transformers"
    parameters: int
    dtype: torch.dtype
    weights: int  # bytes in that dtype
    layers: list[CacheSpec]
    max_position_embeddings: int
    download: int  # bytes that are still on the hub

    @classmethod
    def of(cls, config: EngineConfig, device: torch.device) -> ModelShape:
        """Raises what loading would; of a hub model's files only the small ones are downloaded."""
        here = config.model == BUNDLED or Path(config.model).expanduser().is_dir()
        folder = resolve_model(
            config.model,
            revision=config.revision,
            download_dir=config.download_dir,
            token=config.hf_token,
            progress=lambda *_: None,
            weights=here,
        )
        checkpoint, download = _checkpoint(config, folder, here=here)
        read = read_config(folder)
        if has_spec(read, config.model_impl):
            return _by_spec(read, config, device, checkpoint, download)
        return _by_transformers(folder, read, config, device, checkpoint, download)


def _checkpoint(config: EngineConfig, folder: Path, *, here: bool) -> tuple[Checkpoint | None, int]:
    """The checkpoint where it is on this machine, and else the bytes still to be downloaded."""
    if config.load_format == "dummy":
        return None, 0
    try:
        return Checkpoint(folder), 0
    except CheckpointError:
        if here:
            raise
        cache = _cache_folder(config.download_dir)
        missing = Download(config.model, config.revision, cache, config.hf_token, weights=True).missing()
        if not missing:  # all of it is here, and damaged
            raise
        return None, missing


def _by_spec(
    read: Mapping[str, Any], config: EngineConfig, device: torch.device, checkpoint: Checkpoint | None, download: int
) -> ModelShape:
    spec = believe_weights(spec_from_config(read), checkpoint)
    if checkpoint is not None:
        for weight in spec.weights():
            for source in weight.sources:
                checkpoint.resolve(source)  # a tensor that is missing is told of now
    count = spec.parameter_count()
    dtype = pick_dtype(config.dtype, spec.dtype, device, count)
    return ModelShape(
        architecture=spec.architecture,
        implementation="nbengine",
        parameters=count,
        dtype=dtype,
        weights=count * dtype.itemsize,
        layers=spec.cache_layers(),
        max_position_embeddings=spec.max_position_embeddings,
        download=download,
    )


def _by_transformers(
    folder: Path, read: Mapping[str, Any], config: EngineConfig, device: torch.device, checkpoint: Checkpoint | None, download: int
) -> ModelShape:
    from nbengine.models.transformers_model import outline_model
    from nbengine.models.transformers_weights import weight_specs

    outline = outline_model(folder, read, config, device)
    stored = sum(prod(weight.shape) for weight in weight_specs(outline.empty, checkpoint))  # tied ones may be apart in the checkpoint
    return ModelShape(
        architecture=type(outline.empty).__name__,
        implementation="transformers",
        parameters=outline.parameters,
        dtype=outline.dtype,
        weights=stored * outline.dtype.itemsize,
        layers=_layers(outline.config.get_text_config()),
        max_position_embeddings=outline.max_position_embeddings,
        download=download,
    )


def _layers(described: Any) -> list[CacheSpec]:
    """What each layer keeps, as transformers' config has it; a load reads it off a trial."""
    heads = getattr(described, "num_attention_heads", None)
    if not heads:
        raise UnsupportedModelError(
            f"{described.model_type} has no attention heads in its config, so it keeps something else than keys and values (a state, a "
            "convolution), which nbengine has no cache for. Use another model, or transformers itself"
        )
    head_dim = getattr(described, "head_dim", None) or described.hidden_size // heads
    return [CacheSpec(_key_heads(described, heads), head_dim, window) for window in _windows(described)]


def _key_heads(described: Any, heads: int) -> int:
    if described.model_type == "falcon" and described.new_decoder_architecture:
        return described.num_kv_heads or heads
    if getattr(described, "multi_query", False):
        return 1
    return getattr(described, "num_key_value_heads", None) or heads


def _windows(described: Any) -> list[int | None]:
    window = getattr(described, "sliding_window", None) if getattr(described, "use_sliding_window", True) else None
    types = getattr(described, "layer_types", None) or ["sliding_attention"] * described.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in types]
