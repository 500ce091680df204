"""Eviction policy: which value a full in-memory store evicts next.

A policy sees keys, sizes and hints (`StateItem.after`, `saves_tokens`, `ends_prompt`), never what a value holds. The
store (state_store.py) tells it what happens and asks for a victim. Not thread safe: the store holds its lock.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

_AGES = 11  # ages are told apart by powers of two, up to this one
_SAMPLE = 64
_FORGOTTEN_KEPT = 4096
_FADE_EVERY = 8192
_OWN_WEIGHT = 2.0  # weight of the prior from a snapshot's kind, in uses, against its own uses

Kind = tuple[int, bool] | None


class Entry(NamedTuple):
    """What a policy knows about a value; hints as in StateItem."""

    nbytes: int
    after: str
    saves_tokens: int
    ends_prompt: bool


class EvictionPolicy(Protocol):
    def add(self, key: str, entry: Entry) -> None:
        """A value was added, or replaced the one under its key."""
        ...

    def remove(self, key: str) -> None:
        """A known key was removed."""
        ...

    def ask(self, keys: Sequence[str]) -> None:
        """A prompt was looked up that could use any of these, deepest first, known or not."""
        ...

    def victim(self) -> str:
        """The known key to evict next; it stays known until it is removed."""
        ...


@dataclass(slots=True)
class _Use:
    """Usage of a snapshot, remembered for a while even after its eviction. Times are counted in lookups."""

    first: int
    last: int
    count: int
    ends_prompt: bool
    kind: Kind = None


class UseRates:
    """How likely a snapshot of a kind is to be used at the next lookup, learned from all earlier snapshots.

    By age since the last use, in powers of two: of the snapshots of the kind that reached this age, how many were used
    before twice the age. Sparse counts are smoothed by those of all kinds, and these by 1/(3 age). Old counts decay.
    Source: after Beckmann et al., LHD: Improving cache hit rate by maximizing hit density, NSDI 2018.
    """

    def __init__(self) -> None:
        self._reached: dict[tuple[Kind, int], float] = {}
        self._used: dict[tuple[Kind, int], float] = {}

    def count_reached(self, kind: Kind, age: int) -> None:
        for cell in ((kind, _age_class(age)), (None, _age_class(age))):
            self._reached[cell] = self._reached.get(cell, 0.0) + 1

    def count_used(self, kind: Kind, age: int) -> None:
        for cell in ((kind, _age_class(age)), (None, _age_class(age))):
            self._used[cell] = self._used.get(cell, 0.0) + 1

    def rate(self, kind: Kind, age: int) -> float:
        """Expected uses per lookup, > 0."""
        share = 1 / 3
        for cell in ((None, _age_class(age)), (kind, _age_class(age))):
            share = (self._used.get(cell, 0.0) + share) / (self._reached.get(cell, 0.0) + 1)
        return share / 2 ** _age_class(age)

    def fade(self) -> None:
        for table in (self._reached, self._used):
            for cell in table:
                table[cell] /= 2


class LeastValuable:
    """Evicts the snapshot that is expected to save the fewest tokens per byte from now on.

    Values form a tree by `after`: a KV block follows a block, a snapshot follows the last block that it needs. A block
    is never evicted before what follows it; one that nothing follows any more goes first. So the choice is among
    snapshots, by expected uses x tokens since the snapshot before it / (its own bytes + the blocks that only it needs).
    A use is a lookup for which it is the deepest snapshot ever stored: a snapshot whose readers have moved on to a
    deeper one loses its value by itself. The expectation is a gamma posterior: the rate of its kind (UseRates; how
    often it was used, whether a prompt's documents ended there) as a prior worth two uses, and its own uses since it
    was added. Of more than 64 snapshots a random 64 are compared. O(sample x blocks between two snapshots).
    Source: value per byte as in Marconi, arXiv 2411.19379, section 4.2; the expectation is ours.
    """

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._behind: dict[str, set[str]] = {}  # a key, known or not -> known keys whose `after` it is
        self._loose: dict[str, None] = {}  # blocks that nothing follows
        self._snapshots: list[str] = []
        self._place: dict[str, int] = {}  # of a snapshot in that list
        self._uses: OrderedDict[str, _Use] = OrderedDict()
        self._rates, self._clock = UseRates(), 0
        self._recent: deque[list[str]] = deque([[]], maxlen=2**_AGES + 1)  # used at a lookup, the newest last
        self._random = random.Random(0)

    def add(self, key: str, entry: Entry) -> None:
        if key in self._entries:
            self._unlink(key)
        self._entries[key] = entry
        self._behind.setdefault(entry.after, set()).add(key)
        self._loose.pop(entry.after, None)
        if not entry.saves_tokens:
            if key not in self._behind:
                self._loose[key] = None
            return
        self._place[key] = len(self._snapshots)
        self._snapshots.append(key)
        if (use := self._uses.get(key)) is None:
            use = self._uses[key] = _Use(self._clock, -1, 0, entry.ends_prompt)
            self._note(key, use)
        use.ends_prompt |= entry.ends_prompt

    def remove(self, key: str) -> None:
        self._unlink(key)
        del self._entries[key]
        while len(self._uses) > _FORGOTTEN_KEPT + 4 * len(self._snapshots):
            oldest, use = self._uses.popitem(last=False)
            if oldest in self._entries:
                self._uses[oldest] = use

    def ask(self, keys: Sequence[str]) -> None:
        self._clock += 1
        self._recent.append([])
        self._count_survivors()
        deepest = next((key for key in keys if key in self._uses), None)
        deepest_here = next((key for key in keys if key in self._place), None)
        for key in {deepest, deepest_here} - {None}:
            use = self._uses[key]
            self._rates.count_used(use.kind, self._clock - use.last)
            use.count += 1
            self._uses.move_to_end(key)
            self._note(key, use)

    def victim(self) -> str:
        if self._loose:
            return next(reversed(self._loose))
        few = len(self._snapshots) <= _SAMPLE
        return min(self._snapshots if few else self._random.sample(self._snapshots, _SAMPLE), key=self._value)

    def _note(self, key: str, use: _Use) -> None:
        """A snapshot was used, or added for the first time: its age is 0 again."""
        use.last, use.kind = self._clock, (min(use.count, 2), use.ends_prompt)
        self._recent[-1].append(key)
        self._rates.count_reached(use.kind, 0)

    def _count_survivors(self) -> None:
        """Count snapshots that have just reached an age of 2, 4, 8, ... lookups."""
        for power in range(1, _AGES + 1):
            if len(self._recent) <= 2**power:
                break
            for key in self._recent[-1 - 2**power]:
                if (use := self._uses.get(key)) is not None and use.last == self._clock - 2**power:
                    self._rates.count_reached(use.kind, 2**power)
        if self._clock % _FADE_EVERY == 0:
            self._rates.fade()

    def _unlink(self, key: str) -> None:
        """Remove a known key from the tree and the lists."""
        after = self._entries[key].after
        behind = self._behind[after]
        behind.discard(key)
        if not behind:
            del self._behind[after]
            if after in self._entries and after not in self._place:
                self._loose[after] = None
        self._loose.pop(key, None)
        if (place := self._place.pop(key, None)) is not None:
            last = self._snapshots.pop()
            if last != key:
                self._snapshots[place], self._place[last] = last, place

    def _value(self, key: str) -> float:
        """Tokens per byte that the snapshot is expected to save at the next lookup."""
        use = self._uses[key]
        tokens, nbytes = self._worth(key)
        prior = _OWN_WEIGHT / self._rates.rate(use.kind, self._clock - use.last)
        return (_OWN_WEIGHT + use.count) / (prior + self._clock - use.first) * tokens / nbytes

    def _worth(self, key: str) -> tuple[int, int]:
        """(tokens that would have to be recomputed, bytes that would be freed) without this snapshot."""
        nbytes, after, saves_tokens, _ = self._entries[key]
        alone, previous = True, key
        while after:
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


def _age_class(age: int) -> int:
    return min(max(age, 1).bit_length() - 1, _AGES)
