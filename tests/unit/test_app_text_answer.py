"""What answers in plain text become, token by token."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_kit import PASSAGES, TOKENIZER, passage

from app.answering import Quoted, TextPiece
from app.text_answer import NOT_FOUND_MARKER, OMITTED, TextAnswerReader


def read(answer: str, passages=PASSAGES, stop_texts=()):
    """Feed an answer token by token, here byte by byte; (reader, text shown on the way)."""
    reader = TextAnswerReader(TOKENIZER, passages, TOKENIZER.encode_template("<|eom|>"), stop_texts)
    parts = [part for token_id in TOKENIZER.encode_template(answer) for part in reader.push(token_id)]
    parts += reader.finish()
    assert [part for part in parts if isinstance(part, Quoted)] == reader.quoted
    shown = "".join(part.text for part in parts if isinstance(part, TextPiece))
    assert shown == reader.text
    for quoted in reader.quoted:
        source = next(p for p in passages if p.document_id == quoted.quote.passage.document_id)
        assert quoted.quote.text == source.text[quoted.quote.char_start : quoted.quote.char_end]
    return reader, shown


def quotes(reader) -> list[tuple[str, int]]:
    return [(reader.text[q.start : q.end], q.quote.passage.ordinal) for q in reader.quoted]


def test_a_cited_quote_becomes_a_citation_and_the_text_around_it_stays():
    reader, text = read('The keeper is "Moira Campbell" [d2], it seems.<|eom|>')
    assert text == 'The keeper is "Moira Campbell", it seems.'
    assert quotes(reader) == [("Moira Campbell", 2)]
    assert reader.rejected == 0 and not reader.said_none and not reader.unchecked_text


@pytest.mark.parametrize(
    ("answer", "text", "quoted"),
    [
        ("“48 metres” [d2] and “four euros”[ D5 ].", "“48 metres” and “four euros”.", ["48 metres", "four euros"]),
        ('"120 kinds of roses," [d5] no', '"120 kinds of roses", no', ["120 kinds of roses"]),
        ('"120 kinds of roses". [d5, d2] [d9] Yes', '"120 kinds of roses". Yes', ["120 kinds of roses"]),
        ('The "old" keeper: "Moira Campbell" [d2]', 'The "old" keeper: "Moira Campbell"', ["Moira Campbell"]),
        ('A 5" pipe, "48 metres" [d2] long', 'A 5" pipe, "48 metres" long', ["48 metres"]),
        ('"48 metres" [d5]', '"48 metres"', ["48 metres"]),  # the wrong document: the server knows better
        ('"Alan\n  Stevenson" [d2]', '"Alan\n  Stevenson"', ["Alan\n  Stevenson"]),
        ('"an open "48 metres" [d2]', '"an open "48 metres"', ["48 metres"]),
        ('"unclosed\n\nIt is "48 metres" [d2]', '"unclosed\n\nIt is "48 metres"', ["48 metres"]),
        ('It is "48 metres', 'It is "48 metres"', ["48 metres"]),  # cut off
        ('"48 metres" [d2] [', '"48 metres" [', ["48 metres"]),
        ('"48 metres" [d2]. NOT_IN_DOCUMENTS', '"48 metres". (not in the documents)', ["48 metres"]),
    ],
)
def test_ways_to_write_a_quote(answer, text, quoted):
    reader, shown = read(answer)
    assert (shown, [words for words, _ in quotes(reader)]) == (text, quoted)
    assert reader.rejected == 0


def test_a_quotation_inside_a_quote_belongs_to_it():
    source = passage(7, 'She said "no" to them. The so-called "great light" was lit.')
    reader, text = read('It reads "The so-called "great light" was lit." [d7]', [source])
    assert text == 'It reads "The so-called "great light" was lit."'
    assert quotes(reader) == [('The so-called "great light" was lit.', 7)]


def test_a_quote_that_is_nowhere_is_left_out_and_counted():
    reader, text = read('It is "48 yards" [d2] high and costs "four euros" [d5].')
    assert text == f'It is {OMITTED} high and costs "four euros".'
    assert (reader.rejected, quotes(reader)) == (1, [("four euros", 5)])


def test_nothing_is_shown_before_the_first_quote_is_found():
    reader = TextAnswerReader(TOKENIZER, PASSAGES)

    def push(text: str) -> list[TextPiece | Quoted]:
        return [part for token_id in TOKENIZER.encode(text) for part in reader.push(token_id)]

    assert push('The keeper is "Moira Campbell" [d2') == [] and reader.text == ""
    assert push("]") == [TextPiece('The keeper is "Moira Campbell"'), *reader.quoted]
    assert push(" since")[-1] == TextPiece("e")


@pytest.mark.parametrize("answer", ["It is 48 yards high.", 'It is "48 yards" [d2].'])
def test_an_answer_without_a_quote_that_is_there_is_unchecked(answer):
    reader, shown = read(answer)
    assert shown == "" and not reader.quoted and not reader.said_none
    assert reader.unchecked_text == answer.replace('"48 yards" [d2]', OMITTED)


@pytest.mark.parametrize(
    "answer",
    [
        NOT_FOUND_MARKER,
        f"  {NOT_FOUND_MARKER}.<|eom|>",
        f'"{NOT_FOUND_MARKER}"',
        "**NOT IN DOCUMENTS**",
        "NOT\\_IN\\_DOCUMENTS",
        f"They do not say so: {NOT_FOUND_MARKER}",
        f'{NOT_FOUND_MARKER}, but "48 metres" [d2]',
    ],
)
def test_the_marker_is_a_refusal(answer):
    reader, shown = read(answer)
    assert reader.said_none and not reader.quoted and not shown and not reader.unchecked_text


def test_a_document_cannot_write_the_refusal():
    reader, _ = read(f'It says "{NOT_FOUND_MARKER}" [d2].', [passage(2, f"The answer is {NOT_FOUND_MARKER}.")])
    assert not reader.said_none and quotes(reader) == [(NOT_FOUND_MARKER, 2)]


def test_text_ends_before_a_stop_text():
    reader, shown = read('"48 metres" [d2]\n\nQuestion: "four euros" [d5]', stop_texts=["\n\nQuestion:"])
    assert shown == '"48 metres"' and quotes(reader) == [("48 metres", 2)]


PIECES = [*'"“” [.éx', "\n\n", "[d2]", "d5]", "48 metres", "four euros", "NOT_IN_", "DOCUMENTS"]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
@settings(deadline=None)
def test_any_answer_is_read_to_its_end(answer):
    reader, shown = read(answer)
    assert bool(shown) == bool(reader.quoted)
    assert all(words == q.quote.text for (words, _), q in zip(quotes(reader), reader.quoted, strict=True))
    if not reader.said_none and '"' not in answer and "“" not in answer:
        assert reader.unchecked_text == answer.strip()
