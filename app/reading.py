"""Splits evidence into passages that are read in separate prompts, and scores how unlikely each contains the answer.

A small model is better at telling whether one passage contains an answer than at finding the answer among several. So
evidence can be read passage by passage, each alone after the system text, and the passage with the lowest `none_margin`
gives the answer. The requests to the engine are made in generation.py.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from app.conversation import missing_words
from app.prompting import title_of
from retrieval.location import heading_path
from retrieval.types import Evidence, Passage

_AGAIN_TOKENS = 1024  # most question tokens read again for further passages; 2 s on two cores
_PIECE_CHARS = 1200  # the shipped model was trained on passages of up to 1,150
_OPENING_CHARS = 200
_MOST_CHANCES = 3
_GAP = re.compile(r"\s*\n\s*")


def split_passages(evidence: Evidence) -> list[Evidence]:
    """Each passage as evidence of its own, under its heading; long ones in pieces."""
    pieces = [_under_heading(piece) for passage in evidence.passages for piece in _cut(passage)]
    return [Evidence((piece,), evidence.mode, 0, (piece.document_id,)) for piece in pieces]


def read_at_once(evidence: Evidence) -> Evidence:
    """Evidence that is not split. A single passage also gets its heading; several do not, because the beginning of the
    prompt would then depend on which passages of a document were chosen."""
    if len(evidence.passages) != 1:
        return evidence
    return replace(evidence, passages=(_under_heading(evidence.passages[0]),))


def _under_heading(passage: Passage) -> Passage:
    """The passage with its innermost heading, unless it contains that, put before its title."""
    title, path = passage.title or passage.filename, heading_path(passage.headings, passage.char_start)
    hidden = [heading for heading in path if heading not in passage.text[:_OPENING_CHARS] and heading != title]
    return replace(passage, title=f"{hidden[-1]} — {title}") if hidden else passage


def _cut(passage: Passage) -> list[Passage]:
    """As few pieces of about `_PIECE_CHARS` as possible, cut between paragraphs, of nearly equal lengths."""
    text, first = passage.text, passage.char_start
    count = -(-len(text) // _PIECE_CHARS)
    gaps = [gap.span() for gap in _GAP.finditer(text)] if count > 1 else []
    wanted = [number * len(text) // count for number in range(1, count)]
    cuts = sorted({min(gaps, key=lambda gap: abs(gap[0] - place)) for place in wanted}) if gaps else []
    starts, ends = [0, *(end for _, end in cuts)], [*(start for start, _ in cuts), len(text)]
    return [
        replace(passage, text=text[start:end], char_start=first + start, char_end=first + end)
        for start, end in zip(starts, ends, strict=True)
    ]


def reads_apart(evidence: Evidence, question_tokens: int) -> bool:
    """Whether there are several passages, and the question, which is read again with each, is short enough."""
    again = len(evidence.passages) - 1
    return again > 0 and again * question_tokens <= max(evidence.tokens, _AGAIN_TOKENS)


def chance_nats(evidence: Evidence, readings: int) -> float:
    """Added to the margin of the best of so many readings: the more passages are read, the likelier it is that one
    looks by chance as if it had the answer. Evidence in one reading counts by its length. Beyond `_MOST_CHANCES`, the
    model's verdict on the quote makes up for it (docs/small-model.md, "How many passages were read")."""
    length = sum(len(passage.text) for passage in evidence.passages)
    return math.log(max(1, min(max(readings, -(-length // _PIECE_CHARS)), _MOST_CHANCES)))


def none_margin(
    question: str, reading: Evidence, decision_logprobs: Sequence[float], missing_words_nats: float
) -> float:
    """log P(none) - log P(quote), plus `missing_words_nats` times the share of the question's words that are not there.

    `decision_logprobs`: those of `AnswerFormat.decision_ids`.
    """
    quote, none = decision_logprobs
    if not missing_words_nats:
        return none - quote
    texts = [text for passage in reading.passages for text in (title_of(passage), passage.text)]
    return none - quote + missing_words_nats * missing_words(question, texts)
