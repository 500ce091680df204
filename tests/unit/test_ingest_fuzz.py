"""Every parser against damaged documents: the corpus of tests/fuzz, and seeded mutations of it."""

import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.fuzz.mutate import damage_inside, random_damage
from tests.fuzz.target import CORPUS, FORMATS, check_parser

MUTATIONS = 12  # of each input; `python -m tests.fuzz` tries more


@pytest.fixture(scope="module")
def small_process() -> Iterator[ProcessPoolExecutor]:
    """Parsers of archives fork. A process that has run other tests may be too large for that."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("name", FORMATS)
def test_a_parser_gives_a_document_or_says_why_not(small_process, name):
    small_process.submit(try_parser, name).result()


def try_parser(name: str) -> None:
    inputs = sorted(path for path in (CORPUS / name).iterdir() if path.is_file())
    assert any([check_parser(FORMATS[name], path.read_bytes()) for path in inputs]), "no input is a document"
    for path in inputs:
        for seed in range(MUTATIONS):
            choice = random.Random(f"{path.name}-{seed}")
            data = damage_inside(path.read_bytes(), choice, random_damage(choice))
            try:
                check_parser(FORMATS[name], data)
            except Exception as fault:
                raise AssertionError(f"{path.name} with seed {seed}") from fault
