"""Falcon's attention, which transformers computes in place, with that part handed to the paged one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from nbengine.models.transformers_attention import PAGED, PROBE, paged_attention

if TYPE_CHECKING:
    import torch


class PagedFalconAttention(FalconAttention):
    """The stock module, its weights and its rotation; under our implementations' names the attention is ours."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.config._attn_implementation not in {PAGED, PROBE}:  # noqa: SLF001 - where transformers itself looks
            return super().forward(hidden_states, *args, **kwargs)
        query, key, value = self._split_heads(self.query_key_value(hidden_states))  # [1, tokens, heads, head_dim]
        if self.new_decoder_architecture:  # every key head was repeated for its query heads
            group = key.shape[2] // (self.num_kv_heads or key.shape[2])
            key, value = key[:, :, ::group], value[:, :, ::group]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *kwargs["position_embeddings"])
        attended, _ = paged_attention(self, query, key, value, kwargs["attention_mask"], scaling=self.inv_norm_factor)
        return self.dense(attended.flatten(2)), None


def adapt(model: torch.nn.Module) -> None:
    """Turn every attention module of a Falcon into the class above, its weights under their old names."""
    for module in model.modules():
        if isinstance(module, FalconAttention):
            module.__class__ = PagedFalconAttention
