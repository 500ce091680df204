"""Triton kernels of w8a8.py: quantizing tokens to int8, and products of int8 tokens with int8 weights, dense or by
expert.

One kernel does all products. It is persistent: as many programs as run at once walk the tiles, `GROUP` tiles of rows
together over all columns, so that what one program reads is in the L2 cache for the next.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TO_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves no bits for a fraction; halves round to even
_SMALLEST = tl.constexpr(1e-30)


@triton.jit
def _round(x):
    """x (rows, span) float32 -> integers from -127 to 127 and the scale of each row."""
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), _SMALLEST)
    whole = (x * tl.div_rn(127.0, largest)[:, None] + _TO_WHOLE) - _TO_WHOLE
    return whole.to(tl.int8), tl.div_rn(largest, 127.0)


@triton.jit
def quantize_kernel(
    x, index, values, scales, k, stride, num_scales,
    HAS_INDEX: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Row i of the result is row index[i] (or i) of x (rows, k), quantized; the scale of each SPAN columns is a 127th
    of their largest value."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row) if HAS_INDEX else row
    spans = tl.arange(0, SPANS)
    columns = spans[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    inside = columns < k
    x_row = tl.load(x + source * stride + columns, mask=inside, other=0.0).to(tl.float32)
    whole, scale = _round(x_row)
    tl.store(values + row * k + columns, whole, mask=inside)
    tl.store(scales + row * num_scales + spans, scale, mask=spans < num_scales)


@triton.jit
def _load_tile(source, first_row, last_row, column, k, TMA: tl.constexpr, EVEN: tl.constexpr,
               ROWS: tl.constexpr, BK: tl.constexpr):  # fmt: skip
    """(ROWS, BK) of a matrix (.., k); rows after `last_row` are undefined."""
    if TMA:
        loaded = source.load([first_row, column])
    else:
        rows = tl.minimum(first_row + tl.arange(0, ROWS), last_row).to(tl.int64)
        columns = column + tl.arange(0, BK)
        at = source + rows[:, None] * k + columns[None, :]
        loaded = tl.load(at) if EVEN else tl.load(at, mask=columns[None, :] < k, other=0)
    return loaded


@triton.jit
def product_kernel(
    x, x_scale, weight, scale, other, other_scale, bias, shares, place, row_starts, tile_starts, out, out_scale,
    rows, n, k, num_experts, expert_rows, num_scales,
    GROUPED: tl.constexpr, PAIRED: tl.constexpr, ROUNDED: tl.constexpr, HAS_BIAS: tl.constexpr, EXPERTS: tl.constexpr,
    EVEN: tl.constexpr, TMA: tl.constexpr, SPAN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (rows, n) = x (rows, k) @ weight (n, k).T, times the row scales of both; + bias.

    SPAN: 0, or how many columns of x share one of its num_scales scales per row; a multiple of BK, and not with PAIRED.
    PAIRED: silu of that product times the product with `other`. GROUPED: x is sorted by expert, and the matrix of
    expert i starts at row i * expert_rows; row_starts and tile_starts (num_experts + 1,) are the indices of each
    expert's first row and first tile of BM rows. With `place` (GROUPED and not PAIRED), row i is written to row
    place[i], times shares[place[i]]. ROUNDED: out is int8, with one scale per BN columns in out_scale
    (rows, ceil(n / BN)).
    """
    tiles_n = tl.cdiv(n, BN)
    tiles_m = tl.cdiv(rows, BM)
    if GROUPED:
        tiles_m = tl.load(tile_starts + num_experts)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        band = tile // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - band * GROUP, GROUP)
        within = tile % (GROUP * tiles_n)
        tile_m = band * GROUP + within % height
        column = within // height * BN
        first_row, end_row, base = tile_m * BM, rows, 0
        if GROUPED:
            experts = tl.arange(0, EXPERTS)
            ends = tl.load(tile_starts + 1 + experts, mask=experts < num_experts, other=0x7FFFFFFF)
            expert = tl.sum((ends <= tile_m).to(tl.int32), axis=0)
            first_row = tl.load(row_starts + expert) + (tile_m - tl.load(tile_starts + expert)) * BM
            end_row = tl.load(row_starts + expert + 1)
            base = expert * expert_rows
        own_rows = first_row + tl.arange(0, BM)
        is_row = own_rows < end_row
        total = tl.zeros([BM, BN], tl.float32 if SPAN else tl.int32)
        if PAIRED:
            other_total = tl.zeros([BM, BN], tl.int32)
        for depth in range(0, k, BK):
            x_tile = _load_tile(x, first_row, rows - 1, depth, k, TMA, EVEN, BM, BK)
            weight_tile = _load_tile(weight, base + column, base + n - 1, depth, k, TMA, EVEN, BN, BK)
            if SPAN:
                at_scale = own_rows.to(tl.int64) * num_scales + depth // SPAN
                span_scale = tl.load(x_scale + at_scale, mask=is_row, other=0.0)
                part = tl.dot(x_tile, weight_tile.T, out_dtype=tl.int32)
                total += part.to(tl.float32) * span_scale[:, None]
            else:
                total = tl.dot(x_tile, weight_tile.T, total, out_dtype=tl.int32)
            if PAIRED:
                other_tile = _load_tile(other, base + column, base + n - 1, depth, k, TMA, EVEN, BN, BK)
                other_total = tl.dot(x_tile, other_tile.T, other_total, out_dtype=tl.int32)
        columns = column + tl.arange(0, BN)
        is_column = columns < n
        column_scale = tl.load(scale + base + columns, mask=is_column, other=0.0)
        result = total.to(tl.float32) * column_scale[None, :]
        if not SPAN:
            row_scale = tl.load(x_scale + own_rows, mask=is_row, other=0.0)
            result *= row_scale[:, None]
        if PAIRED:
            other_column_scale = tl.load(other_scale + base + columns, mask=is_column, other=0.0)
            up = other_total.to(tl.float32) * row_scale[:, None] * other_column_scale[None, :]
            result = result / (1.0 + tl.exp(-result)) * up
        if HAS_BIAS:
            result += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        target = own_rows.to(tl.int64)
        if GROUPED and not PAIRED:
            target = tl.load(place + own_rows, mask=is_row, other=0)
            result *= tl.load(shares + target, mask=is_row, other=0.0)[:, None]
        if ROUNDED:
            result, rounded_scale = _round(result)
            tl.store(out_scale + target * tl.cdiv(n, BN) + column // BN, rounded_scale, mask=is_row)
        at = out + target[:, None] * n + columns[None, :]
        tl.store(at, result.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
