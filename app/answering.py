"""Turns the model's tokens into an answer: text, and quotes with their location in the documents.

prompting.py builds the prompt, quotes.py locates quotes. Start at `AnswerWriter.push`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from app.quotes import LocatedQuote, QuoteTokens, locate_quote
from model.tokenizer import StreamDecoder, Tokenizer
from retrieval.types import Passage

NOT_FOUND_TEXT = "The documents do not answer this question."
NO_DOCUMENTS_TEXT = "There are no documents to answer this from."
NO_MATCH_TEXT = "No document has the metadata that the filters ask for."
STILL_READING_TEXT = "The documents are still being read; ask again when they are ready."
CUT_OFF_TEXT = "The answer was cut off before its first quote; allow more output tokens."
_BETWEEN_QUOTES = "\n"


@dataclass(frozen=True)
class TextPiece:
    """Text to append to what has been shown so far."""

    text: str


@dataclass(frozen=True)
class Quoted:
    """text[start:end] of the answer is a quote that was located in the evidence."""

    start: int
    end: int
    quote: LocatedQuote


AnswerPart = TextPiece | Quoted


class AnswerReader(Protocol):
    """Reads the tokens of one answer.

    After `finish`: `text` is the answer, `quoted` its quotes; `rejected` counts quotes that were found in no passage
    and left out of the text; `said_none`: the model refused; `unchecked_text`: what the model said if none of its
    quotes was found. `none_margin`: see reading.py; set if it decided.
    """

    quoted: list[Quoted]
    rejected: int
    said_none: bool
    none_margin: float

    @property
    def text(self) -> str: ...

    @property
    def unchecked_text(self) -> str: ...

    def push(self, token_id: int) -> Iterator[AnswerPart]:
        """The parts of the answer that this token completes."""
        ...

    def finish(self) -> Iterator[AnswerPart]:
        """The remaining parts, after the last token."""
        ...


class AnswerWriter:
    """The `AnswerReader` of the shipped format: quotes become text and citations; all other tokens are markup."""

    unchecked_text = ""

    def __init__(
        self, tokenizer: Tokenizer, tokens: QuoteTokens, passages: Sequence[Passage], question: str = ""
    ) -> None:
        self._tokenizer, self._tokens, self._passages, self._question = tokenizer, tokens, passages, question
        self._state: Literal["outside", "quote", "document"] = "outside"
        self._decoder = StreamDecoder(tokenizer)
        self._base = 0  # length of the text before the current quote
        self._quote = ""  # text of the current quote so far, without leading white space
        self._shown = 0  # characters already shown since `_base`
        self._document: list[int] = []
        self.text = ""
        self.quoted: list[Quoted] = []
        self.rejected = 0
        self.said_none = False
        self.none_margin = 0.0

    def push(self, token_id: int) -> Iterator[AnswerPart]:
        """What this token adds: text of a quote, as far as the evidence contains it, and its citation once complete.

        White space at the ends of a quote is not shown.
        """
        tokens = self._tokens
        if token_id == tokens.none:
            self.said_none = True
        elif token_id == tokens.quote:
            yield from self._end_document()
            self._begin_quote()
        elif token_id == tokens.end_quote:
            yield from self._end_quote()
        elif self._state == "quote":
            yield from self._read(self._decoder.push(token_id))
        elif self._state == "document":
            self._document.append(token_id)

    def finish(self) -> Iterator[AnswerPart]:
        """The remaining parts, after the last token."""
        if self._state == "quote":
            yield from self._end_quote()
        yield from self._end_document()

    def _begin_quote(self) -> None:
        self._state, self._decoder = "quote", StreamDecoder(self._tokenizer)
        self._base, self._quote, self._shown = len(self.text), "", 0

    def _read(self, text: str) -> Iterator[TextPiece]:
        self._quote = (self._quote + text).lstrip()
        certain = self._quote.rstrip()
        if certain and any(certain in passage.text for passage in self._passages):
            yield from self._show(certain)

    def _show(self, quote: str) -> Iterator[TextPiece]:
        whole = self._gap() + quote
        if len(whole) > self._shown:
            self.text = self.text[: self._base] + whole
            yield TextPiece(whole[self._shown :])
            self._shown = len(whole)

    def _gap(self) -> str:
        return _BETWEEN_QUOTES if self._base else ""

    def _end_quote(self) -> Iterator[TextPiece]:
        yield from self._read(self._decoder.finish())
        self._state, self._document = "document", []

    def _end_document(self) -> Iterator[AnswerPart]:
        if self._state != "document":
            return
        self._state = "outside"
        quote = self._quote.rstrip()
        if not quote:  # cut off before its first word
            return
        ordinal = _ordinal(self._tokenizer.decode(self._document))
        found = locate_quote(quote, self._passages, ordinal, self._question)
        if found is None:
            self.rejected += 1
            self.text = self.text[: self._base]
            return
        yield from self._show(quote)
        start = self._base + len(self._gap())
        self.quoted.append(Quoted(start, start + len(quote), found))
        yield self.quoted[-1]


def _ordinal(cited: str) -> int | None:
    number = cited.strip().removeprefix("d")
    return int(number) if number.isascii() and number.isdigit() else None
