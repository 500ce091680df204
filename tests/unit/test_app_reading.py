"""How little a reading seems to hold the answer: the model's margin, and the question's words that it lacks."""

import pytest
from app_kit import GARDEN, LIGHTHOUSE

from app.conversation import missing_words
from app.reading import none_margin, split_passages
from retrieval.types import Evidence, Passage

EVIDENCE = Evidence(
    tuple(
        Passage(f"d{i}", 1, "c", i, f"{i}.md", title, text, 0, len(text))
        for i, title, text in ((1, "Skerryvore", LIGHTHOUSE), (2, None, GARDEN))
    ),
    "rag",
    90,
)


@pytest.mark.parametrize(
    ("question", "share"),
    [
        ("Who were keepers of lighthouses?", 0),
        ("Does the lighthouse-keeper own a tractor?", 1 / 2),
        ("WHAT ABOUT VISITORS?", 1),
        ("And when?", 0),  # nothing to be missing
        ("", 0),
    ],
)
def test_share_of_the_words_that_were_not_read(question, share):
    assert missing_words(question, [LIGHTHOUSE]) == share


def test_words_count_wherever_they_were_read():
    assert missing_words("lighthouse garden zebra", [LIGHTHOUSE, GARDEN]) == 1 / 3
    assert missing_words("lighthouse garden zebra", []) == 1


def test_each_passage_alone_has_its_own_margin():
    lighthouse, garden = split_passages(EVIDENCE)
    assert [lighthouse.passages, garden.passages] == [EVIDENCE.passages[:1], EVIDENCE.passages[1:]]
    question = "Which roses grow at Skerryvore?"  # its title counts as read
    for reading, missing in ((lighthouse, 2 / 3), (garden, 2 / 3), (EVIDENCE, 1 / 3)):
        assert none_margin(question, reading, (-0.5, -2.0), 0.0) == -1.5
        assert none_margin(question, reading, (-0.5, -2.0), 3.0) == pytest.approx(-1.5 + 3 * missing)
