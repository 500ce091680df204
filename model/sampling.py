"""What a request wants of its tokens: how to choose them, when to stop."""

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
    """`temperature` 0 takes the likeliest token. `stop` strings end the text before them, `stop_token_ids` end it too.

    Raises ValueError for values out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False  # for measurements that need exactly max_new_tokens

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
    """Which tokens may come next, for instance only continuations of a quoted span.

    A function of `generated` alone: the engine also asks about tokens that it only guesses, and then goes back.
    """

    def allowed(self, generated: Sequence[int]) -> Sequence[int] | None:
        """Ids that may follow the tokens generated so far; None: anything."""
        ...


def choose_token(
    logprobs: Tensor, params: SamplingParams, rng: random.Random, allowed: Sequence[int] | None = None
) -> int:
    """Pick one id from logprobs (v,) float32 on the CPU; the allowed ids are renormalised among themselves.

    Takes exactly one number from `rng` per sampled token. The nucleus is drawn from in order of ids, not of
    probabilities: logits that differ by rounding, as those of a batch do from those of one sequence, then give the
    same token. Raises ValueError when nothing is allowed or a logit is not a number.
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
    """Place in scores (v,) drawn at params.temperature from the top_p nucleus."""
    below = scores.numpy().astype(np.float64)
    below -= below.max()
    with np.errstate(over="ignore"):  # of a temperature near 0: all but the likeliest weigh nothing
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
    """Cuts a streamed text before the first stop string; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that is certain, whether a stop string was met; then nothing more may be pushed)."""
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
        """What was held back and turned out to be no stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
