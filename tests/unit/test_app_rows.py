"""Which row of a table a question is about, and which of several places a quote is shown at."""

import pytest

from app.quotes import locate_quote
from app.rows import AskedLines
from retrieval.types import Passage

HOSTS = """## Hosts

| host | role | owner |
|------|------|-------|
| atlas | database | Priya |
| borealis | web | Tomas |
| dorado | all | Tomas |

Lena looks after dorado in May."""
ORDERS = """order_id | city | product
order_id: ORD-7001 | city: Porto | product: lamp
order_id: ORD-7002 | city: Lyon | product: fan
order_id: ORD-7003 | city: Porto | product: fan"""


def passage(text: str, ordinal: int = 1, start: int = 50) -> Passage:
    return Passage(f"doc_{ordinal}", 1, "default", ordinal, "x.md", None, text, start, start + len(text))


@pytest.mark.parametrize(
    ("question", "rows"),
    [
        ("Who is the owner of the host borealis?", ["| borealis | web | Tomas |"]),
        ("What does Tomas own?", ["| borealis | web | Tomas |", "| dorado | all | Tomas |"]),
        ("What product was order ORD-7002?", ["order_id: ORD-7002 | city: Lyon | product: fan"]),
        ("Which host has most memory?", []),
        ("Why?", []),
    ],
)
def test_rows_that_a_question_names(question, rows):
    named = AskedLines(question, [passage(HOSTS), passage(ORDERS, 2)]).named()
    assert [row.text for row in named] == rows
    texts = {1: HOSTS, 2: ORDERS}
    assert all(texts[row.ordinal][row.char_start - 50 : row.char_end - 50] == row.text for row in named)


def test_a_value_of_another_row_misses_what_is_asked_about():
    lines = AskedLines("Who owns atlas?", [passage(HOSTS)])
    assert lines.misses("Tomas") and lines.misses(" Tomas")
    assert not lines.misses("Priya")
    assert not lines.misses("Lena")  # in no table
    assert not lines.misses("dorado")  # in a table, but elsewhere too
    assert not AskedLines("Who owns most?", [passage(HOSTS)]).misses("Tomas")


def test_a_reading_lacks_the_rows_that_another_has():
    named, other, prose = (passage(text) for text in (ORDERS.replace("7001", "6001"), ORDERS, "Porto has no lamps."))
    lines = AskedLines("Which city is ORD-6001 for?", [named, other, prose])
    assert [lines.lacks([one]) for one in (named, other, prose)] == [False, True, False]


@pytest.mark.parametrize(
    ("question", "line"),
    [("Who owns dorado?", "| dorado | all | Tomas |"), ("Who owns borealis?", "| borealis | web | Tomas |")],
)
def test_a_quote_is_shown_where_the_question_leads(question, line):
    found = locate_quote("Tomas", [passage(HOSTS)], 1, question)
    at = found.char_start - 50
    assert HOSTS[at:].startswith("Tomas") and HOSTS.rindex("\n", 0, at) + 1 == HOSTS.index(line)


def test_without_a_question_the_first_place_is_shown_and_whole_words_come_first():
    assert locate_quote("Tomas", [passage(HOSTS)]).char_start == 50 + HOSTS.index("Tomas")
    assert locate_quote("all", [passage("hall, all")]).char_start == 56
    assert locate_quote("Porto", [passage(HOSTS), passage(ORDERS, 2)], 1, "Porto?").passage.ordinal == 2
