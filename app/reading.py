"""What of the evidence is read at once, and how little it seems to hold the answer.

A small model tells better whether one passage holds an answer than it finds the answer among several. So evidence can
be read passage by passage, each alone behind the system text, and the answer made from the one with the least
`none_margin`. Who asks the engine stands in generation.py.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from app.conversation import missing_words
from app.prompting import title_of
from retrieval.location import heading_path
from retrieval.types import Evidence, Passage

_AGAIN_TOKENS = 1024  # of the question; 2 s of two cores
_PIECE_CHARS = 1200  # the shipped model learnt to read passages of up to 1,150
_OPENING_CHARS = 200
_GAP = re.compile(r"\s*\n\s*")


def split_passages(evidence: Evidence) -> list[Evidence]:
    """Each passage as if it were all there is to read, under its heading; long ones in pieces."""
    pieces = [_under_heading(piece) for passage in evidence.passages for piece in _cut(passage)]
    return [Evidence((piece,), evidence.mode, 0, (piece.document_id,)) for piece in pieces]


def read_at_once(evidence: Evidence) -> Evidence:
    """Evidence that is not split: a single passage stands under its heading, too. Several have none, for a prompt would
    begin otherwise with each choice of a document's passages."""
    if len(evidence.passages) != 1:
        return evidence
    return replace(evidence, passages=(_under_heading(evidence.passages[0]),))


def _under_heading(passage: Passage) -> Passage:
    """The innermost heading that the passage does not show itself, before its title."""
    title, path = passage.title or passage.filename, heading_path(passage.headings, passage.char_start)
    hidden = [heading for heading in path if heading not in passage.text[:_OPENING_CHARS] and heading != title]
    return replace(passage, title=f"{hidden[-1]} — {title}") if hidden else passage


def _cut(passage: Passage) -> list[Passage]:
    """As few pieces as have about `_PIECE_CHARS`, cut between the paragraphs nearest to equal lengths."""
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
    """Whether there is a choice among passages, and it is not too dear: the question is read again with each."""
    again = len(evidence.passages) - 1
    return again > 0 and again * question_tokens <= max(evidence.tokens, _AGAIN_TOKENS)


def none_margin(
    question: str, reading: Evidence, decision_logprobs: Sequence[float], missing_words_nats: float
) -> float:
    """log P(none) - log P(quote), and `missing_words_nats` times the share of the question's words that were not read.

    `decision_logprobs`: those of `AnswerFormat.decision_ids`.
    """
    quote, none = decision_logprobs
    if not missing_words_nats:
        return none - quote
    texts = [text for passage in reading.passages for text in (title_of(passage), passage.text)]
    return none - quote + missing_words_nats * missing_words(question, texts)
