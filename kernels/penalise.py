"""Repetition, frequency and presence penalties, from counts that stay on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from nbengine.kernels._triton import chained, follow, jit

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it

IN_PROMPT = 1 << 30  # added to a token's count where the prompt has it
_TILE = 2048


def penalise_reference(logits: torch.Tensor, counts: torch.Tensor, slots: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Edit logits [rows, vocab] float32 in place, and return them; row i by counts[slots[i]] and rates[slots[i]], or not at all where
    slots[i] is -1.

    counts [slots, vocab] int32: how often the output has each token, IN_PROMPT added where the prompt has it. rates [slots, 3]:
    repetition divides positive and multiplies negative logits of tokens that were there; frequency is subtracted for each time
    that the output has a token, presence once if it does.
    """
    where = (slots >= 0).nonzero()[:, 0]
    row, (repetition, frequency, presence) = counts[slots[where]], rates[slots[where]].float()[:, :, None].unbind(1)
    output = row & (IN_PROMPT - 1)
    values = logits[where]
    values = torch.where(row > 0, torch.where(values > 0, values / repetition, values * repetition), values)
    logits[where] = values - frequency * output - presence * (output > 0)
    return logits


def penalise(logits: torch.Tensor, counts: torch.Tensor, slots: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """As penalise_reference."""
    rows, vocab = logits.shape
    assert logits.stride(1) == counts.stride(1) == slots.stride(0) == 1
    assert rates.is_contiguous()
    if rows:
        penalise_kernel[(rows, -(-vocab // _TILE))](
            logits, counts, slots, rates, logits.stride(0), counts.stride(0), vocab, prompt=IN_PROMPT, tile=_TILE, **chained(logits.device)
        )
    return logits


@jit()
def penalise_kernel(
    p_logits: tl.tensor,
    p_counts: tl.tensor,
    p_slots: tl.tensor,
    p_rates: tl.tensor,
    stride: int,
    counts_stride: int,
    vocab: int,
    prompt: tl.constexpr,
    tile: tl.constexpr,
    following: tl.constexpr = False,
) -> None:
    follow(following)
    i_row = tl.program_id(0).to(tl.int64)
    slot = tl.load(p_slots + i_row)
    if slot < 0:
        return
    o = tl.program_id(1) * tile + tl.arange(0, tile)
    m = o < vocab
    count = tl.load(p_counts + slot * counts_stride + o, mask=m, other=0)
    repetition = tl.load(p_rates + slot * 3).to(tl.float32)
    frequency, presence = tl.load(p_rates + slot * 3 + 1).to(tl.float32), tl.load(p_rates + slot * 3 + 2).to(tl.float32)
    x = tl.load(p_logits + i_row * stride + o, mask=m)
    x = tl.where(count > 0, tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + repetition), x * repetition), x)
    output = (count & (prompt - 1)).to(tl.float32)
    x = x - frequency * output - tl.where(output > 0, presence, 0.0)
    tl.store(p_logits + i_row * stride + o, x, mask=m)


def example_inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]]:
    """Arguments to try, each with those of its tensors that the op writes to."""
    del dtype  # logits are float32 whatever the model computes in
    device = generator.device
    for rows, vocab, slots in ((1, 64, 1), (5, 1000, 3), (63, 2049, 9)):
        logits = torch.randn(rows, vocab, generator=generator, device=device) * 4
        counts = torch.randint(-8, 4, (slots, vocab), generator=generator, device=device).clamp_(min=0).int()
        counts += IN_PROMPT * (torch.rand(slots, vocab, generator=generator, device=device) < 0.1).int()
        which = torch.randint(-1, slots, (rows,), generator=generator, device=device)
        rates = torch.rand(slots, 3, generator=generator, device=device) * 2 + 0.1
        yield (logits, counts, which, rates), (logits,)
