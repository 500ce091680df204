"""Time and token counts of one answer."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import cast

from app import schemas
from app.evidence import Found
from app.schemas import Tier
from model.engine_request import StepOutput


@dataclass
class Measures:
    """Time and token counts of an answer, summed over its generations."""

    started: float = field(default_factory=time.perf_counter)
    retrieval_ms: float = 0.0
    pack_ms: float = 0.0
    state_load_ms: float = 0.0
    prefill_ms: float = 0.0
    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    first_token: float | None = None
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    tier: Tier = "none"

    def add_search(self, found: Found) -> None:
        self.retrieval_ms += found.retrieval_ms
        self.pack_ms += found.pack_ms

    def add_start(self, prompt_tokens: int, output: StepOutput, queue_ms: float) -> None:
        """Add the costs of a prompt, reported with its first output, and the time it was queued."""
        self.input_tokens += prompt_tokens
        self.cached_tokens += output.cached_tokens
        if output.cached_tokens:
            self.tier = cast(Tier, output.tier)
        self.state_load_ms += output.timings.state_load_ms
        self.prefill_ms += output.timings.prefill_ms
        self.queue_ms += queue_ms

    def add_first_token(self) -> None:
        if self.first_token is None:
            self.first_token = time.perf_counter()
            self.ttft_ms = 1000 * (self.first_token - self.started)

    @property
    def computed_tokens(self) -> int:
        return self.input_tokens - self.cached_tokens + self.output_tokens

    def timings(self) -> schemas.Timings:
        generation_ms = 0.0 if self.first_token is None else 1000 * (time.perf_counter() - self.first_token)
        values = (self.retrieval_ms, self.pack_ms, self.state_load_ms, self.prefill_ms, self.ttft_ms, generation_ms)
        names = ("retrieval_ms", "pack_ms", "state_load_ms", "prefill_ms", "ttft_ms", "generation_ms")
        return schemas.Timings(**{name: round(value, 3) for name, value in zip(names, values, strict=True)})
