"""Finds KV that a sequence can share instead of holding a copy: that of running and of some ended sequences.

Memory of an ended sequence is kept until it is needed otherwise, so that the next question about the same documents
copies nothing. Not here: who needs memory (state_room.py), what the prefix cache stores (prefix_cache.py).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from model.prefix_plan import PrefixPlan
from model.state import HybridState, LentKv, Origin, cut_loan

_LIMIT = 4  # prefixes of ended sequences


@dataclass(frozen=True, slots=True)
class _Ended:
    loan: LentKv  # always with a plan
    origin: Origin  # of its tokens


class Lenders:
    """KV of ended sequences. `forget` may be called from any thread, everything else only from the engine's."""

    def __init__(self) -> None:
        self._ended: OrderedDict[int, _Ended] = OrderedDict()  # by address, least recently used first
        self._lock = threading.Lock()

    @property
    def memory(self) -> Mapping[int, int]:
        """Like `HybridState.memory`."""
        with self._lock:
            return {address: one.loan.kv.nbytes for address, one in self._ended.items()}

    def find(self, wanted: Origin, most_tokens: int, unit: int, states: Sequence[HybridState]) -> LentKv | None:
        """The longest KV, in `unit`s, that a running or ended sequence has of the first `most_tokens` of a state that
        will consist of the blocks `wanted`."""
        with self._lock:
            ended = list(self._ended.values())
        offers = [state.lend(min(state.origin.common_tokens(wanted), most_tokens), unit) for state in states]
        offers += [cut_loan(one.loan, min(one.origin.common_tokens(wanted), most_tokens), unit) for one in ended]
        best = max(filter(None, offers), key=lambda loan: loan.num_tokens, default=None)
        if best is not None:
            with self._lock:
                if best.kv.data_ptr() in self._ended:
                    self._ended.move_to_end(best.kv.data_ptr())
        return best

    def keep(self, state: HybridState, is_current: Callable[[PrefixPlan, Collection[str]], bool]) -> None:
        """Keep an ended sequence's KV, or what it was lent, if others could share it and none of the documents in that
        memory has been deleted: see `PrefixCache.is_current`."""
        loan = state.lend(state.origin.num_tokens)
        if loan is None or loan.plan is None:
            return
        own, address = _Ended(loan, state.origin.first(loan.num_tokens)), loan.kv.data_ptr()
        with self._lock:
            known = self._ended.pop(address, None)
            if known is not None and known.loan.num_tokens > loan.num_tokens:
                own = known
            for other, one in list(self._ended.items()):
                if own.origin.common_tokens(one.origin) == one.origin.num_tokens:  # it has nothing more than this one
                    del self._ended[other]
            self._ended[address] = own
            while len(self._ended) > _LIMIT:
                self._ended.popitem(last=False)
        if not is_current(loan.plan, loan.plan.tags):  # checked last: a later invalidation finds them here
            with self._lock:
                self._ended.pop(address, None)

    def drop_oldest(self, keep: LentKv | None = None) -> bool:
        """Release the memory of the least recently used one, except `keep`; False if there is none."""
        with self._lock:
            kept = None if keep is None else keep.kv.data_ptr()
            oldest = next((address for address in self._ended if address != kept), None)
            return oldest is not None and bool(self._ended.pop(oldest))

    def forget(self, tags: Collection[str] | None = None) -> None:
        """Release the memory of those that include one of these documents; None: of all."""
        with self._lock:
            for address, one in list(self._ended.items()):
                if tags is None or not one.loan.plan.tags.keys().isdisjoint(tags):
                    del self._ended[address]
