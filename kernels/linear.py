"""x @ weight.T + bias: every dense product of a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F  # noqa: N812 - its name everywhere

from nbengine.kernels._triton import chained, check_product, follow, jit, next_power_of_2, shared_memory

if TYPE_CHECKING:
    import triton.language as tl  # noqa: TC004 - `jit` brings it

_MANY = 8  # rows on a CPU; from here on oneDNN's product is the faster one


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply x [tokens, in] by weight [out, in], add bias [out]: contiguous [tokens, out].

    In float32 on a CPU F.linear reads the weight at 6 to 13 GB/s where few rows are multiplied; written as weight @ x.T with
    two rows or more (a lone one is doubled) it reaches 25 to 35, and for many rows oneDNN takes a third less time. In bfloat16
    it is oneDNN's own layout (`laid_out`) that doubles the speed of a lone row.
    """
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001 - what torch.compile calls here
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    rows = x.shape[0]
    if rows >= _MANY:
        if torch.backends.mkldnn.is_available():
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # noqa: SLF001 - what torch.compile calls here
        return F.linear(x, weight, bias)
    out = torch.mm(weight, (torch.cat((x, x)) if rows == 1 else x).t())  # [out, rows or 2]
    out = out.t()[:rows].contiguous()
    return out if bias is None else out.add_(bias)


def laid_out(weight: torch.Tensor) -> torch.Tensor:
    """A weight as linear_reference reads it fastest: a copy in oneDNN's layout where that pays, and otherwise the weight itself."""
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return weight
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # noqa: SLF001 - as above
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)  # noqa: SLF001 - as above


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As linear_reference: by a kernel of ours where cuBLAS is far from the time to read the weight, which is for few rows."""
    rows, width = x.shape
    outs = weight.shape[0]
    few, some = _ways(x, outs)
    if not (few or some):
        return F.linear(x, weight, bias)
    x, out = _operands(x, weight, bias)
    if few:
        tile_out, tile, stages, warps = _few_tiles(rows, outs, width)
        linear_few_kernel[(-(-outs // tile_out),)](
            x, weight, bias, out, rows, outs, width=width, tile_rows=next_power_of_2(rows), tile_out=tile_out, tile=tile, stages=stages,
            num_warps=warps, **chained(x.device),
        )  # fmt: skip
    else:
        check_product(x)
        linear_some_kernel[(-(-outs // 16),)](
            x, weight, bias, out, rows, outs, width=width, tile_rows=16, tile_out=16, tile=64, splits=4, num_warps=4, num_stages=5,
        )  # fmt: skip
    return out


def _ways(x: torch.Tensor, outs: int) -> tuple[bool, bool]:
    """Whether the kernel for few rows is the fastest, and whether the one for some is; as measured on an H200."""
    rows, width = x.shape
    if rows == 1:
        return True, False
    if not rows or x.element_size() != 2:
        return False, False
    few = (rows == 2 and width <= 8192) or (rows <= 4 and outs <= 2048)
    return few, not few and rows <= 16 and outs <= 4096 and _on_matrix_units(x)


def _few_tiles(rows: int, outs: int, width: int) -> tuple[int, int, int, int]:
    """Numbers of the product that a program makes, of the width that it takes at a time, stages, warps; tried on an H200."""
    if rows == 1:
        if width <= 1024:
            return 4, 1024, 1, 4
        if width < 2048:
            return 4, 2048, 1, 8 if outs <= 8192 else 4
        if width < 3072:
            return 1, 2048, 1, 4
        if width <= 8192:
            return 1, 4096, 1, 8
        if width <= 16384:
            return 1, 16384, 1, 8
        return (1, 32768, 1, 16) if width <= 32768 else (2, 1024, 3, 4)
    if rows == 2 and width >= 4096:
        return (4, 512, 3, 4) if outs > 8192 else (1, 2048, 1, 4)
    return 2, 1024, 1, 4


def linear_invariant(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As linear_reference, a row's result the same to the bit however many rows there are: one way to multiply, whatever the shape."""
    check_product(x)
    x, out = _operands(x, weight, bias)
    rows, outs = out.shape
    tile_rows, tile_out, tile, stages = (64, 64, 64, 4) if _on_matrix_units(x) else (16, 32, 32, 1)
    if rows:
        linear_invariant_kernel[(-(-rows // tile_rows), -(-outs // tile_out))](
            x, weight, bias, out, rows, outs, width=x.shape[1], tile_rows=tile_rows, tile_out=tile_out, tile=tile, num_warps=4,
            num_stages=stages,
        )  # fmt: skip
    return out


def _operands(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernels read as x, and room for the product."""
    assert weight.is_contiguous()
    assert bias is None or bias.stride(0) == 1
    return x.contiguous(), torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)


def _on_matrix_units(x: torch.Tensor) -> bool:
    """float32 is to be exact, and a T4's are out of Triton's reach."""
    return x.element_size() == 2 and shared_memory(x.device) > 90 << 10


@jit(do_not_specialize=("rows",))
def linear_invariant_kernel(
    p_x: tl.tensor,
    p_weight: tl.tensor,
    p_bias: tl.tensor | None,
    p_out: tl.tensor,
    rows: int,
    outs: int,
    width: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_out: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    """A tile of the product, the width passed over from its beginning to its end."""
    o_row = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    o_out = tl.program_id(1).to(tl.int64) * tile_out + tl.arange(0, tile_out)
    m_row, m_out = o_row < rows, o_out < outs
    total = tl.zeros([tile_rows, tile_out], tl.float32)
    for start in range(0, width, tile):
        o = start + tl.arange(0, tile)
        m = o < width
        x = tl.load(p_x + o_row[:, None] * width + o[None, :], mask=m_row[:, None] & m[None, :], other=0.0)
        w = tl.load(p_weight + o_out[:, None] * width + o[None, :], mask=m_out[:, None] & m[None, :], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    _store(total, p_bias, p_out, outs, o_row, o_out, m_row, m_out)


@jit(do_not_specialize=("rows",))
def linear_few_kernel(
    p_x: tl.tensor,
    p_weight: tl.tensor,
    p_bias: tl.tensor | None,
    p_out: tl.tensor,
    rows: int,
    outs: int,
    width: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_out: tl.constexpr,
    tile: tl.constexpr,
    stages: tl.constexpr,
    following: tl.constexpr = False,
) -> None:
    """The weight's rows pass by in registers; their products are added up at the end."""
    o_row = tl.arange(0, tile_rows)
    o_out = tl.program_id(0) * tile_out + tl.arange(0, tile_out)
    m_row, m_out = o_row < rows, o_out < outs
    p_all = p_x + o_row[:, None, None] * width
    p_some = p_weight + o_out.to(tl.int64)[None, :, None] * width
    if width <= tile:  # the weight, which no launch writes, is on its way when x is
        o = tl.arange(0, tile)[None, None, :]
        w = tl.load(p_some + o, mask=(o < width) & m_out[None, :, None], other=0.0, eviction_policy="evict_first")
        follow(following)
        x = tl.load(p_all + o, mask=(o < width) & m_row[:, None, None], other=0.0)
        total = w.to(tl.float32) * x.to(tl.float32)
    else:
        follow(following)
        total = tl.zeros([tile_rows, tile_out, tile], tl.float32)
        for start in tl.range(0, width, tile, num_stages=stages):
            o = start + tl.arange(0, tile)[None, None, :]
            m = o < width if width % tile else o >= start  # always true, and seen to be
            x = tl.load(p_all + o, mask=m if tile_rows == 1 else m & m_row[:, None, None], other=0.0)
            w = tl.load(p_some + o, mask=m & m_out[None, :, None], other=0.0, eviction_policy="evict_first")
            total += w.to(tl.float32) * x.to(tl.float32)
    _store(tl.sum(total, axis=2), p_bias, p_out, outs, o_row, o_out, m_row, m_out)


@jit(do_not_specialize=("rows",))
def linear_some_kernel(
    p_x: tl.tensor,
    p_weight: tl.tensor,
    p_bias: tl.tensor | None,
    p_out: tl.tensor,
    rows: int,
    outs: int,
    width: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_out: tl.constexpr,
    tile: tl.constexpr,
    splits: tl.constexpr,
) -> None:
    """All rows of x and some of the weight's, on the matrix units; each warp has its own splits of the width."""
    o_row = tl.arange(0, tile_rows)
    o_out = tl.program_id(0) * tile_out + tl.arange(0, tile_out)
    m_row, m_out = o_row < rows, o_out < outs
    p_all = p_x + o_row[None, :, None] * width
    p_some = p_weight + o_out.to(tl.int64)[None, :, None] * width
    o_split = tl.arange(0, splits)[:, None, None] * tile + tl.arange(0, tile)[None, None, :]
    total = tl.zeros([splits, tile_rows, tile_out], tl.float32)
    for start in range(0, width, tile * splits):
        o = start + o_split
        if width % (tile * splits):
            x = tl.load(p_all + o, mask=m_row[None, :, None] & (o < width), other=0.0)
            w = tl.load(p_some + o, mask=m_out[None, :, None] & (o < width), other=0.0)
        else:
            x = tl.load(p_all + o, mask=m_row[None, :, None], other=0.0)
            w = tl.load(p_some + o, mask=m_out[None, :, None], other=0.0)
        total = tl.dot(x, tl.trans(w, (0, 2, 1)), total)
    _store(tl.sum(total, axis=0), p_bias, p_out, outs, o_row, o_out, m_row, m_out)


@jit()
def _store(
    out: tl.tensor,
    p_bias: tl.tensor | None,
    p_out: tl.tensor,
    outs: int,
    o_row: tl.tensor,
    o_out: tl.tensor,
    m_row: tl.tensor,
    m_out: tl.tensor,
) -> None:
    """Keep a tile of the product, its bias added."""
    if p_bias is not None:
        out += tl.load(p_bias + o_out, mask=m_out, other=0.0).to(tl.float32)[None, :]
    tl.store(p_out + o_row[:, None] * outs + o_out[None, :], out, mask=m_row[:, None] & m_out[None, :])


def example_inputs(
    generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[tuple[Any, ...], tuple[torch.Tensor, ...]]]:
    """Arguments to try, each with those of its tensors that the op writes to."""
    device = generator.device
    for rows, width, out, biased in ((1, 64, 96, False), (5, 63, 33, True), (63, 128, 257, True), (1, 200, 1000, True)):
        x = torch.randn(rows, width, generator=generator, device=device, dtype=dtype)
        weight = torch.randn(out, width, generator=generator, device=device, dtype=dtype)
        bias = torch.randn(out, generator=generator, device=device, dtype=dtype) if biased else None
        yield (x, weight, bias), ()
