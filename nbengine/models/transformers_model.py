"""Models without a spec: transformers' own code, one flat row of tokens a step, over our paged cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PreTrainedModel

from nbengine.errors import CheckpointError, UnsupportedModelError, nearest
from nbengine.models.checkpoint import PREFIXES
from nbengine.models.loader import Progress
from nbengine.models.loading import LoadedModel, pick_dtype
from nbengine.models.transformers_attention import PAGED, attach, register, set_implementation
from nbengine.models.transformers_check import Trial, read_layers
from nbengine.models.transformers_weights import empty_model, load_model
from nbengine.ops import Ops

if TYPE_CHECKING:
    from nbengine.config import EngineConfig
    from nbengine.step_inputs import CacheSpec, LayerCache, StepInputs


class TransformersModel:
    """A causal language model of transformers' with the interface of Decoder.

    `body` makes the last hidden states; `head` is the causal model with its body taken out, so that whatever it does to them
    (scaling, soft caps) is done. `layers` says what each layer keeps.
    """

    def __init__(self, causal: Any, ops: Ops, layers: list[CacheSpec]) -> None:
        self.weights = dict(causal.named_parameters(remove_duplicate=False))
        self.layers = layers
        self.step = attach(causal, ops)
        self.body = _body(causal)
        set_implementation(causal, PAGED)
        place = next(name for name, module in causal.named_modules() if module is self.body)
        parent, _, leaf = place.rpartition(".")
        setattr(causal.get_submodule(parent), leaf, _Given(self.body))
        self.head = causal

    def forward(self, inputs: StepInputs, caches: list[LayerCache]) -> torch.Tensor:
        """The last hidden states [tokens, hidden], after the final norm; keys and values are stored on the way."""
        with self.step.running(inputs, caches, self.layers):
            return self.body(input_ids=inputs.tokens[None], position_ids=inputs.positions[None], use_cache=False)[0][0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 [n, vocab] from hidden states [n, hidden]."""
        return self.head(inputs_embeds=hidden[None], use_cache=False).logits[0].float()

    def move(self, device: torch.device) -> None:
        """Bring the weights to another device."""
        self.head.to(device)
        self.body.to(device)

    @torch.no_grad()
    def update_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy new values into some weights, named as in transformers' state dict. All names and shapes are checked first."""
        places = {name: self._place(name) for name in weights}
        for name, value in weights.items():
            if places[name].shape != value.shape:
                raise CheckpointError(f"{name} has the shape {list(places[name].shape)}; the new value's is {list(value.shape)}")
        for name, value in weights.items():
            places[name].copy_(value)

    def _place(self, name: str) -> torch.Tensor:
        bare = {name.removeprefix(prefix) for prefix in PREFIXES}
        for candidate in (name, *(prefix + stem for prefix in PREFIXES for stem in bare)):
            if candidate in self.weights:
                return self.weights[candidate]
        raise CheckpointError(f"the model has no weight {name!r}{nearest(name, self.weights)}; names are those of transformers' state dict")


def _body(causal: Any) -> Any:
    """The part of a causal model that makes its last hidden states."""
    for part in (causal.get_decoder(), causal.base_model, getattr(causal, "model", None)):
        if isinstance(part, PreTrainedModel) and part is not causal:
            return part
    raise UnsupportedModelError(f"{type(causal).__name__} has no body apart from its head, so nbengine cannot run it; use another model")


class _Given(torch.nn.Module):
    """Stands where the body was: hands on the hidden states that it is given; anything else is asked of the body."""

    def __init__(self, body: torch.nn.Module) -> None:
        super().__init__()
        self.__dict__["body"] = body  # not as a submodule

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["body"], name)

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> _Output:
        return _Output(inputs_embeds)


class _Output:
    """What a body returns, everything but the hidden states None."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def load_transformers_model(
    folder: Path, read_config: Mapping[str, Any], config: EngineConfig, device: torch.device, progress: Progress | None
) -> LoadedModel:
    """Load a model that transformers knows, and try it: UnsupportedModelError where it does not run right over a paged cache."""
    register()
    trust = config.trust_remote_code
    outline = outline_model(folder, read_config, config, device)
    described, limit, dtype, name = outline.config, outline.max_position_embeddings, outline.dtype, type(outline.empty).__name__
    ops = Ops.default(device)
    layers: list[CacheSpec] = []

    def load() -> Any:
        seed = config.seed if config.load_format == "dummy" else None
        causal = load_model(described, folder, device, dtype, dummy_seed=seed, trust_remote_code=trust, progress=progress)
        if described.model_type == "falcon":
            from nbengine.models.transformers_falcon import adapt

            adapt(causal)
        return causal

    causal = load()
    trial = Trial(causal, min(limit, config.max_model_len or limit), device)
    model = TransformersModel(causal, ops, layers)
    layers += read_layers(model, trial, dtype, name)
    return LoadedModel(
        model=model,
        ops=ops,
        device=device,
        dtype=dtype,
        vocab_size=trial.near_logits.shape[-1],
        hidden_size=outline.config.get_text_config().hidden_size,
        max_position_embeddings=limit,
        cache_layers=layers,
        weight_bytes=sum(weight.nbytes for weight in {id(weight): weight for weight in model.weights.values()}.values()),
        build=lambda: TransformersModel(load(), ops, layers),
        info={"architecture": name, "implementation": "transformers", "parameters": outline.parameters},
    )


@dataclass(frozen=True, slots=True)
class Outline:
    """What is known of a model before its weights are there."""

    config: Any  # transformers'
    empty: Any  # the causal model, its weights on the meta device
    max_position_embeddings: int
    parameters: int
    dtype: torch.dtype


def outline_model(folder: Path, read_config: Mapping[str, Any], config: EngineConfig, device: torch.device) -> Outline:
    """Everything that loading goes by; UnsupportedModelError where the config alone says that it cannot run."""
    described = _transformers_config(folder, read_config, config.trust_remote_code)
    limit = _position_limit(described.get_text_config(), config.max_model_len)
    empty = _empty(described, config.trust_remote_code)
    parameters = sum(parameter.numel() for parameter in empty.parameters())
    return Outline(described, empty, limit, parameters, pick_dtype(config.dtype, _declared_dtype(read_config), device, parameters))


def _transformers_config(folder: Path, read_config: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """Read config.json as transformers does, and refuse what plainly cannot run."""
    if quantization := read_config.get("quantization_config"):
        method = quantization.get("quant_method", "an unnamed method")
        raise UnsupportedModelError(
            f"this checkpoint is quantised ({method}), which nbengine cannot read; load the unquantised checkpoint it was made from"
        )
    try:
        described = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(f"transformers cannot make sense of {folder / 'config.json'}: {error}") from error
    kind = described.model_type
    if described.is_encoder_decoder:
        raise UnsupportedModelError(f"{kind} is an encoder-decoder model, which nbengine does not run; load a decoder-only language model")
    if getattr(described, "alibi", False):
        raise UnsupportedModelError(
            f"this {kind} places its tokens by ALiBi, which paged attention cannot do; use a model with rotary or learned positions"
        )
    return described


def _empty(described: Any, trust_remote_code: bool) -> Any:
    """The model as shapes, for its class and size."""
    try:
        return empty_model(described, torch.device("cpu"), torch.float32, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UnsupportedModelError(f"transformers has no causal language model for {described.model_type!r}: {error}") from error


def _position_limit(described: Any, max_model_len: int | None) -> int:
    limit = getattr(described, "max_position_embeddings", None) or max_model_len or 2048
    boundary = min(_longrope_boundaries(getattr(described, "rope_parameters", None), limit), default=limit)
    if boundary < min(limit, max_model_len or limit):
        raise UnsupportedModelError(
            f"this {described.model_type} rotates sequences of more than {boundary} tokens otherwise than shorter ones (LongRoPE), and "
            f"transformers' code does so for a whole batch at once: pass max_model_len={boundary} or less"
        )
    return limit


def _longrope_boundaries(rope: Any, limit: int) -> Iterator[int]:
    if isinstance(rope, Mapping):
        if rope.get("rope_type") == "longrope":
            yield rope.get("original_max_position_embeddings") or limit
        for nested in rope.values():
            yield from _longrope_boundaries(nested, limit)


def _declared_dtype(read_config: Mapping[str, Any]) -> str | None:
    declared = read_config.get("dtype") or read_config.get("torch_dtype") or (read_config.get("text_config") or {}).get("dtype")
    return str(declared).removeprefix("torch.") if declared else None
