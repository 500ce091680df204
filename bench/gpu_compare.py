"""Each candidate against what runs today, in one process on one model: prefills, and first tokens behind a prefix.

A row a candidate: gains of each measure (2 = half the time), how far its logits are from today's after one prompt
(relative RMS; routing flips are part of it, and `w8a8` is a change of the arithmetic), and a verdict: "take" when some
measure gains more than the noise and none loses more. Noise is the largest difference between two runs of today's way,
the second behind all candidates but those that change the model. Correctness first: docs/performance.md.
    python -m bench.gpu_compare [--shape jamba-52b] [--only short-graphs w8a8] [--limit-s 75]
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch

from bench.gpu import SMALL_SIZES, Bench, Sizes, bench_first_token, bench_prefill, run_segments, start
from bench.gpu_candidates import CANDIDATES, switched_on
from bench.gpu_kit import Overtime, limit_time, random_tokens
from bench.runs import BenchRun
from bench.shapes import SHAPES

SIZES = Sizes(prefill=(8192, 32_768, 262_144))
LONGER = "longer-segments"  # of twice the length
ORDER = [name for name in CANDIDATES if name != "w8a8"] + [LONGER, "w8a8"]
LEAST_NOISE = 0.02


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="jamba-52b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=ORDER, nargs="+", default=ORDER)
    parser.add_argument("--limit-s", type=float, default=75.0, help="longest time of one candidate")
    arguments = parser.parse_args(argv)
    run = BenchRun("gpu-compare", argv=sys.argv if argv is None else ["gpu_compare", *argv])
    sizes = SMALL_SIZES if arguments.shape.startswith("small") else SIZES
    with torch.inference_mode():
        bench = start(arguments.shape, torch.device(arguments.device), sizes)
        names = [name for name in ORDER if name in arguments.only]
        changing = [name for name in names if name == "w8a8"]
        today, logits = measure(bench), last_logits(bench)
        measured = {name: try_out(bench, name, arguments.limit_s) for name in names if name not in changing}
        again = gains(today, measure(bench))
        measured |= {name: try_out(bench, name, arguments.limit_s) for name in changing}
    noise = max(LEAST_NOISE, *(abs(gain - 1) for gain in again.values()))
    run.add(candidate="today, milliseconds", **today)
    run.add(candidate="today again", **again)
    for name, result in measured.items():
        if isinstance(result, str):
            run.add(candidate=name, verdict=f"leave: {result}")
            continue
        times, own_logits = result
        own = gains(today, times)
        run.add(candidate=name, **own, logits_error=relative_rms(own_logits, logits), verdict=judge(own, noise))
    run.finish()


def try_out(bench: Bench, name: str, limit_s: float) -> tuple[dict[str, float], torch.Tensor] | str:
    """Times and logits with the candidate, or why there are none."""
    print(name, flush=True)
    longer = replace(bench.sizes, segments=tuple(2 * segment for segment in bench.sizes.segments))
    bench = replace(bench, sizes=longer) if name == LONGER else bench
    on: AbstractContextManager[None] = nullcontext() if name == LONGER else switched_on(name, bench.model)
    try:
        with limit_time(limit_s), on:
            return measure(bench), last_logits(bench)
    except (Exception, Overtime) as error:
        traceback.print_exc(limit=-3, file=sys.stdout)
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def measure(bench: Bench) -> dict[str, float]:
    """Milliseconds of each measure."""
    run = BenchRun("", argv=[])  # for its rows
    bench_prefill(bench, run)
    bench_first_token(bench, run)
    return {
        (f"prefill {row['tokens']}" if "tokens" in row else f"{row['by']} {row['context']}"): (
            1e3 * row["median_s"] if "tokens" in row else row["ttft_ms"]
        )
        for row in run.rows
    }


def last_logits(bench: Bench) -> torch.Tensor:
    """Of one prompt, whatever the segments: the second length of `prefill`, in at least two of them."""
    (segment,), model = bench.sizes.segments, bench.model
    state, tokens = model.new_state(), random_tokens(model, bench.sizes.prefill[1], seed=1)
    run_segments(model, state, tokens[:-64], segment)
    return model.forward_packed(tokens[-64:], [64], [state]).float()


def gains(today: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {name: today[name] / other[name] for name in today}


def judge(own: dict[str, float], noise: float) -> str:
    better = [name for name, gain in own.items() if gain > 1 + noise]
    worse = [name for name, gain in own.items() if gain < 1 - noise]
    if better and not worse:
        return "take"
    return f"mixed: slower at {', '.join(worse)}" if better else "leave"


def relative_rms(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
