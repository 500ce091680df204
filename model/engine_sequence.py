"""One request under way in an engine."""

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
    """A request that an engine has accepted, and how far it is."""

    request_id: str
    request: EngineRequest
    plan: PrefixPlan
    generation: Generation
    lookup: PromptLookup
    added_s: float
    state: HybridState | None = None  # with room for prompt and answer, from when it need not wait any more
    may_borrow: bool = True  # KV that another has
    kept_tokens: int = 0  # how many tokens' KV the cache has
    cached_tokens: int = 0
    tier: str = "none"
    timings: RequestTimings = field(default_factory=RequestTimings)
    segment: LayeredPrefill | None = None  # begun and not yet computed to the end
    branch_logprobs: tuple[tuple[float, ...], ...] = ()  # that nobody was told yet

    @property
    def position(self) -> int:
        return 0 if self.state is None else self.state.num_tokens

    @property
    def max_tokens(self) -> int:
        """How long prompt and answer may become together."""
        return self.plan.num_tokens + self.request.sampling.max_new_tokens

    @property
    def counted(self) -> bool:
        """Whether looking for its prefix is a use of what is found; once."""
        return self.request.counted and self.may_borrow

    def tell(self, read_tokens: int) -> None:
        if self.request.on_read is not None:
            self.request.on_read(read_tokens)
