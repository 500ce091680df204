import pytest

from bench.long_context import word_f1
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
