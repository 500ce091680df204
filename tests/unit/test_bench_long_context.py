"""Texts of the RULER-style tasks, readers and scores of LongBench and L-Eval, and a whole run on a random model."""

import json
import random

import pytest
from app_kit import write_checkpoint

from bench import long_context, ruler
from bench.asking import open_asker
from bench.runs import BenchRun


def count_words(text: str) -> int:
    return len(text.split())


def count_letters(text: str) -> int:
    """As tokens are: more of them in long words, and in what is between sentences."""
    return len(text) // 3 + 2 * text.count("\n")


@pytest.mark.parametrize("count", [count_words, count_letters])
@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_text_has_its_length_and_all_that_is_asked_for(task, length, count):
    (sample,) = ruler.make_samples([task], length, 1, count)
    assert 0.8 * (length - 1024) <= count(sample.text) <= length - 1024
    assert all(one in sample.text for one in sample.expected)
    assert ruler.make_samples([task], length, 1, count) == [sample]
    assert ruler.score(" ".join(sample.expected), sample.expected) == 1 and ruler.score("", sample.expected) == 0


def test_a_needle_stands_at_its_depth():
    for sample in ruler.make_samples(["single"], 4096, 1, count_words):
        at = sample.text.index(sample.expected[0]) / len(sample.text)
        assert sample.depth is not None and abs(at - sample.depth) < 0.02


def test_assignments_stand_in_the_order_in_which_they_are_needed():
    sample = ruler.make_variables(random.Random(3), 3000, count_words)
    places = [sample.text.index(f"{name} =") for name in sample.expected]
    assert places == sorted(places)


def test_the_words_of_an_aggregation_are_the_most_frequent():
    sample = ruler.make_aggregation(random.Random(3), 3000, count_words)
    words = sample.text.split()
    best = sorted(set(words), key=words.count, reverse=True)[:3]
    assert set(best) == set(sample.expected)


def test_both_kinds_of_files_are_read(tmp_path):
    bench, leval = tmp_path / "hotpotqa_e.jsonl", tmp_path / "longfqa.jsonl"
    row = {"input": "Who?", "context": "It was Ada.", "answers": ["Ada"], "dataset": "hotpotqa_e", "all_classes": None}
    bench.write_text(json.dumps(row) + "\n")
    leval.write_text(json.dumps({"input": "A text.", "instructions": ["One?", "Two?"], "outputs": ["1", "2"]}) + "\n")
    assert [*long_context.read_items(bench)] == [long_context.Item("hotpotqa", "It was Ada.", "Who?", ("Ada",))]
    assert [item.question for item in long_context.read_items(leval)] == ["One?", "Two?"]
    (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"line 1: neither LongBench nor L-Eval"):
        list(long_context.read_items(tmp_path / "other.jsonl"))


@pytest.mark.parametrize(
    ("name", "said", "answers", "score"),
    [
        ("hotpotqa", "the Ada Lovelace", ["Ada"], 2 / 3),
        ("qasper", "no idea", ["yes", "no idea"], 1),
        ("gov_report", "a b c d", ["a x c d"], 0.75),
        ("passage_count", "5 or 6", ["5"], 0.5),
        ("quality", "(B)", ["B"], 1),
        ("quality", "A", ["AB"], 0),
        ("sfiction", "True", ["true"], 1),
        ("lcc", "# comment\nx = 1", ["x = 1"], 1),
    ],
)
def test_scores(name, said, answers, score):
    assert long_context.judge(long_context.Item(name, "", "", tuple(answers)), said) == pytest.approx(score)


def test_a_class_is_right_when_it_is_the_one_named():
    item = long_context.Item("trec", "", "", ("Date",), ("Date", "City", "Number"))
    assert long_context.judge(item, "Date") == 1 and long_context.judge(item, "Date or City") == 0.5
    assert long_context.judge(item, "City") == 0


@pytest.fixture
def asker(tmp_path, write_jamba):
    checkpoint = write_checkpoint(tmp_path, write_jamba)
    with open_asker(checkpoint, 2048, "none", max_quotes=2) as asker:
        yield asker


def test_a_checkpoint_is_asked_and_its_rows_are_drawn(asker, tmp_path, monkeypatch):
    run, shown = BenchRun("ruler", ["ruler"]), []
    monkeypatch.setattr("builtins.print", lambda row, flush=False: shown.append((row, flush)))  # of a pipe as well
    ruler.measure(asker, ["single", "qa"], [2048], 1, run)
    assert shown == [(row, True) for row in run.rows]
    assert [(row["task"], row["depth"]) for row in run.rows] == [*(("single", d) for d in ruler.DEPTHS), ("qa", None)]
    assert all(0 <= row["score"] <= 1 and row["seconds"] > 0 for row in run.rows)
    ruler.draw([row for row in run.rows if row["task"] == "single"], tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


def test_a_text_over_the_limit_loses_its_middle(asker):
    text = "begin " + "word " * 2000 + "end"
    cut = long_context.cut_middle(text, 500, asker)
    assert asker.count_tokens(cut) <= 500 and cut.startswith("begin") and cut.endswith("end")
    assert long_context.cut_middle("short", 500, asker) == "short"
    assert asker.ask("Who?", cut, 20).prompt_tokens > 400
