"""Quotes: constrains a model to copy spans of the evidence, and locates a quote in the stored text.

`QuoteIndex` and `QuoteConstraint` work on UTF-8 bytes, so that any tokens that spell a span are allowed, however the
evidence itself was tokenized. `locate_quote` works on characters and never guesses: a quote matches exactly, or after
normalizing white space, ligatures and hyphenation, or not at all.
"""

import bisect
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal, Self

import tokenizers

from app.rows import choose_place, places_of
from model.sampling import TokenConstraint
from retrieval.types import Passage

_BETWEEN = b"\xff"  # separates passages; no UTF-8 text and no allowed token contains it
_MAX_TOKEN_BYTES = 32
_PIECES = re.compile(rb" ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9\xff]+")
_WORD_BYTE = re.compile(rb"[A-Za-z0-9]")
_CHARACTER_STARTS = re.compile(rb"[\xc2-\xf4]")


class TokenBytes:
    """Maps each ordinary token of a vocabulary to the bytes that it spells, and back."""

    def __init__(self, token_bytes: Sequence[bytes | None]) -> None:
        """`token_bytes[id]` is None for special tokens, which no text can spell."""
        self.bytes_of = token_bytes
        usable = ((i, b) for i, b in enumerate(token_bytes) if b and len(b) <= _MAX_TOKEN_BYTES and _BETWEEN not in b)
        self.id_of = {spelled: token_id for token_id, spelled in usable}

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Read a checkpoint's byte-level tokenizer.json. Raises ValueError for another kind of tokenizer."""
        backend = tokenizers.Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        byte_of = _byte_alphabet()
        special = {token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special}
        spelled: list[bytes | None] = [None] * backend.get_vocab_size(with_added_tokens=True)
        for token, token_id in backend.get_vocab(with_added_tokens=True).items():
            if token_id in special:
                continue
            if not byte_of.keys() >= set(token):
                raise ValueError(
                    f"{checkpoint}: token {token!r} is not in byte-level form, so quotes can't be constrained"
                )
            spelled[token_id] = bytes(byte_of[character] for character in token)
        return cls(spelled)

    def prefixes(self, window: bytes) -> Iterator[int]:
        """Ids of the tokens that `window` starts with."""
        for length in range(1, len(window) + 1):
            token_id = self.id_of.get(window[:length])
            if token_id is not None:
                yield token_id


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level BPE writes for each byte. Source: openai/gpt-2 encoder.py::bytes_to_unicode."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class QuoteIndex:
    """Finds which tokens may start a quote, and which may follow, so that it stays a span of one passage."""

    def __init__(self, passages: Sequence[Passage], vocabulary: TokenBytes) -> None:
        self.vocabulary = vocabulary
        self._ordinals = [passage.ordinal for passage in passages]
        texts = [passage.text.encode() for passage in passages]
        self._starts = [0]
        for text in texts:
            self._starts.append(self._starts[-1] + len(text) + len(_BETWEEN))
        self._haystack = _BETWEEN.join([*texts, b""])
        self.first_ids = tuple(sorted(self._find_first_ids()))

    def _find_first_ids(self) -> set[int]:
        first: set[int] = set()
        for piece in set(_PIECES.findall(self._haystack)):
            first.update(self.vocabulary.prefixes(piece))
            first.update(self.vocabulary.prefixes(piece.lstrip()))
            for start in _CHARACTER_STARTS.finditer(piece):
                first.update(self.vocabulary.prefixes(piece[start.start() : start.start() + _MAX_TOKEN_BYTES]))
        return {token_id for token_id in first if (self.vocabulary.bytes_of[token_id] or b"").strip()}

    def ends_of(self, first_id: int) -> list[int]:
        """The position after each place where a quote may start with this token; none starts inside an ASCII word."""
        spelled = self.vocabulary.bytes_of[first_id] or b""
        pattern = b"(?=" + re.escape(spelled) + b")"
        if _WORD_BYTE.match(spelled):
            pattern = b"(?<![A-Za-z0-9])" + pattern
        return [found.start() + len(spelled) for found in re.finditer(pattern, self._haystack)]

    def extend(self, ends: Sequence[int], token_id: int) -> list[int]:
        """Those of these positions where the text continues with the token, moved past it."""
        spelled = self.vocabulary.bytes_of[token_id] or b""
        return [end + len(spelled) for end in ends if self._haystack.startswith(spelled, end)]

    def next_ids(self, ends: Sequence[int]) -> set[int]:
        """Tokens with which the text continues at one of these positions."""
        windows = {self._haystack[end : end + _MAX_TOKEN_BYTES] for end in ends}
        return {token_id for window in windows for token_id in self.vocabulary.prefixes(window.split(_BETWEEN)[0])}

    def at_word_end(self, ends: Sequence[int]) -> list[int]:
        """Those of these positions that are not inside an ASCII word."""
        return [end for end in ends if not _WORD_BYTE.match(self._haystack, end) or not self._ends_word(end)]

    def _ends_word(self, end: int) -> bool:
        return _WORD_BYTE.match(self._haystack, end - 1) is not None

    def ordinals(self, ends: Sequence[int]) -> list[int]:
        """Ordinals of the documents that contain these positions, ascending."""
        return sorted({self._ordinals[bisect.bisect_right(self._starts, end - 1) - 1] for end in ends})


@dataclass(frozen=True)
class QuoteTokens:
    """Special tokens and spellings of the answer format."""

    quote: int
    end_quote: int
    none: int
    end: int
    separator: tuple[int, ...]  # between a document id and the next quote
    document_ids: dict[int, tuple[int, ...]]  # ordinal -> tokens of "d<ordinal>"


@dataclass(frozen=True)
class QuoteLimits:
    max_quote_tokens: int = 96
    max_quotes: int = 4
    allow_none: bool = True


class QuoteConstraint:
    """Lets a model answer only with verbatim quotes and the ids of documents that contain them, or with `<|none|>`.

    A `model.sampling.TokenConstraint` for one request. The work per step is proportional to the number of places where
    the quote so far occurs.
    """

    def __init__(self, index: QuoteIndex, tokens: QuoteTokens, limits: QuoteLimits) -> None:
        self._index, self._tokens, self._limits = index, tokens, limits
        self._seen: list[int] = []
        self._before: list[tuple] = []  # `_known` before each token seen
        self._state: Literal["start", "quote", "document", "separator", "end"] = "start"
        self._ends: list[int] = []
        self._quote: list[int] = []
        self._quotes: list[bytes] = []
        self._spelling: list[int] = []  # tokens so far of the document id or separator being written
        self._options: list[tuple[int, ...]] = []

    def allowed(self, generated: Sequence[int]) -> Sequence[int]:
        """Ids that may come after `generated`; never empty."""
        shared = len(self._seen)
        while list(generated[:shared]) != self._seen[:shared]:
            shared -= 1
        if shared < len(self._seen):
            self._known = self._before[shared]
            del self._seen[shared:], self._before[shared:]
        for token_id in generated[len(self._seen) :]:
            self._before.append(self._known)
            self._seen.append(token_id)
            self._advance(token_id)
        return self._next()

    @property
    def first_ids(self) -> tuple[int, ...]:
        """Tokens that a quote may begin with."""
        return self._index.first_ids

    def quote_of(self, answer: Sequence[int]) -> tuple[int, ...]:
        """The tokens of a quote up to its closing mark."""
        return tuple(takewhile(lambda token_id: token_id != self._tokens.end_quote, answer))

    def spell(self, quote: Sequence[int]) -> str:
        """The text of a quote, given its tokens up to the closing mark."""
        ids = self.quote_of(quote)
        return b"".join(self._index.vocabulary.bytes_of[token_id] or b"" for token_id in ids).decode(errors="replace")

    def after(self, begun: Sequence[int]) -> TokenConstraint:
        """The constraint on the rest of an answer whose first tokens are already part of the prompt."""
        return _Begun(QuoteConstraint(self._index, self._tokens, self._limits), tuple(begun))

    @property
    def _known(self) -> tuple:
        """Everything that `_advance` changes; it replaces lists and never mutates them."""
        return self._state, self._ends, self._quote, self._quotes, self._spelling, self._options

    @_known.setter
    def _known(self, known: tuple) -> None:
        self._state, self._ends, self._quote, self._quotes, self._spelling, self._options = known

    def _advance(self, token_id: int) -> None:
        tokens = self._tokens
        if token_id in (tokens.end, tokens.none):
            self._state = "end"
        elif token_id == tokens.quote:
            self._state, self._quote, self._ends = "quote", [], []
        elif token_id == tokens.end_quote:
            self._close_quote()
        elif self._state == "quote":
            self._ends = self._index.extend(self._ends, token_id) if self._quote else self._index.ends_of(token_id)
            self._quote = [*self._quote, token_id]
        elif self._state == "document" and self._is_complete() and token_id == tokens.separator[0]:
            self._state, self._spelling = "separator", [token_id]
        else:
            self._spelling = [*self._spelling, token_id]

    def _close_quote(self) -> None:
        self._quotes = [*self._quotes, self._spelled().strip()]
        self._state, self._spelling = "document", []
        ends = self._index.at_word_end(self._ends) or self._ends
        self._options = [self._tokens.document_ids[ordinal] for ordinal in self._index.ordinals(ends)]

    def _next(self) -> Sequence[int]:
        match self._state:
            case "start":
                return (self._tokens.quote, self._tokens.none) if self._limits.allow_none else (self._tokens.quote,)
            case "quote":
                return self._next_in_quote()
            case "document":
                return sorted(self._next_of_id())
            case "separator":
                written = len(self._spelling)
                return self._tokens.separator[written : written + 1] or (self._tokens.quote,)
            case _:
                return (self._tokens.end,)

    def _next_in_quote(self) -> Sequence[int]:
        if not self._quote:
            return self._index.first_ids or (self._tokens.end_quote,)
        spelled = self._spelled()
        may_close = bool(spelled.strip()) and _is_whole_utf8(spelled)
        if may_close and len(self._quote) >= self._limits.max_quote_tokens:
            return (self._tokens.end_quote,)
        may_close = may_close and bool(self._index.at_word_end(self._ends))
        following = self._index.next_ids(self._ends)
        if may_close or not following:
            following.add(self._tokens.end_quote)
        return sorted(following)

    def _next_of_id(self) -> set[int]:
        written = len(self._spelling)
        going_on = [option for option in self._options if list(option[:written]) == self._spelling]
        following = {option[written] for option in going_on if len(option) > written}
        if self._is_complete():
            following.add(self._tokens.end)
            if len(self._quotes) < self._limits.max_quotes and self._quotes[-1] not in self._quotes[:-1]:
                following.add(self._tokens.separator[0])
        return following or {self._tokens.end}

    def _is_complete(self) -> bool:
        return tuple(self._spelling) in self._options

    def _spelled(self) -> bytes:
        return b"".join(self._index.vocabulary.bytes_of[token_id] or b"" for token_id in self._quote)


@dataclass(frozen=True)
class _Begun:
    whole: QuoteConstraint
    begun: tuple[int, ...]

    def allowed(self, generated: Sequence[int]) -> Sequence[int]:
        return self.whole.allowed([*self.begun, *generated])


def _is_whole_utf8(spelled: bytes) -> bool:
    try:
        spelled.decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass(frozen=True)
class LocatedQuote:
    """A span of a passage's document, in offsets of the stored text; `text` is that slice."""

    passage: Passage
    char_start: int
    char_end: int
    text: str
    verification: Literal["exact", "normalized"]


def locate_quote(
    quote: str, passages: Sequence[Passage], ordinal: int | None = None, question: str = ""
) -> LocatedQuote | None:
    """Find `quote` in the passages, first in those of document d<ordinal>; None if none contains it.

    Of several places in one document, the one whose line shares most words with `question`.
    """
    wanted = quote.strip()
    if not wanted:
        return None
    ordered = sorted(passages, key=lambda passage: passage.ordinal != ordinal)
    whole = _as_words(wanted)
    for group in ([p for p in ordered if p.ordinal == ordinal], ordered):
        for pattern in (whole, re.escape(wanted)):
            if (place := choose_place(question, places_of(re.compile(pattern), group))) is not None:
                return _located(place.passage, place.start, place.end, "exact")
    normalized = normalize(wanted)[0].strip()
    for passage in ordered if normalized else ():
        text, spans = normalize(passage.text)
        if (start := _find_words(text, normalized)) >= 0:
            return _located(passage, spans[start][0], spans[start + len(normalized) - 1][1], "normalized")
    return None


def _find_words(text: str, wanted: str) -> int:
    """Where `wanted` occurs as whole words, else where it occurs at all, else -1."""
    found = re.search(_as_words(wanted), text)
    return found.start() if found else text.find(wanted)


def _as_words(wanted: str) -> str:
    before, after = (r"(?<!\w)" if wanted[0].isalnum() else ""), (r"(?!\w)" if wanted[-1].isalnum() else "")
    return before + re.escape(wanted) + after


def _located(passage: Passage, start: int, end: int, verification: Literal["exact", "normalized"]) -> LocatedQuote:
    first = passage.char_start
    return LocatedQuote(passage, first + start, first + end, passage.text[start:end], verification)


_SAME = str.maketrans({**dict.fromkeys("‘’‚‛′`", "'"), **dict.fromkeys("“”„‟″«»", '"'), **dict.fromkeys("‐‑‒–—−", "-")})
_INVISIBLE = frozenset("\u00ad\u200b\u200c\u200d\u2060\ufeff")
_BROKEN_WORD = re.compile(r"(?<=\w)[-‐\u00ad]\s*\n\s*(?=[a-zß-ÿ])")


def normalize(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Text with white space, ligatures, quote marks, dashes and hyphenation normalized, and each character's source.

    Case and words stay as they are: this undoes typesetting, it is no fuzzy match.
    """
    characters: list[str] = []
    spans: list[tuple[int, int]] = []
    skip_until = 0
    breaks = {found.start(): found.end() for found in _BROKEN_WORD.finditer(text)}
    for position, source in enumerate(text):
        skip_until = max(skip_until, breaks.get(position, 0))
        if position < skip_until or source in _INVISIBLE:
            continue
        for character in unicodedata.normalize("NFKC", source).translate(_SAME):
            if not character.isspace():
                characters.append(character)
                spans.append((position, position + 1))
            elif not characters or characters[-1] != " ":
                characters.append(" ")
                spans.append((position, position + 1))
    return "".join(characters), spans
