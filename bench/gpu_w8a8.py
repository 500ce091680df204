"""Tiles of the W8A8 products at the shapes of the 52B Jamba, each checked against the definition before it is timed.

`top_per_s` is 10^12 operations a second beside the bfloat16 product's in the same run and torch._int_mm's. Rounding the
tokens is a row of its own.
    python -m bench.gpu_w8a8 [--tokens 16384] [--shape jamba-52b]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.gpu_kit import measure_ceilings, time_calls
from bench.runs import BenchRun
from bench.shapes import SHAPES
from model.config import JambaConfig
from model.kernels import w8a8
from model.kernels.w8a8 import Tile

MAX_ERROR = 2e-2  # of the largest value: bfloat16 outputs
# rows, columns, depth, warps, stages, group, tma: all fit an H100's registers and shared memory
TILES = {
    "SINGLE": [Tile(128, 256, 128, 8, 3, group, True) for group in (16, 8, 32)] + [Tile(256, 128, 128, 8, 3, 16, True)],
    "SPANNED": [
        *(Tile(128, 128, 128, 8, 4, group, True) for group in (8, 16)),
        *(Tile(128, 256, 128, warps, 3, 8, True) for warps in (8, 16)),
        *(Tile(256, 128, 128, warps, 3, 8, True) for warps in (8, 16)),
    ],
    "PAIRED": [Tile(128, 128, 128, 8, 3, group, True) for group in (8, 16, 32)],
}


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
    add(run, "rounding, f", None, lambda: w8a8.quantize_tokens(wide, spans=True).scale, None, 0, device)
    values = w8a8.quantize_tokens(x).values
    add(run, "in_proj, _int_mm", None, lambda: torch._int_mm(values, in_proj[0].T), None, 4 * t * d * e, device)
    gates = (up[0][:f], up[1][:f], up[0][f:], up[1][f:])
    own = weight(device, m, 2 * f, d), weight(device, m, d, f)
    chosen, shares = torch.rand(t, m, device=device).argsort(-1)[:, :k], torch.rand(t, k, device=device)

    def mix() -> Tensor:
        return w8a8.mix_experts(x, shares, chosen, *own[0], *own[1])

    first = x[:64].float()
    expected_in = w8a8.linear_ref(first, *in_proj)
    expected_down = w8a8.linear_ref(wide[:64].float(), *down, spans=True)
    expected_swiglu = w8a8.swiglu(first, *gates, *down)
    expected_mix = w8a8.mix_experts_ref(first, shares[:64], chosen[:64], *own[0], *own[1])
    for kind, tile in each_tile():
        if kind == "SINGLE":
            add(run, "in_proj", tile, lambda: w8a8.linear(x, *in_proj), expected_in, 4 * t * d * e, device)
            continue
        if kind == "SPANNED":
            add(run, "down", tile, lambda: w8a8.linear(wide, *down, spans=True), expected_down, 2 * t * d * f, device)
        add(run, f"swiglu, {kind}", tile, lambda: w8a8.swiglu(x, *gates, *down), expected_swiglu, 6 * t * d * f, device)
        add(run, f"experts, {kind}", tile, mix, expected_mix, 6 * t * k * d * f, device)
    bench_kernels(run, "experts", mix)


def each_tile() -> Iterator[tuple[str, Tile]]:
    """In the place of what ships, one at a time."""
    for kind, tiles in TILES.items():
        before = getattr(w8a8, kind)
        for tile in tiles:
            setattr(w8a8, kind, tile)
            yield kind, tile
        setattr(w8a8, kind, before)


def bench_kernels(run: BenchRun, product: str, call: Callable[[], Tensor]) -> None:
    """A row for each kernel of one call."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize()
    for event in sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total):
        if event.self_device_time_total:
            run.add(product=f"{product}: {event.key[:60]}", us=event.self_device_time_total)


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
