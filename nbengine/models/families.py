"""From a checkpoint's config.json to a DecoderSpec, in both dialects of transformers (before and since its version 5).

Read by hand: transformers' own AutoConfig costs 1.7 s of import. A missing key takes the default that transformers gives
the family. A new family is an entry in `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nbengine.errors import UnsupportedModelError
from nbengine.models.rope import RopeSpec
from nbengine.models.rope_config import full_and_local_ropes, one_rope
from nbengine.models.spec import DecoderSpec, LayerSpec

Config = Mapping[str, Any]

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}

_DEFAULTS: Config = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "sliding_window": None,
}


@dataclass(frozen=True)
class Family:
    """How one architecture differs from Llama: defaults of its config, fields of its spec, which layers slide, its ropes."""

    model_type: str
    defaults: Config = field(default_factory=dict)
    fields: Callable[[Config], dict[str, Any]] = lambda _: {}
    slides: Callable[[Config, int], bool] = lambda _, __: False  # (config, layer)
    ropes: Callable[[Config], tuple[RopeSpec, ...]] = one_rope  # where there are two, the second turns the sliding layers


def supported_architectures() -> list[str]:
    return sorted(_FAMILIES)


def spec_from_config(config: Config) -> DecoderSpec:
    """The spec of the model that this config.json describes; UnsupportedModelError where there is none."""
    architecture = _architecture(config)
    _refuse_unsupported(config)
    family = _FAMILIES[architecture]
    config = {**_DEFAULTS, **family.defaults, **config}
    config["num_key_value_heads"] = config["num_key_value_heads"] or config["num_attention_heads"]
    config["head_dim"] = config["head_dim"] or config["hidden_size"] // config["num_attention_heads"]
    ropes = family.ropes(config)
    sliding = [family.slides(config, index) for index in range(config["num_hidden_layers"])]
    window = config["sliding_window"]
    fields = {
        "architecture": architecture,
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "layers": tuple(LayerSpec(window if slides else None, int(slides and len(ropes) > 1)) for slides in sliding),
        "ropes": ropes,
        "max_position_embeddings": _longest(config, ropes),
        "attention_scale": config["head_dim"] ** -0.5,
        "dtype": _dtype(config),
        "norm_eps": config["rms_norm_eps"],
        "activation": _activation(config),
        "tied_head": bool(config["tie_word_embeddings"]),
    }
    return DecoderSpec(**{**fields, **family.fields(config)})


def _architecture(config: Config) -> str:
    """The first architecture named, or that of the model type where an old config names none."""
    named = (config.get("architectures") or [None])[0]
    by_type = {family.model_type: architecture for architecture, family in _FAMILIES.items()}
    architecture = named or by_type.get(config.get("model_type", ""))
    if architecture not in _FAMILIES:
        raise UnsupportedModelError(
            f"no decoder spec for {architecture or config.get('model_type')!r}; there are specs for {', '.join(supported_architectures())}"
        )
    return architecture


def _refuse_unsupported(config: Config) -> None:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "an unnamed method")
        raise UnsupportedModelError(
            f"this checkpoint is quantised ({method}), which nbengine cannot read; load the unquantised checkpoint it was made from"
        )
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModelError("this checkpoint attends in both directions, so it cannot generate; load a causal language model")


def _dtype(config: Config) -> str | None:
    declared = config.get("dtype") or config.get("torch_dtype")
    return str(declared).removeprefix("torch.") if declared else None


def _longest(config: Config, ropes: tuple[RopeSpec, ...]) -> int:
    """The longest context: of a scaled rotation, whose config may still say what the model was first made for, the scaled one."""
    scaled = [int(rope.original_max * rope.factor) for rope in ropes if rope.kind in {"dynamic", "yarn"}]
    return max([config["max_position_embeddings"], *scaled])


def _activation(config: Config) -> str:
    named = config.get("hidden_activation") or config["hidden_act"]
    if named not in _ACTIVATIONS:
        raise UnsupportedModelError(f"no activation {named!r} in nbengine's decoder; it has {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[named]


def _always(config: Config, _: int) -> bool:
    return config["sliding_window"] is not None


def _every(pattern: Callable[[Config], int]) -> Callable[[Config, int], bool]:
    """Layers slide but for each pattern-th, unless the config lists every layer's type."""

    def slides(config: Config, layer: int) -> bool:
        if types := config.get("layer_types"):
            return types[layer] == "sliding_attention"
        return bool((layer + 1) % pattern(config))

    return slides


def _upper_layers(config: Config, layer: int) -> bool:
    """Qwen: with use_sliding_window the layers from max_window_layers on slide, unless the config lists every layer's type."""
    if not config["use_sliding_window"] or config["sliding_window"] is None:
        return False
    if types := config.get("layer_types"):
        return types[layer] == "sliding_attention"
    return layer >= config["max_window_layers"]


def _gemma(config: Config) -> dict[str, Any]:
    return {
        "norm_offset": 1.0,
        "post_norms": True,
        "qkv_bias": config["attention_bias"],
        "o_bias": config["attention_bias"],
        "embed_scale": config["hidden_size"] ** 0.5,
        "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        "final_softcap": config["final_logit_softcapping"],
    }


_QWEN: Config = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_GEMMA: Config = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

_FAMILIES = {
    "LlamaForCausalLM": Family(
        "llama",
        {"attention_bias": False, "mlp_bias": False},
        lambda c: {"qkv_bias": c["attention_bias"], "o_bias": c["attention_bias"], "mlp_bias": c["mlp_bias"]},
    ),
    "MistralForCausalLM": Family(
        "mistral",
        {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        slides=_always,
    ),
    "Qwen2ForCausalLM": Family("qwen2", {**_QWEN, "num_key_value_heads": 32}, lambda _: {"qkv_bias": True}, _upper_layers),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        {**_QWEN, "num_key_value_heads": 32, "head_dim": 128, "attention_bias": False},
        lambda c: {"qkv_bias": c["attention_bias"], "o_bias": c["attention_bias"], "qk_norm": True},
        _upper_layers,
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        {**_GEMMA, "vocab_size": 256000, "max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        lambda c: {**_gemma(c), "attention_softcap": c["attn_logit_softcapping"]},
        _every(lambda _: 2),
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3_text",
        {**_GEMMA, "vocab_size": 262208, "max_position_embeddings": 131072, "final_logit_softcapping": None},
        lambda c: {**_gemma(c), "qk_norm": True},
        _every(lambda c: c.get("sliding_window_pattern") or 6),
        full_and_local_ropes,
    ),
    "Phi3ForCausalLM": Family(
        "phi3",
        {
            "vocab_size": 32064,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        lambda _: {"merged_checkpoint": True},
        _always,
    ),
}
