"""Cloze questions from running text: a sentence is removed and one of its terms, which recurs elsewhere, is blanked.

To fill the blank, the model must find the passage about the same thing and copy from it, which is the skill of
extractive question answering, without annotated data.
Source: recurring span selection, Splinter (arXiv 2101.00438), section 3.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from model.train.contexts import Context, Question

WORD = re.compile(r"[A-Za-z0-9][\w./:+'-]*\w|[A-Za-z0-9]")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z0-9\"'(])|\n{2,}")
COMMON = (
    "the a an of to in and or for on with as by is are was were be been it its this that these those from at not but "
    "if then than which who when where how what can may will would should must have has had do does did so such any "
    "all each other another some more most into out up no only also use used using one two you your we our they their "
    "he she his her i there here see note example same different following first new file option set value"
)
STOPWORDS = frozenset(COMMON.split())
FORMS = ("{}", "{}", "Fill in the blank: {}", "What is missing here? {}", "{} What is ___?")


def informative(words: Sequence[str], first_in_sentence: bool) -> bool:
    """Whether a run of words is specific: it has a digit, a capital inside a sentence, or a long word."""
    if words[0].lower() in STOPWORDS or words[-1].lower() in STOPWORDS:
        return False
    if any(any(c.isdigit() or c in "_./" for c in word) for word in words):
        return True
    if any(word[0].isupper() for word in words[first_in_sentence:]):
        return True
    return any(len(word) >= 8 for word in words)


class ClozeContexts:
    """Contexts made from (title, text) documents."""

    def __init__(self, texts: Sequence[tuple[str, str]]) -> None:
        self.texts = [(title, text) for title, text in texts if len(text) > 700]
        if not self.texts:
            raise ValueError("no text is long enough (700 characters) to make cloze questions of")

    def draw(self, rng: random.Random, max_chars: int, shortest: int = 250) -> Context | None:
        """A context of about `max_chars` in passages of at least `shortest` characters, with up to six blanks; None if
        the drawn text gives no question."""
        title, text = rng.choice(self.texts)
        start = rng.randrange(max(1, len(text) - max_chars))
        sentences = [s for s in SENTENCE_END.split(text[start : start + max_chars])[1:-1] if s.strip()]
        if len(sentences) < 5:
            return None
        taken = self._choose(sentences, rng)
        passages = self._passages(title, [s for i, s in enumerate(sentences) if i not in taken], shortest, rng)
        questions = []
        for i, (term, at) in taken.items():
            homes = [k for k, (_, body) in enumerate(passages) if self._find(body, term) >= 0]
            asked = rng.choice(FORMS).format(f"{sentences[i][:at]}___{sentences[i][at + len(term) :]}".strip())
            if len(homes) == 1:
                questions.append(Question(asked, term, homes[0], self._find(passages[homes[0]][1], term)))
        rng.shuffle(questions)
        lost = {q.passage for q in questions if len(passages) > 2 and rng.random() < 0.12}
        return self._drop(passages, questions, lost) if questions else None

    def _choose(self, sentences: list[str], rng: random.Random) -> dict[int, tuple[str, int]]:
        """The sentences to remove: index -> (term to blank, its offset)."""
        places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for i, sentence in enumerate(sentences):
            words = [(m.group(), m.start()) for m in WORD.finditer(sentence)]
            for k, (_, at) in enumerate(words):
                for n in (1, 2, 3):
                    run = [word for word, _ in words[k : k + n]]
                    if len(run) == n and informative(run, k == 0):
                        end = words[k + n - 1][1] + len(run[-1])
                        places[sentence[at:end]].append((i, at))
        terms = [term for term, where in places.items() if 2 <= len({i for i, _ in where}) <= 4]
        rng.shuffle(terms)
        taken: dict[int, tuple[str, int]] = {}
        for term in terms:
            where = places[term]
            fit = [(i, at) for i, at in where if i not in taken and 40 <= len(sentences[i]) - len(term) <= 260]
            if fit and len({i for i, _ in where} - taken.keys()) >= 2:
                i, at = rng.choice(fit)
                taken[i] = (term, at)
            if len(taken) == min(6, len(sentences) // 4):
                break
        return taken

    @staticmethod
    def _passages(title: str, sentences: list[str], shortest: int, rng: random.Random) -> list[tuple[str, str]]:
        passages, body, size = [], "", rng.randrange(shortest, 4 * shortest + 100)
        for sentence in sentences:
            body = f"{body} {sentence}" if body else sentence
            if len(body) >= size:
                passages.append((title, body))
                body, size = "", rng.randrange(shortest, 4 * shortest + 100)
        return [*passages, (title, body)] if body else passages

    @staticmethod
    def _find(body: str, term: str) -> int:
        match = re.search(rf"(?<![\w]){re.escape(term)}(?![\w])", body)
        return match.start() if match else -1

    @staticmethod
    def _drop(passages: list[tuple[str, str]], questions: list[Question], lost: set[int]) -> Context:
        """Remove the passages `lost`; their questions become unanswerable."""
        kept = [k for k in range(len(passages)) if k not in lost]
        place = {k: i for i, k in enumerate(kept)}
        moved = [
            replace(q, passage=place[q.passage]) if q.passage in place else Question(q.text, None, -1, -1)
            for q in questions
        ]
        return Context(tuple(passages[k] for k in kept), tuple(moved))
