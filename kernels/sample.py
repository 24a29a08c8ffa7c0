"""Drawing one token a row: Gumbel-max with noise that a row's own seed and position decide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from nbengine.kernels._triton import chained, follow, jit, next_power_of_2

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it

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

    logits [rows, vocab] floating, read as float32 and not changed; temperature, top_p, min_p [rows] floating; top_k, seeds, positions [rows] integer.
    A row is scaled by its temperature, keeps the tokens at least min_p times as likely as its best, of all tokens the top_k best
    (all that tie with the last of them), then the fewest of the best that hold top_p of the mass left (of those that tie at the
    edge, higher ids first), and draws from these. Off: top_k 0, top_p 1, min_p 0; a temperature below 1e-5 takes the best.

    The draw is argmax(logits / temperature + noise) over the tokens kept, so a row's token depends on its own arguments alone:
    no matter which rows stand beside it, and which way through this file they made it take. See `gumbel_noise`.
    """
    logits, greedy = logits.float(), temperature < GREEDY_BELOW
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


# ── the kernels ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_GROUP = 128  # logits of a row that are passed over together if their largest is too small
_GROUPS = 32  # groups that are looked at together


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """As sample_reference, without a sort and without the host's knowing anything of the rows' parameters.

    A first kernel draws from every row as if nothing were cut, and notes of each 128 logits the largest. A second has a program
    for each row. If the row is cut and the draw is not among the tokens kept, it draws again among those in front of it: what is
    drawn among more and lies among fewer has the distribution that these have by themselves. Logits whose group's largest is too
    small are never read again.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    drawn = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows:
        groups, parts = -(-vocab // _GROUP), -(-vocab // (_GROUP * _GROUPS))
        largest = torch.empty((rows, groups), dtype=torch.float32, device=logits.device)
        listed = torch.empty((rows, groups), dtype=torch.int32, device=logits.device)
        notes = torch.empty((3, rows, parts), dtype=torch.float32, device=logits.device)  # largest, weight, best with its noise
        ids = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)  # of that best
        draw_kernel[(rows, parts)](
            logits, temperature, seeds, positions, largest, notes, ids, logits.stride(0), vocab, groups,
            greedy_below=GREEDY_BELOW, group=_GROUP, tile=_GROUPS, num_warps=8, **chained(logits.device),
        )  # fmt: skip
        sample_kernel[(rows,)](
            logits, temperature, top_k, top_p, min_p, seeds, positions, largest, listed, notes, ids, drawn, logits.stride(0), vocab, groups,
            parts, greedy_below=GREEDY_BELOW, group=_GROUP, tile=_GROUPS, block=next_power_of_2(groups), parts_block=next_power_of_2(parts),
            num_warps=16, **chained(logits.device),
        )  # fmt: skip
    return drawn


@jit(do_not_specialize=("groups",))
def draw_kernel(
    p_logits: tl.tensor,
    p_temperature: tl.tensor,
    p_seeds: tl.tensor,
    p_positions: tl.tensor,
    p_largest: tl.tensor,
    p_notes: tl.tensor,
    p_ids: tl.tensor,
    stride: int,
    vocab: int,
    groups: int,
    greedy_below: tl.constexpr,
    group: tl.constexpr,
    tile: tl.constexpr,
    following: tl.constexpr = False,
) -> None:
    follow(following)
    i_row, i_part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_group = i_part * tile + tl.arange(0, tile)
    o = o_group[:, None] * group + tl.arange(0, group)[None, :]
    x = tl.load(p_logits + i_row * stride + o, mask=o < vocab, other=float("-inf")).to(tl.float32)
    broken = tl.max((~(x < float("inf"))).to(tl.int32)) > 0  # NaN too
    temperature = tl.load(p_temperature + i_row).to(tl.float32)
    noisy = temperature >= greedy_below
    if noisy & (temperature != 1):
        x = tl.div_rn(x, tl.zeros_like(x) + temperature)
    of_groups = tl.max(x, axis=1)
    tl.store(p_largest + i_row * groups + o_group, of_groups, mask=o_group < groups)
    largest = tl.max(of_groups)
    weights = tl.exp(x - tl.where(largest == float("-inf"), 0.0, largest))
    if noisy:
        key, mix = _key(p_seeds, p_positions, i_row)
        found = _luck(weights, o, key, mix)
    else:
        found = x
    best = tl.max(found)
    place = tl.min(tl.where(found == best, o, 0x7FFFFFFF))
    if noisy:
        best = largest + tl.log(best)
    p_note = p_notes + i_row * tl.num_programs(1) + i_part
    size = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    tl.store(p_note, tl.where(broken, float("inf"), largest))
    tl.store(p_note + size, tl.sum(weights))
    tl.store(p_note + size * 2, best)
    tl.store(p_ids + i_row * tl.num_programs(1) + i_part, place)


@jit(do_not_specialize=("groups", "parts"))
def sample_kernel(
    p_logits: tl.tensor,
    p_temperature: tl.tensor,
    p_top_k: tl.tensor,
    p_top_p: tl.tensor,
    p_min_p: tl.tensor,
    p_seeds: tl.tensor,
    p_positions: tl.tensor,
    p_largest: tl.tensor,
    p_listed: tl.tensor,
    p_notes: tl.tensor,
    p_ids: tl.tensor,
    p_drawn: tl.tensor,
    stride: int,
    vocab: int,
    groups: int,
    parts: int,
    greedy_below: tl.constexpr,
    group: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    parts_block: tl.constexpr,
    following: tl.constexpr = False,
) -> None:
    follow(following)
    i_row = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, parts_block)
    size = tl.num_programs(0).to(tl.int64) * parts
    largest = tl.load(p_notes + i_row * parts + o, mask=o < parts, other=float("-inf"))
    noisy = tl.load(p_notes + size * 2 + i_row * parts + o, mask=o < parts, other=float("-inf"))
    place = tl.argmax(noisy, axis=0)
    token = tl.load(p_ids + i_row * parts + place)
    top = tl.max(largest, axis=0)
    if (top == float("inf")) | (top == float("-inf")):
        tl.store(p_drawn + i_row, tl.full([], -1, tl.int64))
        return
    temperature = tl.load(p_temperature + i_row).to(tl.float32)
    top_k = tl.load(p_top_k + i_row)
    top_p = tl.load(p_top_p + i_row).to(tl.float64)
    min_p = tl.load(p_min_p + i_row).to(tl.float64)
    counted = (top_k > 0) & (top_k < vocab)
    if (temperature < greedy_below) | ((top_p >= 1) & (min_p <= 0) & (counted == 0)):
        tl.store(p_drawn + i_row, token.to(tl.int64))
        return
    p_row = p_logits + i_row * stride
    p_largest += i_row * groups
    p_listed += i_row * groups
    least = min_p.to(tl.float32)  # the smallest weight kept: min_p rounded up
    least = tl.where(least.to(tl.float64) < min_p, (least.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True), least)
    floor = tl.full([], -3.4028234663852886e38, tl.float32)  # no logit kept is smaller
    if min_p > 0:
        floor = top + tl.log(least) - 0.001  # groups to pass over; which tokens are kept, their weights say
    if counted:
        k = top_k.to(tl.int32)
        low = _kth(p_largest, p_listed, groups, k, 2 * k + 8, floor, top, temperature, vocab, False, group, tile, block)  # of the groups
        count = _list(p_largest, p_listed, low, groups, block)
        floor = tl.maximum(floor, _kth(p_row, p_listed, count, k, k, low, top, temperature, vocab, True, group, tile, block))
    key, mix = _key(p_seeds, p_positions, i_row)
    value = tl.full([], float("-inf"), tl.float32)  # of the token drawn; -inf: none yet, and all tokens kept are in front of it
    limit = tl.full([], float("inf"), tl.float64)  # mass in front of a token at which it is out
    count = _list(p_largest, p_listed, floor, groups, block)
    if (min_p <= 0) & (counted == 0):  # the first draw was from the right tokens
        weights = tl.load(p_notes + size + i_row * parts + o, mask=o < parts, other=0.0)
        limit = top_p * tl.sum(weights.to(tl.float64) * tl.exp(largest - top).to(tl.float64))
        value = tl.div_rn(tl.load(p_row + token).to(tl.float32), temperature)
    elif top_p < 1:
        limit = top_p * _mass_in_front(p_row, p_listed, count, value, token, floor, least, top, temperature, vocab, group, tile)
    searching = True
    while searching:
        outside = value == float("-inf")
        if (top_p < 1) & (outside == 0):
            count = _list(p_largest, p_listed, tl.maximum(value, floor), groups, block)
            outside = _mass_in_front(p_row, p_listed, count, value, token, floor, least, top, temperature, vocab, group, tile) >= limit
        if outside:
            token = _drawn_in_front(p_row, p_listed, count, value, token, floor, least, top, temperature, key, mix, vocab, group, tile)
            value = tl.div_rn(tl.load(p_row + token).to(tl.float32), temperature)
        searching = outside & (top_p < 1)
    tl.store(p_drawn + i_row, token.to(tl.int64))


@jit()
def _list(p_largest: tl.tensor, p_listed: tl.tensor, low: tl.tensor, groups: int, block: tl.constexpr) -> tl.tensor:
    """Write down the groups that have a logit as large as low; how many there are."""
    o = tl.arange(0, block)
    m = tl.load(p_largest + o, mask=o < groups, other=float("-inf")) >= low
    place = tl.cumsum(m.to(tl.int32), axis=0)
    tl.debug_barrier()  # the list before may still be read
    tl.store(p_listed + place - 1, o, mask=m)
    tl.debug_barrier()
    return tl.max(place, axis=0)


@jit()
def _mass_in_front(
    p_row: tl.tensor,
    p_listed: tl.tensor,
    count: tl.tensor,
    value: tl.tensor,
    token: tl.tensor,
    floor: tl.tensor,
    least: tl.tensor,
    top: tl.tensor,
    temperature: tl.tensor,
    vocab: int,
    group: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """What the tokens kept in front of one weigh, as multiples of the best token's weight."""
    mass = tl.zeros([tile, group], tl.float32)
    for start in range(0, count, tile):
        weights, _ = _in_front(p_row, p_listed, start, count, value, token, floor, least, top, temperature, vocab, group, tile)
        mass += weights
    return tl.sum(mass.to(tl.float64))


@jit()
def _drawn_in_front(
    p_row: tl.tensor,
    p_listed: tl.tensor,
    count: tl.tensor,
    value: tl.tensor,
    token: tl.tensor,
    floor: tl.tensor,
    least: tl.tensor,
    top: tl.tensor,
    temperature: tl.tensor,
    key: tl.tensor,
    mix: tl.tensor,
    vocab: int,
    group: tl.constexpr,
    tile: tl.constexpr,
) -> tl.tensor:
    """A token drawn among those kept in front of one."""
    best = tl.zeros([tile, group], tl.float32)
    best_id = tl.zeros([tile, group], tl.int32)
    for start in range(0, count, tile):
        weights, o_id = _in_front(p_row, p_listed, start, count, value, token, floor, least, top, temperature, vocab, group, tile)
        luck = _luck(weights, o_id, key, mix)
        best_id = tl.where(luck > best, o_id, best_id)
        best = tl.maximum(luck, best)
    return tl.min(tl.where(best == tl.max(best), best_id, 0x7FFFFFFF))


@jit()
def _in_front(
    p_row: tl.tensor,
    p_listed: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    value: tl.tensor,
    token: tl.tensor,
    floor: tl.tensor,
    least: tl.tensor,
    top: tl.tensor,
    temperature: tl.tensor,
    vocab: int,
    group: tl.constexpr,
    tile: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Weights and ids of some listed groups' tokens; 0 for those that are not kept, or not in front of the token."""
    x, o_id = _scaled(p_row, p_listed, start, count, temperature, vocab, group, tile)
    weights = tl.exp(x - top)
    front = ((x > value) | ((x == value) & (o_id > token))) & (x >= floor) & (weights >= least)
    return tl.where(front, weights, 0.0), o_id


@jit()
def _scaled(
    p_row: tl.tensor,
    p_listed: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    temperature: tl.tensor,
    vocab: int,
    group: tl.constexpr,
    tile: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Logits over temperature, and ids, of some listed groups."""
    o = start + tl.arange(0, tile)
    o_id = tl.load(p_listed + o, mask=o < count, other=0)[:, None] * group + tl.arange(0, group)[None, :]
    x = tl.load(p_row + o_id, mask=(o < count)[:, None] & (o_id < vocab), other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, tl.zeros_like(x) + temperature), o_id


@jit()
def _kth(
    p_values: tl.tensor,
    p_listed: tl.tensor,
    count: tl.tensor,
    k: tl.tensor,
    most: tl.tensor,
    floor: tl.tensor,
    top: tl.tensor,
    temperature: tl.tensor,
    vocab: int,
    listed: tl.constexpr,
    group: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """A value that at least k and at most `most` others reach, if there is one, else the k-th largest or, with too few, the floor.

    Of the logits in listed groups, or of all groups' largest. Two bounds close in, eight counts at a time; floats are in the
    order of their keys.
    """
    low_key, high_key = _order(floor).to(tl.int64), _order(top).to(tl.int64) + 1
    kept = tl.full([], 0x7FFFFFFF, tl.int32)  # values at least as large as low, once they are counted
    o_pivot = tl.arange(0, 8)
    while (kept > most) & (high_key - low_key > 1):
        low, high = _value(low_key), _value(high_key)
        # half of the pivots divide the values evenly, which is quick; the others the keys, which ends
        by_value = _order(high - tl.minimum(high - low, 32.0) * ((o_pivot + 1) / 5.0)).to(tl.int64)
        by_key = low_key + (high_key - low_key) * (o_pivot - 3) // 5
        pivot_keys = tl.where(o_pivot < 4, by_value, by_key)
        pivot_keys = tl.minimum(tl.maximum(pivot_keys, low_key + 1), high_key - 1)
        pivots = _value(pivot_keys)
        if listed:
            counts = tl.zeros([8], tl.int32)
            for start in range(0, count, tile // 4):
                x, _ = _scaled(p_values, p_listed, start, count, temperature, vocab, group, tile // 4)
                x = tl.reshape(x, [1, tile // 4 * group])
                counts += tl.sum((x >= pivots[:, None]).to(tl.int32), axis=1)
        else:
            o = tl.arange(0, block)
            x = tl.load(p_values + o, mask=o < count, other=float("-inf"))
            counts = tl.sum((x[None, :] >= pivots[:, None]).to(tl.int32), axis=1)
        enough = counts >= k
        kept = tl.minimum(kept, tl.min(tl.where(enough, counts, 0x7FFFFFFF)))
        low_key = tl.maximum(low_key, tl.max(tl.where(enough, pivot_keys, low_key)))
        high_key = tl.minimum(high_key, tl.min(tl.where(enough, high_key, pivot_keys)))
    return _value(low_key)


@jit()
def _order(x: tl.tensor) -> tl.tensor:
    """Keys that are in order as the floats are; a key is its own inverse but for the type."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit()
def _value(key: tl.tensor) -> tl.tensor:
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit()
def _key(p_seeds: tl.tensor, p_positions: tl.tensor, i_row: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Of `gumbel_noise`: the low and the high half of a row's key."""
    seed = tl.load(p_seeds + i_row).to(tl.int64).to(tl.uint64, bitcast=True)
    position = tl.load(p_positions + i_row).to(tl.int64).to(tl.uint64, bitcast=True)
    key = _mixed64(_mixed64(seed) + 0x9E3779B97F4A7C15 * (position + 1))
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@jit()
def _luck(weights: tl.tensor, o_id: tl.tensor, key: tl.tensor, mix: tl.tensor) -> tl.tensor:
    """exp(logit + gumbel_noise), but for a factor: weight / -log1p(-v). The largest is the draw, and one logarithm is enough."""
    h = _mixed32(_mixed32(o_id.to(tl.uint32) ^ key) + mix)
    v = tl.minimum(((h >> 1).to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.9999999403953552)
    u = 1 - v
    # log1p(-v) = log(u) * v / (1 - u), exact where v is small too
    return weights * tl.where(u == 1, 1.0, 1 - u) / (v * tl.where(u == 1, 1.0, -tl.log(u)))


@jit()
def _mixed64(z: tl.tensor) -> tl.tensor:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@jit()
def _mixed32(h: tl.tensor) -> tl.tensor:
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


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
