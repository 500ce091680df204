"""Citation recall and precision, refusal accuracy and the rows of bench.answers, by hand; a run on a random model."""

import asyncio
import json
from dataclasses import replace

import pytest
import torch

from app.advice import Advice
from app.quotes import LocatedQuote, locate_quote
from bench import answers
from bench.answer_scores import (
    GoldPlace,
    Outcome,
    calibrate,
    citation_precision,
    citation_recall,
    draw,
    name_size,
    summarize,
    tabulate,
)
from bench.asking import evidence_of

PUMPS, OWLS = "The pump weighs 31 kg. It needs 230 V.", "An owl weighs 2 kg. It sees at night."
ITEM = {
    "set": "hand2",
    "passages": [["Owls", OWLS], ["Pumps", PUMPS]],
    "question": "How heavy is the pump?",
    "answer": "31 kg",
    "gold": 1,
}
GOOD = Outcome("hand3", True, 1.0, 1.0, True, -2.0, 100, "31 kg", "rag", (True,), 300)


def quote_of(words: str, mode: str = "rag", ordinal: int | None = None) -> tuple[GoldPlace, LocatedQuote]:
    evidence, gold = answers.lay_out(ITEM, mode)
    found = locate_quote(words, evidence.passages, ordinal)
    assert gold is not None and found is not None
    return gold, found


@pytest.mark.parametrize(
    ("citations", "recall", "precision"),
    [
        ((), 0, 0),
        ((True,), 1, 1),
        ((False,), 0, 0),
        ((False, True), 1, 1 / 2),
        ((True, False, False, False), 1, 1 / 4),
        ((True, True, False), 1, 2 / 3),
        ((False, False), 0, 0),
    ],
)
def test_one_citation_that_supports_recalls_an_answer_and_the_others_cost_precision(citations, recall, precision):
    assert citation_recall(citations) == recall
    assert citation_precision(citations) == pytest.approx(precision)


@pytest.mark.parametrize("mode", answers.MODES)
@pytest.mark.parametrize(
    ("words", "cited", "supports"),
    [
        ("31 kg", True, True),
        ("31", True, True),  # a part of the answer
        (PUMPS, True, True),  # more than the answer
        ("kg. It needs", True, True),
        ("230 V", True, False),  # other words of the right passage
        ("2 kg", False, False),  # words of the answer in another passage
        ("sees at night", False, False),
    ],
)
def test_a_citation_supports_where_the_gold_answer_stands(mode, words, cited, supports):
    gold, quote = quote_of(words, mode)
    assert (gold.in_passage(quote), gold.is_supported_by(quote)) == (cited, supports)


def test_the_same_words_support_in_the_gold_passage_alone():
    ours, theirs = quote_of("kg", ordinal=2), quote_of("kg", ordinal=1)
    assert ours[0].is_supported_by(ours[1]) and not theirs[0].is_supported_by(theirs[1])


def test_every_place_of_the_gold_words_counts_whatever_white_space_is_between_them_and_no_part_of_a_word():
    text = "It holds 3 l. At most 31 l, of\nwhich 3\nl are kept."
    gold = GoldPlace.find(1, 100, text, ["3 l", "never said"])
    assert [text[start - 100 : end - 100] for start, end in gold.answers] == ["3 l", "3\nl"]
    assert gold.passage == (100, 100 + len(text))


@pytest.mark.parametrize(("answer", "begin"), [("kg", 7), (".conf", 15), ("on", 17), ("", 0)])
def test_gold_words_stand_inside_others_where_they_stand_nowhere_else(answer, begin):
    gold = GoldPlace.find(1, 0, "31kg 5 kg, pump.conf", [answer])
    assert [start for start, _ in gold.answers] == [begin]


def test_an_article_that_is_shared_with_the_answer_supports_nothing():
    (passage,) = evidence_of([("Crew", "Ask the keeper first.")]).passages
    gold = GoldPlace.find(1, 0, passage.text, ["the keeper"])
    for words, supports in (("Ask the", False), ("the keeper", True), ("keeper first", True)):
        assert gold.is_supported_by(locate_quote(words, [passage])) is supports


def test_an_answer_whose_words_are_not_in_its_passage_is_supported_by_any_of_it():
    gold = GoldPlace.find(2, 0, PUMPS, ["thirty-one kilograms"])
    assert gold.answers == (gold.passage,) and gold.is_supported_by(quote_of("230 V")[1])


def test_one_whole_text_holds_each_passage_where_its_gold_place_says():
    evidence, gold = answers.lay_out(ITEM, "full_context")
    (passage,) = evidence.passages
    assert evidence.mode == "full_context" and passage.text == f"Owls\n\n{OWLS}\n\nPumps\n\n{PUMPS}"
    assert passage.text[slice(*gold.passage)] == PUMPS
    assert [passage.text[slice(*span)] for span in gold.answers] == ["31 kg"]
    assert answers.lay_out(ITEM | {"answer": None, "gold": None}, "full_context") == (evidence, None)


def test_scores_of_answers_and_refusals_worked_out_by_hand():
    outcomes = [
        GOOD,
        replace(GOOD, exact=0.0, f1=0.5, citations=(True, False)),
        replace(GOOD, exact=0.0, f1=0.0, cited=False, citations=()),  # says something, cites nothing
        replace(GOOD, margin=1.0),  # would be right, and is refused
        replace(GOOD, answerable=False, cited=False, margin=1.0, citations=(False,)),
        replace(GOOD, answerable=False, cited=False, margin=-1.0, citations=(False,)),  # answered, though nothing does
    ]
    row = summarize(outcomes, threshold=0.0)
    assert (row["questions"], row["tokens"]) == (6, 100)
    assert row["EM"] == pytest.approx(25) and row["F1"] == pytest.approx(100 * 1.5 / 4)
    assert row["EM if answered"] == pytest.approx(50) and row["cited right"] == pytest.approx(75)
    assert row["refused wrongly"] == pytest.approx(25) and row["refused"] == pytest.approx(50)
    # given are four: (right), (right, wrong), none, and one to a question without an answer
    assert row["citation recall"] == pytest.approx(100 * (1 + 1 + 0 + 0) / 4)
    assert row["citation precision"] == pytest.approx(100 * (1 + 1 / 2 + 0 + 0) / 4)
    assert row["refusal accuracy"] == pytest.approx(100 * (3 + 1) / 6)


def test_a_set_where_nothing_can_be_answered_has_no_scores_of_words():
    nothing = replace(GOOD, answerable=False, cited=False, citations=(False,))
    row = summarize([nothing, replace(nothing, margin=3.0)], threshold=0.0)
    assert set(row) == {"questions", "tokens", "refused", "citation recall", "citation precision", "refusal accuracy"}
    assert (row["refused"], row["refusal accuracy"]) == (50, 50)
    assert (row["citation recall"], row["citation precision"]) == (0, 0)


def test_who_refuses_everything_cites_nothing_and_is_right_where_nothing_answers():
    row = summarize([GOOD, replace(GOOD, answerable=False), replace(GOOD, answerable=False)], threshold=-5.0)
    assert "citation recall" not in row and "citation precision" not in row
    assert (row["EM"], row["refused wrongly"], row["refused"]) == (0, 100, 100)
    assert row["refusal accuracy"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize(("tokens", "name"), [(0, "to 256"), (256, "to 256"), (257, "to 512"), (513, "over 512")])
def test_sizes_are_named_by_their_upper_bound(tokens, name):
    assert name_size(tokens, [256, 512]) == name


def test_rows_are_a_mode_and_set_then_a_mode_then_a_mode_and_size():
    apart = replace(GOOD, mode="rag-apart", margin=4.0)
    outcomes = [replace(GOOD, evidence_tokens=900), replace(GOOD, set="dev1", evidence_tokens=90), apart]
    rows = list(tabulate(outcomes, 0.0, [256, 512]))
    assert [(row["mode"], row["set"], row["evidence tokens"]) for row in rows] == [
        ("rag", "hand3", "all"),
        ("rag", "dev1", "all"),
        ("rag-apart", "hand3", "all"),
        ("rag", "all", "all"),
        ("rag-apart", "all", "all"),
        ("rag", "all", "to 256"),
        ("rag", "all", "over 512"),
        ("rag-apart", "all", "to 512"),
    ]
    assert [row["refusal accuracy"] for row in rows[3:5]] == [100, 0] and rows[3]["questions"] == 2


def test_each_mode_has_a_threshold_of_its_own_unless_one_is_given():
    outcomes = [replace(GOOD, mode=mode, margin=margin) for mode, margin in (("rag", -2.0), ("rag-apart", 4.0))]
    assert [row["threshold"] for row in tabulate(outcomes, None, [512])] == [-2.0, 4.0] * 3
    assert {row["threshold"] for row in tabulate(outcomes, 1.0, [512])} == {1.0}
    assert calibrate(outcomes, 0.5) == -2.0 and calibrate([replace(GOOD, answerable=False)], 0.08) == 0.0


def test_a_checkpoint_is_asked_in_every_mode_and_its_rows_are_drawn(tiny_checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "items.jsonl"
    nothing = {"set": "handnone1", "passages": [["Owls", OWLS]], "question": "Why?", "answer": None, "gold": None}
    file.write_text("".join(json.dumps(row) + "\n" for row in (ITEM, nothing, ITEM)))
    items = answers.read_items(file, limit=1)
    reader = answers.Reader(tiny_checkpoint, torch.float32, None, 2, Advice(quote_beginnings=2, ask_back=0.5))
    outcomes = answers.ask_all(reader, items, answers.MODES)
    asyncio.run(reader.engine.close())
    assert [(o.mode, o.set) for o in outcomes] == [(m, s) for m in answers.MODES for s in ("hand2", "handnone1")]
    assert all(o.said and 1 <= len(o.citations) <= 2 for o in outcomes)
    assert not any(any(o.citations) for o in outcomes if not o.answerable)
    assert {o.evidence_tokens for o in outcomes if o.set == "hand2"} == {reader.count_evidence(ITEM["passages"])}
    answers.write_outcomes(items, outcomes, tmp_path / "outcomes.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "outcomes.jsonl").read_text().splitlines()]
    assert [(line["mode"], line["question"], line["said"]) for line in lines] == [
        (o.mode, item["question"], o.said) for o, item in zip(outcomes, items * 3, strict=True)
    ]
    draw(list(tabulate(outcomes, None, [64, 256])), tmp_path / "answers.png")
    assert (tmp_path / "answers.png").read_bytes().startswith(b"\x89PNG")
