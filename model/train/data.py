"""Training rows: running text, and contexts of passages with several questions each.

A context is a complete prompt of the service: system, documents, question, answer, next question, … For some questions
the answering passage is removed and similar ones remain: their answer is `<|none|>`. Loss weights mark the answers, and
each token of a quote or citation is labelled with the document token that it copies. Start at `QaRows`.
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

# Kinds of target token. The kind of an answer token is its loss weight; the decisive ones choose between quote and
# none, begin and end the quote, and cite the document. Running text belongs to no context.
DECISIVE, ANSWER, QUESTION, TEXT, PADDING, RUNNING = 3.0, 1.0, 0.5, 0.0, -1.0, -2.0


NO_SOURCE = -1
BEFORE_ANSWER, BEHIND_ANSWER = 16, 32  # the neighbourhood of an answer's first token in which it is to be found


class Place(NamedTuple):
    """The position of a passage in a prompt: number and first token of its document, and its own first token."""

    ordinal: int
    document: int
    passage: int

    def moved(self, shift: int) -> Place:
        return Place(self.ordinal, self.document + shift, self.passage + shift)


def covering_tokens(tokenizer: Tokenizer, text: str, start: int, end: int) -> tuple[list[int], int, int] | None:
    """The tokens of `text` and the range of them that covers text[start:end]; None if token boundaries do not match,
    except for white space."""
    ids, offsets = tokenizer.encode_with_offsets(text)
    first = next((i for i, (_, stop) in enumerate(offsets) if stop > start), len(ids))
    last = next((i for i in range(first, len(ids)) if offsets[i][1] >= end), len(ids) - 1)
    if first > last or text[offsets[first][0] : offsets[last][1]].strip() != text[start:end].strip():
        return None
    return ids, first, last + 1


class ContextRenderer:
    """Turns a `Context` into token ids and target kinds; with `rephrase`, the questions are reworded."""

    WRONG: ClassVar = 0.4  # for answerable questions that are asked back, share of wrong quotes

    def __init__(self, tokenizer: Tokenizer, rephrase: bool = False) -> None:
        self.format, self.tokenizer, self.rephrase = ChatFormat(tokenizer), tokenizer, rephrase

    def render(
        self, context: Context, max_tokens: int, rng: random.Random, back: float = 0.0
    ) -> tuple[list[int], list[float], list[int]]:
        """At most `max_tokens` token ids and, for each, its kind and its source: the index of the token that it copies,
        or NO_SOURCE.

        Questions that no longer fit are left out. A share `back` of them is asked back: given a quote, the targets are
        the verdict whether it answers the question and, if it does, the question itself.
        """
        passages = [self.tokenizer.encode(text) for _, text in context.passages]
        groups = self._group_passages(context, rng)
        ceiling = 10 ** rng.uniform(0.0, 3.0)
        ordinals = sorted(rng.sample(range(1, max(int(ceiling), len(groups) + 1)), len(groups)))
        ids, places = self.format.system(), dict[int, Place]()
        for ordinal, group in zip(ordinals, groups, strict=True):
            start = len(ids)
            ids += self.format.document(ordinal, context.passages[group[0]][0], [passages[i] for i in group])
            end = len(ids) - 1  # of the last passage, before the token that closes the document
            for i in reversed(group):
                places[i] = Place(ordinal, start, end - len(passages[i]))
                end = places[i].passage - 1  # a separator between two
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
        """Tokens and kinds of a quote, the question and the verdict; None if no quote matches token boundaries.

        Unanswerable questions get a wrong quote; answerable ones the right quote or, for a share `WRONG`, a wrong one.
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
        # no loss on the question after a wrong quote: it must stay unlikely there
        kinds = [TEXT] * len(given) + [ANSWER if quote is None else PADDING] * (len(said) - 1) + [DECISIVE]
        return [*given, *said], kinds

    @staticmethod
    def _rival(context: Context, question: Question, rng: random.Random) -> tuple[int, str, int] | None:
        """(passage, text, start) of a wrong quote: one that a model found likely, or the answer to another question.

        The higher its F1 with the right answer, the more often it is rejected as possibly right.
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
        """Mostly one passage per document; sometimes neighbours are merged into one document."""
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
    """A context of invented facts (`model.train.templated`), in their own documents or hidden in passages of `host`."""
    if host is not None:
        made = templated.hide_needles(rng, host.passages, rng.randrange(2, 7))
    else:
        count = num_passages or max(1, min(16, rng.randrange(1, 2 + max_chars // 450)))
        made = templated.generate_context(rng, count, min(10, 3 + count), tables=tables)
    questions = []
    for asked in made.questions:
        if len(asked.spans) > 1:
            continue  # answers with several quotes are not trained
        span = asked.spans[0] if asked.spans else None
        where = (span.text, span.passage, span.start) if span else (None, -1, -1)
        questions.append(Question(asked.text, *where))
    return Context(tuple(made.passages), tuple(questions))


class QaRows:
    """Training rows of one length, each with one context, padded at the end.

    Cloze questions teach finding and copying, invented facts discrimination between similar things, statements and
    pairs natural questions; the mixture shifts from `FIRST` to `LAST` over training (`progress`, 0 to 1). Early
    passages are short, for many candidates in few tokens. Some rows hold a single passage, as the service also reads
    passages one at a time, with questions that a search would match to it, most of them unanswerable.
    """

    LONE: ClassVar = {256: 1.0, 512: 0.7}  # row length -> share of rows with a single passage
    LONE_INVENTED: ClassVar = 0.2  # share of those that are invented, mostly tables
    BACK: ClassVar = {256: 0.45, 512: 0.45, 1024: 0.3}  # row length -> share of questions asked back
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
        """One or more contexts, possibly of different kinds, merged to about `max_chars`."""
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
    """The copied tokens of a row's answers, decisive ones first, as queries (count, 4) of `losses.attention_to`.

    float32. The query is at the token before the copy, the key at its source.
    """
    _, kinds, sources = row
    places = np.flatnonzero(sources != NO_SOURCE)
    places = places[np.argsort(-kinds[places], kind="stable")][:count]
    made = np.zeros((count, 4), dtype=np.float32)
    made[: len(places)] = np.stack([places - 1, sources[places], sources[places] + 1, kinds[places]], axis=1)
    return made


def findings(row: tuple[np.ndarray, np.ndarray, np.ndarray], count: int) -> np.ndarray:
    """Like `copies`, with queries at each `<|answer|>` and `<|quote|>` and keys around the first token quoted."""
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
