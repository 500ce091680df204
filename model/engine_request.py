"""Input and output types of an engine, and its protocol; engine.py implements it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from model.generation import FinishReason
from model.sampling import SamplingParams, TokenConstraint

MAX_BRANCH_TOKENS = 512  # all branches of a request together: they are computed in one step, which delays the others


class ContextTooLong(ValueError):
    """A request that exceeds the context even if nothing else is running."""

    def __init__(self, prompt_tokens: int, max_new_tokens: int, limit: int) -> None:
        self.prompt_tokens, self.max_new_tokens, self.limit = prompt_tokens, max_new_tokens, limit
        super().__init__(
            f"prompt of {prompt_tokens} tokens plus {max_new_tokens} new tokens is "
            f"{prompt_tokens + max_new_tokens - limit} over the limit of {limit}; "
            "send less evidence or allow fewer new tokens"
        )


class EngineOverloaded(RuntimeError):
    """More requests wait than the engine accepts; the same request may succeed later."""


class Branches(NamedTuple):
    """Continuations of a prompt to score. Of each branch, the last `scored_tokens` get a log-probability given
    everything before them; at least the first token is not scored. At most `MAX_BRANCH_TOKENS` in all."""

    token_ids: tuple[tuple[int, ...], ...]
    scored_tokens: tuple[int, ...]

    def check(self, vocab_size: int) -> None:
        """Raises ValueError if the branches are not as described above or have tokens outside the vocabulary."""
        branches, scored_tokens = self
        if len(branches) != len(scored_tokens) or sum(map(len, branches)) > MAX_BRANCH_TOKENS:
            raise ValueError(f"branches need a number of scored tokens each, and {MAX_BRANCH_TOKENS} tokens at most")
        for ids, scored in zip(branches, scored_tokens, strict=True):
            if not 0 < scored < len(ids) or not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(f"a branch of {len(ids)} tokens, {scored} of them scored, or outside the vocabulary")


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """`boundaries`: positions, in any order, where prompts with a common beginning may diverge; states are kept there.

    `tags` are the documents in the prompt and `tag_starts` where their tokens begin (default 0), for
    `PrefixCache.invalidate`. `salt` separates tenants. `epoch` is `PrefixCache.epoch` from before the documents were
    chosen. The log-probabilities of `watch_tokens` come with every step. `counted`: false for requests that no user
    made (prefetches), which stay out of the cache's statistics and usage counts. `turn`: among waiting requests the
    lowest goes first, then the oldest; requests that belong together share one. `branches`: their log-probabilities
    come with the first output. `on_read`: called between steps, on the engine thread, with the number of prompt tokens
    read so far, also if another request computes them or they came from the cache. It must be quick and not raise.
    """

    token_ids: Sequence[int] | np.ndarray
    boundaries: tuple[int, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    salt: bytes = b""
    tags: frozenset[str] = frozenset()
    constraint: TokenConstraint | None = None
    tag_starts: Mapping[str, int] = field(default_factory=dict)
    epoch: int | None = None
    watch_tokens: tuple[int, ...] = ()
    counted: bool = True
    turn: float = 0.0
    branches: Branches | None = None
    on_read: Callable[[int], object] | None = None

    def check(self, token_ids: np.ndarray, max_context_tokens: int, vocab_size: int) -> None:
        """Raises ContextTooLong or ValueError for an invalid request; `token_ids` are its own, as an array."""
        prompt_tokens, max_new_tokens = len(token_ids), self.sampling.max_new_tokens
        if prompt_tokens == 0:
            raise ValueError("the prompt has no tokens")
        if prompt_tokens + max_new_tokens > max_context_tokens:
            raise ContextTooLong(prompt_tokens, max_new_tokens, max_context_tokens)
        for token_id in (int(token_ids.min()), int(token_ids.max()), *self.watch_tokens):
            if not 0 <= token_id < vocab_size:
                raise ValueError(f"token {token_id} is outside the vocabulary of {vocab_size}")
        if self.branches is not None:
            self.branches.check(vocab_size)


@dataclass(frozen=True, slots=True)
class RequestTimings:
    """`ttft_ms` is the time from `add` to the first token, waiting included; 0 before that."""

    state_load_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One token of one request, or its end. Log-probabilities are the model's, before temperature and constraint.

    `text` is the text that became final with this token; it lags behind while a character is incomplete or a stop
    string may have begun.
    """

    request_id: str
    token_id: int | None
    logprob: float | None
    text: str
    finish_reason: FinishReason | None
    cached_tokens: int
    tier: str  # "gpu", "host", "redis" or "none"
    timings: RequestTimings
    watch_logprobs: tuple[float, ...] = ()
    branch_logprobs: tuple[tuple[float, ...], ...] = ()
    error: str | None = None


class Engine(Protocol):
    """Not thread safe: see engine_thread.py."""

    def add(self, request: EngineRequest) -> str:
        """Accept a request; returns its id. Raises ContextTooLong, ValueError, EngineOverloaded."""
        ...

    def step(self) -> list[StepOutput]:
        """Do a bounded piece of work; returns the new tokens and the ended requests."""
        ...

    def abort(self, request_id: str) -> None:
        """End a request: the next step reports it as finished and computes nothing more for it."""
        ...

    def has_work(self) -> bool:
        """Whether a step would do or report anything."""
        ...

    def prepare(self) -> bool:
        """When idle: do a short piece of preparation that later requests would wait for; False when nothing is left."""
        ...
