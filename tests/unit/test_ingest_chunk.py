import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.chunk import ChunkLimits, chunk_document
from retrieval.types import Chunk, Heading, Page, ParsedDocument

SMALL = ChunkLimits(target_tokens=16, min_tokens=4)


def count_words(text: str) -> int:
    return len(text.split())


def chunk(parsed: ParsedDocument, limits: ChunkLimits = SMALL) -> list[Chunk]:
    return chunk_document(parsed, "doc", limits, count_words)


def check(parsed: ParsedDocument, chunks: list[Chunk], limits: ChunkLimits) -> None:
    """What holds for every document."""
    end = 0
    for ordinal, piece in enumerate(chunks):
        assert piece.ordinal == ordinal
        assert parsed.text[piece.char_start : piece.char_end] == piece.text == piece.text.strip() != ""
        assert not parsed.text[end : piece.char_start].strip()  # nothing but white space is left out
        assert piece.tokens == count_words(piece.text) <= limits.target_tokens
        end = piece.char_end
    assert not parsed.text[end:].strip()
    assert len({piece.id for piece in chunks}) == len(chunks)


words = st.text(st.sampled_from("abcdeÄ.,;:!?()\"'-|#日本。"), min_size=1, max_size=12)
gaps = st.sampled_from([" ", " ", " ", "\n", "\n\n", " \n \n", "\t", "\x0b", "\u2028"])
texts = st.lists(st.tuples(words, gaps), max_size=120).map(lambda pairs: "".join(word + gap for word, gap in pairs))


@settings(max_examples=150, deadline=None)
@given(text=texts, data=st.data())
def test_chunks_tile_the_text_within_the_limits(text, data):
    positions = data.draw(st.lists(st.integers(0, max(0, len(text) - 1)), max_size=6).map(sorted))
    headings = tuple(Heading(data.draw(st.integers(1, 4)), f"h{n}", at) for n, at in enumerate(positions))
    parsed = ParsedDocument(text, headings=headings)
    chunks = chunk(parsed)
    check(parsed, chunks, SMALL)
    assert chunk(parsed) == chunks


@pytest.mark.parametrize(
    "text",
    [
        "x" * 100_000,
        "a1B2" * 400 + " and then words " * 50,
        "word " * 20_000,
        "日本語の文です。" * 3_000,
        "名" * 5_000,
        "a\n\n" * 5_000,
        "1,2,3\n" * 5_000,
        "\n" * 10_000,
        "",
    ],
)
def test_odd_texts_are_cut_all_the_same(text):
    parsed = ParsedDocument(text)
    check(parsed, chunk(parsed), SMALL)


def test_the_number_of_tokens_counted_grows_with_the_text_and_not_faster():
    def counted(repeats: int) -> int:
        total = 0

        def count(text: str) -> int:
            nonlocal total
            total += len(text)
            return count_words(text)

        chunk_document(ParsedDocument("Some words in a sentence, yes. " * repeats), "doc", SMALL, count)
        return total

    assert counted(4000) < 4.1 * counted(1000)


def test_sections_start_chunks_and_tiny_ones_are_joined():
    text = (
        "# Top\n\nfew words here\n\n## One\n\n"
        + "one two three four five. " * 2
        + "\n\n## Two\n\nx\n\n## Three\n\nz\n\n# Next\n\nend"
    )
    headings = tuple(
        Heading(len(match[1]), match[2], match.start()) for match in re.finditer(r"^(#+) (.*)$", text, re.M)
    )
    chunks = chunk(ParsedDocument(text, headings=headings))
    assert [(piece.text.split("\n")[0], piece.heading_path) for piece in chunks] == [
        ("# Top", ("Top",)),
        ("## One", ("Top", "One")),
        ("## Two", ("Top", "Two")),
        ("# Next", ("Next",)),
    ]


def test_a_title_directly_above_a_section_is_under_that_section():
    text = "Guide\n\nCleaning\n\nUse water."
    headings = (Heading(1, "Guide", 0), Heading(2, "Cleaning", 7))
    assert [piece.heading_path for piece in chunk(ParsedDocument(text, headings=headings))] == [("Guide", "Cleaning")]


def test_a_heading_is_never_parted_from_a_long_paragraph_below():
    text = "Heading\n\n" + "one two three four five six seven. " * 10
    chunks = chunk(ParsedDocument(text, headings=(Heading(1, "Heading", 0),)))
    assert chunks[0].text.startswith("Heading\n\none two")
    check(ParsedDocument(text), chunks, SMALL)


def test_long_paragraphs_are_cut_between_sentences_but_not_after_abbreviations():
    parts = [
        "Dr. Berg walked for approx. 5 km in the rain. She was wet.",
        "Then e.g. Mr. Lund came along with tea and some cake.",
    ]
    assert [piece.text for piece in chunk(ParsedDocument(" ".join(parts)))] == parts


def test_pages_of_a_chunk():
    text = (
        "first page\n\nsecond page\n\n\n\nfourth page has many words and is cut into two chunks. "
        + "So it goes on. " * 3
    )
    pages = (Page(1, None, 0, 10), Page(2, None, 12, 23), Page(3, None, 25, 25), Page(4, None, 27, len(text)))
    chunks = chunk(ParsedDocument(text, pages=pages))
    assert [(piece.page_start, piece.page_end) for piece in chunks] == [(1, 2), (4, 4), (4, 4)]


def test_ids_depend_on_document_place_and_text():
    parsed = ParsedDocument("same\n\n" + "w " * 16 + "\n\nsame")
    first, _, second = (piece.id for piece in chunk(parsed))
    assert first != second
    assert chunk_document(parsed, "other", SMALL, count_words)[0].id != first


def test_limits_that_cannot_hold_a_sentence_are_refused():
    with pytest.raises(ValueError, match="at least 16"):
        ChunkLimits(target_tokens=8)
