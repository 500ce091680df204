"""The answer of one request so far: each step's logits become a token, its text, and the decision to stop."""

from __future__ import annotations

import random
from typing import Literal, NamedTuple

from torch import Tensor

from model.sampling import SamplingParams, StopMatcher, TokenConstraint, choose_token
from model.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length", "abort", "error"]


class Generated(NamedTuple):
    token_id: int
    logprob: float  # of the model as it is: before temperature and constraint
    watch_logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason | None


class Generation:
    """Holds the request's own random numbers, so its text does not depend on what else is in the batch."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sampling: SamplingParams,
        constraint: TokenConstraint | None = None,
        watch_tokens: tuple[int, ...] = (),
    ) -> None:
        self.token_ids: list[int] = []
        self._sampling, self._constraint, self._watch = sampling, constraint, list(watch_tokens)
        self._stop_ids = set(sampling.stop_token_ids)
        if tokenizer.eos_id is not None and not sampling.ignore_eos:
            self._stop_ids.add(tokenizer.eos_id)
        self._random = random.Random(sampling.seed)
        self._decoder, self._matcher = StreamDecoder(tokenizer), StopMatcher(sampling.stop)

    def advance(self, logprobs: Tensor) -> Generated:
        """Choose the next token from logprobs (v,) float32 on the CPU. Raises ValueError, and as the constraint."""
        allowed = None if self._constraint is None else self._constraint.allowed(self.token_ids)
        token_id = choose_token(logprobs, self._sampling, self._random, allowed)
        self.token_ids.append(token_id)
        text, finish_reason = self._text_of(token_id)
        watched = tuple(logprobs[self._watch].tolist())
        return Generated(token_id, float(logprobs[token_id]), watched, text, finish_reason)

    def _text_of(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Text that is certain now; a stop token and a stop string are not part of it."""
        if token_id in self._stop_ids:
            text, stopped = self._matcher.push(self._decoder.finish())
            return (text if stopped else text + self._matcher.finish()), "stop"
        text, stopped = self._matcher.push(self._decoder.push(token_id))
        if stopped:
            return text, "stop"
        if len(self.token_ids) < self._sampling.max_new_tokens:
            return text, None
        rest, stopped = self._matcher.push(self._decoder.finish())
        return (text + rest, "stop") if stopped else (text + rest + self._matcher.finish(), "length")
