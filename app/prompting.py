"""The prompt, always in the order `system | documents | question`, and how its tokens are counted.

Every piece is tokenized on its own, so two prompts that begin with the same documents begin with the same tokens.
`AnswerFormat` is the interface to a checkpoint's prompt format; `QuoteFormat` is the shipped checkpoint's,
text_format.py has that of others. Answers are interpreted in answering.py. Start at `QuoteFormat.build_prompt`.
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np

from app.answering import AnswerReader, AnswerWriter
from app.conversation import Turn
from app.kept_tokens import KeptTokens, LruByWeight, TokenRow, passage_key
from app.quotes import QuoteConstraint, QuoteIndex, QuoteLimits, QuoteTokens, TokenBytes
from model.chat_format import ChatFormat
from model.engine_request import ContextTooLong, EngineRequest
from model.sampling import SamplingParams, TokenConstraint
from model.tokenizer import Tokenizer
from retrieval.types import Evidence, Passage

_MAX_TITLE_CHARS = 120
_CACHED_INDEXES = 4


@dataclass(frozen=True)
class Prompt:
    """`token_ids`: (t,) int64. `boundaries`: lengths of the prefixes worth keeping: the system text, then up to the end
    of each document. `document_starts`: where the tokens of each document (by id) begin.
    """

    token_ids: np.ndarray
    boundaries: tuple[int, ...]
    document_starts: Mapping[str, int]


_NO_EVIDENCE = Evidence((), "rag", 0)


class AnswerFormat(Protocol):
    """How a checkpoint is prompted and how it answers. Thread safe.

    An answer ends with one of `stop_ids` or before one of `stop_texts`. `decision_ids`: the first tokens of an answer
    for a quote and for "none"; empty if no single token decides that.
    """

    max_context_tokens: int
    stop_ids: tuple[int, ...]
    stop_texts: tuple[str, ...]
    decision_ids: tuple[int, ...]

    def count_tokens(self, passages: Sequence[Passage]) -> int:
        """An upper bound of the prompt's tokens for one document, given its passages in order."""
        ...

    def cut_ahead(self, passages: Sequence[Passage]) -> None:
        """Tokenize these passages in one go, ahead of the methods that need their tokens."""
        ...

    def build_prompt(self, question: str, evidence: Evidence, turns: Sequence[Turn] = ()) -> Prompt:
        """Tokens of `system | documents | question`; earlier turns are part of the question."""
        ...

    def constrain(self, evidence: Evidence, limits: QuoteLimits) -> TokenConstraint | None:
        """The constraint on answers from this evidence; None: none."""
        ...

    def ask_back(self, quote: Sequence[int], question: str) -> tuple[Sequence[int], Sequence[int]]:
        """For asking back: the tokens after the documents that state the quote, and the tokens of the question after
        those, the last of which says that the quote answers it. Only called if `constrain` gives a
        `QuoteConstraint`."""
        ...

    def read_answer(self, evidence: Evidence, question: str = "") -> AnswerReader:
        """A reader of one answer to the question from this evidence."""
        ...

    def forget(self, document_ids: Collection[str]) -> None:
        """Drop everything cached of these documents, which were deleted."""
        ...

    def count_prompt(self, question: str, turns: Sequence[Turn] = ()) -> int:
        """Tokens of a prompt without documents."""
        return len(self.build_prompt(question, _NO_EVIDENCE, turns).token_ids)

    def room_for_evidence(self, question: str, max_output_tokens: int, turns: Sequence[Turn] = ()) -> int:
        """Tokens available for the documents of a prompt. Raises ContextTooLong if the question leaves none."""
        prompt_tokens = self.count_prompt(question, turns)
        room = self.max_context_tokens - prompt_tokens - max_output_tokens
        if room < 0:
            raise ContextTooLong(prompt_tokens, max_output_tokens, self.max_context_tokens)
        return room


class QuoteFormat(AnswerFormat):
    """The shipped checkpoint's format (`model.chat_format`) over evidence.

    Tokens of passages and quote indexes are cached for further questions about the same documents.
    """

    stop_texts = ()

    def __init__(self, tokenizer: Tokenizer, vocabulary: TokenBytes, max_context_tokens: int) -> None:
        """Raises ValueError if the tokenizer lacks one of the format's special tokens."""
        self._tokenizer = tokenizer
        self._format = ChatFormat(tokenizer)
        self.max_context_tokens = max_context_tokens
        self.stop_ids = (self._format.im_end,)
        self.decision_ids = (self._format.quote, self._format.none)
        self._vocabulary = vocabulary
        self._separator = tuple(tokenizer.encode(" "))
        self._kept = KeptTokens(tokenizer)
        self._indexes = LruByWeight[QuoteIndex](_CACHED_INDEXES)

    def count_tokens(self, passages: Sequence[Passage]) -> int:
        """Tokens of one document of a prompt, given its passages in order."""
        return sum(map(len, self._document(passages)))

    def cut_ahead(self, passages: Sequence[Passage]) -> None:
        self._kept.cut_ahead(passages)

    def build_prompt(self, question: str, evidence: Evidence, turns: Sequence[Turn] = ()) -> Prompt:
        """Tokens of `system | documents | question`. Earlier turns are left out: the model is not trained on any."""
        row = TokenRow()
        row.add(self._kept.of(self._format.system))
        boundaries, starts = [len(row)], {}
        for document_id, group in groupby(evidence.passages, key=lambda passage: passage.document_id):
            starts.setdefault(document_id, len(row))  # a document may occur twice
            row.add(*self._document(list(group)))
            boundaries.append(len(row))
        row.add(self._format.ask(question))
        return Prompt(row.joined(), tuple(boundaries), starts)

    def constrain(self, evidence: Evidence, limits: QuoteLimits) -> QuoteConstraint:
        """The constraint that only allows quotes of this evidence, or none."""
        key = tuple(passage_key(passage) for passage in evidence.passages)
        index = self._indexes.get(key)
        if index is None:
            index = QuoteIndex(evidence.passages, self._vocabulary)
            self._indexes.put(key, index, weight=1)
        return QuoteConstraint(index, self.answer_tokens(evidence), limits)

    def ask_back(self, quote: Sequence[int], question: str) -> tuple[Sequence[int], Sequence[int]]:
        return self._format.ask_back(quote, question)

    def read_answer(self, evidence: Evidence, question: str = "") -> AnswerWriter:
        return AnswerWriter(self._tokenizer, self.answer_tokens(evidence), evidence.passages, question)

    def forget(self, document_ids: Collection[str]) -> None:
        self._kept.forget(document_ids)
        self._indexes.drop(lambda passages: any(key[0] in document_ids for key in passages))

    def answer_tokens(self, evidence: Evidence) -> QuoteTokens:
        """The tokens that spell answers from this evidence."""
        ordinals = {passage.ordinal for passage in evidence.passages}
        return QuoteTokens(
            quote=self._format.quote,
            end_quote=self._format.quote_end,
            none=self._format.none,
            end=self._format.im_end,
            separator=self._separator,
            document_ids={ordinal: tuple(self._format.citation(ordinal)) for ordinal in ordinals},
        )

    def _document(self, passages: Sequence[Passage]) -> list[Sequence[int] | np.ndarray]:
        head = self._kept.of(self._format.document_head, passages[0].ordinal, title_of(passages[0]))
        return self._format.document_pieces(head, [self._kept.of_passage(passage) for passage in passages])


def title_of(passage: Passage) -> str:
    """The title of a document in the prompt: one line, not too long."""
    return re.sub(r"\s+", " ", passage.title or passage.filename).strip()[:_MAX_TITLE_CHARS]


def engine_request(
    prompt: Prompt, evidence: Evidence, secret: bytes, epoch: int, sampling: SamplingParams
) -> EngineRequest:
    """The engine request for a prompt with this evidence. Equal prompts share cached states, whoever asks.

    But only if they read the same collections: cache keys are salted with these and the `secret`, so that someone who
    may not read a collection cannot infer from response times what others have read. `epoch`: that of the prefix cache
    before the evidence was chosen.
    """
    collections = dict.fromkeys(passage.collection for passage in evidence.passages)
    salt = hashlib.blake2b(json.dumps(list(collections)).encode(), key=secret, digest_size=16).digest()
    return EngineRequest(
        token_ids=prompt.token_ids,
        boundaries=prompt.boundaries,
        sampling=sampling,
        salt=salt,
        tags=frozenset(prompt.document_starts),
        tag_starts=prompt.document_starts,
        epoch=epoch,
    )
