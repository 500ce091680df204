"""W8A8: products of many tokens, quantized to int8, with int8 weights; one scale per token and one per weight row. An
option for prefills (model/w8a8.py); on a GPU by w8a8_triton.py, elsewhere by the definition.

A token has one scale, or one per SPAN columns, because a gated value may be forty times larger than the others, and no
rotation of the weights (model/rotation.py) can change that. Sums are exact (int32) within a scale. Few tokens, where
reading the weights is the bottleneck: gpu_linear.py. Nothing here waits for the GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import gpu
from model.kernels.gpu_linear import MAX_TOKENS

try:
    import triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    from model.kernels import w8a8_triton
except ImportError:  # a PyTorch without Triton, as the CPU wheels are
    triton = None

SPAN = 128  # columns of a token that share a scale, if it has several
_MAX_COLUMNS = 1 << 16  # longest row that one program can quantize


class Tile(NamedTuple):
    """Tile sizes and launch options of one program of the product."""

    rows: int
    columns: int  # if `PAIRED`, as many of each matrix
    depth: int
    warps: int
    stages: int  # tiles of both matrices in flight
    group: int  # tiles of rows side by side
    tma: bool  # loads by the bulk copy engine


# alone, with several scales a token (two sums of one tile are held), and in pairs of gate and up, whose columns are a
# SPAN; a benchmark tries others
SINGLE = Tile(rows=128, columns=256, depth=128, warps=8, stages=3, group=16, tma=True)
SPANNED = Tile(rows=128, columns=128, depth=128, warps=8, stages=4, group=8, tma=True)
PAIRED = Tile(rows=128, columns=SPAN, depth=128, warps=8, stages=3, group=8, tma=True)


class Tokens(NamedTuple):
    """Tokens quantized to int8, approximately values * scale; a scale is for all columns or for SPAN of them."""

    values: Tensor  # (T, k) int8
    scale: Tensor  # (T, 1) or (T, ceil(k / SPAN)) float32


class Places(NamedTuple):
    """Which rows belong to which expert when assignments are sorted by expert; computed on the device."""

    order: Tensor  # (T*k,) int64: the assignment that is row i
    row_starts: Tensor  # (m + 1,) int32
    tile_starts: Tensor  # (m + 1,) int32

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int, tile_rows: int) -> Places:
        """chosen (T, k) with tiles of `tile_rows`."""
        assigned = chosen.flatten().long()
        counts = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
        counts.scatter_add_(0, assigned, torch.ones_like(assigned))
        ends = torch.stack([counts, (counts + tile_rows - 1) // tile_rows]).cumsum(1)
        row_starts, tile_starts = F.pad(ends, (1, 0)).int()
        return cls(assigned.argsort(stable=True), row_starts, tile_starts)


def takes(x: Tensor, *weights: Tensor) -> bool:
    """Whether x (..., k) has enough tokens to be quantized; fewer are left as they are."""
    return x.numel() // x.shape[-1] > MAX_TOKENS and all(weight.dtype == torch.int8 for weight in weights)


def linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, spans: bool = False) -> Tensor:
    """round(x) (..., k) @ (weight (n, k) * scale (n,)[:, None]).T + bias -> (..., n) in x.dtype.

    spans: a scale of x for each SPAN columns.
    """
    if not _on_gpu(x, weight):
        return linear_ref(x, weight, scale, bias, spans)
    tokens = quantize_tokens(x.flatten(0, -2), spans=spans)
    out = x.new_empty(len(tokens.values), len(weight))
    _multiply(tokens, weight, scale, out, bias=bias)
    return out.view(*x.shape[:-1], -1)


def swiglu(
    x: Tensor, gate: Tensor, gate_scale: Tensor, up: Tensor, up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """h = silu(round(x) @ gate.T) * (round(x) @ up.T), then round(h) in spans @ down.T. x (..., d), gate and up (f, d),
    down (d, f) -> (..., d) in x.dtype."""
    if not _on_gpu(x, gate, up, down):
        h = F.silu(linear_ref(x, gate, gate_scale)) * linear_ref(x, up, up_scale)
        return linear_ref(h, down, down_scale, spans=True)
    out = torch.empty_like(x)
    h = _gate(quantize_tokens(x.flatten(0, -2)), gate, gate_scale, up, up_scale)
    _multiply(h, down, down_scale, out)
    return out


def mix_experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
) -> Tensor:
    """Each token's chosen experts, summed by `weights` (T, k) float32: x (T, d) -> (T, d). The inputs of both products
    of an expert are quantized, the second's in spans. gate_up (m, 2f, d), the gates first; down (m, d, f)."""
    if not _on_gpu(x, gate_up, down):
        return mix_experts_ref(x, weights, chosen, gate_up, gate_up_scale, down, down_scale)
    (m, d, f), k = down.shape, chosen.shape[1]
    places = Places.of(chosen, m, PAIRED.rows)
    gates, gate_scales = gate_up.flatten(0, 1), gate_up_scale.flatten()
    h = _gate(quantize_tokens(x, places.order // k), gates, gate_scales, gates[f:], gate_scales[f:], f, places, 2 * f)
    out, shares = x.new_empty(*chosen.shape, d), weights.float().flatten()
    _multiply(h, down.flatten(0, 1), down_scale.flatten(), out, places=places, shares=shares, expert_rows=d)
    return out.sum(1)


def quantize_tokens(x: Tensor, index: Tensor | None = None, spans: bool = False) -> Tokens:
    """Quantize rows of x (T, k), or those in `index`; a row's (or span's) scale is a 127th of its largest value."""
    rows, k = len(x) if index is None else len(index), x.shape[1]
    if x.stride(1) != 1 or k > _MAX_COLUMNS:
        raise ValueError(f"rows must be contiguous, of {_MAX_COLUMNS} columns at most: {tuple(x.shape)} {x.stride()}")
    values = torch.empty(rows, k, dtype=torch.int8, device=x.device)
    block = max(triton.next_power_of_2(k), SPAN)
    span = SPAN if spans else block
    scale = torch.empty(rows, triton.cdiv(k, span), dtype=torch.float32, device=x.device)
    w8a8_triton.quantize_kernel[(rows,)](
        *(x, x if index is None else index, values, scale, k, x.stride(0), scale.shape[1]),
        HAS_INDEX=index is not None, SPANS=block // span, SPAN=span, num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    return Tokens(values, scale)


def quantize_tokens_ref(x: Tensor, spans: bool = False) -> Tokens:
    """The definition; x (..., k)."""
    k = x.shape[-1]
    wide = F.pad(x.float(), (0, -k % SPAN)).unflatten(-1, (-1, SPAN)) if spans else x.float().unsqueeze(-2)
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    steps = torch.full_like(largest, 127.0).div_(largest)  # `127 / largest` would round twice
    return Tokens((wide * steps).round().to(torch.int8).flatten(-2)[..., :k], largest.squeeze(-1) / 127)


def linear_ref(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, spans: bool = False) -> Tensor:
    """Like `linear`, in float32."""
    values, own_scale = quantize_tokens_ref(x, spans)
    if spans:
        rounded = values.float() * own_scale.repeat_interleave(SPAN, dim=-1)[..., : values.shape[-1]]
        out = F.linear(rounded, weight.float()) * scale
    else:
        out = F.linear(values.float(), weight.float()) * own_scale * scale
    return (out if bias is None else out + bias.float()).to(x.dtype)


def mix_experts_ref(
    x: Tensor, weights: Tensor, chosen: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> Tensor:
    """Like `mix_experts`."""
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in chosen.unique().tolist():
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        gate, up = linear_ref(x[token], gate_up[expert], gate_up_scale[expert]).chunk(2, dim=-1)
        rows = linear_ref(F.silu(gate) * up, down[expert], down_scale[expert], spans=True)
        out.index_add_(0, token, weights[token, slot, None].float() * rows.float())
    return out.to(x.dtype)


def _gate(
    tokens: Tokens,
    gate: Tensor,
    gate_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    f: int | None = None,
    places: Places | None = None,
    expert_rows: int = 0,
) -> Tokens:
    """The first half of SwiGLUs of f columns; its result is quantized in spans by the same kernel."""
    rows, f = len(tokens.values), f or len(gate)
    values = torch.empty(rows, f, dtype=torch.int8, device=gate.device)
    h = Tokens(values, gate_scale.new_empty(rows, triton.cdiv(f, PAIRED.columns)))
    _multiply(tokens, gate, gate_scale, *h, other=(up, up_scale), places=places, expert_rows=expert_rows)
    return h


def has_kernels(*tensors: Tensor) -> bool:
    """Whether there are kernels for the device of these tensors."""
    return triton is not None and gpu.has_bulk_copies(*tensors)


def _on_gpu(x: Tensor, *weights: Tensor) -> bool:
    """Whether the kernels support these: bfloat16, rows of multiples of 16 bytes."""
    fits = all(weight.is_contiguous() and weight.shape[-1] % 16 == 0 for weight in weights)
    return fits and x.dtype == torch.bfloat16 and has_kernels(x, *weights)


def _multiply(
    tokens: Tokens,
    weight: Tensor,
    scale: Tensor,
    out: Tensor,
    out_scale: Tensor | None = None,
    bias: Tensor | None = None,
    other: tuple[Tensor, Tensor] | None = None,
    places: Places | None = None,
    shares: Tensor | None = None,
    expert_rows: int = 0,
) -> None:
    """One launch of the product; see product_kernel. `out` (..., n)."""
    (rows, k), n, spans = tokens.values.shape, out.shape[-1], tokens.scale.shape[1] > 1
    tile = PAIRED if other is not None else SPANNED if spans else SINGLE
    num_experts = 0 if places is None else len(places.row_starts) - 1
    tiles = (triton.cdiv(rows, tile.rows) + num_experts) * triton.cdiv(n, tile.columns)
    x, matrices = tokens.values, [weight, weight if other is None else other[0]]
    if tile.tma:
        x = TensorDescriptor.from_tensor(x, [tile.rows, tile.depth])
        matrices = [TensorDescriptor.from_tensor(matrix, [tile.columns, tile.depth]) for matrix in matrices]
    scales = (scale, scale if other is None else other[1])
    order, row_starts, tile_starts = (tokens.scale,) * 3 if places is None else places
    w8a8_triton.product_kernel[(min(tiles, gpu.sm_count(out.device)),)](
        *(x, tokens.scale, matrices[0], scales[0], matrices[1], scales[1]),
        *(scale if bias is None else bias, scale if shares is None else shares, order, row_starts, tile_starts, out),
        *(scale if out_scale is None else out_scale, rows, n, k, num_experts, expert_rows, tokens.scale.shape[1]),
        GROUPED=places is not None, PAIRED=other is not None, ROUNDED=out_scale is not None, HAS_BIAS=bias is not None,
        SPAN=SPAN if spans else 0,
        EXPERTS=triton.next_power_of_2(max(num_experts, 1)), EVEN=k % tile.depth == 0, TMA=tile.tma,
        BM=tile.rows, BN=tile.columns, BK=tile.depth, GROUP=tile.group,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
