"""Token ids of the questions and passages for tuning the retrieval models. Start at `SearchData`."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model.train.cloze import STOPWORDS
from model.train.lexical import words
from model.train.rephrase import rephrase
from model.train.sources import EXCLUDED, HELD_OUT, TOO_CLOSE

PASSAGE_TOKENS, QUESTION_TOKENS = 256, 64  # the embedder's window; a question is hardly ever longer
_NO_TITLE = 0.15  # share of passages without their title, like plain text files
_FEWER_WORDS = 0.25  # share of questions that lose a word they share with their passage
_TESTED = {*EXCLUDED, *HELD_OUT, *TOO_CLOSE}

Record = dict[str, Any]


def passage_text(title: str, text: str) -> str:
    """Title and text, in the form of `retrieval.embedder.text_to_embed`."""
    return f"{title[:80]}\n{text}" if title and title not in text[:200] else text


def read_rows(folder: Path, name: str) -> list[Record]:
    """Rows of NAME.jsonl or NAME.jsonl.xz. Raises FileNotFoundError if there is neither."""
    path = folder / f"{name}.jsonl"
    packed = path.with_suffix(".jsonl.xz")
    with lzma.open(packed, "rt", encoding="utf-8") if packed.exists() else path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class SearchData:
    """A split from `model.train.pairs`: pairs_SPLIT and passages_SPLIT.

    `passages`: token ids; `gold[i]`: indices of the passages that answer question i; `near[i]`: indices of its hard
    negatives. With `train`, raises ValueError for pairs of packages that are reserved for tests.
    """

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, limit: int | None = None) -> None:
        rows = [row for row in read_rows(folder, f"pairs_{split}") if row.get("answer", "") is not None][:limit]
        stored = read_rows(folder, f"passages_{split}")
        if split == "train" and (tested := _TESTED & {row["source"] for row in [*rows, *stored]}):
            raise ValueError(f"pairs of {', '.join(sorted(tested))} must stay out of training")
        self.tokenizer = tokenizer
        place = {passage["id"]: number for number, passage in enumerate(stored)}
        self.texts = [passage["text"] for passage in stored]
        self.passages = self.encode([passage_text(p["title"], p["text"]) for p in stored], PASSAGE_TOKENS)
        titles = self.encode([passage_text(p["title"], p["text"])[: -len(p["text"])] for p in stored], PASSAGE_TOKENS)
        self._title_ends = [len(title) - 1 for title in titles]
        self.questions: list[str] = [row["question"] for row in rows]
        self.kinds: list[str] = [row.get("kind", "") for row in rows]
        self.answers: list[str] = [row.get("answer") or "" for row in rows]
        self.gold = [[place[i] for i in row.get("gold") or [row["passage_id"]]] for row in rows]
        self.near = [[place[i] for i in row.get("negatives", []) if i in place] for row in rows]

    def encode(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Token ids, truncated to `limit` including [CLS] and [SEP]."""
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(limit)
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def passage(self, place: int, rng: random.Random) -> list[int]:
        ids = self.passages[place]
        return [ids[0], *ids[self._title_ends[place] :]] if rng.random() < _NO_TITLE else ids

    def ask(self, chosen: Sequence[int], rng: random.Random) -> list[list[int]]:
        """Token ids of the questions, reworded; some lose a word that they share with their passage."""
        return self.encode([self._reword(i, rng) for i in chosen], QUESTION_TOKENS)

    def _reword(self, i: int, rng: random.Random) -> str:
        question = rephrase(self.questions[i], rng)
        if rng.random() < _FEWER_WORDS:
            shared = set(words(self.texts[self.gold[i][0]])) - STOPWORDS
            kept = question.split()
            found = [n for n, word in enumerate(kept) if word.strip("?.,;:'\"()").lower() in shared]
            if found and len(kept) > 4:
                del kept[rng.choice(found)]
                return " ".join(kept)
        return question

    def batches(self, size: int, rng: random.Random) -> Iterator[list[int]]:
        """Batches of question indices, reshuffled every epoch, without end."""
        size = min(size, len(self.questions))
        while True:
            order = rng.sample(range(len(self.questions)), len(self.questions))
            for start in range(0, len(order) - size + 1, size):
                yield order[start : start + size]
