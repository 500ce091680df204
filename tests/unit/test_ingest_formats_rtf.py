"""RTF: text in any code page, headings and rows kept, nothing of what is not shown."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingest.parse import ParseError
from ingest.parse.cage import parse_in_child
from ingest.parse.rtf import MEDIA_TYPE as RTF
from ingest.parse.rtf import parse_rtf
from ingest.sniff import sniff_media_type

DOCUMENT = rb"""{\rtf1\ansi\ansicpg1252\deff0{\fonttbl{\f0 Arial;}}{\*\generator Secret;}{\info{\title T}}
{\header running head}{\pard\outlinelevel0 House rules\par}
\pard Gr\'f6\'dfe {\b bold} \u8364?5 \uc0\u-10179\u-8704 !\par
{\v hidden}shown{\footnote note}\line next \{x\}\par
\pard\outlinelevel1 Limits\par\pard
\trowd City\cell Limit\cell\row\trowd Oslo\cell 900\cell\row\pard Last.}"""


def test_rtf_keeps_headings_paragraphs_and_rows(tmp_path):
    (tmp_path / "x").write_bytes(DOCUMENT)
    assert sniff_media_type(DOCUMENT, "x.doc") == RTF
    parsed = parse_in_child(tmp_path / "x", RTF)
    assert parsed.text == (
        "House rules\n\nGröße bold €5 😀!\n\nshown\nnext {x}\n\nLimits\n\n"
        "City | Limit\nCity: Oslo | Limit: 900\n\nLast."
    )
    assert [(h.level, h.title, h.char_start) for h in parsed.headings] == [
        (1, "House rules", 0),
        (2, "Limits", parsed.text.index("Limits")),
    ]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (rb"{\rtf1\ansi\ansicpg1251 \'cf\'f0\'e8\'e2\'e5\'f2}", "Привет"),
        (rb"{\rtf1\ansi\ansicpg932 \'93\'fa\'96\'7b}", "日本"),
        (rb"{\rtf1\ansi\ansicpg99999 caf\'e9}", "café"),
        (rb"{\rtf1 never {closed", "never closed"),
        (rb"{\rtf1 closed}}} too often", "closed too often"),
        (rb"{\rtf1 a\u99999999 b\uc-5 c\outlinelevel77 d}", None),
    ],
)
def test_code_pages_and_damage(data, text):
    assert parse_rtf(data).text == text or text is None


def test_what_only_looks_like_rtf_and_endless_nesting_are_refused():
    for data in (b"plain", b"{\\rtf1" + b"{" * 20_000):
        with pytest.raises(ParseError) as caught:
            parse_rtf(data)
        assert caught.value.code == "broken_rtf"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(DOCUMENT.split(b"\\")) | st.binary(max_size=6), max_size=20))
def test_any_order_of_words_is_read(pieces):
    parse_rtf(b"{\\rtf1 " + b"\\".join(pieces))
