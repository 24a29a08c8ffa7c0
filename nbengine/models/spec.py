"""What one decoder is made of: everything the forward pass, the loader and the cache need to know of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from nbengine.step_inputs import CacheSpec

if TYPE_CHECKING:
    from nbengine.models.rope import RopeSpec


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One of the decoder's weights: the checkpoint's tensors `sources`, laid end to end along dim 0.

    `shard_axis` is the axis that tensor parallelism would cut, each of the `parts` (their rows along dim 0) by itself.
    """

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    shard_axis: int | None = None
    parts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    window: int | None = None  # a query at position p sees the keys (p - window, p]
    rope: int = 0  # index into DecoderSpec.ropes


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder-only transformer with grouped-query attention, rotary positions, RMS norms and a gated MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    max_position_embeddings: int
    attention_scale: float
    dtype: str | None = None  # as the checkpoint declares it: "bfloat16"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to every norm's weight (Gemma keeps them centred on zero)
    activation: str = "silu"  # silu, gelu, gelu_tanh
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # an RMS norm of each query and key head before it turns
    post_norms: bool = False  # norms after attention and after the MLP, before they join the residual
    embed_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    tied_head: bool = False
    merged_checkpoint: bool = False  # the checkpoint itself holds qkv_proj and gate_up_proj

    def cache_layers(self) -> list[CacheSpec]:
        return [CacheSpec(self.kv_heads, self.head_dim, layer.window) for layer in self.layers]

    def weights(self) -> list[WeightSpec]:
        """Every weight of the decoder, in the order of the forward pass."""
        hidden, vocab = self.hidden_size, self.vocab_size
        found = [WeightSpec("embed", ("model.embed_tokens.weight",), (vocab, hidden), 0)]
        for index in range(len(self.layers)):
            found += self._layer_weights(index)
        found.append(WeightSpec("norm", ("model.norm.weight",), (hidden,)))
        if not self.tied_head:
            found.append(WeightSpec("lm_head", ("lm_head.weight",), (vocab, hidden), 0))
        return found

    def _layer_weights(self, index: int) -> list[WeightSpec]:
        hidden, inter, queries, keys = self.hidden_size, self.intermediate_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        qkv: tuple[str, ...] = ("qkv_proj",)
        gate_up: tuple[str, ...] = ("gate_up_proj",)
        if not self.merged_checkpoint:
            qkv, gate_up = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
        found = []

        def norm(name: str, source: str, width: int = hidden) -> None:
            found.append(WeightSpec(f"layers.{index}.{name}", (f"model.layers.{index}.{source}.weight",), (width,)))

        def dense(name: str, module: str, sources: tuple[str, ...], parts: tuple[int, ...], width: int, axis: int, bias: bool) -> None:
            paths, rows = [f"model.layers.{index}.{module}.{source}" for source in sources], sum(parts)
            found.append(WeightSpec(f"layers.{index}.{name}", tuple(f"{p}.weight" for p in paths), (rows, width), axis, parts))
            if bias:
                cut = 0 if axis == 0 else None  # a product cut along its inputs adds its bias once
                found.append(WeightSpec(f"layers.{index}.{name}_bias", tuple(f"{p}.bias" for p in paths), (rows,), cut, parts))

        norm("input_norm", "input_layernorm")
        dense("qkv", "self_attn", qkv, (queries, keys, keys), hidden, 0, self.qkv_bias)
        if self.qk_norm:
            norm("q_norm", "self_attn.q_norm", self.head_dim)
            norm("k_norm", "self_attn.k_norm", self.head_dim)
        dense("o", "self_attn", ("o_proj",), (hidden,), queries, 1, self.o_bias)
        if self.post_norms:
            norm("post_attention_norm", "post_attention_layernorm")
        norm("mlp_norm", "pre_feedforward_layernorm" if self.post_norms else "post_attention_layernorm")
        dense("gate_up", "mlp", gate_up, (inter, inter), hidden, 0, self.mlp_bias)
        dense("down", "mlp", ("down_proj",), (hidden,), inter, 1, self.mlp_bias)
        if self.post_norms:
            norm("post_mlp_norm", "post_feedforward_layernorm")
        return found

    def parameter_count(self) -> int:
        return sum(prod(weight.shape) for weight in self.weights())

    @property
    def rope_boundary(self) -> int | None:
        """A sequence that grows past this many tokens must be computed again from its first (LongRoPE); None: never."""
        return next((rope.boundary for rope in self.ropes if rope.kind == "longrope"), None)

    def rope_anchor(self, prompt_len: int, known_len: int) -> int:
        """What the rotation of a sequence's tokens hangs on, fixed when it is given a row (models/rope.py); 0: nothing."""
        return max(rope.anchor(prompt_len, known_len) for rope in self.ropes)

    def rope_regime(self, anchor: int) -> int:
        """Part of the seed of a block's hash: two sequences may share cached keys only if this is equal for both."""
        return max(rope.regime(anchor) for rope in self.ropes)
