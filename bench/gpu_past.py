"""Attention of a prefill segment over a long past: PyTorch's flash attention, and tiles of our Triton kernel.

At the heads of the 52B Jamba. `first_ms` is the first call, which compiles.
    python -m bench.gpu_past [--pasts 0 8192 32768 131072 245760] [--queries 2048 16384]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from bench.gpu_kit import synchronize, time_calls
from bench.runs import BenchRun
from model import attention
from model.kernels import gpu_past

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MAX_ERROR = 2e-2  # of the largest value: bfloat16 outputs
# queries, keys, warps, stages, tma: all fit an H100's registers and shared memory
TILES = [gpu_past.Tile(*tile) for tile in ((128, 128, 8, 3, True), (128, 64, 8, 4, True), (128, 128, 8, 2, False))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pasts", type=int, nargs="+", default=[0, 8192, 32_768, 131_072, 245_760])
    parser.add_argument("--queries", type=int, nargs="+", default=[2048, 16_384])
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = BenchRun("gpu-past", argv=sys.argv)
    with torch.inference_mode():
        for queries in arguments.queries:
            for past in arguments.pasts:
                bench_shape(run, queries, past, device)
    run.finish()


def bench_shape(run: BenchRun, queries: int, past: int, device: torch.device) -> None:
    """A row for each tile, checked against flash attention."""
    q = torch.randn(queries, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    keys, values = torch.randn(2, past + queries, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    flop = 4 * HEADS * HEAD_DIM * queries * (past + queries / 2)
    expected = flash(q, keys, values)
    ways: dict[str, tuple[gpu_past.Tile, Callable[..., Tensor]]] = {"flash": (gpu_past.TILE, flash)}
    ways |= {f"triton {' '.join(map(str, map(int, tile)))}": (tile, gpu_past.attend) for tile in TILES}
    for name, (tile, attend) in ways.items():
        row: dict[str, object] = {"queries": queries, "past": past, "way": name}
        gpu_past.TILE = tile
        try:
            begin = time.perf_counter()
            out = attend(q, keys, values)
            synchronize(device)
            row["first_ms"] = 1e3 * (time.perf_counter() - begin)
            row["max_error"] = ((out - expected).abs().max() / expected.abs().max()).item()
            if not row["max_error"] < MAX_ERROR:
                raise RuntimeError(f"wrong by {row['max_error']:.1e} of the largest value")
            own_s = median(time_calls(device, lambda attend=attend: attend(q, keys, values), warmup=1, repeats=3))
            row |= {"ms": 1e3 * own_s, "tflop_per_s": flop / own_s / 1e12}
        except Exception as error:  # of the compiler too
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        run.add(**row)
        print(row, flush=True)
    gpu_past.TILE = TILES[0]


def flash(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What attention.py does without our kernel."""
    takes, gpu_past.takes = gpu_past.takes, lambda *_: False
    try:
        return attention.attend_past(q, keys, values)
    finally:
        gpu_past.takes = takes


if __name__ == "__main__":
    main()
