"""Speculative decoding by prompt lookup: guesses the next tokens, so that the engine verifies several in one forward.

Answers quote their evidence, so the next tokens have often followed the last ones before; and if the constraint leaves
only one token, it is certain. Guesses change the time of an answer but never its tokens: see `Jamba.try_tokens`.
Start at `PromptLookup.draft`.
Source: Saxena, prompt lookup decoding, 2023; with a vote among all earlier matches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from model.generation import Generation, Likeliest, score

_LONGEST_MATCH = 4  # tokens
_LEAST_SHARE = 0.5  # of the earlier matches; a rejected token costs a quarter of a step
_LONGEST_PAUSE = 32  # steps
_ROWS = 8  # last tokens and guesses of all sequences together: so many rows share one read of the weights


@dataclass(slots=True)
class DraftCounts:
    """Accepted and rejected guesses since the start."""

    accepted: int = 0
    rejected: int = 0


class PromptLookup:
    """The guesses for one answer. After successive wrong guesses it pauses for one, three, seven, ... steps."""

    def __init__(self, prompt: Sequence[int], generation: Generation, counts: DraftCounts) -> None:
        self._generation, self._counts = generation, counts
        self._tokens = np.empty(len(prompt) + generation.max_new_tokens, dtype=np.int64)
        self._tokens[: len(prompt)] = prompt
        self._prompt_tokens = len(prompt)
        self._pause = self._misses = 0
        self._drafted = 0  # length of the last draft
        self._guessed_at: int | None = None  # index in it of the first token that was not certain

    def draft(self, limit: int) -> list[int]:
        """Up to `limit` guessed next tokens, none of which ends the answer."""
        generated = self._generation.token_ids
        draft: list[int] = []
        self._guessed_at = None
        self._tokens[self._prompt_tokens : self._prompt_tokens + len(generated)] = generated
        for end in range(len(generated), min(len(generated) + limit, self._generation.max_new_tokens - 1)):
            token_id = self._next(draft, self._prompt_tokens + end)
            if token_id is None or self._generation.ends_with(token_id):
                break
            self._tokens[self._prompt_tokens + end] = token_id
            draft.append(token_id)
        self._pause, self._drafted = max(0, self._pause - 1), len(draft)
        return draft

    def learn(self, accepted: int) -> None:
        """Report how many tokens of the last draft were right. Call after each draft that was verified."""
        self._counts.accepted += accepted
        self._counts.rejected += self._drafted - accepted
        if self._guessed_at is None:
            return
        self._misses = 0 if accepted > self._guessed_at else self._misses + 1
        self._pause = min(2**self._misses - 1, _LONGEST_PAUSE)

    def _next(self, draft: Sequence[int], end: int) -> int | None:
        allowed = self._generation.allowed(draft)
        if allowed is not None and len(allowed) == 1:
            return int(allowed[0])
        if self._pause and self._guessed_at is None:
            return None
        token_id = _most_frequent(self._tokens[:end], allowed)
        if token_id is not None and self._guessed_at is None:
            self._guessed_at = len(draft)
        return token_id


def _most_frequent(tokens: np.ndarray, allowed: Sequence[int] | None) -> int | None:
    """The token that most often followed earlier matches of the last tokens, longest first; None without a majority."""
    places = np.flatnonzero(tokens[:-1] == tokens[-1]) + 1  # of the tokens that followed
    if allowed is not None:
        places = places[np.isin(tokens[places], allowed)]
    for length in range(2, _LONGEST_MATCH + 1):
        longer = places[places >= length]
        longer = longer[tokens[longer - length] == tokens[-length]] if len(tokens) > length else longer[:0]
        if not len(longer):
            break
        places = longer
    if not len(places):
        return None
    found, counts = np.unique(tokens[places], return_counts=True)
    best = counts.argmax()
    return int(found[best]) if counts[best] >= _LEAST_SHARE * len(places) else None


def draft_all(lookups: Sequence[PromptLookup], limit: int) -> list[list[int]]:
    """A draft of up to `limit` tokens for each sequence; shorter or none in larger batches."""
    limit = min(limit, _ROWS // len(lookups) - 1)
    return [lookup.draft(limit) if limit > 0 else [] for lookup in lookups]


def score_pieces(
    logits: Tensor, generations: Sequence[Generation], lengths: Sequence[int]
) -> list[list[Tensor | Likeliest]]:
    """logits (T, v) of pieces end to end, `lengths[i]` of the i-th generation -> inputs of each `advance`."""
    owners = (itertools.repeat(own, length) for own, length in zip(generations, lengths, strict=True))
    scores = iter(score(logits, list(itertools.chain(*owners))))
    return [list(itertools.islice(scores, length)) for length in lengths]
