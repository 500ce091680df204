"""Shared by the GPU benchmarks: hardware limits, synchronized timing, states without a prefill, time limits."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from tokenizers.models import WordLevel
from torch import Tensor

from model.jamba import Jamba
from model.state import HybridState, LentKv
from model.tokenizer import Tokenizer

_FILL_TOKENS = 1 << 16  # generated at a time, to need little memory beyond the state


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured limits of the device."""

    copy_bytes_per_s: float  # read and written
    matmul_flop_per_s: float  # bfloat16


@dataclass(frozen=True, slots=True)
class Sizes:
    prefill: tuple[int, ...] = (8192, 32_768, 131_072, 262_144)
    segments: tuple[int, ...] = (16_384,)
    decode: tuple[int, ...] = (1024, 131_072, 261_000)
    batches: tuple[tuple[int, int], ...] = (  # context, sequences
        *((8192, 8), (8192, 16), (8192, 32)),
        *((131_072, 4), (131_072, 16), (261_000, 8), (261_000, 32), (261_000, 64)),
    )
    first_token: tuple[int, ...] = (32_768, 131_072, 261_000)
    sharing: tuple[int, int, int] = (4, 1024, 131_072)  # running answers, their prompt length, that of the long prompt
    new_tokens: int = 64
    steps: int = 16  # decode steps per time measurement


@dataclass(frozen=True, slots=True)
class Bench:
    """One model under test."""

    name: str
    model: Jamba
    device: torch.device
    ceilings: Ceilings
    sizes: Sizes

    def peer(self, table: dict[Any, float], key: Any) -> float | None:
        return table.get(key) if self.name == "jamba-52b" else None


class Overtime(Exception):
    """A section exceeded its time limit."""


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raise Overtime in the block after `seconds`, once a running device call has returned."""

    def stop(*_: object) -> None:
        raise Overtime(f"stopped after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(device: torch.device, call: Callable[[], object], warmup: int = 2, repeats: int = 7) -> list[float]:
    """Seconds of each of `repeats` calls, including all work on the device."""
    times_s = []
    for i in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        if i >= warmup:
            times_s.append(time.perf_counter() - start)
    return times_s


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure the limits by the fastest of several calls each."""
    on_gpu = device.type == "cuda"
    source = torch.ones(1 << (31 if on_gpu else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = min(time_calls(device, lambda: target.copy_(source)))
    size = 8192 if on_gpu else 512
    square = torch.randn(size, size, device=device).bfloat16()
    matmul_s = min(time_calls(device, lambda: square @ square))
    return Ceilings(2 * source.nbytes / copy_s, 2 * size**3 / matmul_s)


def random_tokens(model: Jamba, count: int, seed: int = 0) -> Tensor:
    """(count,) int64 on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (count,), generator=generator)
    return tokens.to(model.embed_tokens.weight.device)


def filled_state(model: Jamba, num_tokens: int, room: int, lent: LentKv | None = None) -> HybridState:
    """A random state of `num_tokens` tokens, with room for `room` more."""
    state = model.new_state(lent)
    state.reserve(num_tokens + room)
    state.num_tokens = state.lent_tokens
    layout, device = state.layout, state.conv.device
    k, v = torch.randn(2, min(_FILL_TOKENS, num_tokens), layout.g, layout.p, dtype=layout.kv_dtype, device=device)
    while (count := min(_FILL_TOKENS, num_tokens - state.num_tokens)) > 0:
        for layer in range(layout.n_attn):
            state.append_kv(layer, k[:count], v[:count])
        state.num_tokens += count
    state.conv.normal_(std=0.1)
    state.ssm.normal_(std=0.1)
    return state


def word_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer with one word per id, for engines whose text is not used."""
    vocab = {f"w{i}": i for i in range(vocab_size)}
    return Tokenizer(tokenizers.Tokenizer(WordLevel(vocab, unk_token="w0")))
