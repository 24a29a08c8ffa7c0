"""What a config.json says of rotary positions, in either dialect, as RopeSpecs.

Old: `rope_theta` beside a `rope_scaling` with `type` or `rope_type`. New: one `rope_parameters`, for Gemma 3 one a layer type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nbengine.errors import UnsupportedModelError
from nbengine.models.rope import RopeSpec

Config = Mapping[str, Any]

_KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")


def one_rope(config: Config) -> tuple[RopeSpec, ...]:
    """One rotation for all layers."""
    return (_rope({**_outer(config), **_clean(config.get("rope_scaling") or config.get("rope_parameters"))}, config),)


def full_and_local_ropes(config: Config) -> tuple[RopeSpec, ...]:
    """Gemma 3: one for the layers that see everything (`rope_scaling` is theirs), another for the sliding ones."""
    nested = config.get("rope_parameters") or {}
    full = {"rope_theta": config.get("rope_theta_full", 1e6), **_clean(nested.get("full_attention")), **_clean(config.get("rope_scaling"))}
    local = {"rope_theta": config.get("rope_local_base_freq") or 1e4, **_clean(nested.get("sliding_attention"))}
    return (_rope(full, config), _rope(local, config))


def _outer(config: Config) -> dict[str, Any]:
    """What may stand beside the parameters instead of among them."""
    return {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if config.get(key) is not None}


def _clean(parameters: Config | None) -> dict[str, Any]:
    return {key: value for key, value in (parameters or {}).items() if value is not None}


def _rope(parameters: Config, config: Config) -> RopeSpec:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if config.get("model_type") == "phi3" and kind in {"su", "yarn"}:  # LongRoPE's first names
        kind = "longrope"
    if kind not in _KINDS:
        raise UnsupportedModelError(f"no rotary scaling {kind!r} in nbengine's decoder; it has {', '.join(_KINDS)}")
    original = _original_max(kind, parameters, config)
    factor = parameters.get("factor") or config["max_position_embeddings"] / original
    return RopeSpec(
        rotary_dim=int(config["head_dim"] * parameters.get("partial_rotary_factor", 1.0)),
        theta=float(parameters["rope_theta"]),
        kind=kind,
        factor=float(factor),
        attention_factor=_attention_factor(kind, parameters, float(factor), original),
        original_max=original,
        low_freq_factor=parameters.get("low_freq_factor", 1.0),
        high_freq_factor=parameters.get("high_freq_factor", 4.0),
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        truncate=parameters.get("truncate", True),
        short_factor=tuple(parameters.get("short_factor", ())),
        long_factor=tuple(parameters.get("long_factor", ())),
    )


def _original_max(kind: str, parameters: Config, config: Config) -> int:
    """Beside the parameters (Phi-3) before among them, the whole context where neither says; dynamic knows only the whole."""
    whole = config["max_position_embeddings"]
    if kind == "dynamic":
        return whole
    return config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings") or whole


def _attention_factor(kind: str, parameters: Config, factor: float, original: int) -> float:
    if kind not in {"yarn", "longrope"}:
        return 1.0
    if "attention_factor" in parameters:
        return float(parameters["attention_factor"])
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    scale, scale_all = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)
