"""The generation state of one request: turns the logits of each step into a token, its text and a stop decision."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.sampling import SamplingParams, StopMatcher, TokenConstraint, choose_token
from model.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length", "abort", "error"]


class Likeliest(NamedTuple):
    """The argmax of the logits: enough for a greedy step without constraint or watched tokens."""

    token_id: int
    logprob: float  # not finite if a logit is not


class Generated(NamedTuple):
    token_id: int
    logprob: float  # before temperature and constraint
    watch_logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason | None


class Generation:
    """Has its own random number generator, so that the text does not depend on the rest of the batch."""

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

    @property
    def needs_only_likeliest(self) -> bool:
        return self._sampling.temperature == 0 and self._constraint is None and not self._watch

    @property
    def max_new_tokens(self) -> int:
        return self._sampling.max_new_tokens

    def allowed(self, draft: Sequence[int] = ()) -> Sequence[int] | None:
        """Ids that the constraint allows after the tokens so far and `draft`; None: any."""
        return None if self._constraint is None else self._constraint.allowed([*self.token_ids, *draft])

    def ends_with(self, token_id: int) -> bool:
        return token_id in self._stop_ids

    def advance(self, scores: Tensor | Likeliest) -> Generated:
        """Choose the next token by its entry from `score`. Raises ValueError, and whatever the constraint raises."""
        if isinstance(scores, Likeliest):
            return self._take(*scores, ())
        return self._choose(scores)

    def _choose(self, logprobs: Tensor) -> Generated:
        token_id = choose_token(logprobs, self._sampling, self._random, self.allowed())
        return self._take(token_id, float(logprobs[token_id]), tuple(logprobs[self._watch].tolist()))

    def _take(self, token_id: int, logprob: float, watched: tuple[float, ...]) -> Generated:
        if not math.isfinite(logprob):
            raise ValueError("the model gave logits that are not finite")
        self.token_ids.append(token_id)
        text, finish_reason = self._text_of(token_id)
        return Generated(token_id, logprob, watched, text, finish_reason)

    def _text_of(self, token_id: int) -> tuple[str, FinishReason | None]:
        """The text that can be emitted now, without stop token and stop string, and the finish reason if any."""
        if self.ends_with(token_id):
            text, stopped = self._matcher.push(self._decoder.finish())
            return (text if stopped else text + self._matcher.finish()), "stop"
        text, stopped = self._matcher.push(self._decoder.push(token_id))
        if stopped:
            return text, "stop"
        if len(self.token_ids) < self._sampling.max_new_tokens:
            return text, None
        rest, stopped = self._matcher.push(self._decoder.finish())
        return (text + rest, "stop") if stopped else (text + rest + self._matcher.finish(), "length")


def score(logits: Tensor, generations: Sequence[Generation]) -> list[Tensor | Likeliest]:
    """logits (b, v) on any device -> the argument of `advance` for each generation: log-probabilities (v,) float32 on
    the CPU or, if it is enough, the argmax, which is computed on the device."""
    logits = logits.float()
    scores: list[Tensor | Likeliest | None] = [None] * len(generations)
    greedy = [i for i, generation in enumerate(generations) if generation.needs_only_likeliest]
    if greedy:
        best, ids = (rows := _rows(logits, greedy)).max(-1)
        found = torch.stack([ids.double(), (best - rows.logsumexp(-1)).double()], dim=-1).tolist()
        for i, (token_id, logprob) in zip(greedy, found, strict=True):
            scores[i] = Likeliest(int(token_id), logprob)
    if others := [i for i in range(len(generations)) if i not in greedy]:
        for i, row in zip(others, _rows(logits, others).log_softmax(-1).cpu(), strict=True):
            scores[i] = row
    return scores


def _rows(logits: Tensor, rows: list[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]
