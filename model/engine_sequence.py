"""One running request of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.drafting import PromptLookup
from model.engine_request import EngineRequest, RequestTimings
from model.generation import Generation
from model.layered_prefill import LayeredPrefill
from model.prefix_plan import PrefixPlan
from model.state import HybridState


@dataclass(slots=True, eq=False)
class RunningSequence:
    """A request that an engine has accepted, and its progress."""

    request_id: str
    request: EngineRequest
    plan: PrefixPlan
    generation: Generation
    lookup: PromptLookup
    added_s: float
    state: HybridState | None = None  # with room for prompt and answer; None while waiting
    may_borrow: bool = True  # KV that another has
    kept_tokens: int = 0  # how many tokens' KV the cache has
    cached_tokens: int = 0
    tier: str = "none"
    timings: RequestTimings = field(default_factory=RequestTimings)
    segment: LayeredPrefill | None = None  # started and not yet finished
    branch_logprobs: tuple[tuple[float, ...], ...] = ()  # not reported yet

    @property
    def position(self) -> int:
        return 0 if self.state is None else self.state.num_tokens

    @property
    def max_tokens(self) -> int:
        """How long prompt and answer may become together."""
        return self.plan.num_tokens + self.request.sampling.max_new_tokens

    @property
    def counted(self) -> bool:
        """Whether its prefix lookup counts in the cache's statistics; true at most once."""
        return self.request.counted and self.may_borrow

    def tell(self, read_tokens: int) -> None:
        if self.request.on_read is not None:
            self.request.on_read(read_tokens)
