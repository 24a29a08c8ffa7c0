"""The forward pass of every family with a spec: plain functions over tensors, one op after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from nbengine.errors import CheckpointError, nearest
from nbengine.kernels.linear import laid_out
from nbengine.models.rope import Rope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from nbengine.models.spec import DecoderSpec, WeightSpec
    from nbengine.ops import Ops
    from nbengine.step_inputs import LayerCache, StepInputs


class Decoder:
    """A decoder-only transformer over a paged cache.

    `weights` holds every weight under the name that `spec.weights()` gives it. Only max_model_len decides whether a rotation
    that changes beyond the original context is ever needed.
    """

    def __init__(self, spec: DecoderSpec, weights: dict[str, Tensor], ops: Ops, max_model_len: int) -> None:
        self.spec = spec
        self.weights = weights
        self.ops = ops
        for weight in spec.weights():
            assert weight.name in weights, f"the loader brought no {weight.name}"
            assert weights[weight.name].shape == weight.shape, f"{weight.name}: {weights[weight.name].shape} is not {weight.shape}"
        embed = weights["embed"]
        self.ropes = [Rope(rope, max_model_len, embed.device) for rope in spec.ropes]
        self._embed_scale = float(torch.tensor(spec.embed_scale, dtype=embed.dtype))  # rounded as transformers rounds it
        self.lay_out()
        # the norm after a layer's MLP is the next layer's first, so that it can add the residual
        self._next_norms = [f"layers.{index}.input_norm" for index in range(1, len(spec.layers))] + ["norm"]

    def lay_out(self, *, plain: bool = False) -> None:
        """Keep the weights that only products read as the op in use reads them fastest; any op but the reference gets plain ones."""
        plain = plain or self.ops.in_use()["linear"] != "reference"
        for name, weight in self.weights.items():
            if name != "embed" and weight.dim() == 2:
                self.weights[name] = weight if plain != weight.is_mkldnn else weight.to_dense() if plain else laid_out(weight)

    def forward(self, inputs: StepInputs, caches: list[LayerCache]) -> Tensor:
        """The last hidden states [tokens, hidden], after the final norm; keys and values are stored on the way."""
        spec, ops, weights = self.spec, self.ops, self.weights
        eps, offset = spec.norm_eps, spec.norm_offset
        turns = [rope.cos_sin(inputs.positions, self._lengths(inputs, rope)) for rope in self.ropes]
        residual = F.embedding(inputs.tokens, weights["embed"])  # [tokens, hidden]
        if spec.embed_scale != 1.0:
            residual *= self._embed_scale
        x = ops.rms_norm(residual, weights["layers.0.input_norm"], eps, offset)
        for index, (layer, cache, next_norm) in enumerate(zip(spec.layers, caches, self._next_norms, strict=True)):
            name = f"layers.{index}."
            cos, sin = turns[layer.rope]
            qkv = ops.linear(x, weights[name + "qkv"], weights.get(name + "qkv_bias"))
            q_norm, k_norm = weights.get(name + "q_norm"), weights.get(name + "k_norm")
            q = ops.rope_store(qkv, cache, inputs, cos, sin, q_norm, k_norm, eps, offset)
            x = ops.paged_attention(q, cache, inputs, spec.attention_scale, layer.window, spec.attention_softcap)
            x = ops.linear(x, weights[name + "o"], weights.get(name + "o_bias"))
            if spec.post_norms:
                x = ops.rms_norm(x, weights[name + "post_attention_norm"], eps, offset)
            x = ops.rms_norm(x, weights[name + "mlp_norm"], eps, offset, residual)
            x = ops.gated(ops.linear(x, weights[name + "gate_up"], weights.get(name + "gate_up_bias")), spec.activation)
            x = ops.linear(x, weights[name + "down"], weights.get(name + "down_bias"))
            if spec.post_norms:
                x = ops.rms_norm(x, weights[name + "post_mlp_norm"], eps, offset)
            x = ops.rms_norm(x, weights[next_norm], eps, offset, residual)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, vocab] from hidden states [n, hidden], in their dtype; float32 where a softcap bends them."""
        logits: Tensor = self.ops.linear(hidden, self.weights["embed" if self.spec.tied_head else "lm_head"])
        if cap := self.spec.final_softcap:
            logits = logits.float().div_(cap).tanh_().mul_(cap)
        return logits

    def move(self, device: torch.device) -> None:
        """Bring the weights to another device: to pinned main memory, from where they come back fast, or to the GPU. All of them, or none."""
        moved = {}
        for name, weight in self.weights.items():
            if weight.device == device:
                continue
            pinned = device.type == "cpu" and weight.is_cuda
            moved[name] = torch.empty(weight.shape, dtype=weight.dtype, device=device, pin_memory=pinned).copy_(weight, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self.weights.update(moved)

    def _lengths(self, inputs: StepInputs, rope: Rope) -> Tensor | None:
        """The length that each token's rotation goes by; where the runner gives none, its row's context."""
        if not rope.by_length or inputs.lengths is not None:
            return inputs.lengths
        counts = (inputs.query_starts[1:] - inputs.query_starts[:-1]).long()
        return inputs.context_lens.long().repeat_interleave(counts, output_size=len(inputs.tokens))

    @torch.no_grad()
    def update_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy new values into some weights, named as in the checkpoint or as in the spec. All names and shapes are checked first."""
        self.lay_out(plain=True)
        try:
            self._update(weights)
        finally:
            self.lay_out()

    def _update(self, weights: Mapping[str, Tensor]) -> None:
        places = dict(self._places())
        for name, value in weights.items():
            if name not in places:
                raise CheckpointError(f"the model has no weight {name!r}{nearest(name, places)}; names are those of the checkpoint")
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                raise CheckpointError(
                    f"the new value of {name} must be a tensor of a floating dtype, not {getattr(value, 'dtype', type(value))}"
                )
            if places[name].shape != value.shape:
                raise CheckpointError(f"{name} has the shape {list(places[name].shape)}; the new value's is {list(value.shape)}")
        for name, value in weights.items():
            places[name].copy_(value)

    def _places(self) -> Iterator[tuple[str, Tensor]]:
        for weight in self.spec.weights():
            whole = self.weights[weight.name]
            yield weight.name, whole
            yield from zip(weight.sources, whole.split(_source_rows(weight)), strict=True)


def _source_rows(weight: WeightSpec) -> list[int]:
    """Rows along dim 0 that each of a weight's sources fills."""
    return list(weight.parts) if len(weight.sources) > 1 else [weight.shape[0]]
