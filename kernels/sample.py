"""Drawing one token a row: Gumbel-max with noise that a row's own seed and position decide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

GREEDY_BELOW = 1e-5  # a temperature under this takes the most likely token
_CANDIDATES = 128  # best tokens looked at first; a row that keeps more than these takes the wide way
_BLOCK = 1 << 19  # logits worked on together on a CPU: what its caches hold


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Draw a token for each row of logits; -1 for a row with a NaN or +inf in it, or with nothing above -inf.

    logits [rows, vocab] float32, not changed; temperature, top_p, min_p [rows] floating; top_k, seeds, positions [rows] integer.
    A row is scaled by its temperature, keeps the tokens at least min_p times as likely as its best, of all tokens the top_k best
    (all that tie with the last of them), then the fewest of the best that hold top_p of the mass left (of those that tie at the
    edge, higher ids first), and draws from these. Off: top_k 0, top_p 1, min_p 0; a temperature below 1e-5 takes the best.

    The draw is argmax(logits / temperature + noise) over the tokens kept, so a row's token depends on its own arguments alone:
    no matter which rows stand beside it, and which way through this file they made it take. See `gumbel_noise`.
    """
    greedy = temperature < GREEDY_BELOW
    if logits.device.type == "cpu" and bool(greedy.all()):
        drawn, ids = logits.max(-1)  # the common case of a single request, with little around it
        return ids.masked_fill_(~drawn.isfinite(), -1)
    cut = ((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1) | (min_p > 0)
    ids = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    for where, way in ((greedy, _best), (~greedy & ~cut, _draw), (~greedy & cut, _draw_cut)):
        if where.any():
            arguments = _rows(where, logits, temperature, top_k, top_p, min_p, seeds, positions)
            block = max(1, _BLOCK // logits.shape[1]) if way is not _best and logits.device.type == "cpu" else len(ids)
            ids[where] = torch.cat([way(*piece) for piece in zip(*(t.split(block) for t in arguments), strict=True)])
    drawn = logits.gather(1, ids[:, None])[:, 0]
    return ids.masked_fill_(~drawn.isfinite(), -1)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Gumbel noise [rows, n], float32, for tokens [n] or [rows, n], int32; seeds and positions [rows], int64.

    All integers are unsigned and wrap; >> shifts zeros in. A kernel gets h and v to the bit, the logarithms to an ulp or two.

        mix64(z):  z ^= z >> 30; z *= 0xBF58476D1CE4E5B9; z ^= z >> 27; z *= 0x94D049BB133111EB; z ^= z >> 31
        mix32(h):  h ^= h >> 16; h *= 0x85EBCA6B; h ^= h >> 13; h *= 0xC2B2AE35; h ^= h >> 16
        key = mix64(mix64(seed) + 0x9E3779B97F4A7C15 * (position + 1))             64 bits, once a row
        h = mix32(mix32(token ^ low32(key)) + high32(key))                         32 bits, once a token
        v = min((float32(h >> 1) + 0.5) * 2**-31, 1 - 2**-24)                      in (0, 1), finest near 0
        noise = -log(-log1p(-v))                                                   that is -log(-log(u)) with u = 1 - v

    The fine end of v makes the large noise, so that even tokens of probability 1e-9 come as often as they should.
    """
    key = _mix64(_mix64(seeds.long()) + -0x61C8864680B583EB * (positions.long() + 1))[:, None]
    h = tokens ^ key.int()  # int() keeps the low 32 bits
    spare = torch.empty_like(h)
    _mix32(h, spare).add_((key >> 32).int())
    v = _mix32(h, spare).bitwise_right_shift_(1).bitwise_and_(0x7FFFFFFF).float()
    v.add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return v.neg_().log1p_().neg_().log_().neg_()


def _mix64(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ ((z >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & (2**33 - 1))


def _mix32(h: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """In place; torch shifts signed integers arithmetically, so the bits shifted in are masked away."""
    h.bitwise_xor_(torch.bitwise_right_shift(h, 16, out=spare).bitwise_and_(0xFFFF)).mul_(-0x7A143595)
    h.bitwise_xor_(torch.bitwise_right_shift(h, 13, out=spare).bitwise_and_(0x7FFFF)).mul_(-0x3D4D51CB)
    return h.bitwise_xor_(torch.bitwise_right_shift(h, 16, out=spare).bitwise_and_(0xFFFF))


def _best(logits: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def _draw(logits: torch.Tensor, temperature: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
    return _perturbed(logits / temperature[:, None], *arguments[-2:]).argmax(-1)


def _perturbed(scaled: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    tokens = torch.arange(scaled.shape[1], dtype=torch.int32, device=scaled.device)
    return gumbel_noise(seeds, positions, tokens).add_(scaled)


def _draw_cut(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Look at the best few tokens only; the rows that keep more than these go the wide way."""
    vocab = logits.shape[1]
    scaled = logits / temperature[:, None]
    values, ids = _in_order(*scaled.topk(min(_CANDIDATES, vocab)))
    best = values[:, :1]
    weights = (values - best).exp_()  # [rows, candidates], of a mass that is not normalised
    last = (top_k.long() - 1).clamp(0, values.shape[1] - 1)[:, None]
    keep = (weights >= min_p[:, None]) & ((top_k == 0)[:, None] | (values >= values.gather(1, last)))
    closed = ~keep[:, -1]  # what min_p and top_k keep lies within the candidates
    mass = _mass(weights * keep)
    whole = ~closed & (top_k == 0) & (min_p == 0)  # they keep everything: then top_p may still end within
    if whole.any():
        mass[whole] = _mass(torch.sub(*_rows(whole, scaled, best)).exp_())
    before = (weights * keep).double().cumsum(-1) - weights  # mass of the tokens in front of each
    keep &= before < _share(top_p, mass)[:, None]
    keep[:, 0] = True
    closed |= whole & (values.gather(1, keep.sum(-1, keepdim=True) - 1)[:, 0] > values[:, -1])
    if values.shape[1] == vocab:
        closed[:] = True
    noise = gumbel_noise(seeds, positions, ids.int())
    drawn = ids.gather(1, noise.add_(values).masked_fill_(~keep, -torch.inf).argmax(-1, keepdim=True))[:, 0]
    if not closed.all():
        wide = ~closed
        drawn[wide] = _draw_wide(*_rows(wide, scaled, top_k, top_p, min_p, seeds, positions))
    return drawn


def _draw_wide(
    scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Draw first, ask later: a drawn token with top_p of the mass in front of it is out, and so is all behind it; draw again.

    What is drawn among a larger set and lies in the smaller one has the smaller one's distribution. Every refusal cuts the
    mass that is out by half on average, so a few passes over the vocabulary do what a sort would.
    """
    best = scaled.amax(-1, keepdim=True)
    weights = (scaled - best).exp_()
    perturbed = _perturbed(scaled, seeds, positions)
    if (top_k > 0).any() or (min_p > 0).any():
        out = weights < min_p[:, None]
        for k in top_k[top_k > 0].unique().tolist():
            rows = top_k == k
            out[rows] |= scaled[rows] < scaled[rows].topk(min(k, scaled.shape[1])).values[:, -1:]
        weights.masked_fill_(out, 0)
        perturbed.masked_fill_(out, -torch.inf)
    limit = _share(top_p, _mass(weights))
    ids = torch.arange(scaled.shape[1], device=scaled.device)
    drawn = perturbed.argmax(-1)
    asked = torch.arange(scaled.shape[0], device=scaled.device)  # rows whose draw is not yet accepted
    while len(asked):
        token = drawn[asked, None]
        value = scaled.gather(1, token)
        front = (scaled > value) | ((scaled == value) & (ids > token))
        refused = _mass(weights * front) >= limit
        asked, front, scaled, weights, perturbed, limit = _rows(refused, asked, front, scaled, weights, perturbed, limit)
        drawn[asked] = perturbed.masked_fill_(~front, -torch.inf).argmax(-1)
    return drawn


def _mass(weights: torch.Tensor) -> torch.Tensor:
    """Sums over the vocabulary, [rows] float64, by 64s first: fast, and the same to the bit whichever rows stand beside one."""
    even = weights.shape[1] // 64 * 64
    return weights[:, :even].unflatten(1, (-1, 64)).sum(-1).double().sum(-1) + weights[:, even:].double().sum(-1)


def _rows(where: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(tensors) if where.all() else [t[where] for t in tensors]


def _share(top_p: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The mass in front of a token at which it is out."""
    return torch.where(top_p < 1, top_p.double() * mass, torch.inf)


def _in_order(values: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best first, equals by descending id."""
    ids, order = ids.sort(-1, descending=True)
    values, order = torch.sort(values.gather(1, order), dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def example_inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]]:
    """Arguments to try, each with those of its tensors that the op writes to; logits are float32 whatever the model's dtype."""
    del dtype
    device = generator.device
    for rows, vocab in ((1, 131), (40, 1000), (7, 4096)):
        logits = torch.randn(rows, vocab, generator=generator, device=device) * 4
        temperature = torch.rand(rows, generator=generator, device=device).sub_(0.2).clamp_(min=0)  # a fifth of the rows is greedy
        top_k = torch.randint(0, 40, (rows,), generator=generator, device=device)
        top_p = torch.rand(rows, generator=generator, device=device).mul_(2).clamp_(0.1, 1)
        min_p = torch.rand(rows, generator=generator, device=device).sub_(0.5).clamp_(min=0)
        seeds, positions = torch.randint(0, 1 << 40, (2, rows), generator=generator, device=device)
        yield (logits, temperature, top_k, top_p, min_p, seeds, positions), ()
