"""Rows to train on: running text, and contexts of passages with several questions in turn.

A context is a whole prompt of the service: system, documents, question, answer, the next question, … Some questions
have lost their passage to near ones: their answer is `<|none|>`. Loss weights mark the answers, and each token of a
quote or citation knows which token of the documents it repeats. Start at `QaRows`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from model.chat_format import ChatFormat
from model.tokenizer import Tokenizer
from model.train import templated
from model.train.cloze import ClozeContexts
from model.train.contexts import Context, Question, merge_contexts
from model.train.pair_contexts import PairContexts
from model.train.rephrase import rephrase
from model.train.scoring import token_f1
from model.train.statement_contexts import StatementContexts, ask_more

# Kinds of target token. Answers weigh as much as their kind: where the document is chosen, the quote begins and ends.
# Running text belongs to no context.
DECISIVE, ANSWER, QUESTION, TEXT, PADDING, RUNNING = 3.0, 1.0, 0.5, 0.0, -1.0, -2.0


NO_SOURCE = -1
BEFORE_ANSWER, BEHIND_ANSWER = 16, 32  # tokens around an answer's first that tell what it answers


class Place(NamedTuple):
    """Where a passage stands in a prompt: its document's number and first token, and its own first token."""

    ordinal: int
    document: int
    passage: int

    def moved(self, shift: int) -> Place:
        return Place(self.ordinal, self.document + shift, self.passage + shift)


def covering_tokens(tokenizer: Tokenizer, text: str, start: int, end: int) -> tuple[list[int], int, int] | None:
    """Tokens of `text` and the range of them that covers text[start:end]; None when they cover more than white space
    beside it."""
    ids, offsets = tokenizer.encode_with_offsets(text)
    first = next((i for i, (_, stop) in enumerate(offsets) if stop > start), len(ids))
    last = next((i for i in range(first, len(ids)) if offsets[i][1] >= end), len(ids) - 1)
    if first > last or text[offsets[first][0] : offsets[last][1]].strip() != text[start:end].strip():
        return None
    return ids, first, last + 1


class ContextRenderer:
    """Turns a `Context` into token ids and target kinds, at most `max_tokens` long; with `rephrase`, in other words."""

    WRONG: ClassVar = 0.4  # share of the quotes given for questions that have an answer

    def __init__(self, tokenizer: Tokenizer, rephrase: bool = False) -> None:
        self.format, self.tokenizer, self.rephrase = ChatFormat(tokenizer), tokenizer, rephrase

    def render(
        self, context: Context, max_tokens: int, rng: random.Random, back: float = 0.0
    ) -> tuple[list[int], list[float], list[int]]:
        """Token ids and, for each, its kind and its source: the place of the token it repeats, or NO_SOURCE.

        Questions that no longer fit are left out. A share `back` of them is asked back: a quote is given, and what is
        to be said is the question, if the quote answers it, and whether it does.
        """
        passages = [self.tokenizer.encode(text) for _, text in context.passages]
        groups = self._group_passages(context, rng)
        ceiling = 10 ** rng.uniform(0.0, 3.0)
        ordinals = sorted(rng.sample(range(1, max(int(ceiling), len(groups) + 1)), len(groups)))
        ids, places = self.format.system(), dict[int, Place]()
        for ordinal, group in zip(ordinals, groups, strict=True):
            start = len(ids)
            ids += self.format.document(ordinal, context.passages[group[0]][0], [passages[i] for i in group])
            end = len(ids) - 1  # of the last passage: then the document closes
            for i in reversed(group):
                places[i] = Place(ordinal, start, end - len(passages[i]))
                end = places[i].passage - 1  # a gap between two
        kinds, sources = [TEXT] * len(ids), [NO_SOURCE] * len(ids)
        for question in context.questions:
            text = rephrase(question.text, rng) if self.rephrase else question.text
            if rng.random() < back and (turn := self._asked_back(context, question, text, rng)):
                if len(ids) + len(turn[0]) <= max_tokens:
                    ids, kinds, sources = ids + turn[0], kinds + turn[1], sources + [NO_SOURCE] * len(turn[0])
                continue
            asked = self.format.ask(text)
            answer = self._answer(context, question, places)
            if answer is None or len(ids) + len(asked) + len(answer[0]) > max_tokens:
                continue
            ids += [*asked, *answer[0]]
            kinds += [QUESTION] * len(asked) + self._kinds(answer[0])
            sources += [NO_SOURCE] * len(asked) + answer[1]
        return ids[:max_tokens], kinds[:max_tokens], sources[:max_tokens]

    def _answer(
        self, context: Context, question: Question, places: Mapping[int, Place]
    ) -> tuple[list[int], list[int]] | None:
        """The answer's tokens and their sources."""
        if question.answer is None:
            answer = self.format.no_answer()
            return answer, [NO_SOURCE] * len(answer)
        text = context.passages[question.passage][1]
        found = covering_tokens(self.tokenizer, text, question.start, question.start + len(question.answer))
        if found is None:
            return None
        (ids, first, last), place = found, places[question.passage]
        answer = self.format.quoted_answer(ids[first:last], place.ordinal)
        cited = range(place.document + 1, place.document + 1 + len(self.format.citation(place.ordinal)))
        sources = [NO_SOURCE, *range(place.passage + first, place.passage + last), NO_SOURCE, *cited, NO_SOURCE]
        return answer, sources

    def _asked_back(
        self, context: Context, question: Question, text: str, rng: random.Random
    ) -> tuple[list[int], list[float]] | None:
        """A quote, the question and the verdict, with their kinds; None where there is no quote of whole tokens.

        What is asked in vain gets a wrong quote, what has an answer the right one or, for a share `WRONG`, another.
        """
        wrong = rng.random() < self.WRONG or question.answer is None
        quote = self._rival(context, question, rng) if wrong else None
        if quote is None and question.answer is None:
            return None
        passage, words, start = quote or (question.passage, question.answer, question.start)
        found = covering_tokens(self.tokenizer, context.passages[passage][1], start, start + len(words))
        if found is None:
            return None
        given, said = self.format.ask_back(found[0][found[1] : found[2]], text, answers=quote is None)
        # behind a wrong quote the question is not learnt: it must stay unlikely there
        kinds = [TEXT] * len(given) + [ANSWER if quote is None else PADDING] * (len(said) - 1) + [DECISIVE]
        return [*given, *said], kinds

    @staticmethod
    def _rival(context: Context, question: Question, rng: random.Random) -> tuple[int, str, int] | None:
        """A wrong quote, its passage first: one that a model took for likely, or what answers another question.

        The nearer its words come to the right ones, the less often it is taken for wrong.
        """
        rivals = [(0, words, start) for words, start in question.rivals]
        rivals = rivals or [(q.passage, q.answer, q.start) for q in context.questions if q.answer and q is not question]
        if not rivals:
            return None
        chosen = rng.choice(rivals)
        near = question.answer is not None and rng.random() < token_f1(chosen[1], question.answer)
        return None if near else chosen

    def _kinds(self, answer: list[int]) -> list[float]:
        """Decisive: quote or none, the quote's first token and its end, and the citation."""
        if answer[0] != self.format.quote:
            return [DECISIVE] + [ANSWER] * (len(answer) - 1)
        end = answer.index(self.format.quote_end)
        return [DECISIVE if i < 2 or end <= i < len(answer) - 1 else ANSWER for i in range(len(answer))]

    @staticmethod
    def _group_passages(context: Context, rng: random.Random) -> list[list[int]]:
        """Mostly a document a passage; sometimes neighbours under one title, as passages of one document."""
        groups: list[list[int]] = []
        merge = rng.random() < 0.3
        for i in range(len(context.passages)):
            if merge and groups and rng.random() < 0.5:
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups


def templated_context(
    rng: random.Random,
    max_chars: int,
    num_passages: int | None = None,
    host: Context | None = None,
    tables: float = 0.25,
) -> Context:
    """A context of invented facts (`model.train.templated`): documents of them, or needles in passages of `host`."""
    if host is not None:
        made = templated.hide_needles(rng, host.passages, rng.randrange(2, 7))
    else:
        count = num_passages or max(1, min(16, rng.randrange(1, 2 + max_chars // 450)))
        made = templated.generate_context(rng, count, min(10, 3 + count), tables=tables)
    questions = []
    for asked in made.questions:
        if len(asked.spans) > 1:
            continue  # answers of several quotes are not trained yet
        span = asked.spans[0] if asked.spans else None
        where = (span.text, span.passage, span.start) if span else (None, -1, -1)
        questions.append(Question(asked.text, *where))
    return Context(tuple(made.passages), tuple(questions))


class QaRows:
    """Rows of one length for training: each a context of its own, padded at the end.

    Blanks teach to find and to copy, invented facts to tell like from like, statements and pairs what people ask: the
    shares move from the first to the last over the training (`progress`, 0 to 1). Early passages are short: many
    documents in few tokens, and so many choices to learn from. Some rows have a passage alone, as the service has
    passages read, and questions that lead a search to it, most of them in vain; or a passage that is read again with
    each question, as the service reads the one it answers from.
    """

    LONE: ClassVar = {256: 1.0, 512: 0.7}  # share of the rows of a length in which a passage stands alone
    LONE_INVENTED: ClassVar = 0.2  # of these: tables for the most part
    BACK: ClassVar = {256: 0.45, 512: 0.45, 1024: 0.3}  # share of the questions that are asked back
    FIRST: ClassVar = {"cloze": 0.12, "templated": 0.18, "statements": 0.25, "pairs": 0.45}
    LAST: ClassVar = {"cloze": 0.04, "templated": 0.16, "statements": 0.2, "pairs": 0.6}

    def __init__(self, tokenizer: Tokenizer, pairs: PairContexts, texts: Sequence[tuple[str, str]]) -> None:
        self.renderer = ContextRenderer(tokenizer, rephrase=True)
        self.pairs, self.cloze, self.statements = pairs, ClozeContexts(texts), StatementContexts(texts)

    def row(self, rng: random.Random, length: int, progress: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(length + 1,) token ids int64, kinds float32, sources int64 of one context that fills most of the row."""
        shares = {kind: (1 - progress) * self.FIRST[kind] + progress * self.LAST[kind] for kind in self.FIRST}
        ids, kinds, sources = [], [], []
        while max(kinds, default=TEXT) < ANSWER:
            chars = int(length * rng.uniform(1.8, 2.6) if length <= 512 else length * rng.uniform(2.6, 3.4))
            if rng.random() < self.LONE.get(length, 0.0):
                if rng.random() < self.LONE_INVENTED:
                    context = templated_context(rng, 0, num_passages=1, tables=0.7)
                else:
                    context = self.pairs.draw_lone(rng, int(3.5 * length))
                context = ask_more(context, rng) if rng.random() < 0.9 else context
            else:
                context = self._context(rng, shares, chars, shortest=60 if rng.random() > progress else 250)
            ids, kinds, sources = self.renderer.render(context, length + 1, rng, self.BACK.get(length, 0.1))
        row = np.zeros(length + 1, dtype=np.int64)
        marks = np.full(length + 1, PADDING, dtype=np.float32)
        origins = np.full(length + 1, NO_SOURCE, dtype=np.int64)
        row[: len(ids)], marks[: len(ids)], origins[: len(ids)] = ids, kinds, sources
        return row, marks, origins

    def _context(self, rng: random.Random, shares: Mapping[str, float], max_chars: int, shortest: int) -> Context:
        """Contexts of one kind or several, together of about `max_chars`."""
        parts: list[Context] = []
        room = max_chars
        while room > 0.25 * max_chars:
            kind = rng.choices(list(shares), list(shares.values()))[0]
            part = self._part(kind, rng, int(room * rng.uniform(0.5, 1.0)), shortest)
            if part is not None and part.chars < 1.1 * room:
                parts.append(part)
                room -= part.chars
            elif parts:
                break
        return merge_contexts(parts, rng) if len(parts) > 1 else parts[0]

    def _part(self, kind: str, rng: random.Random, max_chars: int, shortest: int) -> Context | None:
        if kind == "cloze":
            return self.cloze.draw(rng, max_chars, shortest)
        if kind == "statements":
            return self.statements.draw(rng, max_chars, shortest)
        if kind == "templated":
            host = self.pairs.draw(rng, max_chars) if rng.random() < 0.35 else None
            return templated_context(rng, max_chars, host=host)
        part = self.pairs.draw(rng, max_chars)
        return ask_more(part, rng) if rng.random() < 0.6 else part


def copies(row: tuple[np.ndarray, np.ndarray, np.ndarray], count: int) -> np.ndarray:
    """Where a row's answers repeat its documents, decisive tokens first: (count, 4) float32 for `losses.attention_to`.

    The query is the token before the one that is repeated, its key the token that is.
    """
    _, kinds, sources = row
    places = np.flatnonzero(sources != NO_SOURCE)
    places = places[np.argsort(-kinds[places], kind="stable")][:count]
    made = np.zeros((count, 4), dtype=np.float32)
    made[: len(places)] = np.stack([places - 1, sources[places], sources[places] + 1, kinds[places]], axis=1)
    return made


def findings(row: tuple[np.ndarray, np.ndarray, np.ndarray], count: int) -> np.ndarray:
    """Each `<|answer|><|quote|>`, and the neighbourhood of what is quoted then: as `copies` gives them."""
    _, kinds, sources = row
    begun = np.flatnonzero((sources[2:] != NO_SOURCE) & (kinds[:-2] == QUESTION)) + 2  # the first token of each quote
    made = np.zeros((count, 4), dtype=np.float32)
    for i, at in enumerate(begun[: count // 2]):
        near = max(0, sources[at] - BEFORE_ANSWER), min(sources[at] + BEHIND_ANSWER, at - 2)
        made[2 * i : 2 * i + 2] = [(at - 2, *near, 1.0), (at - 1, *near, 1.0)]
    return made


class TextRows:
    """Rows of running text, cut at random places from a memory-mapped uint16 array of tokens."""

    def __init__(self, path: Path) -> None:
        self.tokens = np.load(path, mmap_mode="r")

    def row(self, rng: random.Random, length: int) -> np.ndarray:
        """(length + 1,) token ids int64."""
        start = rng.randrange(len(self.tokens) - length - 1)
        return self.tokens[start : start + length + 1].astype(np.int64)
