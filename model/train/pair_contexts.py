"""Contexts from question-answer pairs: passages with questions, among distractors or alone.

Start at `PairContexts`.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from model.train.contexts import Context, Question

NAME_BESIDE = (
    re.compile(r"(?:(?:[A-Z][\w'’-]+|[A-Z]\.) ){1,3}$"),
    re.compile(r"^(?: (?:[A-Z][\w'’-]+|[A-Z]\.|van|von|de))* [A-Z][\w'’-]+"),
)
UNIT_BEHIND = re.compile(
    r"^[ -]?(?:bytes?|bits?|[kKMGT]i?B|[kMG]?Hz|(?:milli|micro|nano)?seconds?|minutes?|hours?|days?|weeks?|months?|"
    r"years?|ms|percent|%|pixels?|lines?|characters?|degrees|metres?|meters?|feet|inches|miles|km|kg|dollars|USD)(?![\w-])"
)
_DAY, _MONTH = r"\d{1,2}(?:st|nd|rd|th)?", r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
DATE_BEFORE = re.compile(rf"(?:{_DAY} (?:of )?)?\b{_MONTH},? (?:{_DAY},? )?$")  # a year
ASKS_WHEN = re.compile(r"(?:since |until )?when |(?:on |at )?(?:what|which) (?:date|day)\b", re.IGNORECASE)
QUESTION_CHARS = 110  # a question with its answer, about
SILENT = 0.2  # share of lone passages that answer none of their questions
CONTESTED = 0.5  # share of lone passages drawn from those with known wrong quotes


def load_pairs(paths: Sequence[Path], rivals: Path | None = None) -> PairContexts:
    """Load files `pairs_X.jsonl` and the `passages_X.jsonl` beside each, as `model.train.pairs` writes them.

    `rivals`: output folder of `model.train.rivals`, with wrong quotes for questions.
    """
    pairs: list[dict] = []
    passages: dict[int, tuple[str, str]] = {}
    for path in paths:
        _load_file(path, pairs, passages)
    found = {}
    for file in sorted(rivals.glob("*.jsonl")) if rivals else ():
        for line in map(json.loads, file.read_text().splitlines()):
            found[line["asked"]] = tuple((words, start) for words, start, _ in line["rivals"])
    return PairContexts(pairs, passages, found)


def _load_file(path: Path, pairs: list[dict], passages: dict[int, tuple[str, str]]) -> None:
    """Add the pairs of a file and their negatives, whose ids begin at 0 in each file, here behind the earlier ones'."""
    first = 1 + max([*passages, *(pair.get("passage_id", -1) for pair in pairs)], default=-1)
    new = [widen_answer(json.loads(line)) for line in path.read_text().splitlines()]
    wanted = {i for pair in new for i in pair["negatives"]}
    for pair in new:
        moved = {"passage_id": pair["passage_id"] + first} if "passage_id" in pair else {}
        pairs.append(pair | {"negatives": [i + first for i in pair["negatives"]]} | moved)
    with path.with_name(path.name.replace("pairs_", "passages_")).open() as file:
        for record in map(json.loads, file):
            if record["id"] in wanted:
                passages[record["id"] + first] = (record["title"] or record["doc"], record["text"])


def asked_of(passage: str, question: str) -> str:
    """Identifies a question about a passage."""
    return hashlib.blake2b(f"{passage}\n{question}".encode(), digest_size=8).hexdigest()


def widen_answer(pair: dict) -> dict:
    """Extend part of a person's name to the full name, a year to the full date, a bare number to include its unit."""
    if pair["answer"] is None:
        return pair
    start, text = pair["start"], pair["passage"]
    end = start + len(pair["answer"])
    if pair["question"].startswith(("Who ", "By whom ")):
        if before := NAME_BESIDE[0].search(text[:start]):
            start = before.start()
        if after := NAME_BESIDE[1].match(text[end:]):
            end += after.end()
    elif re.fullmatch(r"\d{4}", text[start:end]) and ASKS_WHEN.match(pair["question"]):
        if before := DATE_BEFORE.search(text[:start]):
            start = before.start()
    elif text[end - 1].isdigit() and (unit := UNIT_BEHIND.match(text[end:])):
        end += unit.end()
    return pair | {"start": start, "answer": text[start:end]}


class PairContexts:
    """Contexts from question-answer pairs, several per passage. Distractors are lexically similar passages, then others
    of the same document, of the same package, of any; distractors that have questions of their own bring them along.

    `near`: id -> (title, text) of the passages that pairs name as `negatives`. `rivals`: question (`asked_of`) -> wrong
    quotes (text, offset) from its passage.
    """

    def __init__(
        self,
        pairs: Sequence[dict],
        near: Mapping[int, tuple[str, str]],
        rivals: Mapping[str, tuple[tuple[str, int], ...]] = MappingProxyType({}),
    ) -> None:
        self.rivals = rivals
        asked: dict[str, list[dict]] = defaultdict(list)
        for pair in pairs:
            asked[pair["passage"]].append(pair)
        self.asked, self.near = list(asked.values()), near
        self.drawn_to: dict[int, list[int]] = defaultdict(list)  # passage -> `asked` indices it is a negative of
        self.by_doc: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.by_source: dict[str, list[int]] = defaultdict(list)
        for i, (first, *_) in enumerate(self.asked):
            for passage in first["negatives"]:
                self.drawn_to[passage].append(i)
            self.by_doc[first["source"], first["doc"]].append(i)
            self.by_source[first["source"]].append(i)
        self.silent = [i for i in self.drawn_to if i in near and near[i][1] not in asked]  # without own questions
        self.contested = (
            [own for own in self.asked if any(asked_of(pair["passage"], pair["question"]) in rivals for pair in own)],
            [i for i in self.silent if any(asked_of(near[i][1], question) in rivals for question in self._in_vain(i))],
        )

    def draw(self, rng: random.Random, max_chars: int, num_passages: int | None = None, lost: float = 0.15) -> Context:
        """A context of about `max_chars`, or of `num_passages`; a share `lost` of the passages with questions is
        removed, so that their questions become unanswerable."""
        seed = rng.choice(self.asked)
        chosen = {seed[0]["passage"]: (self._title(seed[0], rng), seed)}
        for title, text, pairs in self._distractors(seed[0], rng):
            if len(chosen) >= (num_passages or 64) or sum(map(len, chosen)) + len(text) > max_chars:
                break
            chosen.setdefault(text, (title, pairs))
        kept, gone = [], []
        for text, (title, pairs) in chosen.items():
            take_away = len(pairs) > 0 and len(chosen) > 1 and rng.random() < lost
            (gone if take_away else kept).append((title, text, pairs))
        if not kept:
            kept.append(gone.pop())
        rng.shuffle(kept)
        if len(chosen) == 1 and rng.random() < lost:  # a lone passage with a question about a similar one
            other = self.asked[rng.choice(self.by_source[seed[0]["source"]])]
            if other is not seed:
                gone.append(("", "", other))
        return self._context(kept, gone, rng)

    def draw_lone(self, rng: random.Random, max_chars: int) -> Context:
        """One passage with its own questions and unanswerable ones about similar passages, in about `max_chars`."""
        asked, silent = self.contested if rng.random() < CONTESTED and self.contested[0] else (self.asked, self.silent)
        if silent and rng.random() < SILENT:
            return self._lone(None, rng.choice(silent), rng, max_chars)
        return self._lone(rng.choice(asked), -1, rng, max_chars)

    def each_lone(self, rng: random.Random, max_chars: int) -> Iterator[Context]:
        """Every passage once, as by `draw_lone`, in random order."""
        order: list[list[dict] | int] = [*self.asked, *self.silent]
        rng.shuffle(order)
        for one in order:
            silent = isinstance(one, int)
            yield self._lone(None if silent else one, one if silent else -1, rng, max_chars)

    def _lone(self, own: list[dict] | None, number: int, rng: random.Random, max_chars: int) -> Context:
        """The passage of `own` with its questions, or passage `number` without any; plus unanswerable questions."""
        if own is None:
            (title, text), own = self.near[number], []
        else:
            number, title, text = own[0].get("passage_id", -1), self._title(own[0], rng), own[0]["passage"]
        asked = [(p["question"], p["answer"], *((-1, -1) if p["answer"] is None else (0, p["start"]))) for p in own]
        vain = self._in_vain(number)
        room = (max_chars - len(text)) // QUESTION_CHARS - len(own)
        most = max(1, min(room, 4 + 2 * len(own)))
        asked += [(question, None, -1, -1) for question in rng.sample(vain, min(most, len(vain)))]
        rng.shuffle(asked)
        return Context(
            ((title[:80], text),), tuple(Question(*one, self.rivals.get(asked_of(text, one[0]), ())) for one in asked)
        )

    def _in_vain(self, number: int) -> list[str]:
        """Questions about other passages that have this one as a negative."""
        return [p["question"] for i in self.drawn_to.get(number, ()) for p in self.asked[i] if p["answer"] is not None]

    def _distractors(self, seed: dict, rng: random.Random) -> Iterator[tuple[str, str, list[dict]]]:
        near = [self.near[i] for i in seed["negatives"] if i in self.near]
        rng.shuffle(near)
        for title, text in near[: rng.randrange(8)]:
            yield title[:80], text, []
        same_doc = list(self.by_doc[seed["source"], seed["doc"]])
        rng.shuffle(same_doc)
        others = same_doc[: rng.randrange(1, 12)]
        for _ in range(200):
            same = rng.random() < 0.6
            others.append(rng.choice(self.by_source[seed["source"]]) if same else rng.randrange(len(self.asked)))
        for i in others:
            first = self.asked[i][0]
            yield self._title(first, rng), first["passage"], self.asked[i]

    @staticmethod
    def _context(kept: list[tuple], gone: list[tuple], rng: random.Random) -> Context:
        questions = []
        for at, (_, _, pairs) in enumerate(kept):
            for pair in pairs:
                where = (pair["answer"], at, pair["start"]) if pair["answer"] is not None else (None, -1, -1)
                questions.append(Question(pair["question"], *where))
        for _, _, pairs in gone:
            questions += [Question(pair["question"], None, -1, -1) for pair in pairs[:2] if pair["answer"] is not None]
        rng.shuffle(questions)
        return Context(tuple((title, text) for title, text, _ in kept), tuple(questions))

    @staticmethod
    def _title(pair: dict, rng: random.Random) -> str:
        """The heading of the passage, the name of its document, or both."""
        heading, name, kind = pair["title"][:80], pair["doc"].rsplit("/", 1)[-1], rng.random()
        if heading and kind < 0.5:
            return heading if kind < 0.25 else f"{heading} — {name}"
        return name if kind < 0.8 else f"{pair['source']} {name}"
