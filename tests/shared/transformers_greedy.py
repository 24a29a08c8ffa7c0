"""What transformers' generate takes greedily."""

from __future__ import annotations

from typing import Any

import torch


def greedily(model: Any, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
    """Tokens, and the log-probabilities [new_tokens, vocab] that they were taken from."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).float().log_softmax(-1)
