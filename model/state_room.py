"""Allocates the memory of an engine's states, and lets sequences share KV instead of holding it twice.

How much memory there is: admission.py. Who can lend KV: lending.py. Whose turn it is: engine.py.
"""

from __future__ import annotations

import torch

from model.admission import StateBudget
from model.jamba import MAX_GPU_BATCH, Jamba
from model.lending import Lenders
from model.prefix_cache import PrefixCache
from model.prefix_plan import PrefixPlan
from model.state import HybridState, LentKv, Origin


class StateRoom:
    """`max_bytes` bounds the memory of all running states and of ended ones kept for sharing; None: no bound."""

    def __init__(self, model: Jamba, cache: PrefixCache, max_bytes: int | None, max_batch: int) -> None:
        self._model, self._cache = model, cache
        self._budget = StateBudget(model.state_layout, max_bytes)
        self._lends = model.can_borrow and cache.has_near_states and max_batch <= MAX_GPU_BATCH
        self._lenders = Lenders()
        cache.on_invalidated.append(self._lenders.forget)

    @property
    def max_tokens(self) -> int | None:
        """Length of the longest sequence that fits by itself; 0 if none does, None without a limit."""
        return self._budget.max_tokens

    def new_state(
        self, plan: PrefixPlan, max_tokens: int, others: list[HybridState], may_borrow: bool
    ) -> HybridState | None:
        """A state for prompt and answer of `max_tokens`; None if there is no memory for it beside the `others`.

        Memory of ended sequences is released for it, KV that this one could share last, and only if that helps. Raises
        torch.OutOfMemoryError if there is not enough even for it alone.
        """
        while True:
            lent = self._find_lent(plan, others) if may_borrow and self._lends else None
            own_tokens = max_tokens - (0 if lent is None else lent.num_tokens)
            least = others if lent is None else [*others, lent]
            if self._budget.has_room(own_tokens, [*least, self._lenders]):
                try:
                    state = self._model.new_state(lent)
                    state.reserve(max_tokens)
                    state.plan = plan
                    return state
                except torch.OutOfMemoryError:
                    if not others and not self._lenders.memory:
                        raise
            keep = lent if self._budget.has_room(own_tokens, least) else None
            if keep is None and not self._budget.has_room(max_tokens, others):
                return None
            if not self._lenders.drop_oldest(keep) and (others or not self._lenders.drop_oldest()):
                return None  # retry when another request ends

    def leave(self, state: HybridState) -> None:
        """A sequence has ended and no longer needs its state."""
        if self._lends:
            self._lenders.keep(state, self._cache.is_current)

    def give_back(self) -> None:
        """Release all memory kept of ended sequences."""
        self._lenders.forget()

    def close(self) -> None:
        self.give_back()
        self._cache.on_invalidated.remove(self._lenders.forget)

    def _find_lent(self, plan: PrefixPlan, others: list[HybridState]) -> LentKv | None:
        """KV that another sequence already has of the state about to be loaded."""
        wanted, kept = Origin(plan.block_keys, plan.block_tokens), self._cache.kept_tokens(plan, nearest=True)
        return self._lenders.find(wanted, kept, plan.block_tokens, others)
