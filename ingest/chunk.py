"""ParsedDocument -> chunks: whole sections, paragraphs and sentences if they fit, with exact offsets.

Chunks do not overlap, and together cover every character except white space. Structure takes precedence over size: a
chunk may be short at the end of a section, but none exceeds the target.
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from retrieval.types import Chunk, Heading, Page, ParsedDocument

CountTokens = Callable[[str], int]
_PARAGRAPH_GAP = "\n\n"
_EMPTY_LINE = re.compile(r"\n\s*\n")
_SENTENCE_GAP = re.compile(r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[A-Z0-9À-ÖØ-Þ])|(?<=[。！？])")
_ABBREVIATION = re.compile(r"\b(?:[A-Z]|Dr|Mr|Mrs|Ms|Prof|St|No|Nr|Fig|Eq|Sec|Ch|Art|approx|ca|cf|vs|e\.g|i\.e)\.$")
_UNBROKEN_RUN = re.compile(r"[^\s,.;。？！]{400}(?=[^\s,.;。？！])")


@dataclass(frozen=True, slots=True)
class ChunkLimits:
    """`target_tokens`: maximum tokens of a chunk, by `count_tokens`. A section starts a new chunk unless the current
    one has fewer than `min_tokens` and the section is not an outer one. `chars_per_token`: bounds the length of text
    that a tokenizer may count as one unknown word.
    """

    target_tokens: int = 256
    min_tokens: int = 48
    chars_per_token: int = 8

    def __post_init__(self) -> None:
        if self.target_tokens < 16 or self.chars_per_token < 1:
            raise ValueError(f"chunks of {self.target_tokens} tokens are too small to hold a sentence; use at least 16")


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    end: int
    tokens: int
    level: int  # of the heading that it begins with; 0: none


def chunk_document(
    parsed: ParsedDocument, document_id: str, limits: ChunkLimits, count_tokens: CountTokens
) -> list[Chunk]:
    """Split the text; chunk.text == parsed.text[chunk.char_start:chunk.char_end] for every chunk.

    Ids depend only on document, position and text, so they are reproducible. `count_tokens` is called for each
    paragraph, each sentence of a long paragraph and each chunk: linear in the text.
    """
    section_starts = [heading.char_start for heading in parsed.headings]
    page_starts = [page.char_start for page in parsed.pages]
    paths = _heading_paths(parsed.headings)
    splitter = _Splitter(limits, count_tokens)
    pieces = _cut_pieces(parsed.text, parsed.headings, splitter)
    chunks = []
    for ordinal, group in enumerate(_group(pieces, limits, splitter.gap_tokens)):
        start, end = group[0].start, group[-1].end
        text = parsed.text[start:end]
        section = bisect_right(section_starts, max(piece.start for piece in _opening(group)))
        chunks.append(
            Chunk(
                id=_chunk_id(document_id, start, text),
                document_id=document_id,
                ordinal=ordinal,
                char_start=start,
                char_end=end,
                text=text,
                page_start=_page_at(parsed.pages, page_starts, start),
                page_end=_page_at(parsed.pages, page_starts, end - 1),
                heading_path=paths[section - 1] if section else (),
                tokens=count_tokens(text),
            )
        )
    return chunks


def _chunk_id(document_id: str, start: int, text: str) -> str:
    digest = hashlib.blake2b(f"{document_id}\0{start}\0{text}".encode(), digest_size=12)
    return f"chunk_{digest.hexdigest()}"


def _page_at(pages: Sequence[Page], page_starts: list[int], position: int) -> int | None:
    """The page of this character: the last one to start at or before it, which is never one without text."""
    return pages[max(0, bisect_right(page_starts, position) - 1)].page if pages else None


def _heading_paths(headings: Sequence[Heading]) -> list[tuple[str, ...]]:
    """For each heading, the titles from the outermost down to it."""
    open_sections: list[Heading] = []
    paths = []
    for heading in headings:
        while open_sections and open_sections[-1].level >= heading.level:
            open_sections.pop()
        open_sections.append(heading)
        paths.append(tuple(section.title for section in open_sections))
    return paths


def _opening(group: Sequence[_Piece]) -> Iterator[_Piece]:
    """The first piece and the section openings directly after it: "# Guide", "## Cleaning" -> the path of Cleaning."""
    for number, piece in enumerate(group):
        if number and not piece.level:
            return
        yield piece
        if not piece.level:
            return


def _cut_pieces(text: str, headings: Sequence[Heading], splitter: "_Splitter") -> Iterator[_Piece]:
    """Paragraphs in order; long ones are split into pieces, between sentences if possible.

    The piece after a heading is small enough to share a chunk with it.
    """
    levels = {heading.char_start: heading.level for heading in reversed(headings)}
    room = splitter.target_tokens
    for start, end in _paragraphs(text, levels):
        pieces = [
            _Piece(piece_start, piece_end, tokens, levels.get(piece_start, 0))
            for piece_start, piece_end, tokens in splitter.split(text, start, end, room)
        ]
        yield from pieces
        room = splitter.target_tokens
        if len(pieces) == 1 and pieces[0].level and pieces[0].tokens < room // 4:
            room -= pieces[0].tokens + splitter.gap_tokens


def _paragraphs(text: str, section_starts: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Spans separated by empty lines and headings, without surrounding white space."""
    cuts = sorted({0, len(text), *section_starts, *(match.end() for match in _EMPTY_LINE.finditer(text))})
    for start, end in pairwise(cuts):
        piece = text[start:end]
        if bare := piece.strip():
            start += piece.index(bare[0])
            yield start, start + len(bare)


def _group(pieces: Iterable[_Piece], limits: ChunkLimits, gap_tokens: int) -> Iterator[list[_Piece]]:
    """Fill chunks; a section starts a new one unless the current one is tiny and not of an inner section."""
    group: list[_Piece] = []
    filled = 0
    min_tokens = min(limits.min_tokens, limits.target_tokens // 2)
    for piece in pieces:
        is_full = filled + gap_tokens + piece.tokens > limits.target_tokens
        if group and (is_full or (piece.level and (filled >= min_tokens or piece.level < group[0].level))):
            yield group
            group, filled = [], 0
        filled += piece.tokens + (gap_tokens if group else 0)
        group.append(piece)
    if group:
        yield group


class _Splitter:
    """Splits a paragraph into spans of at most a given number of tokens."""

    def __init__(self, limits: ChunkLimits, count_tokens: CountTokens) -> None:
        self.target_tokens = limits.target_tokens
        self.gap_tokens = count_tokens(_PARAGRAPH_GAP)
        self._chars_per_token = limits.chars_per_token
        self._count_tokens = count_tokens

    def split(self, text: str, start: int, end: int, max_tokens: int) -> Iterator[tuple[int, int, int]]:
        """Spans (start, end, tokens) of text[start:end], in order, without surrounding white space."""
        if end - start <= max_tokens * self._chars_per_token:
            tokens = self._size(text[start:end])
            if tokens <= max_tokens:
                yield start, end, tokens
                return
        for region_start, region_end in _regions(text, start, end):
            position = region_start
            for piece in self._split_sentences(text[region_start:region_end], max_tokens):
                position = text.index(piece, position)  # pieces are separated only by white space
                yield position, position + len(piece), self._size(piece)
                position += len(piece)

    def _split_sentences(self, paragraph: str, max_tokens: int) -> list[str]:
        """LlamaIndex fills pieces with sentences, or if necessary clauses, words, characters; without overlap they
        cover the text except for white space at their ends."""
        from llama_index.core.node_parser import SentenceSplitter  # import takes a second, and is rarely needed

        splitter = SentenceSplitter(
            chunk_size=max_tokens,
            chunk_overlap=0,
            tokenizer=lambda text: range(self._size(text)),
            chunking_tokenizer_fn=_split_at_sentences,
        )
        return splitter.split_text(paragraph)

    def _size(self, text: str) -> int:
        return max(self._count_tokens(text), -(-len(text) // self._chars_per_token))


def _regions(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Split after runs of 400 characters without a break (encoded data), which would take the splitter too long."""
    for match in _UNBROKEN_RUN.finditer(text, start, end):
        yield start, match.end()
        start = match.end()
    yield start, end


def _split_at_sentences(text: str) -> list[str]:
    """Sentences with their trailing white space; a single sentence is split into lines."""
    cuts = [match.end() for match in _SENTENCE_GAP.finditer(text) if not _ends_abbreviation(text, match.start())]
    if not cuts:
        return text.splitlines(keepends=True)
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True) if start < end]


def _ends_abbreviation(text: str, position: int) -> bool:
    return _ABBREVIATION.search(text[max(0, position - 8) : position]) is not None
