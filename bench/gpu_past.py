"""Attention of a prefill segment over a long past: flash attention as it is, blocks of keys by cuDNN, merged, and one
Triton kernel.

At the heads of the 52B Jamba. `way` is how many keys cuDNN gets at once (the past's length: all of it) or the Triton
kernel's tile, `first_ms` the first call, which plans or compiles.
    python -m bench.gpu_past [--pasts 8192 32768 131072 245760] [--queries 8192 16384] [--blocks 8192 16384 32768]
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

import torch

from bench.gpu_kit import synchronize, time_calls
from bench.runs import BenchRun
from model.attention import _any_length, _attend_past
from model.kernels import gpu_past

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MAX_ERROR = 2e-2  # of the largest value: bfloat16 outputs
# queries, keys, warps, stages, tma: all fit an H100's registers and shared memory
TILES = [gpu_past.Tile(*tile) for tile in ((128, 128, 8, 2, True), (128, 64, 8, 3, True), (128, 128, 8, 3, True))]
TILES += [gpu_past.Tile(*tile) for tile in ((64, 128, 4, 2, True), (128, 128, 8, 2, False))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pasts", type=int, nargs="+", default=[0, 8192, 32_768, 131_072, 229_376])
    parser.add_argument("--queries", type=int, nargs="+", default=[8192, 16_384, 32_768])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8192, 16_384, 32_768])
    parser.add_argument("--tiles", type=int, default=len(TILES), help="how many of the Triton kernel's")
    parser.add_argument("--whole", action="store_true", help="the whole past as one block too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = BenchRun("gpu-past", argv=sys.argv)
    with torch.inference_mode():
        for queries in arguments.queries:
            for past in arguments.pasts:
                blocks = [block for block in arguments.blocks if block <= past] or arguments.blocks[:1]
                whole = [past] if arguments.whole and past and past not in blocks else []
                bench_shape(run, queries, past, [None, *TILES[: arguments.tiles], *blocks, *whole], device)
    run.finish()


def bench_shape(
    run: BenchRun, queries: int, past: int, ways: list[int | gpu_past.Tile | None], device: torch.device
) -> None:
    """A row for each size of block or tile; None is flash attention alone, which the others are checked against."""
    q = torch.randn(queries, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    keys, values = torch.randn(2, past + queries, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    flop = 4 * HEADS * HEAD_DIM * queries * (past + queries / 2)
    expected = None
    for way in ways:
        row: dict[str, object] = {"queries": queries, "past": past, "way": _choose(way, queries)}

        def attend() -> torch.Tensor:
            with _any_length(q):
                return _attend_past(q, keys, values)

        try:
            begin = time.perf_counter()
            out = attend()
            synchronize(device)
            row["first_ms"] = 1e3 * (time.perf_counter() - begin)
            expected = out if expected is None else expected
            row["max_error"] = ((out - expected).abs().max() / expected.abs().max()).item()
            if not row["max_error"] < MAX_ERROR:
                raise RuntimeError(f"wrong by {row['max_error']:.1e} of the largest value")
            own_s = median(time_calls(device, attend, warmup=1, repeats=3))
            row |= {"ms": 1e3 * own_s, "tflop_per_s": flop / own_s / 1e12}
        except Exception as error:  # of the compiler too
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        run.add(**row)
        print(row, flush=True)


def _choose(way: int | gpu_past.Tile | None, queries: int) -> str:
    """Set gpu_past to it; its name in the table."""
    if isinstance(way, gpu_past.Tile):
        gpu_past.METHOD, gpu_past.TILE = "triton", way
        return f"triton {' '.join(map(str, map(int, way)))}"
    gpu_past.METHOD, gpu_past.BLOCK_KEYS, gpu_past.SEGMENT_UNIT = way and "blocks", way or 8192, queries
    return "flash" if way is None else f"blocks of {way}"


if __name__ == "__main__":
    main()
