"""The large Jamba on one GPU with random int8 weights: speed and memory relative to the limits of the GPU.

Sections: copy (the limits), memory, decode, batch, first-token, prefill, sharing (time between tokens of running
answers during a long prefill), profile. Each prints a table and writes its JSON; if one fails or takes too long, it
prints why and the next one begins. Decoding uses random states, which cost the same as those of a prefill. On a GPU
`batch` has each row twice: with separate contexts, and with contexts that share all but the last 256 tokens, which are
read once for as many sequences as one read can serve. `first-token` measures the engine with a cached prefix, and the
model alone with the state in place.
`times_vllm` is relative to vLLM 0.24, measured on an H100.
`--quick` runs the most informative rows of all sections in 90 seconds; `--w8a8` quantizes activations in prefills.
    python -m bench.gpu [--shape jamba-52b] [--sections copy,decode] [--segments 16384,32768] [--limit-s 75] [--quick]
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu_first_token import bench_first_token, bench_tiers
from bench.gpu_kit import (
    Bench,
    Overtime,
    Sizes,
    filled_state,
    limit_time,
    measure_ceilings,
    random_tokens,
    synchronize,
    time_calls,
    word_tokenizer,
)
from bench.random_weights import random_model
from bench.runs import BenchRun
from bench.shapes import SHAPES, decode_bytes, prefill_flop, resident_bytes, state_bytes
from model.engine import JambaEngine
from model.engine_request import EngineRequest
from model.jamba import Jamba
from model.kernels import gpu_attention
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings
from model.sampling import SamplingParams
from model.state import HybridState, Origin
from model.w8a8 import round_activations

VLLM_PREFILL = {8192: 16_700, 32_768: 16_200, 131_072: 15_100, 262_144: 14_300}  # tokens per second
VLLM_DECODE = {(1024, 1): 110, (131_072, 1): 101, (261_000, 1): 95, (8192, 8): 477, (8192, 16): 779}
VLLM_DECODE |= {(8192, 32): 1337, (131_072, 4): 361}


QUICK_SIZES = Sizes(
    prefill=(8192, 32_768, 131_072),
    decode=(1024, 261_000),
    batches=((8192, 8), (8192, 32)),
    first_token=(131_072,),
    sharing=(4, 1024, 32_768),
    steps=8,
)
SMALL_SIZES = Sizes((96, 200), (64,), (33, 200), ((40, 3),), (64,), (2, 20, 200), 16, 4)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="jamba-52b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated, in their order")
    parser.add_argument("--segments", help="prefill segment lengths, comma-separated")
    parser.add_argument("--contexts", help="lengths of prefills and of cached prefixes, comma-separated")
    parser.add_argument("--limit-s", type=float, default=75.0, help="longest time of one section")
    parser.add_argument("--quick", action="store_true", help="few rows of each section, 15 s at most")
    parser.add_argument("--w8a8", action="store_true", help="quantize activations in prefills")
    arguments = parser.parse_args(argv)
    names = arguments.sections.split(",")
    if strangers := set(names) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(strangers))}; there are {', '.join(SECTIONS)}")
    sizes = QUICK_SIZES if arguments.quick else Sizes()
    sizes = SMALL_SIZES if arguments.shape.startswith("small") else sizes
    changed = {"segments": arguments.segments, "prefill": arguments.contexts, "first_token": arguments.contexts}
    for field, text in changed.items():
        if text:
            sizes = replace(sizes, **{field: tuple(map(int, text.split(",")))})
    device = torch.device(arguments.device)
    with torch.inference_mode():
        bench = start(arguments.shape, device, sizes)
        if arguments.w8a8:
            round_activations(bench.model)
        for name in names:
            limit_s = min(15.0, arguments.limit_s) if arguments.quick else arguments.limit_s
            run_section(name, bench, limit_s, argv=sys.argv if argv is None else ["gpu", *argv])


def start(shape: str, device: torch.device, sizes: Sizes) -> Bench:
    ceilings = measure_ceilings(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    model = random_model(SHAPES[shape], device)
    synchronize(device)
    print(f"{shape}: {resident_bytes(model) / 2**30:.2f} GiB of weights made in {time.perf_counter() - begin:.1f} s")
    return Bench(shape, model, device, ceilings, sizes)


def run_section(name: str, bench: Bench, limit_s: float, argv: Sequence[str]) -> None:
    """Run a section; its rows so far are printed and stored even if it fails."""
    print(f"\n{name}", flush=True)
    run, begin = BenchRun(f"gpu-{name}", argv=argv), time.perf_counter()
    try:
        with limit_time(limit_s):
            SECTIONS[name](bench, run)
    except (Exception, Overtime) as error:
        traceback.print_exc(limit=-3, file=sys.stdout)
        run.add(error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    if run.rows:
        run.finish()
    print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def bench_copy(bench: Bench, run: BenchRun) -> None:
    ceilings = bench.ceilings
    run.add(what="copy, read and written", tb_per_s=ceilings.copy_bytes_per_s / 1e12)
    run.add(what="bf16 product", tflop_per_s=ceilings.matmul_flop_per_s / 1e12)


def bench_memory(bench: Bench, run: BenchRun) -> None:
    """Must run first: the peak is that of creating the weights."""
    row: dict[str, Any] = {"weights_gib": resident_bytes(bench.model) / 2**30}
    if bench.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(bench.device)
        row["allocated_gib"] = torch.cuda.memory_allocated(bench.device) / 2**30
        row["peak_while_making_gib"] = torch.cuda.max_memory_allocated(bench.device) / 2**30
        row |= {"free_gib": free / 2**30, "total_gib": total / 2**30}
    layout = bench.model.state_layout
    row["state_at_256k_gib"] = state_bytes(layout, 262_144) / 2**30
    run.add(**row)


_DECODE_ROOM = 256  # maximum tokens decoded per state


def bench_decode(bench: Bench, run: BenchRun) -> None:
    for context in bench.sizes.decode:
        add_decode_row(bench, run, context, 1)


def bench_batch(bench: Bench, run: BenchRun) -> None:
    for context, batch in bench.sizes.batches:
        free = torch.cuda.mem_get_info(bench.device)[0] if bench.device.type == "cuda" else math.inf
        if batch * state_bytes(bench.model.state_layout, context + _DECODE_ROOM) < free:
            add_decode_row(bench, run, context, batch)
        if bench.device.type == "cuda":
            add_decode_row(bench, run, context, batch, shared=(context - 256) // 256 * 256)


def add_decode_row(bench: Bench, run: BenchRun, context: int, batch: int, shared: int = 0) -> None:
    """Greedy steps of the model alone, the chosen tokens staying on the device; the first `shared` tokens (whole blocks
    of 256) are the same in all contexts, and lent to the others by the first."""
    steps, model = bench.sizes.steps, bench.model
    states = [filled_state(model, context, _DECODE_ROOM)]
    lent = states[0].lend(shared)
    states += [filled_state(model, context, _DECODE_ROOM, lent) for _ in range(batch - 1)]
    for state in states:
        state.origin = Origin(tuple(f"block {i}" for i in range(shared // 256)), 256)
    config = model.config
    members = gpu_attention.max_members(config.num_attention_heads // config.num_key_value_heads)
    copies = -(-batch // members) if shared else batch  # copies of the shared tokens that are read
    tokens = random_tokens(model, batch)

    def decode() -> None:
        nonlocal tokens
        for _ in range(steps):
            tokens = model.forward_packed(tokens, [1] * batch, states).argmax(-1)

    step_s = [seconds / steps for seconds in time_calls(bench.device, decode)]
    rate = batch / median(step_s)
    moved = decode_bytes(model, context, batch, unread=(batch - copies) * shared)
    row: dict[str, Any] = {"context": context, "batch": batch, "shared": shared, "copies": copies}
    row["states_gib"] = sum({key: size for state in states for key, size in state.memory.items()}.values()) / 2**30
    row |= {"step_ms": 1e3 * median(step_s)}
    row |= {"worst_ms": 1e3 * max(step_s), "tok_per_s": rate, "gb_per_step": moved / 1e9}
    row |= {"gb_per_s": moved / median(step_s) / 1e9}
    row["percent_of_copy"] = 100 * moved / median(step_s) / bench.ceilings.copy_bytes_per_s
    if peer := bench.peer(VLLM_DECODE, (context, batch)):
        row["times_vllm"] = rate / peer
    run.add(**row)
    print(row, flush=True)


def bench_prefill(bench: Bench, run: BenchRun) -> None:
    """Cold prefills in segments; shorter ones are repeated."""
    for segment in bench.sizes.segments:
        prefill(bench, min(segment, max(bench.sizes.prefill)), segment)
        for num_tokens in bench.sizes.prefill:
            repeats = max(1, min(3, 100_000 // num_tokens))
            times_s = [prefill(bench, num_tokens, segment) for _ in range(repeats)]
            flop = prefill_flop(bench.model.config, 0, num_tokens)
            row: dict[str, Any] = {"tokens": num_tokens, "segment": segment, "median_s": median(times_s)}
            row |= {"worst_s": max(times_s), "repeats": repeats, "tok_per_s": num_tokens / median(times_s)}
            row["tflop_per_s"] = flop / median(times_s) / 1e12
            row["percent_of_matmul"] = 100 * flop / median(times_s) / bench.ceilings.matmul_flop_per_s
            if peer := bench.peer(VLLM_PREFILL, num_tokens):
                row["times_vllm"] = row["tok_per_s"] / peer
            run.add(**row)
            print(row, flush=True)


def prefill(bench: Bench, num_tokens: int, segment: int) -> float:
    """Seconds of one prefill."""
    model, tokens = bench.model, random_tokens(bench.model, num_tokens)
    state = model.new_state()
    state.reserve(num_tokens)
    return time_calls(bench.device, lambda: run_segments(model, state, tokens, segment), warmup=0, repeats=1)[0]


def run_segments(model: Jamba, state: HybridState, tokens: torch.Tensor, segment: int) -> None:
    for piece in tokens.split(segment):
        model.forward_packed(piece, [len(piece)], [state])


def bench_sharing(bench: Bench, run: BenchRun) -> None:
    """Milliseconds between steps of running answers, before and during the prefill of a long prompt."""
    model, (answers, short, long) = bench.model, bench.sizes.sharing
    plan = PlanSettings(256, bench.sizes.segments[0], 0, 0)
    engine = JambaEngine(
        model, word_tokenizer(model.config.vocab_size), PrefixCache((), b"", plan), max_context_tokens=long + 4096
    )

    def ask(num_tokens: int, new_tokens: int, seed: int) -> str:
        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        return engine.add(EngineRequest(tuple(random_tokens(model, num_tokens, seed).tolist()), sampling=sampling))

    try:
        # compiles missing kernels, including those for a past
        ask(min(long, 2 * plan.segment_tokens + short), 1, seed=answers + 1)
        while engine.has_work():
            engine.step()
        running = {ask(short, 4000, seed) for seed in range(answers)}
        while running - {output.request_id for output in engine.step()}:
            pass
        idle_ms = [step_ms(engine) for _ in range(2 * bench.sizes.steps)][bench.sizes.steps :]
        waiting, shared_ms = ask(long, 1, seed=answers), []
        start, outputs = time.perf_counter(), []
        while waiting not in {output.request_id for output in outputs}:
            begin = time.perf_counter()
            outputs = engine.step()
            shared_ms.append(1e3 * (time.perf_counter() - begin))
        row: dict[str, Any] = {"answers": answers, "prompt": long, "prefill_s": time.perf_counter() - start}
        row |= {"idle_ms": median(idle_ms), "shared_ms": median(shared_ms), "worst_ms": max(shared_ms)}
        run.add(
            **row, times_idle=median(shared_ms) / median(idle_ms), worst_times_idle=max(shared_ms) / median(idle_ms)
        )
    finally:
        engine.close()


def step_ms(engine: JambaEngine) -> float:
    begin = time.perf_counter()
    engine.step()
    return 1e3 * (time.perf_counter() - begin)


def bench_profile(bench: Bench, run: BenchRun) -> None:
    """Kernels by time, for one prefill segment and for some decode steps."""
    model, segment, steps, new = bench.model, bench.sizes.segments[0], bench.sizes.steps, bench.sizes.new_tokens
    tokens, state = random_tokens(model, segment), model.new_state()
    state.reserve(segment)

    def prefill_once() -> None:
        state.num_tokens = 0
        model.forward_packed(tokens, [segment], [state])

    decoding = filled_state(model, bench.sizes.decode[0], room=4 * steps)

    def decode() -> None:
        for _ in range(steps):
            model.forward_packed(tokens[:1], [1], [decoding])

    def ask() -> None:
        for _ in range(steps):
            state.num_tokens = segment - new
            model.forward_packed(tokens[:new], [new], [state])

    profile_call(bench, run, f"prefill of {segment}", prefill_once, 1)
    profile_call(bench, run, f"{new} tokens behind {segment - new}", ask, steps)
    profile_call(bench, run, "decode step", decode, steps)


def profile_call(bench: Bench, run: BenchRun, what: str, call: Callable[[], object], parts: int, top: int = 18) -> None:
    """Rows of the `top` kernels, milliseconds and launches for one of the call's `parts`, and of all of them."""
    on_gpu = bench.device.type == "cuda"
    wall_ms = 1e3 * median(time_calls(bench.device, call, warmup=1, repeats=3)) / parts
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU], acc_events=True) as profiler:
        call()
        synchronize(bench.device)
    events = profiler.key_averages()
    times_us = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in events}
    counts = {e.key: e.count for e in events if times_us[e.key]}
    busy_ms = sum(times_us.values()) / 1e3 / parts
    run.add(what=what, kernel="all", launches=sum(counts.values()) / parts, ms=busy_ms, percent=100 * busy_ms / wall_ms)
    run.add(what=what, kernel="wall clock, not profiled", ms=wall_ms, percent=100.0)
    for name in sorted(counts, key=times_us.__getitem__, reverse=True)[:top]:
        ms = times_us[name] / 1e3 / parts
        run.add(what=what, kernel=name[:90], launches=counts[name] / parts, ms=ms, percent=100 * ms / wall_ms)


SECTIONS: dict[str, Callable[[Bench, BenchRun], None]] = {
    "copy": bench_copy,
    "memory": bench_memory,
    "decode": bench_decode,
    "batch": bench_batch,
    "first-token": bench_first_token,
    "tiers": bench_tiers,
    "prefill": bench_prefill,
    "sharing": bench_sharing,
    "profile": bench_profile,
}


if __name__ == "__main__":
    main()
