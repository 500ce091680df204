"""Contexts: passages with questions whose answers are located in them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    answer: str | None  # None: not in the passages
    passage: int  # index of the passage with the answer
    start: int  # character offset of the answer in that passage
    rivals: tuple[tuple[str, int], ...] = ()  # wrong quotes and their offsets, for contexts of a single passage


@dataclass(frozen=True, slots=True)
class Context:
    passages: tuple[tuple[str, str], ...]  # (title, text)
    questions: tuple[Question, ...]

    @property
    def chars(self) -> int:
        return sum(len(text) for _, text in self.passages)


def merge_contexts(contexts: Sequence[Context], rng: random.Random) -> Context:
    """Merge contexts into one, shuffled: the passages of each are distractors for the others."""
    passages = [passage for context in contexts for passage in context.passages]
    order = list(range(len(passages)))
    rng.shuffle(order)
    place = {old: new for new, old in enumerate(order)}
    questions, first = [], 0
    for context in contexts:
        for q in context.questions:
            questions.append(q if q.answer is None else replace(q, passage=place[q.passage + first]))
        first += len(context.passages)
    rng.shuffle(questions)
    return Context(tuple(passages[i] for i in order), tuple(questions))
