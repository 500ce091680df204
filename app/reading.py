"""What of the evidence is read at once, and how little it seems to hold the answer.

A small model tells better whether one passage holds an answer than it finds the answer among several. So evidence can
be read passage by passage, each alone behind the system text, and the answer made from the one with the least
`none_margin`. Who asks the engine stands in generation.py.
"""

from collections.abc import Sequence

from app.conversation import missing_words
from retrieval.types import Evidence

_AGAIN_TOKENS = 1024  # of the question; 2 s of two cores


def split_passages(evidence: Evidence) -> list[Evidence]:
    """Each passage as if it were all there is to read."""
    return [Evidence((passage,), evidence.mode, 0, (passage.document_id,)) for passage in evidence.passages]


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
    texts = [text for passage in reading.passages for text in (passage.title or passage.filename, passage.text)]
    return none - quote + missing_words_nats * missing_words(question, texts)
