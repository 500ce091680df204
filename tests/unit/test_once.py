"""A property that several threads ask for at once is computed by one of them."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from retrieval.once import once


class Costly:
    def __init__(self, faults: int = 0) -> None:
        self.computed, self.faults, self.asked = 0, faults, threading.Barrier(4)

    @once
    def value(self) -> object:
        """It is."""
        self.computed += 1
        if self.computed <= self.faults:
            raise RuntimeError("not yet")
        return object()

    def ask(self) -> object:
        self.asked.wait(10)
        return self.value


def test_one_thread_computes_and_all_get_it():
    costly, other = Costly(), Costly()
    with ThreadPoolExecutor(4) as pool:
        values = {future.result() for future in [pool.submit(costly.ask) for _ in range(4)]}
    assert (len(values), costly.computed) == (1, 1)
    assert other.value not in values


def test_what_raises_is_computed_again():
    costly = Costly(faults=1)
    with pytest.raises(RuntimeError, match="not yet"):
        _ = costly.value
    assert costly.value is costly.value and costly.computed == 2
