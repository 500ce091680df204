"""Sentences of an answer without a quote are found; those with one, and what only joins them, are not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.support import unsupported_spans


def marked(said: str) -> list[str]:
    """`said` has its quotes between « and »; returns what is marked."""
    quotes, text = [], ""
    for index, piece in enumerate(said.replace("»", "«").split("«")):
        if index % 2:
            quotes.append((len(text), len(text) + len(piece)))
        text += piece
    return [text[start:end] for start, end in unsupported_spans(text, quotes)]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("«Tuesday at 10:00»", []),
        ("It starts «Tuesday at 10:00». Bring a radio.", ["Bring a radio."]),
        ("It rains. The week starts «Tuesday». It ends late!", ["It rains.", "It ends late!"]),
        ("The handbook says:\n“«Lamps. Trim them. Twice»”.", []),
        ("He said “no.” Then “«yes»”.", ["He said “no.”"]),
        ("- «six hours»\n- no longer than that\n", ["- no longer than that"]),
        ("«一週間»です。明日です。", ["明日です。"]),
        ("«a» … «b»", []),
        ("Version 6.3 is out", ["Version 6.3 is out"]),
        ("", []),
    ],
)
def test_sentences_without_a_quote(said, expected):
    assert marked(said) == expected


@given(st.text("ab.!? \n:”。", max_size=40), st.lists(st.tuples(st.integers(0, 40), st.integers(1, 8)), max_size=3))
def test_what_is_marked_is_in_order_and_apart_from_every_quote(text, places):
    quotes = [(at, min(at + length, len(text))) for at, length in places if at < len(text)]
    spans = unsupported_spans(text, quotes)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges) and all(0 <= start < end <= len(text) for start, end in spans)
    assert not any(a < end and start < b for start, end in spans for a, b in quotes)
    covered = {at for start, end in (*spans, *quotes) for at in range(start, end)}
    assert quotes or all(at in covered for at, letter in enumerate(text) if letter.isalpha())
