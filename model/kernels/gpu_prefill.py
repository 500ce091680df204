"""Products of many tokens with int8 weights on the GPU: each matrix is unpacked to bfloat16 and multiplied by cuBLAS.

Also the row-wise operations around the products: gate, norm, and the sum over experts. Callers check `gpu.supports` and
`fits` first. The kernels are in elementwise.cu. Few tokens: gpu_linear.py. `mix_experts` synchronizes to read the token
counts, so it is not captured in graphs.
"""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import gpu, gpu_linear
from model.kernels.gpu_linear import MAX_ASSIGNMENTS, MAX_EXPERTS, MAX_TOKENS

MAX_ROWS = 8192  # in one product with an expert's gate and up: with 28,672 columns that is 0.5 GB
_MAX_SCRATCH = 1 << 27  # weights unpacked at a time
_MAX_NORM_COLUMNS = 8192
_THREADS = 256

_scratch: defaultdict[torch.device, list[Tensor]] = defaultdict(list)  # the largest last; graphs use earlier ones


def fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether `int8_linear` and `mix_experts` support activations like x and these weights."""
    return x.dtype == torch.bfloat16 and all(map(gpu_linear.fits, weights))


def rows_fit(*rows: Tensor) -> bool:
    """Whether the row-wise operations support these: bfloat16, multiples of 16 bytes, evenly spaced."""
    return all(
        x.dtype == torch.bfloat16
        and x.shape[-1] % 8 == 0
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and (x.ndim == 1 or x.stride(-2) % 8 == 0)
        and (x.ndim < 3 or x.is_contiguous())
        and x.numel() > 0
        for x in rows
    )


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., k) @ (weight (n, k) * scale (n,)[:, None]).T + bias -> (..., n) in bfloat16; see `fits`."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if 0 < len(rows) <= MAX_TOKENS:
        out = x.new_empty(len(rows), len(weight))
        gpu_linear.int8_rows(rows, weight, scale, out, bias)
        return out.view(*x.shape[:-1], -1)
    step = max(_MAX_SCRATCH // weight.shape[1], 1)
    cuts = range(0, len(weight), step)
    biases = [None] * len(cuts) if bias is None else bias.split(step)
    parts = zip(weight.split(step), scale.split(step), biases, strict=True)
    outs = [F.linear(x, dequantize(some, scales, _room(some)), added) for some, scales, added in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def mix_experts(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
) -> Tensor:
    """Each token's chosen experts, summed by `weights` (T, k) float32: x (T, d) -> (T, d).

    gate_up (m, 2f, d), down (m, d, f). For few tokens only the chosen experts' int8 weights are read, without
    synchronization; for many, the experts run one after the other, so that only one expert's activations are held.
    """
    if len(x) <= MAX_TOKENS and chosen.numel() <= MAX_ASSIGNMENTS and len(gate_up) <= MAX_EXPERTS:
        experts = chosen.int()
        h = x.new_empty(*chosen.shape, down.shape[2])
        rows = x.new_empty(*chosen.shape, down.shape[1], dtype=torch.float32)
        gpu_linear.experts_gate_up(x.contiguous(), experts, gate_up, gate_up_scale, h)
        gpu_linear.experts_down(h, experts, down, down_scale, rows)
        return (weights[..., None] * rows).sum(1).to(x.dtype)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.zeros(len(gate_up), dtype=torch.int64, device=x.device)
    counts = counts.scatter_add_(0, chosen.flatten(), torch.ones_like(order)).tolist()
    tokens, shares = (order // chosen.shape[1]).split(counts), weights.flatten()[order].split(counts)
    out = torch.zeros_like(x)
    for i, own in enumerate(tokens):
        if not len(own):
            continue
        rows = x.index_select(0, own)
        if len(own) <= MAX_TOKENS:
            rows = _few(rows, gate_up[i], gate_up_scale[i], down[i], down_scale[i])
        else:
            h = _gated(rows, dequantize(gate_up[i], gate_up_scale[i], _room(gate_up[i])))
            rows = F.linear(h, dequantize(down[i], down_scale[i], _room(down[i])))
        add_rows(rows, own, shares[i], out)
    return out


def dequantize(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """out (n, k) bfloat16 = weight (n, k) int8 * scale (n,)[:, None]; returns out."""
    kernel = gpu.kernel("elementwise", "dequantize")
    kernel(_grid(weight.numel() // 16), _THREADS, weight, scale, out, *weight.shape)
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in one pass; both (..., f) may be slices of wider rows, see `rows_fit`."""
    out, f = gate.new_empty(gate.shape), gate.shape[-1]
    rows = gate.numel() // f
    strides = (x.stride(-2) if x.ndim > 1 else f for x in (gate, up))
    gpu.kernel("elementwise", "silu_mul")(_grid(rows * f // 8), _THREADS, gate, up, out, rows, f, *strides)
    return out


def norm_fits(x: Tensor, weight: Tensor) -> bool:
    return rows_fit(x, weight) and x.shape[-1] <= _MAX_NORM_COLUMNS


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`F.rms_norm` over the last dimension in one pass; x (..., d) may be a slice of wider rows, see `norm_fits`."""
    out, d = x.new_empty(x.shape), x.shape[-1]
    rows, stride = x.numel() // d, x.stride(-2) if x.ndim > 1 else d
    kernel = gpu.kernel("elementwise", "rms_norm", CHUNKS=-(-d // 256))
    kernel((-(-rows // 8),), _THREADS, x, weight, out, rows, d, stride, float(eps))
    return out


def add_rows(rows: Tensor, index: Tensor, weight: Tensor, out: Tensor) -> None:
    """out[index[i]] += weight[i] * rows[i]. rows (count, d), index int64 without repetition, weight float32."""
    grid = _grid(rows.numel() // 8)
    gpu.kernel("elementwise", "add_rows")(grid, _THREADS, rows, index, weight, out, *rows.shape)


def _few(x: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor) -> Tensor:
    (gate, up), (gate_scale, up_scale) = gate_up.chunk(2), gate_up_scale.chunk(2)
    h, out = x.new_empty(len(x), len(gate)), x.new_empty(len(x), len(down))
    gpu_linear.swiglu_rows(x, gate, gate_scale, up, up_scale, h)
    gpu_linear.int8_rows(h, down, down_scale, out)
    return out


def _gated(x: Tensor, gate_up: Tensor) -> Tensor:
    """x (rows, d) -> silu(gate) * up (rows, f), never more than `MAX_ROWS` rows of gates and ups at a time."""
    parts = [silu_mul(*F.linear(rows, gate_up).chunk(2, dim=-1)) for rows in x.split(MAX_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _room(weight: Tensor) -> Tensor:
    """Memory for `weight` in bfloat16, shared by all calls on a device: its content is valid until the next call."""
    rooms, size = _scratch[weight.device], weight.numel()
    if not rooms or rooms[-1].numel() < size:
        with torch.inference_mode(False):
            rooms.append(torch.empty(size, dtype=torch.bfloat16, device=weight.device))
    return rooms[-1][:size].view(weight.shape)


def _grid(threads: int) -> tuple[int]:
    return (-(-threads // _THREADS),)
