"""The simulated caches of bench/prefix_policies.py: never more than the truth, never over the budget."""

import numpy as np
import pytest

from bench.prefix_policies import (
    KV_BYTES,
    SNAPSHOT_BYTES,
    BlockGrid,
    LeastRecentlyUsed,
    Marconi,
    OurCache,
    Prompt,
    bound_hit_rate,
)
from bench.prefix_traces import places, session_trace
from model.state_eviction import LeastValuable

POLICIES = {
    "ours": lambda size: OurCache(size, LeastValuable()),
    "turns": lambda size: OurCache(size, LeastValuable(), prefetch_turns=True),
    "LRU": lambda size: OurCache(size, LeastRecentlyUsed()),
    "grid": lambda size: BlockGrid(size, 2),
    "Marconi": lambda size: Marconi(size, 0.5),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("budget", [10**9, 10**11])
def test_hits_are_prefixes_that_were_seen_and_bytes_stay_in_the_budget(name, budget):
    cache, seen = POLICIES[name](budget), []
    cached, trace = [], session_trace(seed=1, questions=40, open_sessions=5)
    for prompt in trace:
        most = max((common(prompt.token_ids, sequence) for sequence in seen), default=0)
        cached.append(cache.ask(prompt))
        assert 0 <= cached[-1] <= min(most, len(prompt.token_ids) - 1)
        assert cache.used_bytes() <= budget
        seen.append(np.concatenate([prompt.token_ids, prompt.answer]))
    rate = sum(cached) / sum(len(prompt.token_ids) for prompt in trace)
    assert 0 < rate <= bound_hit_rate([places(prompt) for prompt in trace], budget)


def test_marconi_keeps_a_junction_at_the_second_prompt_and_uses_it_at_the_third():
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 9, 1000, dtype=np.int32)
    ends = [np.full(100, 100 + i, dtype=np.int32) for i in range(3)]
    cache = Marconi(10**10, 1.0)
    answer = np.full(10, 99, dtype=np.int32)
    assert [cache.ask(Prompt(np.concatenate([shared, end]), (), answer)) for end in ends] == [0, 0, 1000]
    assert cache.used_bytes() == (1000 + 3 * 110) * KV_BYTES + 4 * SNAPSHOT_BYTES


def test_the_bound_counts_what_must_be_held_between_two_uses():
    """Three prompts of 1,010 tokens share 1,000: two hits, each a snapshot and KV held for one lookup of three."""
    prompts = [([(1000, b"shared"), (1010, bytes([i]))], 1010) for i in range(3)]
    held = 1000 * KV_BYTES + SNAPSHOT_BYTES
    assert bound_hit_rate(prompts, held) == pytest.approx(2000 / 3030)
    assert bound_hit_rate(prompts, held // 3) == pytest.approx(1000 / 3030, rel=1e-6)
    assert bound_hit_rate(prompts[:1], held) == 0.0


def test_the_bound_of_two_depths_takes_the_better_one_first():
    """A snapshot at 4,000 saves more a byte than one at 100 and costs more."""
    prompts = [([(100, b"a"), (4000, b"b")], 5000)] * 2
    deep = 4000 * KV_BYTES + SNAPSHOT_BYTES
    assert bound_hit_rate(prompts, deep // 2) == pytest.approx(0.4)
    assert bound_hit_rate(prompts, deep // 4) == pytest.approx(0.2, rel=1e-6)


def common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    same = one[:length] == other[:length]
    return length if same.all() else int(np.argmin(same))
