"""Products of a few tokens with int8 weights on the GPU, and the norms between them; results go to `out` tensors.

All take bfloat16 activations and int8 rows (out, in) with one float32 scale each, accumulate in float32 and can be
captured in a CUDA graph after a first call. `overlap`: see gpu.Kernel; the preceding kernel must never write weights.
The kernels are in linear.cu and elementwise.cu; each is defined by its `_ref`. Many tokens: gpu_prefill.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels import gpu

MAX_TOKENS = 64
MAX_ASSIGNMENTS = 128  # token-expert pairs in one call
MAX_EXPERTS, MAX_ROUTED_EXPERTS = 64, 32  # for the products; for `add_norm`'s router

_UNIT = 128  # columns that a warp processes at a time
_MAX_PARTS = 1 << 22  # float32 partial sums that blocks sharing a tile can exchange
_MAX_SPLIT_TILES = 1024
_NORM_THREADS = 512


class Tiling(NamedTuple):
    """How linear.cu divides the work; see there."""

    row_tiles: int  # tiles of 16 weight rows in the registers of a warp
    warps_n: int  # warps of a block on different rows
    warps_k: int  # warps of a block that share the columns of one row
    depth: int  # units of 128 columns in flight to a warp
    resident: int  # blocks for which a multiprocessor must have room
    blocks: int  # blocks launched per multiprocessor
    stages: int = 0  # steps of all tokens in shared memory; 0: tokens are read through the L1 cache


# by tiles of 8 tokens
SINGLE = {
    1: Tiling(row_tiles=1, warps_n=1, warps_k=8, depth=2, resident=2, blocks=2),
    2: Tiling(row_tiles=1, warps_n=1, warps_k=8, depth=2, resident=2, blocks=2),
    4: Tiling(row_tiles=2, warps_n=4, warps_k=2, depth=2, resident=1, blocks=1, stages=3),
    8: Tiling(row_tiles=2, warps_n=4, warps_k=2, depth=2, resident=1, blocks=1, stages=3),
}
PAIRED = {
    1: Tiling(row_tiles=2, warps_n=1, warps_k=8, depth=2, resident=2, blocks=2),
    2: Tiling(row_tiles=2, warps_n=2, warps_k=8, depth=1, resident=1, blocks=1),
    4: Tiling(row_tiles=4, warps_n=4, warps_k=2, depth=1, resident=1, blocks=1, stages=3),
    8: Tiling(row_tiles=2, warps_n=4, warps_k=1, depth=2, resident=2, blocks=2, stages=2),
}
# the same for experts, by the tiles that one processes at a time; for further tiles its weights are read again
EXPERTS_PAIRED = {
    1: PAIRED[1],
    2: Tiling(row_tiles=2, warps_n=2, warps_k=4, depth=1, resident=2, blocks=2),
}
EXPERTS_SINGLE = dict.fromkeys((1, 2), Tiling(row_tiles=2, warps_n=1, warps_k=8, depth=1, resident=2, blocks=2))
# for fewer rows than fill the card, with one tile of tokens all columns on their way at once
FEW_ROWS = {
    1: Tiling(row_tiles=1, warps_n=1, warps_k=16, depth=4, resident=1, blocks=1),
    4: Tiling(row_tiles=2, warps_n=1, warps_k=8, depth=2, resident=1, blocks=1),
    8: Tiling(row_tiles=1, warps_n=4, warps_k=4, depth=1, resident=1, blocks=1),
}


class _Launch(NamedTuple):
    constants: dict[str, int]
    block: int
    shared_bytes: int
    tiles: int  # of output rows
    slots: int  # blocks that run at once

    @property
    def grid(self) -> tuple[int]:
        """The number of blocks that gives all of them equal work."""
        items = self.tiles * self.constants["SPLIT"]
        return (-(-items // -(-items // self.slots)),)


def fits(weight: Tensor) -> bool:
    """Whether the kernels support rows of this length."""
    return weight.dtype == torch.int8 and weight.shape[-1] % 16 == 0 and weight.is_contiguous()


def int8_rows(
    x: Tensor, weight: Tensor, scale: Tensor, out: Tensor, bias: Tensor | None = None, overlap: bool = True
) -> None:
    """out (M, n) = x (M, k) @ (weight (n, k) * scale[:, None]).T + bias; out is bfloat16 or float32, 1 <= M <= 64."""
    m, (n, k) = _tokens(x), weight.shape
    _check(x, (m, k), out, (m, n))
    launch = _launch(SINGLE, m, n, k, x.device, can_split=True)
    parts, arrived = _workspace(x.device) if launch.constants["SPLIT"] > 1 else (None, None)
    kernel = gpu.kernel("linear", "int8_rows", OUT_FLOAT=int(out.dtype == torch.float32), **launch.constants)
    arguments = (x, weight, scale, bias, out, parts, arrived, m, n, k)
    kernel(launch.grid, launch.block, *arguments, shared_bytes=launch.shared_bytes, overlap=overlap)


def in_proj_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_pointers: Tensor,
    u_out: Tensor,
    z_out: Tensor,
    e: int,
    offset: int = 0,
    overlap: bool = True,
) -> None:
    """Mamba's in_proj and one step of its causal convolution with SiLU, for one token per sequence.

    x (b, d), weight (2e, d), conv_weight (e, w) -> u_out, z_out (b, e). conv_pointers (b,) int64: addresses of
    bfloat16 memory with the state (e, w-1) at element `offset`, advanced in place.
    """
    m, (n, k) = _tokens(x), weight.shape
    _check(x, (m, k), u_out, (m, e))
    launch = _launch(SINGLE, m, n, k, x.device)
    kernel = gpu.kernel("linear", "in_proj_conv", WIDTH=conv_weight.shape[-1], **launch.constants)
    arguments = (x, weight, scale, bias, conv_weight, conv_bias, conv_pointers, offset, u_out, z_out, m, e, k)
    kernel(launch.grid, launch.block, *arguments, shared_bytes=launch.shared_bytes, overlap=overlap)


def swiglu_rows(
    x: Tensor, gate: Tensor, gate_scale: Tensor, up: Tensor, up_scale: Tensor, out: Tensor, overlap: bool = True
) -> None:
    """out (M, f) = silu(x @ gate.T) * (x @ up.T); gate, up (f, d), out bfloat16."""
    m, (n, k) = _tokens(x), gate.shape
    _check(x, (m, k), out, (m, n))
    launch = _launch(PAIRED, m, n, k, x.device)
    kernel = gpu.kernel("linear", "swiglu_rows", **launch.constants)
    arguments = (x, gate, gate_scale, up, up_scale, out, m, n, k)
    kernel(launch.grid, launch.block, *arguments, shared_bytes=launch.shared_bytes, overlap=overlap)


def experts_gate_up(
    x: Tensor, chosen: Tensor, weight: Tensor, scale: Tensor, out: Tensor, overlap: bool = True
) -> None:
    """out (M, k, f) = silu(gate) * up of each token's chosen experts; weight (m, 2f, d), the gates first.

    chosen (M, k) int32, without repetition within a row. Reads only the weights of the chosen experts.
    """
    (m, top_k), num_experts, (n, k) = chosen.shape, len(weight), (weight.shape[1] // 2, weight.shape[2])
    _check(x, (m, k), out, (m, top_k, n))
    launch = _launch_experts(EXPERTS_PAIRED, chosen, num_experts, n, k)
    kernel = gpu.kernel("linear", "experts_gate_up", **launch.constants)
    arguments = (x, chosen, weight, scale, out, m * top_k, top_k, num_experts, n, k)
    kernel((launch.slots,), launch.block, *arguments, shared_bytes=launch.shared_bytes, overlap=overlap)


def experts_down(h: Tensor, chosen: Tensor, weight: Tensor, scale: Tensor, out: Tensor, overlap: bool = True) -> None:
    """out (M, k, d) float32 = each row of h (M, k, f) times its expert's weight (m, d, f).

    With `overlap` the preceding kernel must be `experts_gate_up`: `chosen` is read while that runs.
    """
    (m, top_k), (num_experts, n, k) = chosen.shape, weight.shape
    _check(h, (m, top_k, k), out, (m, top_k, n))
    launch = _launch_experts(EXPERTS_SINGLE, chosen, num_experts, n, k)
    kernel = gpu.kernel("linear", "experts_down", **launch.constants)
    arguments = (h, chosen, weight, scale, out, m * top_k, num_experts, n, k)
    kernel((launch.slots,), launch.block, *arguments, shared_bytes=launch.shared_bytes, overlap=overlap)


def add_norm(
    residual: Tensor,
    y: Tensor | None,
    route_weights: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    normed: Tensor,
    router: Tensor | None = None,
    route_weights_out: Tensor | None = None,
    chosen_out: Tensor | None = None,
    overlap: bool = True,
) -> None:
    """residual (M, d) float32 += y; normed (M, d) bfloat16 = RMS norm of it.

    y: None, (M, d), or (M, k, d), summed with the weights `route_weights` (M, k) float32; bfloat16 or float32.
    With `router` (m, d) bfloat16, softmax over all m: the k highest go to `route_weights_out` (M, k) float32, their
    indices to `chosen_out` (M, k) int32, the lower index first among equals.
    """
    m, d = residual.shape
    num_experts, top_k = (0, 0) if router is None else (len(router), chosen_out.shape[1])
    _check(residual, (m, d), normed, (m, d))
    if d % (8 if num_experts else 4) or num_experts > MAX_ROUTED_EXPERTS:
        raise ValueError(f"add_norm takes d in steps of 8 and up to {MAX_ROUTED_EXPERTS} experts: {d}, {num_experts}")
    threads = min(_NORM_THREADS, -(-d // 128) * 32)
    constants = {"THREADS": threads, "CHUNKS": -(-d // (4 * threads)), "EXPERTS": num_experts}
    constants["ROUTES"] = y.shape[1] if y is not None and y.ndim == 3 else 1
    constants["Y_FLOAT"] = int(y is not None and y.dtype == torch.float32)
    kernel = gpu.kernel("elementwise", "add_norm", **constants)
    outputs = (route_weights_out, chosen_out)
    arguments = (residual, y, route_weights, norm_weight, normed, router, *outputs, d, top_k, float(eps))
    kernel((m,), threads, *arguments, overlap=overlap)


def in_proj_conv_ref(
    x: Tensor, weight: Tensor, scale: Tensor, conv_weight: Tensor, conv_bias: Tensor, states: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Like `in_proj_conv` without a bias, given the states (e, w-1) themselves -> u, z (b, e); float32."""
    u, z = F.linear(x.float(), weight.float() * scale[:, None]).to(x.dtype).chunk(2, dim=-1)
    outputs = []
    for state, row in zip(states, u, strict=True):
        window = torch.cat([state, row[:, None]], dim=-1)
        state.copy_(window[:, 1:])
        outputs.append(F.silu((window.float() * conv_weight.float()).sum(-1) + conv_bias.float()))
    return torch.stack(outputs), z


def experts_ref(
    x: Tensor, chosen: Tensor, gate_up: Tensor, gate_up_scale: Tensor, down: Tensor, down_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`experts_gate_up`, then `experts_down` of its result: x (M, d) -> (M, k, f) in x.dtype and (M, k, d) float32."""
    h, out = [], []
    for row, experts in zip(x, chosen.tolist(), strict=True):
        for expert in experts:
            both = F.linear(row.float(), gate_up[expert].float() * gate_up_scale[expert][:, None])
            gate, up = both.chunk(2)
            h.append((F.silu(gate) * up).to(x.dtype))
            out.append(F.linear(h[-1].float(), down[expert].float() * down_scale[expert][:, None]))
    return torch.stack(h).unflatten(0, chosen.shape), torch.stack(out).unflatten(0, chosen.shape)


def route_ref(normed: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Route weights (M, k) and chosen experts (M, k) of normed (M, d), the lower index first among equals; float32."""
    probabilities = F.linear(normed.float(), router.float()).softmax(-1)
    weights, chosen = probabilities.sort(dim=-1, descending=True, stable=True)
    return weights[:, :top_k], chosen[:, :top_k].int()


def _launch(
    tilings: dict[int, Tiling], m: int, n: int, k: int, device: torch.device, can_split: bool = False
) -> _Launch:
    tiles = token_tiles(m)
    tiling, sms = tilings[tiles], gpu.sm_count(device)
    if tilings is SINGLE and n < 16 * sms:
        tiling = FEW_ROWS.get(tiles, tiling)
    split = _split(tiling, tiles, n, k, sms) if can_split and tiles > 1 else 1
    return _make(tiling, tilings is PAIRED, tiles, n, k, sms, split)


def _launch_experts(tilings: dict[int, Tiling], chosen: Tensor, num_experts: int, n: int, k: int) -> _Launch:
    (m, top_k), device = chosen.shape, chosen.device
    if chosen.dtype != torch.int32 or m * top_k > MAX_ASSIGNMENTS or num_experts > MAX_EXPERTS:
        raise ValueError(
            f"chosen must be int32 of at most {MAX_ASSIGNMENTS} for at most {MAX_EXPERTS} experts, "
            f"got {chosen.dtype} {tuple(chosen.shape)} for {num_experts}"
        )
    tiles = expert_tiles(m, top_k, num_experts)
    launch = _make(tilings[tiles], tilings is EXPERTS_PAIRED, tiles, n, k, gpu.sm_count(device), 1)
    most = min(num_experts + m * top_k // (8 * tiles), m * top_k)
    return launch._replace(slots=min(launch.slots, launch.tiles * most))


def _make(tiling: Tiling, paired: bool, token_tiles: int, n: int, k: int, sms: int, split: int) -> _Launch:
    parts = 2 if paired else 1
    out_rows = 16 * tiling.row_tiles // parts * tiling.warps_n
    constants = {
        "PAIRED": int(paired),
        "TOKEN_TILES": token_tiles,
        "ROW_TILES": tiling.row_tiles,
        "WARPS_N": tiling.warps_n,
        "WARPS_K": tiling.warps_k,
        "DEPTH": tiling.depth,
        "BLOCKS": tiling.resident,
        "SPLIT": split,
        "STAGES": tiling.stages,
        "TAIL": int(k % _UNIT > 0),
    }
    shared_bytes = 4 * tiling.warps_k * parts * 8 * token_tiles * (out_rows + 4)
    shared_bytes += tiling.stages * 8 * token_tiles * 2 * (_UNIT * tiling.warps_k + 8)
    block = 32 * tiling.warps_n * tiling.warps_k
    return _Launch(constants, block, shared_bytes, -(-n // out_rows), sms * tiling.blocks)


def _split(tiling: Tiling, token_tiles: int, n: int, k: int, sms: int) -> int:
    """Into how many parts to split the columns, so that every multiprocessor has work and every warp a unit."""
    tiles = -(-n // (16 * tiling.row_tiles * tiling.warps_n))
    split = 1
    while (
        2 * split * tiles <= sms * tiling.blocks
        and 2 * split * tiling.warps_k * _UNIT <= k
        and 2 * split * 8 * token_tiles * n <= _MAX_PARTS
        and tiles <= _MAX_SPLIT_TILES
    ):
        split *= 2
    return split


def expert_tiles(m: int, top_k: int, num_experts: int) -> int:
    """How many tiles of 8 tokens an expert processes at a time: 1 as long as few experts have more, 2 otherwise."""
    return 1 if 8 * token_tiles(m) * top_k <= 4 * num_experts or m <= 8 else 2


def token_tiles(m: int) -> int:
    """In how many tiles of 8 the kernels process m tokens: 1, 2, 4 or 8. Equal numbers mean the same kernels."""
    return 1 << (-(-m // 8) - 1).bit_length()


def _tokens(x: Tensor) -> int:
    if not 1 <= len(x) <= MAX_TOKENS:
        raise ValueError(f"{len(x)} tokens, these kernels take 1 to {MAX_TOKENS}; for more see gpu_prefill.py")
    return len(x)


def _check(x: Tensor, x_shape: tuple[int, ...], out: Tensor, out_shape: tuple[int, ...]) -> None:
    for name, tensor, shape in (("the input", x, x_shape), ("out", out, out_shape)):
        if tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous {shape}, got {tuple(tensor.shape)} {tensor.stride()}")


@cache
def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the partial sums of blocks that share a tile, and their counts. Captured graphs point to it, so it
    never grows."""
    with torch.inference_mode(False):
        return torch.empty(_MAX_PARTS, device=device), torch.zeros(_MAX_SPLIT_TILES, device=device)
