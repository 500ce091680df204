"""The ablation: its language says what is asked for, tests name nobody from training, a stopped run goes on alike."""

import argparse
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.ablation import IDLE, share_right
from model.train import ablation
from model.train.lookups import Language, Row

LANGUAGE = Language()


def words(row: Row) -> list[str]:
    return [LANGUAGE.words[i] for i in row.ids]


def people(row: Row) -> set[tuple[str, str]]:
    return {pair for pair in pairwise(words(row)) if pair[0] in LANGUAGE.first and pair[1] in LANGUAGE.last}


@pytest.mark.parametrize("idle", [0.0, 0.6, 1.0])
def test_what_is_asked_for_was_said_once_of_that_person(idle: float) -> None:
    for seed in range(20):
        row = LANGUAGE.draw(random.Random(seed), tokens=300, idle=idle, questions=4)
        assert len(row.ids) <= 300 and len(row.answers) == (1 if idle == 1 else 4)
        document = " ".join(words(row)).split(" <question>")[0]
        for start, end in row.answers:
            said = " ".join(words(row)[start:end])
            assert words(row)[start - 1] == "<answer>" and words(row)[end] == "<end>"
            assert f" {said} " in document


def test_people_of_tests_are_not_those_of_training() -> None:
    training, tests = set(), set()
    for seed in range(300):
        training |= people(LANGUAGE.draw(random.Random(seed), 500, 0.0, 1))
        tests |= people(LANGUAGE.draw(random.Random(seed), 500, 0.0, 1, test=True))
    assert len(training) > 2000 and len(tests) > 500
    assert not training & tests


@pytest.mark.parametrize("mixture", ["mamba", "1:7", "1:3", "attention"])
def test_mixtures_weigh_the_same(mixture: str) -> None:
    model = ablation.build(mixture, len(LANGUAGE.words))
    assert (
        sum(layer.is_attention for layer in model.layers) == {"mamba": 0, "1:7": 1, "1:3": 2, "attention": 8}[mixture]
    )
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(343_200, rel=0.013)


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    args = argparse.Namespace(
        tokens=768, tokens_a_step=128, length=128, grow_until=0.7, rate=3e-3, seed=0, save_every=2
    )
    for name, stops in (("whole", (None,)), ("parts", (3, None))):  # the step behind the last save is done again
        for stop in stops:
            args.out = tmp_path / name
            ablation.train("1:7", args, stop_at=stop)
    whole, parts = (load_file(tmp_path / name / "1-7.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


@pytest.mark.parametrize("task", IDLE)
def test_a_model_that_knows_nothing_finds_nothing(task: str) -> None:
    assert share_right(ablation.build("1:7", len(LANGUAGE.words)), LANGUAGE, task, length=128, samples=5) == 0.0
