"""Answers of one kind begin and end alike; what is cut so already stays."""

import pytest

from model.train.extents import settle

CASES = [
    ("Why is the option bad?", "It is discouraged, since [the password appears].", "since the password appears"),
    ("Why is it kept?", "It is kept [for old clients] alone.", "for old clients"),
    ("How is it installed?", "It is installed with the help of [pip].", "with the help of pip"),
    ("How many developers were there?", "It had about [sixty developers] then.", "about sixty"),
    ("How many developers were there?", "It had [sixty paid maintainers] then.", "sixty paid maintainers"),
    ("How long may a line be?", "No line has more than [80 characters].", "more than 80 characters"),
    ("How long is it?", "It takes at least about [60 seconds].", "at least about 60 seconds"),
    ("When did it appear?", "It appeared [on 21 April 1999] at last.", "21 April 1999"),
    ("When did it appear?", "It appeared in [March 1996].", "March 1996"),
    ("When is it sent?", "It is sent [in 3 days] again.", "in 3 days"),
    ("When does it start?", "It starts right after [the boot].", "right after the boot"),
    ("Where are the samples?", "They are in the [samples folder].", "in the samples folder"),
    ("Where was it held?", "It was held in [Managua, Nicaragua].", "Managua, Nicaragua"),
    ("Where is it set?", "It is set in [/etc/borg.conf].", "/etc/borg.conf"),
    ("What does PageKite do?", "PageKite makes [local sites public].", "makes local sites public"),
    ("What does PageKite do?", "PageKite is old, but people want [local sites].", "local sites"),
    ("What does it provide?", "PageKite provides [local sites].", "local sites"),
    ("Who wrote it?", "It was written by [Ian Murdock].", "Ian Murdock"),
]


@pytest.mark.parametrize(("question", "text", "expected"), CASES)
def test_where_an_answer_begins_and_ends(question: str, text: str, expected: str) -> None:
    start, passage = text.index("["), text.replace("[", "").replace("]", "")
    first = settle(passage, start, text.index("]") - 1, question)
    assert passage[slice(*first)] == expected
    assert settle(passage, *first, question) == first
