"""The tensors of one step, as every model and attention op sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class StepInputs:
    """One step's tokens laid end to end; row i owns the tokens [query_starts[i], query_starts[i + 1]).

    Its cached context, once the step's own keys and values are stored, is positions [0, context_lens[i]); position p lives
    in block block_tables[i, p // block_size] at offset p % block_size. The last token of row i is at context_lens[i] - 1.
    """

    tokens: torch.Tensor  # [tokens] int64
    positions: torch.Tensor  # [tokens] int64
    slots: torch.Tensor  # [tokens] int64, block * block_size + offset: where each token's key and value go
    block_tables: torch.Tensor  # [rows, blocks] int32, entries past a row's context are arbitrary but valid blocks
    query_starts: torch.Tensor  # [rows + 1] int32
    context_lens: torch.Tensor  # [rows] int32
    block_size: int
    query_lens_host: list[int]  # [rows] the same lengths where Python can read them without waiting for a device
    context_lens_host: list[int]  # [rows]
    lengths: torch.Tensor | None = None  # [tokens] int64, the length that a token's rotation goes by (models/rope.py); None: nowhere
    scratch: dict[Any, Any] = field(default_factory=dict)  # what an op works out once and uses in every layer


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What one layer keeps of every token. Layers of one group share a block table."""

    kv_heads: int
    head_dim: int
    window: int | None = None  # sliding window: a query at position p sees positions (p - window, p]
    group: int = 0


@dataclass(slots=True)
class LayerCache:
    """One layer's keys and values: [blocks, block_size, kv_heads, head_dim] each."""

    keys: torch.Tensor
    values: torch.Tensor
