"""How near to each other may the boundaries be that get a snapshot? Tokens from the cache, bytes, and what cuts cost.

`replay`: the traces of bench/prefix_traces.py through our policy, with the states and prefill segments of the 52B model
on a GPU and of the shipped one on a CPU. Budgets are bytes; the shipped model's KV is about a fifth of the other's.
`prefill`: the shipped model reads a prompt of short documents, cut and kept at that distance, on one thread.
    python -m bench.snapshot_distance [--seeds 10 11] [--skip replay|prefill]
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from statistics import median

import numpy as np
import torch

from bench.hf_parity import SHIPPED as CHECKPOINT
from bench.prefix_policies import BLOCK_TOKENS, LARGE, SHIPPED, OurCache, Sizes
from bench.prefix_traces import GB, TRACES, replay_all
from bench.runs import BenchRun, time_interleaved
from model import load_model
from model.device_store import DeviceStateStore
from model.engine import EngineRequest, JambaEngine
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings
from model.sampling import SamplingParams
from model.state_eviction import LeastValuable
from model.tokenizer import Tokenizer

# model -> its states, prefill segment and sparse grid, budgets in GB, distances
CASES: dict[str, tuple[Sizes, int, int, tuple[float, ...], tuple[int, ...]]] = {
    "shipped, CPU": (SHIPPED, 512, 16, (0.4, 1.5), (512, 2048)),
    "52B, GPU": (LARGE, 16_384, 2, (4, 16), (512, 2048, 8192)),
}
_PROMPT_TOKENS = 4096
_DOCUMENT_TOKENS = (250, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", choices=("replay", "prefill"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = BenchRun("snapshot-distance", argv=sys.argv)
    if arguments.skip != "prefill":
        measure_prefill(run, arguments.repeats)
    if arguments.skip != "replay":
        replay_traces(run, arguments.seeds)
    run.finish()


def replay_traces(run: BenchRun, seeds: list[int]) -> None:
    for name, make in TRACES.items():
        traces = [make(seed) for seed in seeds]
        for case, (sizes, segment, sparse, budgets_gb, distances) in CASES.items():
            for budget_gb in budgets_gb:
                for distance in distances:
                    settings = PlanSettings(BLOCK_TOKENS, segment, distance, segment * sparse)
                    build = partial(build_cache, settings=settings, sizes=sizes)
                    found = replay_all(traces, build, int(budget_gb * GB))
                    run.add(what="replay", trace=name, case=case, budget_gb=budget_gb, distance=distance, **found)
                    print(run.rows[-1], flush=True)


def build_cache(max_bytes: int, settings: PlanSettings, sizes: Sizes) -> OurCache:
    return OurCache(max_bytes, LeastValuable(), settings, sizes=sizes)


def measure_prefill(run: BenchRun, repeats: int) -> None:
    """Processor seconds to the first token of a prompt that nothing is known of; snapshots go to a store in memory."""
    model, tokenizer = load_model(CHECKPOINT, dtype=torch.bfloat16), Tokenizer.load(CHECKPOINT)
    rng = np.random.default_rng(0)
    lengths = rng.integers(*_DOCUMENT_TOKENS, _PROMPT_TOKENS)
    boundaries = tuple(int(end) for end in np.cumsum(lengths) if end < _PROMPT_TOKENS - 60)
    token_ids = tuple(map(int, rng.integers(100, 8000, _PROMPT_TOKENS)))
    distances: list[int | None] = [None, 2048, 512, 0]
    cuts: dict[int | None, int] = {}
    times_s: dict[int | None, list[float]] = {distance: [] for distance in distances}

    def read(distance: int | None) -> None:
        settings = PlanSettings(min_snapshot_distance=distance or 0)
        cache = PrefixCache([DeviceStateStore(1 << 30)], b"bench", settings)
        ends = () if distance is None else boundaries
        cuts[distance] = len(cache.plan(token_ids, ends).cuts)
        engine = JambaEngine(model, tokenizer, cache, max_context_tokens=2 * _PROMPT_TOKENS)
        engine.add(EngineRequest(token_ids, ends, SamplingParams(max_new_tokens=1, ignore_eos=True)))
        start = time.process_time()
        while engine.has_work():
            engine.step()
        times_s[distance].append(time.process_time() - start)
        engine.close()

    time_interleaved({str(distance): partial(read, distance) for distance in distances}, warmup=1, repeats=repeats)
    for distance, times in times_s.items():
        times = times[1:]
        run.add(
            what="prefill", tokens=_PROMPT_TOKENS, documents=len(boundaries) + 1, distance=distance,
            segments=cuts[distance], median_cpu_s=median(times), best_cpu_s=min(times),
            times_plain=median(times) / median(times_s[None][1:]), best_times_plain=min(times) / min(times_s[None][1:]),
        )  # fmt: skip
        print(run.rows[-1], flush=True)


if __name__ == "__main__":
    main()
