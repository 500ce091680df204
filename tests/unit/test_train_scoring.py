import json

import pytest

from app.setting_groups import SHIPPED_CHECKPOINT
from bench.long_context import word_f1
from model.tokenizer import Tokenizer
from model.train.evaluate import load_items
from model.train.scoring import normalize_answer, token_f1


@pytest.mark.parametrize(
    ("said", "gold"),
    [("‘wheel’", "wheel"), ("The “y” key.", 'y "key"'), ("up to eight…", "up to eight"), ("a  Bo\nPeep", "Bo Peep")],
)
def test_punctuation_of_any_script_and_articles_do_not_count(said: str, gold: str) -> None:
    assert normalize_answer(said) == normalize_answer(gold)
    assert token_f1(said, gold) == 1.0


def test_signs_that_mean_something_count() -> None:
    assert normalize_answer("45 €") != normalize_answer("45")
    assert token_f1("5 minutes", "5 seconds") == pytest.approx(0.5)
    assert token_f1("", "anything") == 0.0


def test_long_bench_is_scored_by_its_own_rule() -> None:
    assert word_f1("‘wheel’", "wheel") == 0.0
    assert word_f1("the 'wheel'", "wheel") == 1.0


def test_a_question_about_one_passage_is_asked_a_second_time_with_the_passage_read_again(tmp_path):
    tokenizer = Tokenizer.load(SHIPPED_CHECKPOINT)
    one, two = ["Pumps", "The pump weighs 31 kg."], ["Owls", "An owl sees at night."]
    asked = {"question": "How heavy is it?", "answer": "31 kg", "gold": 0}
    rows = [{"set": "hand1", "passages": [one], **asked}, {"set": "hand3", "passages": [one, two], **asked}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    once, again, several = load_items(tmp_path / "items.jsonl", tokenizer, 5)
    assert [item.set for item in (once, again, several)] == ["hand1", "againhand1", "hand3"]
    texts = [tokenizer.decode(item.prompt, skip_special=False) for item in (once, again)]
    assert [text.count("31 kg") for text in texts] == [1, 2] and texts[1].startswith(
        texts[0].removesuffix("<|answer|>")
    )
    assert once.gold == again.gold and (again.answer, again.ordinal) == ("31 kg", 1)
