"""The selective scan of Mamba: h' = exp(delta A) h + delta B u, y = C h + D u, gated by SiLU(z).

`selective_scan_ref` is the definition; `selective_scan` computes the same with the fastest available kernel. Letters as
in model/jamba.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.kernels import cpu, cpu_grad, gpu

try:
    from model.kernels.selective_scan_triton import selective_scan_triton
except ImportError:  # a PyTorch without Triton, as the CPU wheels are
    selective_scan_triton = None

_TILE_STEPS = 32
_BITS = {torch.float32: 32, torch.bfloat16: 16}
# how scan.cu divides the work
_SHARING = {"LANES": 8, "CHANNELS_PER_LANE": 2, "CHANNELS": 32, "TILE": 32, "BLOCKS_PER_SM": 2}
_MIN_CHUNK_STEPS = 64  # with fewer, the overhead of a chunk outweighs the gain from parallelism


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    state: Tensor | None = None,
    delta_bias: Tensor | None = None,
) -> Tensor:
    """Run the selective scan over t tokens, starting from `state` (None: zeros) and updating it in place.

    Shapes: u, delta, z (b, t, e); A (e, n); B, C (b, t, n); D (e,); state (b, e, n) float32 -> (b, t, e) in u.dtype.
    delta is after softplus, or before it when `delta_bias` (e,) is given: then softplus(delta + delta_bias) is used.
    t may be any length >= 1; splitting t over calls gives the same result. Differentiable when `state` is None.
    Source: Mamba, section 3.2, algorithm 2; state-spaces/mamba ops/selective_scan_interface.py::selective_scan_ref.
    """
    if gpu.supports(u, delta, A, B, C, D, z, state, delta_bias) and _fits_cuda(u, delta, A, B, C, z, state):
        return selective_scan_cuda(u, delta, A, B, C, D, z, state, delta_bias)
    if cpu.supports(u, delta, A, B, C, D, z, delta_bias):
        return cpu.selective_scan(u, delta, A, B, C, D, z, state, delta_bias)
    if state is None and cpu_grad.supports(u, delta, A, B, C, D, z, delta_bias):
        return cpu_grad.selective_scan(u, delta, A, B, C, D, z, delta_bias)
    if delta_bias is not None:
        delta = F.softplus(delta.float() + delta_bias.float())
    if u.is_cuda and selective_scan_triton is not None:
        return selective_scan_triton(u, delta, A, B, C, D, z, state)
    return selective_scan_torch(u, delta, A, B, C, D, z, state)


def selective_scan_cuda(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    state: Tensor | None = None,
    delta_bias: Tensor | None = None,
    chunks: int | None = None,
) -> Tensor:
    """`selective_scan` with scan.cu; only if `_fits_cuda`. Not differentiable.

    `chunks`: into how many parts the sequence is split; None: as many as fill the card.
    """
    (b, t, e), n = u.shape, A.shape[1]
    constants = _SHARING | {"LANES": min(_SHARING["LANES"], n // 2)}
    threads = constants["CHANNELS"] * constants["LANES"] // constants["CHANNELS_PER_LANE"]
    blocks, tile = -(-e // constants["CHANNELS"]), constants["TILE"]
    if chunks is None:
        room = constants["BLOCKS_PER_SM"] * gpu.sm_count(u.device) // (blocks * b)
        chunks = max(1, min(room, t // _MIN_CHUNK_STEPS))
    chunk_steps = -(-t // (chunks * tile)) * tile
    chunks = -(-t // chunk_steps)
    out = torch.empty(b, t, e, dtype=u.dtype, device=u.device)
    ends = torch.empty(b, chunks - 1, e, n, device=u.device) if chunks > 1 else None
    delta_sums = torch.empty(b, chunks - 1, e, device=u.device) if chunks > 1 else None
    A, D = A.float().contiguous(), D.float().contiguous()
    bias = None if delta_bias is None else delta_bias.float().contiguous()
    options = {"N": n, "CHUNKED": int(chunks > 1), "SOFTPLUS": int(bias is not None)}
    options |= {"ACTIVATION_BITS": _BITS[u.dtype], "ROW_BITS": _BITS[B.dtype]}
    scan = gpu.kernel("scan", "scan", **constants, **options)
    shared_bytes = 8 * tile * (constants["CHANNELS"] * 3 + 2 * n + 8)  # see the layout in scan.cu
    strides = [stride for x in (u, delta, z, B, C) for stride in x.stride()[:2]]
    for first_chunk in range(min(chunks, 2)):
        grid = (blocks, b, max(chunks - 1, 1))
        tensors = (u, delta, z, B, C, A, D, bias, state, out, ends, delta_sums)
        scan(grid, threads, *tensors, t, e, chunk_steps, first_chunk, *strides, shared_bytes=shared_bytes)
    return out


def _fits_cuda(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor, state: Tensor | None) -> bool:
    """Whether scan.cu supports these tensors: it loads eight channels (16 bytes) at a time, and states in pairs."""
    eights = all(
        x.dtype == u.dtype and x.stride(-1) == 1 and x.data_ptr() % 16 == 0
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
        for x in (u, delta, z)
    )  # fmt: skip
    rows = B.dtype == C.dtype and B.dtype in _BITS and B.stride(-1) == C.stride(-1) == 1
    own_state = state is None or (state.is_contiguous() and state.dtype == torch.float32)
    return eights and rows and own_state and u.dtype in _BITS and u.shape[-1] % 8 == 0 and A.shape[1] in (4, 8, 16, 32)


def selective_scan_torch(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor | None = None
) -> Tensor:
    """`selective_scan` in plain PyTorch: a loop over tiles, all steps of a tile at once."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    A = A.to(dtype)
    h = u.new_zeros(u.shape[0], *A.shape, dtype=dtype) if state is None else state
    outputs = []
    tiles = zip(*(x.split(_TILE_STEPS, dim=1) for x in (u, delta, B, C)), strict=True)
    for tile in tiles:
        arguments = [*(x.to(dtype) for x in tile), A, h]
        # a tile needs n times the memory of its inputs, so it is recomputed for the gradient instead of kept
        recompute = torch.is_grad_enabled()
        y, h = checkpoint(_scan_tile, *arguments, use_reentrant=False) if recompute else _scan_tile(*arguments)
        outputs.append(y)
    if state is not None:
        state.copy_(h)
    y = torch.cat(outputs, dim=1) + D.to(dtype) * u
    return (y * F.silu(z.to(dtype))).to(u.dtype)


def _scan_tile(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(b, l, ...) inputs and h (b, e, n) -> outputs (b, l, e) and the next h.

    By doubling: after the round with `shift`, `states` holds the contributions of the last 2*shift steps and `decay`
    the product of their decays. Only products of decays <= 1 occur, so nothing overflows and nothing is divided.
    """
    decay = torch.exp(delta[..., None] * A)  # (b, l, e, n)
    states = (delta * u)[..., None] * B[:, :, None]
    shift = 1
    while shift < u.shape[1]:
        carried = states[:, shift:] + decay[:, shift:] * states[:, :-shift]
        states = torch.cat([states[:, :shift], carried], dim=1)
        decay = torch.cat([decay[:, :shift], decay[:, shift:] * decay[:, :-shift]], dim=1)
        shift *= 2
    states = states + decay * h[:, None]
    return (states @ C[..., None]).squeeze(-1), states[:, -1]


def selective_scan_ref(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, state: Tensor | None = None
) -> Tensor:
    """The definition, a step at a time; arguments as in `selective_scan`."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    u32, delta, A, B, C, D, z = (x.to(dtype) for x in (u, delta, A, B, C, D, z))
    h = torch.zeros_like(A).repeat(u.shape[0], 1, 1) if state is None else state
    outputs = []
    for i in range(u.shape[1]):
        decay = torch.exp(delta[:, i, :, None] * A)  # (b, e, n)
        h = decay * h + (delta[:, i] * u32[:, i])[..., None] * B[:, i, None]
        outputs.append((h * C[:, i, None]).sum(-1))
    if state is not None:
        state.copy_(h)
    y = torch.stack(outputs, dim=1) + D * u32
    return (y * F.silu(z)).to(u.dtype)
