"""Attention of a prefill segment over a long past: flash attention as it is, and blocks of keys by cuDNN, merged.

At the heads of the 52B Jamba. `block` is how many keys cuDNN gets at once (the past's length: all of it), `first_ms`
the first call, which plans.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pasts", type=int, nargs="+", default=[0, 8192, 32_768, 131_072, 229_376])
    parser.add_argument("--queries", type=int, nargs="+", default=[8192, 16_384, 32_768])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8192, 16_384, 32_768])
    parser.add_argument("--whole", action="store_true", help="the whole past as one block too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = BenchRun("gpu-past", argv=sys.argv)
    with torch.inference_mode():
        for queries in arguments.queries:
            for past in arguments.pasts:
                blocks = [block for block in arguments.blocks if block <= past] or arguments.blocks[:1]
                whole = [past] if arguments.whole and past and past not in blocks else []
                bench_shape(run, queries, past, [None, *blocks, *whole], device)
    run.finish()


def bench_shape(run: BenchRun, queries: int, past: int, blocks: list[int | None], device: torch.device) -> None:
    """A row for each size of block; None is flash attention alone, which the others are checked against."""
    q = torch.randn(queries, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    keys, values = torch.randn(2, past + queries, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=device)
    flop = 4 * HEADS * HEAD_DIM * queries * (past + queries / 2)
    expected = None
    for block in blocks:
        row: dict[str, object] = {"queries": queries, "past": past, "block": block or "flash"}
        gpu_past.ENABLED, gpu_past.BLOCK_KEYS, gpu_past.SEGMENT_UNIT = block is not None, block or 8192, queries

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
        except RuntimeError as error:
            row["error"] = str(error).splitlines()[0][:100]
        run.add(**row)
        print(row, flush=True)


if __name__ == "__main__":
    main()
