"""Attention of a step's queries over keys and values that lie in pages of the cache.

Rows with one query (decoding) are taken together in groups of like length; every other row goes by itself, its queries in
tiles. What depends on the step alone (which slots to read, the masks) is worked out once and kept in `inputs.scratch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from nbengine.step_inputs import LayerCache, StepInputs

_GROUP_SLOTS = 1 << 16  # most cache slots that one group of decoding rows gathers
_TILE = 256  # most queries a masked tile holds
_TILE_SCORES = 1 << 23  # and most queries * keys


def paged_attention_reference(
    q: torch.Tensor, cache: LayerCache, inputs: StepInputs, scale: float, window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    """Attend with q [tokens, heads, head_dim] -> [tokens, heads * head_dim]; a query at position p sees its row's positions (p - window, p].

    Each query head uses the key and value head `head * kv_heads // heads`. With a softcap the scaled scores s become
    softcap * tanh(s / softcap). Slots outside the rows' contexts are never read: they may hold anything, NaN included.
    """
    key = ("paged_attention", window, softcap is not None)
    pieces = inputs.scratch.get(key)
    if pieces is None:
        pieces = inputs.scratch[key] = _pieces(inputs, q.dtype, window, softcap is not None)
    tokens, heads, head_dim = q.shape
    kv_heads = cache.keys.shape[2]
    keys, values = cache.keys.view(-1, kv_heads, head_dim), cache.values.view(-1, kv_heads, head_dim)
    if len(pieces) == 1 and pieces[0].tokens is None:
        return pieces[0].attend(q, keys, values, scale, softcap).reshape(tokens, heads * head_dim)
    out = torch.empty(tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    for piece in pieces:
        out[piece.tokens] = piece.attend(q[piece.tokens], keys, values, scale, softcap)
    return out.view(tokens, heads * head_dim)


@dataclass(slots=True)
class _Slots:
    """Where a piece's keys lie: one run of slots, which needs no copy, or an index of them."""

    rows: int
    length: int  # slots of each row, padding included
    first: int | None  # of a run
    index: torch.Tensor | None  # [rows * length]

    def read(self, flat: torch.Tensor) -> torch.Tensor:
        """From [slots, kv_heads, head_dim] to [rows, kv_heads, length, head_dim]."""
        if self.index is not None:
            found = flat.index_select(0, self.index)
        else:
            assert self.first is not None
            found = flat[self.first : self.first + self.length]
        return found.view(self.rows, self.length, *flat.shape[1:]).transpose(1, 2)


@dataclass(slots=True)
class _Decodes:
    """Rows with one query each."""

    tokens: torch.Tensor | None  # [rows]; None: the rows are the whole step, in order
    slots: _Slots
    mask: torch.Tensor | None  # [rows, 1, 1, length]

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
        rows, heads, head_dim = q.shape
        # the query heads of one key head stand where its queries would: no key is copied for them
        q = q.reshape(rows, keys.shape[1], -1, head_dim)
        out = _attend(q, self.slots.read(keys), self.slots.read(values), self.mask, scale, softcap)
        return out.reshape(rows, heads, head_dim)


@dataclass(slots=True)
class _Chunk:
    """One row with many queries, its slots starting at the first key that any of them sees."""

    tokens: slice | None  # None: the row is the whole step
    slots: _Slots
    tiles: list[tuple[slice, slice, torch.Tensor | None]]  # queries, their keys within slots, mask or None for plainly causal

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
        count, heads, head_dim = q.shape
        kv_heads = keys.shape[1]
        out = torch.empty(count, kv_heads, heads // kv_heads, head_dim, dtype=q.dtype, device=q.device)
        q = q.reshape(out.shape)
        k, v = self.slots.read(keys), self.slots.read(values)  # [1, kv_heads, length, head_dim]
        for queries, seen, mask in self.tiles:
            # the query heads of one key head stand where rows would: [group, kv_heads, tile, head_dim]
            tile = q[queries].permute(2, 1, 0, 3)
            k_seen, v_seen = (t[:, :, seen].expand(tile.shape[0], -1, -1, -1) for t in (k, v))
            out[queries] = _attend(tile, k_seen, v_seen, mask, scale, softcap, causal=mask is None).permute(2, 1, 0, 3)
        return out.view(count, heads, head_dim)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    *,
    causal: bool = False,
) -> torch.Tensor:
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(scale / softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores += mask
    return torch.matmul(scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype), v)


# ── the plan of a step ──────────────────────────────────────────────────────────────────────────────────────────────────


def _pieces(inputs: StepInputs, dtype: torch.dtype, window: int | None, capped: bool) -> list[_Decodes | _Chunk]:
    tables = inputs.scratch.setdefault("block_tables", inputs.block_tables.cpu().long())  # [rows, blocks]
    device = inputs.tokens.device
    counts, contexts = inputs.query_lens_host, inputs.context_lens_host
    ends = torch.tensor(counts).cumsum(0).tolist()
    decodes = [row for row, count in enumerate(counts) if count == 1]
    pieces: list[_Decodes | _Chunk] = []
    for group in _groups(decodes, contexts, window):
        lasts = torch.tensor([contexts[row] for row in group])
        firsts = (lasts - window).clamp(min=0) if window else torch.zeros_like(lasts)
        slots = _slots(tables[group], firsts, lasts, inputs.block_size, device)
        tokens = None if group == list(range(len(counts))) else torch.tensor([ends[row] - 1 for row in group], device=device)
        pieces.append(_Decodes(tokens, slots, _length_mask(lasts - firsts, slots.length, dtype, device)))
    chunks = [row for row, count in enumerate(counts) if count > 1]
    band = _band([(counts[row], contexts[row]) for row in chunks], window, capped, dtype, device)
    for row in chunks:
        count, last = counts[row], contexts[row]
        first = max(0, last - count + 1 - window) if window else 0
        slots = _slots(tables[row : row + 1], torch.tensor([first]), torch.tensor([last]), inputs.block_size, device)
        own = None if len(counts) == 1 else slice(ends[row] - count, ends[row])
        plain = _plainly_causal(count, last, window, capped)
        pieces.append(_Chunk(own, slots, _tiles(count, last - first, window, None if plain else band)))
    return pieces


def _groups(rows: list[int], contexts: list[int], window: int | None) -> list[list[int]]:
    """Rows of like length together, so that padding at most doubles the slots read, in pieces that fit a memory bound."""
    seen = {row: min(contexts[row], window) if window else contexts[row] for row in rows}
    if not rows or len(rows) * max(seen.values()) <= min(2 * sum(seen.values()), _GROUP_SLOTS):
        return [rows] if rows else []
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(rows, key=seen.__getitem__, reverse=True):
        if not groups or seen[row] * 2 < longest or (len(groups[-1]) + 1) * longest > _GROUP_SLOTS:
            groups.append([])
            longest = seen[row]
        groups[-1].append(row)
    return [sorted(group) for group in groups]


def _slots(tables: torch.Tensor, firsts: torch.Tensor, lasts: torch.Tensor, block_size: int, device: torch.device) -> _Slots:
    """Slots of positions [first, last) of every row; shorter rows repeat their last slot, whose content is known to be sound."""
    rows, length = len(tables), int((lasts - firsts).max())
    if rows == 1:
        first, last = int(firsts[0]), int(lasts[0])
        blocks = tables[0, first // block_size : -(-last // block_size)]
        if bool((blocks[1:] - blocks[:-1] == 1).all()):
            return _Slots(1, length, int(blocks[0]) * block_size + first % block_size, None)
    positions = torch.minimum(firsts[:, None] + torch.arange(length), lasts[:, None] - 1)  # [rows, length]
    index = tables.gather(1, positions // block_size) * block_size + positions % block_size
    return _Slots(rows, length, None, index.view(-1).to(device))


def _length_mask(lengths: torch.Tensor, longest: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    if bool((lengths == longest).all()):
        return None
    mask = torch.zeros(len(lengths), 1, 1, longest, dtype=dtype)
    return mask.masked_fill_(torch.arange(longest) >= lengths[:, None, None, None], float("-inf")).to(device)


def _plainly_causal(count: int, context: int, window: int | None, capped: bool) -> bool:
    return count == context and not capped and (window is None or context <= window)


def _band(chunks: list[tuple[int, int]], window: int | None, capped: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """One mask whose lower right corners serve every tile: what a query sees depends only on how far back a key lies."""
    masked = [(count, context) for count, context in chunks if not _plainly_causal(count, context, window, capped)]
    if not masked:
        return None
    tile = min(_TILE, max(count for count, _ in masked))
    width = max(context for _, context in masked)
    if window:
        width = min(width, tile + window)
    tile = max(1, min(tile, _TILE_SCORES // width))
    back = torch.arange(width - tile, width, device=device)[:, None] - torch.arange(width, device=device)  # [tile, width]
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    return torch.zeros(tile, width, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


def _tiles(count: int, length: int, window: int | None, band: torch.Tensor | None) -> list[tuple[slice, slice, torch.Tensor | None]]:
    """Tiles of a row's `count` queries over its `length` keys, the last of which is the last query's own."""
    if band is None:
        return [(slice(0, count), slice(0, length), None)]
    tiles: list[tuple[slice, slice, torch.Tensor | None]] = []
    for start in range(0, count, band.shape[0]):
        stop = min(start + band.shape[0], count)
        last = length - count + stop
        first = max(0, length - count + start + 1 - window) if window else 0
        tiles.append((slice(start, stop), slice(first, last), band[band.shape[0] - (stop - start) :, band.shape[1] - (last - first) :]))
    return tiles


def example_inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]]:
    """Arguments to try, each with those of its tensors that the op writes to."""
    device = generator.device
    for rows, heads, kv_heads, head_dim, block_size, window, softcap in (
        ([(1, 200)], 9, 3, 64, 16, None, None),  # (queries, context) of every row
        ([(1, 1), (1, 63), (1, 64), (1, 1000)], 8, 2, 64, 16, None, None),
        ([(63, 63), (1, 40), (17, 300)], 4, 4, 32, 16, None, None),
        ([(1, 129), (70, 70), (5, 90)], 4, 2, 128, 256, 48, 20.0),
        ([(1, 5), (9, 9)], 6, 3, 64, 1, 4, None),
    ):
        inputs = _example_step(rows, block_size, generator)
        shape = (2, int(inputs.block_tables.max()) + 3, block_size, kv_heads, head_dim)
        cache = LayerCache(*torch.randn(shape, generator=generator, device=device, dtype=dtype))
        q = torch.randn(sum(count for count, _ in rows), heads, head_dim, generator=generator, device=device, dtype=dtype) * 2
        yield (q, cache, inputs, head_dim**-0.5, window, softcap), ()


def _example_step(rows: list[tuple[int, int]], block_size: int, generator: torch.Generator) -> StepInputs:
    """A step whose rows lie in shuffled blocks of a cache."""
    device = generator.device
    needed = [-(-context // block_size) for _, context in rows]
    blocks = torch.randperm(sum(needed) + 2, generator=generator, device=device).int()
    tables = torch.zeros(len(rows), max(needed), dtype=torch.int32, device=device)
    positions, slots = [], []
    for row, ((count, context), own) in enumerate(zip(rows, blocks[: sum(needed)].split(needed), strict=True)):
        tables[row, : len(own)] = own
        positions.append(torch.arange(context - count, context, device=device))
        slots.append(own.long()[positions[-1] // block_size] * block_size + positions[-1] % block_size)
    counts, contexts = [count for count, _ in rows], [context for _, context in rows]
    return StepInputs(
        tokens=torch.zeros(sum(counts), dtype=torch.int64, device=device),
        positions=torch.cat(positions),
        slots=torch.cat(slots),
        block_tables=tables,
        query_starts=torch.tensor([0, *counts], device=device).cumsum(0).int(),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_size=block_size,
        query_lens_host=counts,
        context_lens_host=contexts,
    )
