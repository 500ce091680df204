"""Two columns of a PDF are read one after the other, however the file puts their lines; tables are read row by row."""

import pytest
from test_ingest_pdf import Shown, parse, write_pdf

from ingest.page_image import render_page

# wrapped at 225 points
LEFT = [
    "The lighthouse of Skerryvore stands on a",
    "reef that only the highest tides of the year",
    "cover. Its keeper was relieved every six",
    "weeks if the sea allowed it, and often he",
    "waited for three more. In the winter of",
    "snow no boat could land for fifty days, so",
    "the stores of flour were counted daily.",
]
RIGHT = [
    "Granite for the tower came from Mull and",
    "was dressed at Hynish, where a harbour",
    "had to be dug out of the rock before im-",
    "mense stones could be shipped. Masons",
    "lived in a barrack on the reef that a gale",
    "took away in the first winter. It was built",
    "again on longer legs and stood until the",
    "lamp was lit.",
]
HEADING = "Skerryvore: the tower, its builders and those who kept the light from 1844"
JOINED = (" ".join(LEFT), " ".join(RIGHT).replace("im- mense", "immense"))


def column(lines: list[str], x: float, top: float = 700) -> list[Shown]:
    return [(x, top - 14 * number, text) for number, text in enumerate(lines)]


def in_turn(left: list[Shown], right: list[Shown]) -> list[Shown]:
    """As a program writes them that goes down the page line by line."""
    return sorted([*left, *right], key=lambda shown: (-shown[1], shown[0]))


@pytest.mark.parametrize("order", [lambda left, right: [*left, *right], in_turn], ids=["by column", "by line"])
@pytest.mark.parametrize("longer", ["left", "right"])
def test_columns_are_read_one_after_the_other(tmp_path, order, longer):
    texts = (LEFT, RIGHT) if longer == "right" else (RIGHT, LEFT)
    joined = JOINED if longer == "right" else JOINED[::-1]
    shown = [(72, 740, HEADING), *order(column(texts[0], 72), column(texts[1], 320)), (72, 560, "Below, and alone.")]
    assert parse(write_pdf(tmp_path / "x", [shown])).text == "\n\n".join([HEADING, *joined, "Below, and alone."])


def test_a_heading_across_both_columns_parts_what_is_above_from_what_is_below(tmp_path):
    above, below = (
        in_turn(column(LEFT, 72), column(LEFT, 320)),
        in_turn(column(RIGHT, 72, 572), column(RIGHT, 320, 572)),
    )
    text = parse(write_pdf(tmp_path / "x", [[*above, (72, 594, HEADING), *below]])).text
    assert text == "\n\n".join([JOINED[0], JOINED[0], HEADING, JOINED[1], JOINED[1]])


@pytest.mark.parametrize(
    "rows",
    [
        [("Part", "Price"), *((f"Pump number {n} with its seal", f"{n} kroner and 50 oere") for n in range(1, 9))],
        [("Name", "Task")] + [("Moira Campbell, keeper of the light", "Winds the clockwork and trims the wick")] * 8,
        [("12.50 and 13.70 and 14.90 and 1", "22.50 and 23.70 and 24.90 and 2")] * 8,
        [(LEFT[0], RIGHT[0]), (LEFT[1], RIGHT[4]), ("cover.", "first stone.")] * 3,
    ],
    ids=["words and numbers", "long cells", "numbers", "cells of three lines"],
)
def test_the_rows_of_a_table_stay_together(tmp_path, rows):
    shown = in_turn(column([left for left, _ in rows], 72), column([right for _, right in rows], 320))
    text = parse(write_pdf(tmp_path / "x", [shown])).text
    assert text == "\n".join(f"{left} | {right}" for left, right in rows)


def test_a_quote_over_lines_of_a_column_is_marked_where_they_stand(tmp_path):
    path = write_pdf(tmp_path / "x", [in_turn(column(LEFT, 72), column(RIGHT, 320))])
    text = parse(path).text
    for quote, left in (("often he waited for three more", 72), ("came from Mull and was dressed at Hynish", 320)):
        start = text.index(quote)
        boxes = render_page(path, 1, text, start, start + len(quote)).boxes
        assert len(boxes) == 2 and boxes[0][1] < boxes[1][1]
        assert all(left <= 595 * box[0] + 3 and 595 * (box[0] + box[2]) < left + 235 for box in boxes)
    rows = f"{LEFT[0]} | {RIGHT[0]}\n{LEFT[1]} | {RIGHT[1]}"  # as earlier versions stored it
    assert render_page(path, 1, rows, 0, len(rows)).boxes
