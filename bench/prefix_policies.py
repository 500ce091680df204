"""The cache policies that bench/prefix_traces.py compares: our implementation, and simulations of others.

Ours is the service's own PrefixCache over its tensor store, with states smaller than a model's. The others are
simulated from their descriptions, with token positions and sizes only. Each gets a prompt, returns how many of its
tokens were cached, and updates its cache. `bound_hit_rate` is an upper bound for all of them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, Self

import numpy as np
import torch

from model.device_store import DeviceStateStore
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings
from model.state import HybridState, StateLayout
from model.state_eviction import Entry, EvictionPolicy

KV_BYTES = 16_384  # per token, for all attention layers of the 52B model in bfloat16
SNAPSHOT_BYTES = 512 * 31_360  # conv and SSM of its 28 Mamba layers
BLOCK_TOKENS = 256


SCALE = 128  # the states actually stored (`LAYOUT`) are smaller than the 52B's by this factor
LAYOUT = StateLayout(1, 28, 1, 32, 64, 16, 4, torch.bfloat16, torch.bfloat16)
NEAR = PlanSettings(block_tokens=BLOCK_TOKENS, min_snapshot_distance=512)


class Prompt(NamedTuple):
    """`boundaries` are known to our policy only; `answer` continues the prompt."""

    token_ids: np.ndarray
    boundaries: tuple[int, ...]
    answer: np.ndarray


class CachePolicy(Protocol):
    def ask(self, prompt: Prompt) -> int:
        """Number of cached tokens of the prompt; updates the cache."""
        ...

    def used_bytes(self) -> int:
        """Bytes in use, at the sizes of the 52B model."""
        ...


class OurCache:
    """The service's own classes: boundaries and sparse grid at first sight, `policy` for what goes.

    `prefetch_turns`: when an answer is given, the state behind it is computed too, for a question that follows it up.
    """

    def __init__(
        self,
        max_bytes: int,
        policy: EvictionPolicy,
        settings: PlanSettings = NEAR,
        prefetch_turns: bool = False,
    ) -> None:
        self._store = DeviceStateStore(max_bytes // SCALE, policy=policy)
        self._cache = PrefixCache([self._store], b"bench", settings)
        self._state = HybridState(LAYOUT)
        self._prefetch_turns, self.prefetched_tokens = prefetch_turns, 0

    def ask(self, prompt: Prompt) -> int:
        cached = self._pass(prompt.token_ids, prompt.boundaries)
        if self._prefetch_turns:
            turn = np.concatenate([prompt.token_ids, prompt.answer])
            self.prefetched_tokens += len(turn) - self._pass(turn, (*prompt.boundaries, len(turn)), counted=False)
        return cached

    def used_bytes(self) -> int:
        return self._store.stats()["bytes"] * SCALE

    @property
    def snapshots_saved(self) -> int:
        return self._cache.stats()[0].saved

    def _pass(self, token_ids: np.ndarray, boundaries: Sequence[int], counted: bool = True) -> int:
        """Look up a prompt and save according to its plan; returns the number of cached tokens."""
        plan = self._cache.plan(token_ids, boundaries)
        hit = self._cache.longest_prefix(plan, counted)
        cached = kept = hit.num_tokens if hit else 0
        self._state.reserve(plan.num_tokens)
        for position in plan.snapshot_keys:
            if position > cached:
                self._state.num_tokens = position
                if self._cache.save(plan, self._state, kept):
                    kept = position
        self._state.num_tokens = 0
        return cached


class LeastRecentlyUsed:
    """LRU; within a prefix, the end is evicted before the beginning."""

    def __init__(self) -> None:
        self._order: OrderedDict[str, str] = OrderedDict()  # key -> its predecessor

    def add(self, key: str, entry: Entry) -> None:
        self._order[key] = entry.after
        while key in self._order:
            self._order.move_to_end(key)
            key = self._order[key]

    def remove(self, key: str) -> None:
        del self._order[key]

    def ask(self, keys: Sequence[str]) -> None:
        for key in keys:
            if key in self._order:
                self._order.move_to_end(key)

    def victim(self) -> str:
        return next(iter(self._order))


class BlockGrid:
    """KV and a snapshot every `blocks` blocks of 256 tokens; the least recently used go first, ends before beginnings.

    As vLLM's `all` mode and SGLang's hybrid tree do, with the distance between snapshots as the free choice.
    """

    def __init__(self, max_bytes: int, blocks: int) -> None:
        self._page_tokens = blocks * BLOCK_TOKENS
        self._page_bytes = self._page_tokens * KV_BYTES + SNAPSHOT_BYTES
        self._max_pages = max_bytes // self._page_bytes
        self._pages: OrderedDict[bytes, None] = OrderedDict()

    def ask(self, prompt: Prompt) -> int:
        size, digest, keys = self._page_tokens, b"", []
        for end in range(size, len(prompt.token_ids) + 1, size):
            digest = hashlib.blake2b(prompt.token_ids[end - size : end], key=digest, digest_size=16).digest()
            keys.append(digest)
        found = next((i for i, key in enumerate(keys) if key not in self._pages), len(keys))
        found = min(found, (len(prompt.token_ids) - 1) // size)
        for key in reversed(keys):
            self._pages[key] = None
            self._pages.move_to_end(key)
        while len(self._pages) > self._max_pages:
            self._pages.popitem(last=False)
        return found * size

    def used_bytes(self) -> int:
        return len(self._pages) * self._page_bytes


@dataclass(slots=True, eq=False)
class _Node:
    """An edge of the radix tree and the position where it ends."""

    tokens: np.ndarray
    end: int
    parent: Self | None
    last_use: int = 0
    has_state: bool = False
    children: dict[int, Self] = field(default_factory=dict)

    @property
    def start(self) -> int:
        return self.end - len(self.tokens)


class Marconi:
    """A radix tree; snapshots behind each answer and where a second prompt leaves a known one, for the third to use.

    Of nodes with at most one child, the one with the least recency + alpha x FLOPs saved per byte goes, both scaled to
    0..1 over the candidates; one with a child gives its KV to the child. Source: arXiv 2411.19379, sections 4.1, 4.2.
    The paper tunes alpha while running; here it is fixed, and the best of several is what the table shows.
    """

    def __init__(self, max_bytes: int, alpha: float) -> None:
        self._max_bytes, self._alpha = max_bytes, alpha
        self._root = _Node(np.empty(0, np.int32), 0, None)
        self._nodes: set[_Node] = set()
        self._bytes = self._clock = 0

    def ask(self, prompt: Prompt) -> int:
        self._clock += 1
        sequence = np.concatenate([prompt.token_ids, prompt.answer])
        node, matched, hit = self._root, 0, self._root
        while (child := node.children.get(int(sequence[matched])) if matched < len(sequence) else None) is not None:
            common = _common_tokens(child.tokens, sequence[matched:])
            matched += common
            if common < len(child.tokens):
                node = self._split(child, common)
                break
            node = child
            if node.has_state and node.end < len(prompt.token_ids):
                hit = node
        hit.last_use = self._clock
        for end in (node, self._append(node, sequence[matched:])):
            if end is not self._root:
                self._set_state(end, True)
                end.last_use = self._clock
        while self._bytes > self._max_bytes:
            self._evict()
        return hit.end

    def used_bytes(self) -> int:
        return self._bytes

    def _split(self, node: _Node, length: int) -> _Node:
        upper = _Node(node.tokens[:length], node.start + length, node.parent, node.last_use)
        node.parent.children[int(upper.tokens[0])] = upper
        node.tokens, node.parent = node.tokens[length:], upper
        upper.children[int(node.tokens[0])] = node
        self._nodes.add(upper)
        return upper

    def _append(self, node: _Node, tokens: np.ndarray) -> _Node:
        if not len(tokens):
            return node
        leaf = node.children[int(tokens[0])] = _Node(tokens, node.end + len(tokens), node)
        self._nodes.add(leaf)
        self._bytes += len(tokens) * KV_BYTES
        return leaf

    def _set_state(self, node: _Node, has_state: bool) -> None:
        self._bytes += (has_state - node.has_state) * SNAPSHOT_BYTES
        node.has_state = has_state

    def _evict(self) -> None:
        candidates = [node for node in self._nodes if len(node.children) <= 1]
        recency = _scaled([node.last_use for node in candidates])
        efficiency = _scaled([_flops_per_byte(node) for node in candidates])
        node = candidates[int(np.argmin(recency + self._alpha * efficiency))]
        self._set_state(node, False)
        self._nodes.remove(node)
        if node.children:
            (child,) = node.children.values()
            child.tokens, child.parent = np.concatenate([node.tokens, child.tokens]), node.parent
            node.parent.children[int(child.tokens[0])] = child
        else:
            del node.parent.children[int(node.tokens[0])]
            self._bytes -= len(node.tokens) * KV_BYTES


def _flops_per_byte(node: _Node) -> float:
    flops = 23.1e9 * len(node.tokens) + 32_768.0 * (node.end**2 - node.start**2)
    freed = SNAPSHOT_BYTES * node.has_state + (0 if node.children else len(node.tokens) * KV_BYTES)
    return flops / max(freed, 1)


def _scaled(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    spread = np.ptp(array)
    return (array - array.min()) / spread if spread else np.zeros_like(array)


def _common_tokens(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differ = np.nonzero(one[:length] != other[:length])[0]
    return int(differ[0]) if len(differ) else length


def bound_hit_rate(prompts: Sequence[tuple[Sequence[tuple[int, bytes]], int]], max_bytes: int) -> float:
    """Token hit rate that no policy with `max_bytes` exceeds, one that knows the future included.

    A prompt is ((position, digest of the tokens before it) of all places it may part from others, its tokens). To have
    p tokens at a prompt, the KV of each edge up to p and one snapshot at p must be held since the prompt before that
    passed there: bytes x lookups. The prompts share max_bytes x lookups; the fractional multiple-choice knapsack over
    the concave hulls of what each can have is a relaxation of what is possible.
    Source: after Berger, Beckmann and Harchol-Balter, Practical bounds on optimal caching (PFOO), POMACS 2(2), 2018.
    """
    passed: dict[bytes, int] = {}
    gains: list[tuple[float, float, int]] = []  # tokens per byte-lookup, byte-lookups, tokens
    for now, (places, num_tokens) in enumerate(prompts):
        kv_cost, before, hull = 0, 0, [(0, 0)]  # (byte-lookups, tokens)
        for position, digest in places:
            if digest not in passed or position >= num_tokens:
                break
            age = now - passed[digest]
            kv_cost, before = kv_cost + (position - before) * KV_BYTES * age, position
            _extend_hull(hull, (kv_cost + SNAPSHOT_BYTES * age, position))
        for (cost, tokens), (next_cost, next_tokens) in itertools.pairwise(hull):
            gains.append(((next_tokens - tokens) / (next_cost - cost), next_cost - cost, next_tokens - tokens))
        passed.update((digest, now) for _, digest in places)
    room, saved = float(max_bytes) * len(prompts), 0.0
    for _, cost, tokens in sorted(gains, reverse=True):
        saved += tokens * min(1.0, room / cost)
        if (room := room - cost) <= 0:
            break
    return saved / sum(num_tokens for _, num_tokens in prompts)


def _extend_hull(hull: list[tuple[int, int]], point: tuple[int, int]) -> None:
    """Add a point with more tokens to an upper concave hull that begins at (0, 0)."""
    cost, tokens = point
    while len(hull) > 1:
        (cost0, tokens0), (cost1, tokens1) = hull[-2:]
        if cost > cost1 and (tokens - tokens1) * (cost1 - cost0) < (tokens1 - tokens0) * (cost - cost1):
            break
        hull.pop()
    hull.append(point)
