"""The simulated caches of bench/prefix_policies.py: never more than the truth, never over the budget."""

import numpy as np
import pytest

from bench.prefix_policies import KV_BYTES, SNAPSHOT_BYTES, BlockGrid, Marconi, OurCache, Prompt
from bench.prefix_traces import session_trace
from model.state_eviction import LeastRecentlyUsed, LeastValuable

POLICIES = {
    "ours": lambda size: OurCache(size, LeastValuable()),
    "LRU": lambda size: OurCache(size, LeastRecentlyUsed()),
    "grid": lambda size: BlockGrid(size, 2),
    "Marconi": lambda size: Marconi(size, 0.5),
}


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("budget", [10**9, 10**11])
def test_hits_are_prefixes_that_were_seen_and_bytes_stay_in_the_budget(name, budget):
    cache, seen = POLICIES[name](budget), []
    cached = []
    for prompt in session_trace(seed=1, questions=40, open_sessions=5):
        most = max((common(prompt.token_ids, sequence) for sequence in seen), default=0)
        cached.append(cache.ask(prompt))
        assert 0 <= cached[-1] <= min(most, len(prompt.token_ids) - 1)
        assert cache.used_bytes() <= budget
        seen.append(np.concatenate([prompt.token_ids, prompt.answer]))
    assert sum(cached) > 0


def test_marconi_keeps_a_junction_at_the_second_prompt_and_uses_it_at_the_third():
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 9, 1000, dtype=np.int32)
    ends = [np.full(100, 100 + i, dtype=np.int32) for i in range(3)]
    cache = Marconi(10**10, 1.0)
    answer = np.full(10, 99, dtype=np.int32)
    assert [cache.ask(Prompt(np.concatenate([shared, end]), (), answer)) for end in ends] == [0, 0, 1000]
    assert cache.used_bytes() == (1000 + 3 * 110) * KV_BYTES + 4 * SNAPSHOT_BYTES


def common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    same = one[:length] == other[:length]
    return length if same.all() else int(np.argmin(same))
