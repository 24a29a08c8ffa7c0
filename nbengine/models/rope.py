"""Rotary embeddings: inverse frequencies of every scaling that real checkpoints use, and the angles of a step's tokens.

Two kinds depend on a sequence's length. LongRoPE swaps its factors once a sequence outgrows the original context; dynamic
NTK raises its base with every further token. With a KV cache a key keeps the rotation that it was stored with, so each
token is given a length of its own: max(anchor of its sequence, position + 1). The anchor is

    LongRoPE     the tokens known when the sequence was (last) given a row: one set of factors for all that is then computed.
                 A sequence that grows past `boundary` must be computed again from its first token (as a preemption does),
                 which is what transformers' generate does with Phi-3.
    dynamic NTK  the prompt's length: the prompt is rotated as one piece, each later token with the base of its own length,
                 which is what transformers' generate does; computing it again after a preemption gives the same keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """One rotary embedding. Fields that a kind does not use keep their defaults."""

    rotary_dim: int  # the first rotary_dim of a head's numbers turn, the rest pass
    theta: float = 10000.0
    kind: str = "default"  # default, linear, dynamic, llama3, yarn, longrope
    factor: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin
    original_max: int = 0  # the context before scaling
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    @property
    def boundary(self) -> int | None:
        """Sequences longer than this turn otherwise than shorter ones; None where length changes nothing."""
        return self.original_max if self.kind in {"dynamic", "longrope"} else None

    def anchor(self, prompt_len: int, known_len: int) -> int:
        """What a sequence's token lengths start from, given its prompt's and its known tokens when it gets a row."""
        return {"dynamic": prompt_len, "longrope": known_len}.get(self.kind, 0)

    def regime(self, anchor: int) -> int:
        """Equal for two sequences exactly if equal tokens give equal keys: seeds the hash of their blocks."""
        if self.boundary is None or anchor <= self.boundary:
            return 0
        return 1 if self.kind == "longrope" else anchor


def inverse_frequencies(rope: RopeSpec, length: int | None = None) -> Tensor:
    """Radians a position turns each pair by, float32 [rotary_dim / 2], for a sequence of this length."""
    dim = rope.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    plain = 1.0 / rope.theta**exponents
    match rope.kind:
        case "linear":
            return plain / rope.factor
        case "dynamic":
            stretch = rope.factor * max(length or 0, rope.original_max) / rope.original_max - (rope.factor - 1)
            return 1.0 / (rope.theta * stretch ** (dim / (dim - 2))) ** exponents
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            keep = 1 - _yarn_ramp(rope)
            return plain / rope.factor * (1 - keep) + plain * keep
        case "longrope":
            factors = rope.long_factor if length is not None and length > rope.original_max else rope.short_factor
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponents)
    return plain


def _llama3(rope: RopeSpec, plain: Tensor) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended."""
    turns = rope.original_max * plain / (2 * math.pi)  # within the original context
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return plain * keep + plain / rope.factor * (1 - keep)


def _yarn_ramp(rope: RopeSpec) -> Tensor:
    """0 for pairs that turn often within the original context (kept), 1 for those that hardly turn (stretched)."""
    dim = rope.rotary_dim

    def pair_turning(times: float) -> float:
        return dim * math.log(rope.original_max / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)


class Rope:
    """Angles on demand: no table to size, and lengths may differ from token to token."""

    def __init__(self, spec: RopeSpec, max_model_len: int, device: torch.device) -> None:
        self.spec = spec
        self.by_length = spec.boundary is not None and max_model_len > spec.boundary
        self._short = inverse_frequencies(spec).to(device)  # [rotary_dim / 2]
        if self.by_length and spec.kind == "longrope":
            self._long = inverse_frequencies(spec, spec.original_max + 1).to(device)
        self._exponents = (torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim).to(device)

    def cos_sin(self, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Float32 [tokens, 1, rotary_dim] each: cos twice over, and -sin beside sin.

        x turns into x * cos + swapped(x) * sin, where swapped exchanges the two halves of the rotary part.
        """
        frequencies = self._short if lengths is None or not self.by_length else self._frequencies(lengths)
        angles = positions.float()[:, None, None] * frequencies  # [tokens, 1, rotary_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        if self.spec.attention_factor != 1.0:
            cos, sin = cos.mul_(self.spec.attention_factor), sin.mul_(self.spec.attention_factor)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _frequencies(self, lengths: Tensor) -> Tensor:
        spec, lengths = self.spec, lengths[:, None, None]  # [tokens, 1, 1]
        if spec.kind == "longrope":
            return torch.where(lengths > spec.original_max, self._long, self._short)
        stretch = spec.factor * lengths.clamp(min=spec.original_max).float() / spec.original_max - (spec.factor - 1)
        base = spec.theta * stretch ** (spec.rotary_dim / (spec.rotary_dim - 2))
        return 1.0 / base**self._exponents
