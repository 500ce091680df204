"""Reads answers of models that quote in plain text: "words of a document" [d3]. No constraint keeps them to it.

A quote is shown once it was found in the evidence, never before; one that isn't there is left out and counted. What
the model says around its quotes is kept. Until the first quote is found nothing is shown at all, so that an answer
without any can be given up for a search in more documents. Start at `TextAnswerReader.push`.
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
_MAX_QUOTE_CHARS = 2000  # an opening mark without its end is a mark like any other


class TextAnswerReader:
    """An `app.answering.AnswerReader`.

    A quote that no id follows is only text; one inside a quotation belongs to it as far as the evidence goes on so.
    """

    none_margin = math.inf  # no token stands for a refusal, so there is nothing to weigh: it counts as it is

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
        self._pending = ""  # not decided yet; from its first quotation mark on, or what may become the marker
        self._draft = ""  # decided
        self._after_citation = False
        self.quoted: list[Quoted] = []
        self.rejected = 0
        self.said_none = False

    @property
    def text(self) -> str:
        """The answer as far as it was shown."""
        return self._draft if self.quoted else ""

    @property
    def unchecked_text(self) -> str:
        """What was said without one quote that is in the evidence."""
        return "" if self.quoted or self.said_none else self._draft

    def push(self, token_id: int) -> Iterator[AnswerPart]:
        """What this token adds that is certain to stay."""
        if token_id not in self._stop_ids:
            yield from self._add(self._decoder.push(token_id))

    def finish(self) -> Iterator[AnswerPart]:
        """What is left when the generation has ended, wherever that was."""
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
        """Decide as much of the pending text as can be."""
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
        """Drop further ids behind a quote; False while another may be coming."""
        while found := _MORE_IDS.match(self._pending):
            self._pending = self._pending[found.end() :]
        if not final and _PERHAPS_ID.fullmatch(self._pending):
            return False
        self._after_citation = False
        return True

    def _read_plain(self, end: int, final: bool) -> Iterator[AnswerPart]:
        """Take the text before a quotation mark at `end`, or as much as is certain of text without one (-1)."""
        if end < 0:
            end = len(self._pending) if final else _certain_end(self._pending)
        text, self._pending = self._pending[:end], self._pending[end:]
        yield from self._show(text.rstrip() if final and not self._pending else text)

    def _read_quote(self, final: bool) -> Iterator[AnswerPart]:
        """Decide about the quotation that the pending text begins with, if it can be decided."""
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
        """Show the quotation pending[: end + 1] with the place it is from, or leave it out."""
        quote = self._pending[1:end].strip()
        found = locate_quote(quote, self._passages, ordinal, self._question)
        if found is None and quote[-1:] in _PUNCTUATION:  # often put inside the marks without being in the document
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
        """An answer cut off inside a quotation keeps it if it is one as far as it goes."""
        quote = self._pending[1:].strip()
        if self._stands_in_evidence(quote) and not _MARKS.search(quote):
            yield from self._cite(len(self._pending), None, "")
            self._pending = ""
        else:
            yield from self._give_up(len(self._pending))

    def _give_up(self, length: int) -> Iterator[AnswerPart]:
        """Take the first characters for text like any other."""
        text, self._pending = self._pending[:length], self._pending[length:]
        yield from self._show(text)

    def _is_too_long(self) -> bool:
        long = len(self._pending) > _MAX_QUOTE_CHARS or "\n\n" in self._pending.rstrip()
        return long and not self._stands_in_evidence(self._pending[1:].rstrip())

    def _stands_in_evidence(self, text: str) -> bool:
        return bool(text.strip()) and any(text in passage.text for passage in self._passages)

    def _show(self, text: str) -> Iterator[AnswerPart]:
        """Take text outside quotes. The marker before any quote is a refusal, later on it is about a part."""
        if _MARKER.search(text) and not self.quoted:
            self.said_none, self._pending = True, ""
            return
        text = _MARKER.sub(_NOT_FOUND_PART, text)
        text = text if self._draft else text.lstrip()
        self._draft += text
        if text and self.quoted:
            yield TextPiece(text)


def _opens(text: str, at: int) -> bool:
    """Whether the quotation mark at this place begins a quotation, by what stands before it."""
    if text[at] in "„«":
        return True
    return text[at] not in "”»" and (at == 0 or text[at - 1].isspace() or text[at - 1] in "([{-–—/*_:")


def _find_opening(text: str, before: str) -> int:
    """Where the first quotation begins in `text`, which follows `before`; -1 if none does."""
    whole = before[-1:] + text
    shift = len(whole) - len(text)
    return next((m.start() - shift for m in _MARKS.finditer(whole, shift) if _opens(whole, m.start())), -1)


def _certain_end(text: str) -> int:
    """Length of the text without white space at its end and without what may be the beginning of the marker."""
    for at in range(max(0, len(text) - len(NOT_FOUND_MARKER) - 2), len(text)):
        if NOT_FOUND_MARKER.startswith(text[at:].replace("\\", "").replace(" ", "_")):
            return len(text[:at].rstrip())
    return len(text.rstrip())
