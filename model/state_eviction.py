"""Which value a full store in memory gives up next.

A policy sees keys, sizes and hints (`StateItem.after`, `StateItem.saves_tokens`), never what a value holds. The store
(state_store.py) tells it what happens and asks for a victim. Not thread safe: the store holds its lock.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """What a policy knows of a value; `after` and `saves_tokens` as in StateItem."""

    nbytes: int
    after: str
    saves_tokens: int


class EvictionPolicy(Protocol):
    def add(self, key: str, entry: Entry) -> None:
        """A value came in, or took another's place under its key."""
        ...

    def remove(self, key: str) -> None:
        """A known key is gone."""
        ...

    def touch(self, key: str, read: bool) -> None:
        """A known key was read, or only asked for."""
        ...

    def victim(self) -> str:
        """The known key to give up next; it stays known until it is removed."""
        ...


class LeastRecentlyUsed:
    """The key that was put, asked for or read longest ago."""

    def __init__(self) -> None:
        self._order: OrderedDict[str, None] = OrderedDict()

    def add(self, key: str, entry: Entry) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def remove(self, key: str) -> None:
        del self._order[key]

    def touch(self, key: str, read: bool) -> None:
        self._order.move_to_end(key)

    def victim(self) -> str:
        return next(iter(self._order))


class _Use(NamedTuple):
    clock: float  # the policy's clock at the last use
    count: int


class LeastValuable:
    """The snapshot that saves the fewest tokens for its bytes, weighed with how often and how lately it was read.

    Values form a tree by `after`: a KV block behind a block, a snapshot behind the last block it needs. A value that
    others stand behind is never given up before them; a block that nothing stands behind any more is worth nothing and
    goes first. So what is weighed are snapshots: tokens to the snapshot before it, over its own bytes plus the blocks
    that only it needs. Priority = clock at the last read + reads x tokens / bytes; the clock is the highest priority
    given up so far, which ages what is not read. O(log n) plus a walk over the blocks between two snapshots.
    Source: Cao and Irani, Cost-aware WWW proxy caching algorithms (GreedyDual-Size); the value per byte is Marconi's,
    arXiv 2411.19379, section 4.2.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._behind: dict[str, set[str]] = {}  # a key, known or not -> known keys whose `after` it is
        self._uses: dict[str, _Use] = {}
        self._heap: list[tuple[float, int, str]] = []  # priority, push number, key; only the last push of a key counts
        self._last_push: dict[str, int] = {}
        self._pushes = itertools.count()
        self._clock = 0.0

    def add(self, key: str, entry: Entry) -> None:
        if key in self._entries:
            self._unlink(key)
        self._entries[key] = entry
        self._behind.setdefault(entry.after, set()).add(key)
        self._uses[key] = _Use(self._clock, self._uses[key].count if key in self._uses else 1)
        self._push(key)

    def remove(self, key: str) -> None:
        self._unlink(key)
        for table in (self._entries, self._uses, self._last_push):
            del table[key]

    def touch(self, key: str, read: bool) -> None:
        if read:
            self._uses[key] = _Use(self._clock, self._uses[key].count + 1)
            if key not in self._behind:
                self._push(key)

    def victim(self) -> str:
        while True:
            priority, push, key = self._heap[0]
            if self._last_push.get(key) != push or key in self._behind:
                heapq.heappop(self._heap)
            elif (now := self._priority(key)) > priority:  # it shares its blocks by now, or lost the one before it
                heapq.heappop(self._heap)
                self._push(key, now)
            else:
                self._clock = max(self._clock, priority)
                return key

    def _unlink(self, key: str) -> None:
        after = self._entries[key].after
        behind = self._behind[after]
        behind.discard(key)
        if not behind:
            del self._behind[after]
        if after in self._entries:
            if not behind:
                self._push(after)
            elif len(behind) == 1:  # what is left now holds the blocks before it alone
                self._push(*behind)

    def _push(self, key: str, priority: float | None = None) -> None:
        number = self._last_push[key] = next(self._pushes)
        heapq.heappush(self._heap, (self._priority(key) if priority is None else priority, number, key))
        if len(self._heap) > 4 * len(self._entries) + 64:
            self._heap = [entry for entry in self._heap if self._last_push.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def _priority(self, key: str) -> float:
        tokens, nbytes = self._worth(key)
        if not tokens:
            return 0.0
        use = self._uses[key]
        return use.clock + use.count * tokens / nbytes

    def _worth(self, key: str) -> tuple[int, int]:
        """(tokens that would have to be computed again, bytes that would come free) without this value."""
        _, after, saves_tokens = self._entries[key]
        nbytes, alone = self._entries[key].nbytes, True
        previous = key
        while after and saves_tokens:
            if (block := self._entries.get(after)) is None:
                return 0, nbytes  # a part of its prefix is missing
            behind = self._behind[after]
            alone = alone and len(behind) == 1
            nbytes += block.nbytes * alone
            others = [self._entries[other].saves_tokens for other in behind if other != previous]
            if shorter := max((tokens for tokens in others if tokens < saves_tokens), default=0):
                return saves_tokens - shorter, nbytes
            previous, after = after, block.after
        return saves_tokens, nbytes
