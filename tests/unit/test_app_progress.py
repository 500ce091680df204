"""How far an answer is, before it has a first word."""

import pytest
from clock_kit import Clock

from app.progress import ReadingProgress


@pytest.fixture
def read():
    """read(token -> seconds, marks, total) -> what is shown then."""

    def read(seconds, marks, total):
        clock = Clock()
        progress = ReadingProgress(clock)
        progress.begin(total)
        for tokens in marks:
            clock.now = seconds(tokens)
            progress.note(tokens)
        return progress.show()

    return read


def test_nothing_is_said_before_there_is_something_to_read():
    assert ReadingProgress().show() is None


def test_an_answer_waits_then_reads_then_is_written(read):
    waiting = {"stage": "waiting", "done": 0, "total": 1000, "unit": "tokens", "seconds_left": None}
    assert read(float, [], 1000) == waiting
    assert read(float, [0], 1000) == waiting | {"stage": "reading"}
    assert read(lambda n: n / 100, [0, 250], 1000) == waiting | {"stage": "reading", "done": 250, "seconds_left": 7.5}
    assert read(float, [0, 500, 1000], 1000) == waiting | {"stage": "writing", "done": 1000}


def test_what_came_from_the_cache_took_no_time(read):
    assert read(lambda n: (n - 9000) / 100, [9000, 9200, 9400], 10_000)["seconds_left"] == 6


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("squared", [0.0, 0.4, 1.0])
def test_the_rest_of_a_long_prompt_takes_longer(read, share, squared):
    """Of 100 s, `squared` grow with the square of the length."""
    total = 16_384
    seconds = lambda n: 100 * ((1 - squared) * n / total + squared * (n / total) ** 2)
    done = int(total * share)
    left_s = read(seconds, range(0, done + 1, 512), total)["seconds_left"]
    assert left_s == pytest.approx(100 - seconds(done), rel=0.15)


def test_steps_may_be_uneven(read):
    assert read(lambda n: n / 100, [0, 1, 2, 3, 4, 5, 900], 1000)["seconds_left"] == 1
    assert read(lambda n: n / 100, [0, 900, 901, 902, 903, 904, 910], 1000)["seconds_left"] == 0.9


def test_time_goes_on_between_two_notes():
    clock = Clock()
    progress = ReadingProgress(clock)
    progress.begin(1000)
    for tokens in (0, 500):
        clock.now = tokens / 100
        progress.note(tokens)
    clock.now += 2
    assert progress.show()["seconds_left"] == 3
    clock.now += 60
    assert progress.show()["seconds_left"] == 0


def test_less_than_before_is_no_news():
    progress = ReadingProgress()
    progress.begin(1000)
    for tokens in (500, 0, 400):
        progress.note(tokens)
    assert progress.show()["done"] == 500
