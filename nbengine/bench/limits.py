"""What the hardware allows: output tokens a second that no engine of this design exceeds, step by step.

In each step every weight is read once, or the matrix products take their operations' time where that is longer; then attention
reads every key and value of the sequences that run; all requests run from the first step on. Prompts cost their operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbengine.bench.workloads import Lengths


@dataclass(frozen=True, slots=True)
class Card:
    """What a card does at best: bytes a second, counted as read and as written by a large copy, and bf16 matrix operations a second."""

    bandwidth: float
    rate: float


H200 = Card(4.3e12, 790e12)  # measured on the card that the recorded figures come from


@dataclass(frozen=True, slots=True)
class Work:
    """What a token costs in a model, from its config."""

    body: int  # weights of all layers
    head: int
    token_bytes: int  # of keys and values, in 16 bits

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Work:
        hidden, layers, kv_heads = config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
        queries = config["num_attention_heads"] * head_dim
        layer = hidden * (queries + 2 * kv_heads * head_dim) + queries * hidden + 3 * hidden * config["intermediate_size"]
        return cls(layers * layer, hidden * config["vocab_size"], 2 * 2 * layers * kv_heads * head_dim)

    @property
    def weight_bytes(self) -> int:
        """Bytes read in each step, in 16 bits; a tied embedding is read once, by the head."""
        return 2 * (self.body + self.head)


def limit(config: Mapping[str, Any], lengths: Lengths, card: Card = H200) -> float:
    """Output tokens a second."""
    work, (prompts, outputs) = Work.of(config), np.array(lengths).T
    seconds = 2 * work.body * prompts.sum() / card.rate
    for step in range(outputs.max()):
        live = prompts[outputs > step] + step
        products = max(work.weight_bytes / card.bandwidth, 2 * (work.body + work.head) * len(live) / card.rate)
        seconds += products + work.token_bytes * live.sum() / card.bandwidth
    return float(outputs.sum() / seconds)
