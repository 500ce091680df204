"""Splits clean document text into passages, and finds lexically similar passages as hard negatives.

Not the service's chunker (ingest/chunk.py): passages vary in length on purpose. Start at `cut_passages` and
`NegativeFinder`.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import sparse

from model.train.lexical import words

SHORTEST, LONGEST = 320, 1150
_SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+(?=[\"'(\[]?[A-Z0-9-])")


def cut_passages(text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """(heading, passage) pairs of a document's text, each passage between SHORTEST and LONGEST characters."""
    heading, piece, used, target = "", list[str](), 0, rng.randint(SHORTEST, LONGEST - 250)
    for paragraph in text.split("\n\n"):
        if _is_heading(paragraph):
            if used >= SHORTEST:
                yield heading, "\n".join(piece)
            piece, used, heading = [], 0, paragraph
            continue
        for part in _SENTENCE_END.split(paragraph) if len(paragraph) > 500 else [paragraph]:
            if used + len(part) > LONGEST and used >= SHORTEST:
                yield heading, "\n".join(piece)
                piece, used = [], 0
            if used + len(part) > LONGEST:
                piece, used = [], 0
                continue
            joined = bool(piece) and part is not paragraph and len(paragraph) > 500
            if joined and not paragraph.startswith(part):
                piece[-1] += " " + part
            else:
                piece.append(part)
            used += len(part) + 1
            if used >= target:
                yield heading, "\n".join(piece)
                piece, used, target = [], 0, rng.randint(SHORTEST, LONGEST - 250)
    if used >= SHORTEST:
        yield heading, "\n".join(piece)


def _is_heading(paragraph: str) -> bool:
    return (
        len(paragraph) < 90
        and paragraph[-1] not in ".:;,!?"
        and not paragraph.startswith("- ")
        and "|" not in paragraph
    )


class NegativeFinder:
    """BM25 over a fixed set of passages (k1 1.2, b 0.75)."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words(text)) for text in texts]
        self._vocabulary = {w: i for i, w in enumerate(sorted({w for c in counts for w in c}))}
        lengths = np.array([sum(c.values()) for c in counts], dtype=np.float32)
        rows = np.repeat(np.arange(len(texts)), [len(c) for c in counts])
        columns = np.array([self._vocabulary[w] for c in counts for w in c], dtype=np.int64)
        freq = np.array([n for c in counts for n in c.values()], dtype=np.float32)
        seen_in = np.bincount(columns, minlength=len(self._vocabulary))
        idf = np.log(1 + (len(texts) - seen_in + 0.5) / (seen_in + 0.5)).astype(np.float32)
        norm = 1.2 * (0.25 + 0.75 * lengths / max(1.0, float(lengths.mean())))
        weight = idf[columns] * freq * 2.2 / (freq + norm[rows])
        shape = (len(self._vocabulary), len(texts))
        self._weights = sparse.csr_matrix((weight, (columns, rows)), shape=shape, dtype=np.float32)

    def nearest(self, queries: Sequence[str], count: int) -> list[list[int]]:
        """For each query the indices of the `count` best passages, best first."""
        found: list[list[int]] = []
        for start in range(0, len(queries), 256):
            batch = [
                {self._vocabulary[w] for w in words(q) if w in self._vocabulary} for q in queries[start : start + 256]
            ]
            rows = np.repeat(np.arange(len(batch)), [len(b) for b in batch])
            columns = np.array([c for b in batch for c in sorted(b)], dtype=np.int64)
            asked = sparse.csr_matrix(
                (np.ones(len(rows), np.float32), (rows, columns)), (len(batch), len(self._vocabulary))
            )
            scores = (asked @ self._weights).toarray()
            best = min(count, scores.shape[1])
            top = np.argpartition(-scores, best - 1, axis=1)[:, :best]
            found += [
                [int(i) for i in row[np.argsort(-score[row], kind="stable")]]
                for row, score in zip(top, scores, strict=True)
            ]
        return found
