"""Reads answers of models that quote in plain text: "words of a document" [d3], without constrained decoding.

A quote is shown only once it has been found in the evidence; others are replaced by "[…]" and counted. Text around
quotes is kept. Nothing is shown before the first located quote, so that an answer without any can be discarded for one
from more evidence. Start at `TextAnswerReader.push`.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence

from app.answering import AnswerPart, Quoted, TextPiece
from app.quotes import locate_quote
from model.sampling import StopMatcher
from model.tokenizer import StreamDecoder, Tokenizer
from retrieval.types import Passage

NOT_FOUND_MARKER = "NOT_IN_DOCUMENTS"
OMITTED = "[…]"  # stands for a quote that is not in the evidence
_NOT_FOUND_PART = "(not in the documents)"
_MARKER = re.compile(r"NOT\\?[_ ]IN\\?[_ ]DOCUMENTS")
_MARKS = re.compile('["“”„«»]')
_ID = r"\[\s*[dD]([0-9]{1,9})(?:\s*[,;]\s*[dD]?[0-9]{1,9})*\s*\]"
_CITATION = re.compile(r"([.,;:]?)\s{0,3}" + _ID)
_MORE_IDS = re.compile(r"\s{0,3}" + _ID)
_PERHAPS_ID = re.compile(r"\s{0,3}(?:\[[dD0-9,;\s]{0,40})?")
_PERHAPS_CITATION = re.compile(r"[.,;:]?" + _PERHAPS_ID.pattern)
_CLOSING = {"“": "”", "„": "“", "«": "»"}
_PUNCTUATION = ".,;:!?"
_MAX_QUOTE_CHARS = 2000  # an opening mark without a closing one within this length is plain text


class TextAnswerReader:
    """An `app.answering.AnswerReader`.

    A quotation without a document id after it is plain text. Quotation marks inside a quote are part of it if the
    evidence contains them there.
    """

    none_margin = math.inf  # a refusal in text has no probability to compare, so it always counts

    def __init__(
        self,
        tokenizer: Tokenizer,
        passages: Sequence[Passage],
        stop_ids: Collection[int] = (),
        stop_texts: Sequence[str] = (),
        question: str = "",
    ) -> None:
        self._passages, self._stop_ids, self._question = passages, frozenset(stop_ids), question
        self._decoder, self._stops = StreamDecoder(tokenizer), StopMatcher(tuple(stop_texts))
        self._stopped = False
        self._pending = ""  # undecided text: from an open quotation mark on, or a possible beginning of the marker
        self._draft = ""  # decided text
        self._after_citation = False
        self.quoted: list[Quoted] = []
        self.rejected = 0
        self.said_none = False

    @property
    def text(self) -> str:
        """The answer shown so far."""
        return self._draft if self.quoted else ""

    @property
    def unchecked_text(self) -> str:
        """The answer if none of its quotes is in the evidence."""
        return "" if self.quoted or self.said_none else self._draft

    def push(self, token_id: int) -> Iterator[AnswerPart]:
        """The parts that this token makes final."""
        if token_id not in self._stop_ids:
            yield from self._add(self._decoder.push(token_id))

    def finish(self) -> Iterator[AnswerPart]:
        """The remaining parts, after the last token."""
        yield from self._add(self._decoder.finish())
        if not self._stopped:
            self._pending += self._stops.finish()
        yield from self._read(final=True)

    def _add(self, text: str) -> Iterator[AnswerPart]:
        if text and not self._stopped:
            certain, self._stopped = self._stops.push(text)
            self._pending += certain
            yield from self._read(final=False)

    def _read(self, final: bool) -> Iterator[AnswerPart]:
        """Process as much of the pending text as can be decided."""
        before = None
        while self._pending and self._pending != before and not self.said_none:
            before = self._pending
            if self._after_citation and not self._skip_more_ids(final):
                return
            mark = _find_opening(self._pending, self._draft)
            if mark != 0:
                yield from self._read_plain(mark, final)
            if mark >= 0 and not self.said_none:
                yield from self._read_quote(final)

    def _skip_more_ids(self, final: bool) -> bool:
        """Drop further ids after a quote; False while another may follow."""
        while found := _MORE_IDS.match(self._pending):
            self._pending = self._pending[found.end() :]
        if not final and _PERHAPS_ID.fullmatch(self._pending):
            return False
        self._after_citation = False
        return True

    def _read_plain(self, end: int, final: bool) -> Iterator[AnswerPart]:
        """Show the text before a quotation mark at `end`, or without one (-1) as much as is final."""
        if end < 0:
            end = len(self._pending) if final else _certain_end(self._pending)
        text, self._pending = self._pending[:end], self._pending[end:]
        yield from self._show(text.rstrip() if final and not self._pending else text)

    def _read_quote(self, final: bool) -> Iterator[AnswerPart]:
        """Process the quotation at the beginning of the pending text, if it is complete."""
        for found in _MARKS.finditer(self._pending, 1):
            at, rest = found.start(), self._pending[found.end() :]
            if citation := _CITATION.match(rest):
                yield from self._cite(at, int(citation[2]), citation[1])
                self._pending, self._after_citation = rest[citation.end() :], True
                return
            if not final and _PERHAPS_CITATION.fullmatch(rest):
                return
            end = at if _opens(self._pending, at) else at + 1
            if not self._stands_in_evidence(self._pending[1:end]):
                yield from self._give_up(end)
                return
        if final:
            yield from self._end_inside_quote()
        elif self._is_too_long():
            yield from self._give_up(1)

    def _cite(self, end: int, ordinal: int | None, after: str) -> Iterator[AnswerPart]:
        """Show the quotation pending[: end + 1] with its location, or omit it if not located."""
        quote = self._pending[1:end].strip()
        found = locate_quote(quote, self._passages, ordinal, self._question)
        if found is None and quote[-1:] in _PUNCTUATION:  # punctuation is often put inside the marks
            quote, after = quote[:-1].rstrip(), quote[-1:] + after
            found = locate_quote(quote, self._passages, ordinal, self._question)
        if found is None:
            self.rejected += 1
            yield from self._show(OMITTED + after)
            return
        opening = self._pending[0]
        closing = self._pending[end : end + 1] or _CLOSING.get(opening, opening)
        start = len(self._draft) + len(opening)
        self.quoted.append(Quoted(start, start + len(quote), found))
        shown = opening + quote + closing + after
        self._draft += shown
        yield TextPiece(self._draft if len(self.quoted) == 1 else shown)
        yield self.quoted[-1]

    def _end_inside_quote(self) -> Iterator[AnswerPart]:
        """If the answer is cut off inside a quotation, keep it if the evidence contains the part so far."""
        quote = self._pending[1:].strip()
        if self._stands_in_evidence(quote) and not _MARKS.search(quote):
            yield from self._cite(len(self._pending), None, "")
            self._pending = ""
        else:
            yield from self._give_up(len(self._pending))

    def _give_up(self, length: int) -> Iterator[AnswerPart]:
        """Treat the first characters as plain text."""
        text, self._pending = self._pending[:length], self._pending[length:]
        yield from self._show(text)

    def _is_too_long(self) -> bool:
        long = len(self._pending) > _MAX_QUOTE_CHARS or "\n\n" in self._pending.rstrip()
        return long and not self._stands_in_evidence(self._pending[1:].rstrip())

    def _stands_in_evidence(self, text: str) -> bool:
        return bool(text.strip()) and any(text in passage.text for passage in self._passages)

    def _show(self, text: str) -> Iterator[AnswerPart]:
        """Show text outside quotes. The marker before any quote refuses the whole answer, later only a part."""
        if _MARKER.search(text) and not self.quoted:
            self.said_none, self._pending = True, ""
            return
        text = _MARKER.sub(_NOT_FOUND_PART, text)
        text = text if self._draft else text.lstrip()
        self._draft += text
        if text and self.quoted:
            yield TextPiece(text)


def _opens(text: str, at: int) -> bool:
    """Whether the quotation mark at this position opens a quotation, judging by the character before it."""
    if text[at] in "„«":
        return True
    return text[at] not in "”»" and (at == 0 or text[at - 1].isspace() or text[at - 1] in "([{-–—/*_:")


def _find_opening(text: str, before: str) -> int:
    """Position of the first quotation in `text`, which follows `before`; -1 if there is none."""
    whole = before[-1:] + text
    shift = len(whole) - len(text)
    return next((m.start() - shift for m in _MARKS.finditer(whole, shift) if _opens(whole, m.start())), -1)


def _certain_end(text: str) -> int:
    """Length of the text without trailing white space and a possible beginning of the marker."""
    for at in range(max(0, len(text) - len(NOT_FOUND_MARKER) - 2), len(text)):
        if NOT_FOUND_MARKER.startswith(text[at:].replace("\\", "").replace(" ", "_")):
            return len(text[:at].rstrip())
    return len(text.rstrip())
