"""What a row of questions is made from: passages, and questions that know where their answer stands."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    answer: str | None  # None: the passages do not hold it
    passage: int  # which passage of the context holds the answer
    start: int  # where in that passage
    rivals: tuple[tuple[str, int], ...] = ()  # wrong quotes, and where they stand, where there is one passage alone


@dataclass(frozen=True, slots=True)
class Context:
    passages: tuple[tuple[str, str], ...]  # (title, text)
    questions: tuple[Question, ...]

    @property
    def chars(self) -> int:
        return sum(len(text) for _, text in self.passages)


def merge_contexts(contexts: Sequence[Context], rng: random.Random) -> Context:
    """One context of all their passages and questions: each one's passages are distractors to the others."""
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
