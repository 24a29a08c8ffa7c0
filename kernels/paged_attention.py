"""Attention of a step's queries over keys and values that lie in pages of the cache.

In the reference, rows with one query (decoding) are taken together in groups of like length; every other row goes by itself, its
queries in tiles. What depends on the step alone (which slots to read, the masks) is worked out once and kept in `inputs.scratch`.

The kernels take two kinds of programs. A decoding row's keys are cut into chunks, one program each for all the query heads of a
key head, and the program that ends last merges the row's chunks. The queries of every other row are cut into blocks. Which
chunks and blocks there are, a small kernel works out once a step, on the device and within bounds that the shapes alone give: so
a captured graph stays right whatever the lengths are when it is replayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from nbengine.kernels._triton import chained, check_product, follow, jit, multiprocessors, next_power_of_2, shared_memory
from nbengine.step_inputs import LayerCache, StepInputs

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it

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


# ── the kernels ─────────────────────────────────────────────────────────────────────────────────────────────────────────

_PROGRAMS = 5  # decoding programs that a multiprocessor runs together
_LEAST_CHUNK = 64  # keys
_OVERHEAD = 64  # what it takes to begin a chunk and to merge it, in keys
# Decoding rows, up to so many, beside which the next launch starts. What more of them leave free of the card its programs would fill unevenly.
_FOLLOWED_ROWS = 16
PLANNED_ROWS = (16, 256, 1024)  # that the planning program has room for, and the next power of two: each size is compiled for itself
_LOG2_E = 1.4426950408889634


@dataclass(slots=True)
class _Plan:
    """What the programs of a step read. Layers whose rows and heads are cut alike share it."""

    work: torch.Tensor  # int32: the number of chunks and of blocks, then chunks [chunks, 8], then blocks [blocks, 2]
    chunks: int  # most that there can be
    blocks: int
    parts: torch.Tensor  # [chunks, heads, head_dim] float32, what rows of several chunks wait to be merged from
    sums: torch.Tensor  # [chunks, heads] float32, log2 of the weights' sum
    arrived: torch.Tensor  # [rows, kv_heads] int32, chunks that are there; 0 between launches


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How a card's kernels are cut for a head size and dtype."""

    chunk_keys: int  # keys that a decoding program takes at a time
    chunk_stages: int
    block_queries: int  # queries * query heads of a key head
    block_keys: int
    block_stages: int
    block_warps: int


def paged_attention(
    q: torch.Tensor, cache: LayerCache, inputs: StepInputs, scale: float, window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    """As paged_attention_reference. It asks the host for no length, so that a captured graph stays right whatever they are."""
    return _attend_in_pages(q, cache, inputs, scale, window, softcap, chunked=True)


def paged_attention_invariant(
    q: torch.Tensor, cache: LayerCache, inputs: StepInputs, scale: float, window: int | None = None, softcap: float | None = None
) -> torch.Tensor:
    """As paged_attention_reference, a query's result the same to the bit whatever else the step holds: no row's keys are cut into
    chunks, and a query is computed in one way whether it comes alone, as in decoding, or with others of its prompt.
    """
    return _attend_in_pages(q, cache, inputs, scale, window, softcap, chunked=False)


def _attend_in_pages(
    q: torch.Tensor, cache: LayerCache, inputs: StepInputs, scale: float, window: int | None, softcap: float | None, *, chunked: bool
) -> torch.Tensor:
    tokens, heads, head_dim = q.shape
    block_size, kv_heads = cache.keys.shape[1:3]
    assert q.stride(2) == 1
    assert q.stride(1) == head_dim
    assert scale > 0
    assert inputs.block_tables.stride(1) == 1
    assert cache.keys.is_contiguous() and cache.values.is_contiguous()  # noqa: PT018
    check_product(q)
    group = heads // kv_heads
    tiles = _cut(head_dim, q.element_size(), shared_memory(q.device))
    block_queries = max(tiles.block_queries // group, 1)
    key = ("paged_attention_plan", window, heads, kv_heads, head_dim, chunked)
    plan: _Plan | None = inputs.scratch.get(key)
    if plan is None:
        plan = inputs.scratch[key] = _make_plan(
            inputs, window, heads, kv_heads, head_dim, tiles.chunk_keys, block_queries, q.device, chunked=chunked
        )
    out = torch.empty((tokens, heads * head_dim), dtype=q.dtype, device=q.device)
    tables = inputs.block_tables, inputs.block_tables.stride(0), q.stride(0)
    scales = (scale * _LOG2_E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2_E)
    sizes = {
        "group": group, "kv_heads": kv_heads, "head_dim": head_dim, "block_size": block_size, "far": cache.keys.numel() >= 2**31,
        "capped": softcap is not None, "windowed": window is not None, "block_dim": max(next_power_of_2(head_dim), 16),
    }  # fmt: skip
    if plan.chunks:
        decode_attention_kernel[(plan.chunks * kv_heads,)](
            q, cache.keys, cache.values, out, plan.parts, plan.sums, plan.arrived, plan.work, *tables, *scales, **sizes,
            block_group=max(next_power_of_2(group), 16), merge_group=next_power_of_2(group), tile=tiles.chunk_keys,
            followed=len(inputs.context_lens) <= _FOLLOWED_ROWS, num_warps=4, num_stages=tiles.chunk_stages, **chained(q.device),
        )  # fmt: skip
    if plan.blocks:
        prefill_attention_kernel[(plan.blocks * kv_heads,)](
            q, cache.keys, cache.values, out, plan.work, inputs.query_starts, inputs.context_lens, *tables, *scales, window or 0, plan.chunks,
            **sizes, queries=block_queries, rows=max(next_power_of_2(block_queries * group), 16), tile=tiles.block_keys,
            num_warps=tiles.block_warps, num_stages=tiles.block_stages, **chained(q.device),
        )  # fmt: skip
    return out


def _cut(head_dim: int, element_size: int, memory: int) -> _Tiles:
    """By head size, dtype and the shared memory that a program may have (64 KiB on a T4, 99 to 227 on later cards)."""
    wide = max(next_power_of_2(head_dim), 16)
    # not on the matrix units: float32, which is to be exact, and a T4; the numbers must then fit the registers
    if element_size == 4 or memory < 90 << 10:
        side = 16 if wide * element_size > 256 else 32
        return _Tiles(side, 1, side, side, 1, 8 if side == 32 and wide > 64 else 4)
    if memory < 200 << 10:
        return _Tiles(32 if wide > 128 else 64, 2, 64 if wide > 128 else 128, 32, 2, 8 if wide > 64 else 4)
    keys, stages, warps = (64, 2, 8) if wide > 128 else (64, 3, 4) if wide > 64 else (128, 2, 4)
    return _Tiles(32 if wide > 128 else 64, 2, 128, keys, stages, warps)


def _make_plan(
    inputs: StepInputs,
    window: int | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    tile: int,
    block_queries: int,
    device: torch.device,
    *,
    chunked: bool,
) -> _Plan:
    rows, tokens = len(inputs.context_lens), len(inputs.tokens)
    places = max(_PROGRAMS * multiprocessors(device) // kv_heads, 1)
    chunks = max(rows, places // 2) + places if chunked else 0
    blocks = 0 if chunked and tokens == rows else tokens // block_queries + rows
    plan = _Plan(
        work=torch.empty(2 + 8 * chunks + 2 * blocks, dtype=torch.int32, device=device),
        chunks=chunks,
        blocks=blocks,
        parts=torch.empty((chunks, heads, head_dim), dtype=torch.float32, device=device),
        sums=torch.empty((chunks, heads), dtype=torch.float32, device=device),
        arrived=torch.empty((rows, kv_heads), dtype=torch.int32, device=device),
    )
    plan_attention_kernel[(1,)](
        inputs.query_starts, inputs.context_lens, plan.work, plan.arrived, rows, rows * kv_heads, chunks, places, window or 0, block_queries,
        decodes=chunks > 0, prefills=blocks > 0, fewest=2 if chunked else 1, least=_LEAST_CHUNK, overhead=_OVERHEAD, tile=tile,
        block=(block := _plan_block(rows)), num_warps=min(max(block // 64, 4), 16), **chained(device),
    )  # fmt: skip
    return plan


def _plan_block(rows: int) -> int:
    """How many rows the planning program has room for."""
    return next(size for size in (*PLANNED_ROWS, next_power_of_2(rows)) if size >= rows)


@jit(do_not_specialize=("rows", "counters", "chunks", "places", "window", "queries"))
def plan_attention_kernel(
    p_starts: tl.tensor,
    p_contexts: tl.tensor,
    p_work: tl.tensor,
    p_arrived: tl.tensor,
    rows: int,
    counters: int,
    chunks: int,
    places: int,
    window: int,
    queries: int,
    decodes: tl.constexpr,
    prefills: tl.constexpr,
    fewest: tl.constexpr,
    least: tl.constexpr,
    overhead: tl.constexpr,
    tile: tl.constexpr,
    block: tl.constexpr,
    following: tl.constexpr = False,
) -> None:
    """One program. Decoding rows are cut into chunks of at most one size: of 16 sizes the one that should take least time, where
    as many chunks run together as a key head has places, and each takes its keys and a few more to begin and to be merged.
    """
    follow(following)
    o = tl.arange(0, block)
    m = o < rows
    token = tl.load(p_starts + o, mask=m, other=0)
    count = tl.load(p_starts + o + 1, mask=m, other=0) - token
    last = tl.load(p_contexts + o, mask=m, other=0)
    if decodes:
        first = tl.maximum(last - window, 0) // tile * tile if window > 0 else last * 0
        length = tl.where(count == 1, last - first, 0)
        longest = tl.max(length)
        fitting = tl.maximum(places * longest // tl.maximum(tl.sum(length), 1), 1)  # pieces of the longest row, if all are to run together
        o_try = tl.arange(0, 16)
        tried = tl.where(o_try < 8, o_try + 1, tl.where(o_try < 12, fitting * (o_try - 4) // 8, fitting * (o_try - 11)))
        tried = tl.minimum(tl.maximum(tried, 1), tl.maximum(longest // least, 1))
        sizes = tl.maximum(tl.cdiv(tl.cdiv(longest, tried), tile) * tile, tile)
        needed = tl.sum(tl.cdiv(length[None, :], sizes[:, None]), axis=1)
        cost = tl.cdiv(needed, places) * (sizes + overhead)
        cost = tl.where(needed <= chunks, cost, 0x7FFFFFFF)
        size = tl.min(tl.where(cost == tl.min(cost), sizes, 0x7FFFFFFF))
        pieces = tl.cdiv(length, size)
        size = tl.cdiv(tl.cdiv(length, tl.maximum(pieces, 1)), tile) * tile  # a row's own are of like size
        pieces = tl.cdiv(length, tl.maximum(size, 1))
        index = tl.cumsum(pieces) - pieces
        tl.store(p_work, tl.sum(pieces))
        for i in range(tl.max(pieces)):
            p_chunk = p_work + 2 + 8 * (index + i)
            m_chunk = i < pieces
            tl.store(p_chunk, o, mask=m_chunk)
            tl.store(p_chunk + 1, first + i * size, mask=m_chunk)
            tl.store(p_chunk + 2, tl.minimum(first + (i + 1) * size, last), mask=m_chunk)
            tl.store(p_chunk + 3, tl.where(pieces > 1, i, -1), mask=m_chunk)
            tl.store(p_chunk + 4, pieces, mask=m_chunk)
            tl.store(p_chunk + 5, token, mask=m_chunk)
            tl.store(p_chunk + 6, last - window, mask=m_chunk)
        for i in range(0, counters, block):
            tl.store(p_arrived + i + o, o * 0, mask=i + o < counters)
    if prefills:
        pieces = tl.where(count >= fewest, tl.cdiv(count, queries), 0)  # of rows that are not cut into chunks
        total = tl.sum(pieces)
        index = total - tl.cumsum(pieces)  # a row's last block sees the most keys: it comes first
        tl.store(p_work + 1, total)
        for i in range(tl.max(pieces)):
            p_block = p_work + 2 + 8 * chunks + 2 * (index + i)
            tl.store(p_block, o, mask=i < pieces)
            tl.store(p_block + 1, pieces - 1 - i, mask=i < pieces)


@jit(do_not_specialize=("table_stride", "scale", "cap"))
def decode_attention_kernel(
    p_q: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_out: tl.tensor,
    p_parts: tl.tensor,
    p_sums: tl.tensor,
    p_arrived: tl.tensor,
    p_work: tl.tensor,
    p_tables: tl.tensor,
    table_stride: int,
    q_stride: int,
    scale: float,
    cap: float,
    group: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    far: tl.constexpr,
    capped: tl.constexpr,
    windowed: tl.constexpr,
    block_dim: tl.constexpr,
    block_group: tl.constexpr,
    merge_group: tl.constexpr,
    tile: tl.constexpr,
    followed: tl.constexpr = True,
    following: tl.constexpr = False,
) -> None:
    """The query heads of one key head over one chunk of a row's keys."""
    follow(following, followed)
    i_chunk, i_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    if i_chunk >= tl.load(p_work):
        return
    p_chunk = p_work + 2 + 8 * i_chunk
    i_row, first, last = tl.load(p_chunk), tl.load(p_chunk + 1), tl.load(p_chunk + 2)
    piece, pieces = tl.load(p_chunk + 3), tl.load(p_chunk + 4)
    i_token = tl.load(p_chunk + 5).to(tl.int64)
    unseen = tl.load(p_chunk + 6) if windowed else 0  # positions before this one
    o_group = tl.arange(0, block_group)[:, None]
    o_dim = tl.arange(0, block_dim)[None, :]
    m_out = (o_group < group) & (o_dim < head_dim)
    o_out = (i_head * group + o_group) * head_dim + o_dim
    q = tl.load(p_q + i_token * q_stride + o_out, mask=m_out, other=0.0)
    p_table = p_tables + i_row.to(tl.int64) * table_stride
    out = tl.zeros([block_group, block_dim], tl.float32)
    best = tl.full([block_group], float("-inf"), tl.float32)
    total = tl.zeros([block_group], tl.float32)
    for start in range(first, last, tile):
        o_key = start + tl.arange(0, tile)
        m_key = (o_key < last) & (o_key >= unseen)
        o_kv = _places(p_table, o_key, m_key, i_head, kv_heads, head_dim, block_size, far)[:, None] + o_dim
        m_kv = m_key[:, None] & (o_dim < head_dim)
        k = tl.load(p_keys + o_kv, mask=m_kv, other=0.0)
        scores = _scores(q, k, scale, cap, capped)
        scores = tl.where(m_key[None, :], scores, float("-inf"))
        v = tl.load(p_values + o_kv, mask=m_kv, other=0.0)
        unit = 1.0 if capped else scale  # multiplied and subtracted in one instruction
        higher = tl.maximum(best, tl.max(scores, axis=1) * unit)
        weights = tl.exp2(scores * unit - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        best = higher
    out = out / total[:, None]
    if piece < 0:
        tl.store(p_out + i_token * (kv_heads * group * head_dim) + o_out, out, mask=m_out)
        return
    heads: tl.constexpr = kv_heads * group
    o_sum = i_head * group + tl.arange(0, block_group)
    tl.store(p_sums + i_chunk * heads + o_sum, best + tl.log2(total), mask=tl.arange(0, block_group) < group)
    tl.store(p_parts + i_chunk.to(tl.int64) * heads * head_dim + o_out, out, mask=m_out)
    tl.debug_barrier()  # all of the program's threads have stored before the one that counts
    if tl.atomic_add(p_arrived + i_row * kv_heads + i_head, 1, sem="acq_rel") == pieces - 1:
        tl.store(p_arrived + i_row * kv_heads + i_head, 0)
        _merge(
            p_sums + (i_chunk - piece) * heads + i_head * group,
            p_parts + ((i_chunk - piece).to(tl.int64) * heads + i_head * group) * head_dim,
            p_out + (i_token * heads + i_head * group) * head_dim,
            pieces, heads, group, head_dim, merge_group, block_dim,
        )  # fmt: skip


@jit()
def _merge(
    p_sums: tl.tensor,
    p_parts: tl.tensor,
    p_out: tl.tensor,
    pieces: tl.tensor,
    heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_group: tl.constexpr,
    block_dim: tl.constexpr,
) -> None:
    """Put a row's chunks together, four at a time: one by one, each would wait for its own load."""
    out = tl.zeros([block_group, block_dim], tl.float32)
    best = tl.full([block_group], float("-inf"), tl.float32)
    total = tl.zeros([block_group], tl.float32)
    for i in range(0, pieces, 4):
        sum_0, part_0 = _part(p_sums, p_parts, i, pieces, heads, group, head_dim, block_group, block_dim)
        sum_1, part_1 = _part(p_sums, p_parts, i + 1, pieces, heads, group, head_dim, block_group, block_dim)
        sum_2, part_2 = _part(p_sums, p_parts, i + 2, pieces, heads, group, head_dim, block_group, block_dim)
        sum_3, part_3 = _part(p_sums, p_parts, i + 3, pieces, heads, group, head_dim, block_group, block_dim)
        higher = tl.maximum(best, tl.maximum(tl.maximum(sum_0, sum_1), tl.maximum(sum_2, sum_3)))
        fade = tl.exp2(best - higher)
        sum_0, sum_1, sum_2, sum_3 = tl.exp2(sum_0 - higher), tl.exp2(sum_1 - higher), tl.exp2(sum_2 - higher), tl.exp2(sum_3 - higher)
        total = total * fade + sum_0 + sum_1 + sum_2 + sum_3
        out = out * fade[:, None] + part_0 * sum_0[:, None] + part_1 * sum_1[:, None] + part_2 * sum_2[:, None] + part_3 * sum_3[:, None]
        best = higher
    o_group, o_dim = tl.arange(0, block_group)[:, None], tl.arange(0, block_dim)[None, :]
    tl.store(p_out + o_group * head_dim + o_dim, out / total[:, None], mask=(o_group < group) & (o_dim < head_dim))


@jit()
def _part(
    p_sums: tl.tensor,
    p_parts: tl.tensor,
    i: tl.tensor,
    pieces: tl.tensor,
    heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    block_group: tl.constexpr,
    block_dim: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A chunk's log2 of its weights' sum and its result. What other programs wrote is not looked for in this multiprocessor's cache."""
    o_group, o_dim = tl.arange(0, block_group), tl.arange(0, block_dim)[None, :]
    sums = tl.load(p_sums + i * heads + o_group, mask=(o_group < group) & (i < pieces), other=float("-inf"), cache_modifier=".cg")
    sums = tl.where(o_group < group, sums, 0.0)
    m = (o_group[:, None] < group) & (o_dim < head_dim) & (i < pieces)
    part = tl.load(p_parts + i * (heads * head_dim) + o_group[:, None] * head_dim + o_dim, mask=m, other=0.0, cache_modifier=".cg")
    return sums, part


@jit(do_not_specialize=("table_stride", "scale", "cap", "window", "chunks"))
def prefill_attention_kernel(
    p_q: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_out: tl.tensor,
    p_work: tl.tensor,
    p_starts: tl.tensor,
    p_contexts: tl.tensor,
    p_tables: tl.tensor,
    table_stride: int,
    q_stride: int,
    scale: float,
    cap: float,
    window: int,
    chunks: int,
    group: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    far: tl.constexpr,
    capped: tl.constexpr,
    windowed: tl.constexpr,
    block_dim: tl.constexpr,
    queries: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
    following: tl.constexpr = False,
) -> None:
    """The query heads of one key head, for a block of a row's queries: query by query, the heads of each side by side."""
    follow(following)
    i_block, i_head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    if i_block >= tl.load(p_work + 1):
        return
    p_block = p_work + 2 + 8 * chunks + 2 * i_block
    i_row, block = tl.load(p_block), tl.load(p_block + 1)
    i_token = tl.load(p_starts + i_row)
    count = tl.load(p_starts + i_row + 1) - i_token
    context = tl.load(p_contexts + i_row)
    o_query = block * queries + tl.arange(0, rows) // group
    o_dim = tl.arange(0, block_dim)[None, :]
    m_out = ((tl.arange(0, rows) < queries * group) & (o_query < count))[:, None] & (o_dim < head_dim)
    o_token = (i_token + o_query).to(tl.int64)[:, None]
    o_head = (i_head * group + tl.arange(0, rows) % group)[:, None] * head_dim + o_dim
    q = tl.load(p_q + o_token * q_stride + o_head, mask=m_out, other=0.0)
    p_table = p_tables + i_row.to(tl.int64) * table_stride
    position = context - count + o_query
    lowest = context - count + block * queries  # position of the block's first query, and of its last
    highest = tl.minimum(lowest + queries, context) - 1
    out = tl.zeros([rows, block_dim], tl.float32)
    best = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    # tiles [begin, seen) are hidden from some queries by the window, [seen, full) from none, [full, highest] from some by their order
    unseen = tl.maximum(lowest + 1 - window, 0) if windowed else 0  # positions before this one
    begin = unseen // tile * tile
    full = (lowest + 1) // tile * tile
    seen = begin
    if windowed:
        full = tl.maximum(full, begin)
        seen = tl.minimum(tl.cdiv(tl.maximum(highest + 1 - window, 0), tile) * tile, full)
        out, best, total = _over_keys(
            out, best, total, q, p_keys, p_values, p_table, begin, seen, unseen, position, i_head, scale, cap, window,
            True, windowed, capped, kv_heads, head_dim, block_size, far, block_dim, tile,
        )  # fmt: skip
    out, best, total = _over_keys(
        out, best, total, q, p_keys, p_values, p_table, seen, full, unseen, position, i_head, scale, cap, window,
        False, windowed, capped, kv_heads, head_dim, block_size, far, block_dim, tile,
    )  # fmt: skip
    out, best, total = _over_keys(
        out, best, total, q, p_keys, p_values, p_table, full, highest + 1, unseen, position, i_head, scale, cap, window,
        True, windowed, capped, kv_heads, head_dim, block_size, far, block_dim, tile,
    )  # fmt: skip
    tl.store(p_out + o_token * (kv_heads * group * head_dim) + o_head, out / total[:, None], mask=m_out)


@jit()
def _over_keys(
    out: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    p_keys: tl.tensor,
    p_values: tl.tensor,
    p_table: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    unseen: tl.tensor,
    position: tl.tensor,
    i_head: tl.tensor,
    scale: float,
    cap: float,
    window: int,
    masked: tl.constexpr,
    windowed: tl.constexpr,
    capped: tl.constexpr,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    far: tl.constexpr,
    block_dim: tl.constexpr,
    tile: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over keys [begin, end); scores are scaled as they are raised to a power, where nothing caps them."""
    o_dim = tl.arange(0, block_dim)[None, :]
    for start in range(begin, end, tile):
        o_key = start + tl.arange(0, tile)
        m_key = o_key < end
        if masked and windowed:
            m_key &= o_key >= unseen
        o_kv = _places(p_table, o_key, m_key, i_head, kv_heads, head_dim, block_size, far, masked)[:, None] + o_dim
        if masked:
            m_kv = m_key[:, None] & (o_dim < head_dim)
            k = tl.load(p_keys + o_kv, mask=m_kv, other=0.0)
            v = tl.load(p_values + o_kv, mask=m_kv, other=0.0)
        elif head_dim < block_dim:
            k = tl.load(p_keys + o_kv, mask=o_dim < head_dim, other=0.0)
            v = tl.load(p_values + o_kv, mask=o_dim < head_dim, other=0.0)
        else:
            k = tl.load(p_keys + o_kv)
            v = tl.load(p_values + o_kv)
        scores = _scores(q, k, scale, cap, capped)
        if masked:
            m = o_key[None, :] <= position[:, None]
            if windowed:
                m &= o_key[None, :] > position[:, None] - window
            scores = tl.where(m, scores, float("-inf"))
        unit = 1.0 if capped else scale  # multiplied and subtracted in one instruction
        higher = tl.maximum(best, tl.max(scores, axis=1) * unit)
        against = tl.where(higher == float("-inf"), 0.0, higher) if windowed else higher  # a query may see none of a tile
        weights = tl.exp2(scores * unit - against[:, None])
        fade = tl.exp2(best - against)
        total = total * fade + tl.sum(weights, axis=1)
        out = tl.dot(weights.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        best = higher
    return out, best, total


@jit()
def _places(
    p_table: tl.tensor,
    o_key: tl.tensor,
    m_key: tl.tensor,
    i_head: tl.tensor,
    kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    block_size: tl.constexpr,
    far: tl.constexpr,
    masked: tl.constexpr = True,
) -> tl.tensor:
    """Where in the cache the keys at these positions begin; far: an offset may need more than 32 bits."""
    block = tl.load(p_table + o_key // block_size, mask=m_key, other=0) if masked else tl.load(p_table + o_key // block_size)
    if far:
        block = block.to(tl.int64)
    return ((block * block_size + o_key % block_size) * kv_heads + i_head) * head_dim


@jit()
def _scores(q: tl.tensor, k: tl.tensor, scale: float, cap: float, capped: tl.constexpr) -> tl.tensor:
    """In units of log 2 where they are capped, else still to be scaled. tanh(s) = 2 * sigmoid(2 * s) - 1."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    return cap * (2 * tl.sigmoid(2 * scale * scores) - 1) if capped else scores


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
