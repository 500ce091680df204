"""Sampling parameters, token choice and stop strings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """`temperature` 0 is greedy. Generation ends at a `stop` string, which is cut off, or at one of `stop_token_ids`.

    Raises ValueError for values out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # for benchmarks that need exactly max_new_tokens

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if "" in self.stop:
            raise ValueError("a stop string must not be empty")


class TokenConstraint(Protocol):
    """Restricts the next token, for instance to continuations of a quoted span.

    The result must depend on `generated` alone: the engine also asks about drafted tokens that it may reject.
    """

    def allowed(self, generated: Sequence[int]) -> Sequence[int] | None:
        """Ids that may follow the tokens generated so far; None: any."""
        ...


def choose_token(
    logprobs: Tensor, params: SamplingParams, rng: random.Random, allowed: Sequence[int] | None = None
) -> int:
    """Choose an id by logprobs (v,) float32 on the CPU; probabilities are renormalised over the allowed ids.

    A sampled token takes exactly one number from `rng`. The inverse CDF runs over the nucleus in order of ids, not of
    probability, so that rounding differences, such as those between batch sizes, hardly ever change the token.
    Raises ValueError if no id is allowed, or a logit is NaN, or the largest is not finite.
    """
    ids = None if allowed is None else torch.as_tensor(allowed, dtype=torch.int64).unique()
    if ids is not None and ids.numel() == 0:
        raise ValueError("the constraint allows no next token")
    scores = logprobs if ids is None else logprobs[ids]
    if torch.isnan(scores).any() or not torch.isfinite(scores.max()):
        raise ValueError("the model gave logits that are not finite")
    place = int(scores.argmax()) if params.temperature == 0 else _sample(scores, params, rng)
    return place if ids is None else int(ids[place])


def _sample(scores: Tensor, params: SamplingParams, rng: random.Random) -> int:
    """Index into scores (v,), sampled with temperature from the top_p nucleus."""
    below = scores.numpy().astype(np.float64)
    below -= below.max()
    with np.errstate(over="ignore"):  # a tiny temperature gives -inf, and so weight 0
        weights = np.exp(below / params.temperature)
    if params.top_p < 1.0:
        order = np.argsort(-weights, kind="stable")
        mass = np.cumsum(weights[order])
        kept = int(np.searchsorted(mass, params.top_p * mass[-1])) + 1
        weights[order[kept:]] = 0.0
    mass = np.cumsum(weights)
    place = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
    return min(place, int(np.flatnonzero(weights)[-1]))


class StopMatcher:
    """Cuts a streamed text before the first stop string; holds back text that may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text to emit, whether a stop string was found, after which nothing may be pushed)."""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            certain, self._held = self._held[: min(found)], ""
            return certain, True
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain, False

    def finish(self) -> str:
        """The text still held back, at the end of generation."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
