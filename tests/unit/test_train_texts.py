"""Training texts: what the makers of corpora, pairs and invented questions promise."""

import json
import random

import pytest

from model.train import pairs, sources
from model.train.corpora import clean_text
from model.train.extract import Block
from model.train.pairs import load_pairs
from model.train.passages import LONGEST, NegativeFinder, cut_passages
from model.train.templated import Context, generate_context, hide_needles

PASSAGE = "The lock file lives in /run/lock. It is removed when the daemon stops, and after 30% of all reboots by cron."


def make_context(seed: int) -> Context:
    rng = random.Random(seed)
    if seed % 2:
        return generate_context(rng, n_passages=1 + seed % 11, n_questions=8)
    return hide_needles(rng, [("Title", "One sentence. Another one! A third?")] * 3, n_needles=4)


@pytest.mark.parametrize("seed", range(60))
def test_invented_answers_stand_where_their_spans_say(seed):
    context = make_context(seed)
    assert context.questions
    for question in context.questions:
        assert bool(question.spans) == (question.kind not in ("other-property", "other-thing"))
        for span in question.spans:
            text = context.passages[span.passage][1]
            assert text[span.start : span.start + len(span.text)] == span.text != ""
    for title, text in context.passages:
        assert not set("{}\ue000\ue001\ue002\ue003") & set(title + text)


def test_invented_tables_look_as_the_service_stores_them():
    """A cell is all that stands between two bars, or behind its column's name."""
    named = plain = 0
    for seed in range(60):
        context = generate_context(random.Random(seed), 1, unanswerable=0, tables=1.0)
        ((_, text),) = context.passages
        for span in (span for question in context.questions for span in question.spans):
            row = text[text.rfind("\n", 0, span.start) + 1 :].partition("\n")[0]
            cells = [cell.strip() for cell in row.strip("| ").split("|")]
            plain += span.text in cells
            named += any(cell.endswith(f": {span.text}") for cell in cells)
            assert span.text in cells or any(cell.endswith(f": {span.text}") for cell in cells)
    assert plain > 20 and named > 20


def test_invented_contexts_repeat_with_the_seed():
    assert make_context(7) == make_context(7)
    assert make_context(7) != make_context(9)


def test_some_invented_questions_have_no_answer():
    questions = [q for seed in range(1, 200, 2) for q in make_context(seed).questions]
    unanswerable = sum(not q.spans for q in questions) / len(questions)
    assert 0.15 < unanswerable < 0.35


def write_pairs(path, **changes):
    pair = {"source": "some-doc", "doc": "a.html", "title": "Locks", "passage": PASSAGE, "kind": "path", "f1": 1.0}
    pair |= {"question": "Where does the lock file live?", "answer": "/run/lock. It is", "read": "/run/lock"}
    pair |= {"start": PASSAGE.index("/run/lock")} | changes
    path.write_text(json.dumps(pair) + "\n")
    return path


@pytest.mark.parametrize(
    ("answer", "read", "mended"),
    [
        ("/run/lock. It is", "/run/lock.", "/run/lock"),
        ("removed when the", "It is removed when the daemon stops.", "It is removed when the daemon stops"),
        ("30", "30 percent", "30%"),
        ("by cron", "BY CRON", "by cron"),
    ],
)
def test_pairs_get_the_cleanest_span(tmp_path, answer, read, mended):
    path = write_pairs(tmp_path / "pairs.jsonl", answer=answer, read=read, start=PASSAGE.index(answer))
    kept, dropped = load_pairs(path)
    assert not dropped
    assert kept[0]["answer"] == mended
    assert PASSAGE[kept[0]["start"] :].startswith(mended)


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("What does this example show about the lock file?", "leans on its section"),
        ("What is the name of it?", "too general"),
        ("Is /run/lock where the lock file lives?", "answer in the question"),
    ],
)
def test_pairs_with_a_poor_question_are_dropped(tmp_path, question, reason):
    kept, dropped = load_pairs(write_pairs(tmp_path / "pairs.jsonl", question=question))
    assert not kept
    assert dropped == {reason: 1}


@pytest.mark.parametrize("source", ["sqlite3-doc", "mutt"])
def test_pairs_of_tested_packages_are_refused(tmp_path, source):
    with pytest.raises(ValueError, match=source):
        load_pairs(write_pairs(tmp_path / "pairs.jsonl", source=source))


def test_no_tested_package_is_trained_on():
    training = set(sources.training_packages())
    assert not training & (sources.EXCLUDED | set(sources.HELD_OUT) | sources.TOO_CLOSE)


def test_clean_text_drops_menus_and_code_dumps():
    prose = "This is a sentence about the way in which the program reads its files, and it is not a short one at all. "
    menu = [Block("li", "Next"), Block("p", "Copyright 2001 by somebody, all rights reserved"), Block("h", "A heading")]
    text = clean_text([*menu, *(Block("p", prose + str(i)) for i in range(5)), Block("code", "x = 1;\n" * 200)])
    assert text.startswith("A heading\n\nThis is a sentence")
    assert "Next" not in text
    assert "Copyright" not in text
    assert "x = 1" not in text
    assert clean_text([Block("code", "x = 1;")] * 40) == ""


def test_passages_keep_their_bounds():
    sentence = "The quick brown fox jumps over the lazy dog near the river bank. "
    text = "\n\n".join(["First part", sentence * 9, sentence * 30, "Second part", sentence * 4])
    passages = list(cut_passages(text, random.Random(3)))
    assert {heading for heading, _ in passages} <= {"First part", "Second part"}
    assert all(len(passage) <= LONGEST + len(passage.split("\n")) for _, passage in passages)


def test_nearest_passage_shares_the_rare_words():
    finder = NegativeFinder(["the red boat sails", "the blue car drives", "the red car is a boat"])
    assert finder.nearest(["which boat sails", "a car that drives"], 2) == [[0, 2], [1, 2]]


def test_near_passages_of_a_pair_do_not_answer_it():
    texts = [f"The {name} engine of the mill turns at {n} revolutions when the sluice is open." for name, n in
             (("old", 40), ("new", 55), ("small", 40), ("spare", 70))]  # fmt: skip
    passages = [{"id": i, "source": "s", "title": "Mill", "text": text} for i, text in enumerate(texts)]
    passages += [
        {"id": 4 + i, "source": "s", "title": "", "text": f"Sheep number {i} eats {i} turnips"} for i in range(80)
    ]
    pair = {"source": "s", "passage_id": 0, "passage": texts[0], "question": "How fast does the old engine turn?"}
    asked = [pair | {"answer": "40 revolutions"}, pair | {"answer": None, "question": "Who built the old engine?"}]
    pairs._add_negatives(asked, passages, count=3, workers=1)
    assert asked[0]["negatives"] == asked[1]["negatives"]
    assert not {0, 2} & set(asked[0]["negatives"])
