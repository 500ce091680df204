"""Tiles of the W8A8 products at the shapes of the 52B Jamba, each checked against the definition before it is timed.

`top_per_s` is 10^12 operations a second beside the bfloat16 product's in the same run and torch._int_mm's. Rounding the
tokens is a row of its own.
    python -m bench.gpu_w8a8 [--tokens 16384] [--shape jamba-52b]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from bench.gpu_kit import measure_ceilings, time_calls
from bench.runs import BenchRun
from bench.shapes import SHAPES
from model.config import JambaConfig
from model.kernels import w8a8
from model.kernels.w8a8 import Tile

MAX_ERROR = 2e-2  # of the largest value: bfloat16 outputs
# rows, columns, depth, warps, stages, group, tma: all fit an H100's registers and shared memory
SINGLE = [
    *(Tile(128, 256, 128, 8, 3, group, True) for group in (8, 4, 16)),
    *(Tile(128, 256, 128, 8, 4, 8, True), Tile(128, 256, 128, 8, 3, 8, False)),
    *(Tile(128, 128, 128, 8, 4, 8, True), Tile(128, 128, 128, 4, 4, 8, True)),
]
PAIRED = [
    *(Tile(128, 128, 128, 8, 3, group, True) for group in (8, 4, 16)),
    *(Tile(128, 128, 128, 8, 4, 8, True), Tile(128, 128, 128, 8, 3, 8, False), Tile(128, 64, 128, 8, 4, 8, True)),
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="jamba-52b")
    parser.add_argument("--tokens", type=int, default=16_384)
    arguments = parser.parse_args(argv)
    device = torch.device("cuda")
    run = BenchRun("gpu-w8a8", argv=sys.argv if argv is None else ["gpu_w8a8", *argv])
    torch.manual_seed(0)
    with torch.inference_mode():
        run.add(product="bfloat16, square", top_per_s=measure_ceilings(device).matmul_flop_per_s / 1e12)
        bench_products(run, SHAPES[arguments.shape], arguments.tokens, device)
    run.finish()


def bench_products(run: BenchRun, config: JambaConfig, t: int, device: torch.device) -> None:
    d, f, e, m, k = config.hidden_size, config.intermediate_size, config.mamba_d_inner, config.num_experts, 2
    x, up, down = random(t, d, device), weight(device, 2 * f, d), weight(device, d, f)
    in_proj, wide = weight(device, 2 * e, d), random(t, f, device)
    add(run, "rounding, d", None, lambda: w8a8.quantize_tokens(x).scale, None, 0, device)
    add(run, "rounding, f", None, lambda: w8a8.quantize_tokens(wide).scale, None, 0, device)
    values = w8a8.quantize_tokens(x).values
    add(run, "in_proj, _int_mm", None, lambda: torch._int_mm(values, in_proj[0].T), None, 4 * t * d * e, device)
    gates, expected_in = (up[0][:f], up[1][:f], up[0][f:], up[1][f:]), w8a8.linear_ref(x[:64].float(), *in_proj)
    expected_down = w8a8.linear_ref(wide[:64].float(), *down)
    expected_gated = torch.nn.functional.silu(w8a8.linear_ref(x[:64].float(), *gates[:2]))
    expected_gated *= w8a8.linear_ref(x[:64].float(), *gates[2:])
    for tile in SINGLE:
        w8a8.SINGLE = tile
        add(run, "in_proj", tile, lambda: w8a8.linear(x, *in_proj), expected_in, 4 * t * d * e, device)
        add(run, "down", tile, lambda: w8a8.linear(wide, *down), expected_down, 2 * t * d * f, device)
    for tile in PAIRED:
        w8a8.PAIRED = tile
        add(run, "gate and up", tile, lambda: w8a8.gated(x, *gates), expected_gated, 4 * t * d * f, device)
    own = weight(device, m, 2 * f, d), weight(device, m, d, f)
    chosen = torch.rand(t, m, device=device).argsort(-1)[:, :k]
    shares = torch.rand(t, k, device=device)
    expected = w8a8.mix_experts_ref(x[:64].float(), shares[:64], chosen[:64], *own[0], *own[1])
    for single, paired in zip(SINGLE, PAIRED, strict=False):
        w8a8.SINGLE, w8a8.PAIRED = single, paired
        mix = lambda: w8a8.mix_experts(x, shares, chosen, *own[0], *own[1])
        add(run, "experts", (*single, *paired), mix, expected, 6 * t * k * d * f, device)


def add(
    run: BenchRun,
    product: str,
    tile: tuple | None,
    call: Callable[[], Tensor],
    expected: Tensor | None,
    operations: int,
    device: torch.device,
) -> None:
    """A row; a tile that does not compile, or is wrong, says so instead of a time."""
    row: dict[str, object] = {"product": product, "tile": "" if tile is None else " ".join(map(str, map(int, tile)))}
    try:
        out = call()
        if expected is not None:
            error = (out[: len(expected)].float() - expected).abs().max() / expected.abs().max()
            row["max_error"] = error.item()
            if not row["max_error"] < MAX_ERROR:
                raise RuntimeError(f"wrong by {row['max_error']:.1e} of the largest value")
        own_s = median(time_calls(device, call))
        row |= {"us": 1e6 * own_s, "top_per_s": operations / own_s / 1e12 if operations else None}
    except Exception as error:  # of the compiler too
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
    run.add(**row)
    print(row, flush=True)


def random(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.bfloat16, device=device)


def weight(device: torch.device, *shape: int) -> tuple[Tensor, Tensor]:
    """int8 rows and their scales."""
    values = torch.empty(shape, dtype=torch.int8, device=device)
    for matrix in values if len(shape) == 3 else (values,):  # a draw counts its numbers in 32 bits
        matrix.random_(-127, 128)
    return values, torch.rand(shape[:-1], device=device) * shape[-1] ** -0.5 / 64


if __name__ == "__main__":
    main()
