"""Decides which sequences of a decode step share one read of their common prefix's KV.

Those whose states begin with the same stored blocks (`HybridState.origin`): equal tokens are not enough, since the bits
of their KV may differ. Where the KV lies, in the state's own memory or lent: state.py; the kernel that shares reads:
kernels/gpu_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from model.state import Origin


def share(origins: Sequence[Origin], max_members: int, min_tokens: int, unit: int) -> list[tuple[int, int]]:
    """For each state (owner, until): the index of the state whose KV is read, possibly its own, and up to which token.

    Groups of at most `max_members` are chosen so that the fewest tokens are read; `until` is the same within a group, a
    multiple of `unit` and at least `min_tokens`, or 0 for a state that shares nothing.
    """
    order = sorted(range(len(origins)), key=lambda i: origins[i].keys)  # states with most in common become neighbours
    common = [origins[i].common_tokens(origins[j]) // unit * unit for i, j in pairwise(order)]
    common = [tokens if tokens >= min_tokens else 0 for tokens in common]
    best = [(0, 0)]  # per number of first states: tokens saved, size of the last group
    for end in range(1, len(order) + 1):
        sizes = range(1, min(max_members, end) + 1)
        best.append(max((best[end - n][0] + (n - 1) * _until(common, end - n, end), n) for n in sizes))
    shared, end = [(i, 0) for i in range(len(origins))], len(order)
    while end:
        start = end - best[end][1]
        if until := _until(common, start, end):
            for i in order[start:end]:
                shared[i] = order[start], until
        end = start
    return shared


def _until(common: Sequence[int], start: int, end: int) -> int:
    """How many first tokens states start..end have in common."""
    return min(common[start : end - 1], default=0)
