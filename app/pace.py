"""Admission control: estimates from recent answers how long one more would wait. Start at `Pace.admit`."""

import math
import time
from collections import deque
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from app.errors import Overloaded

_UNMEASURED_S = 1.0  # assumed time between two answers until it has been measured
_KEPT = 64  # measurements: as many as a GPU decodes, and may finish, together
_HALF_LIFE_S = 600.0  # a measurement so long before the last answer counts half as much
_ALWAYS = 2  # always admitted: one slow answer must not shut all others out


class Pace:
    """Admits as many answers as are expected to finish within `max_wait_s` (0: no limit), and at most `max_pending`.

    Not thread safe. `clock` gives monotonic seconds.
    """

    def __init__(self, max_pending: int, max_wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_pending, self._max_wait_s, self._clock = max_pending, max_wait_s, clock
        self._gaps = deque[_Gap](maxlen=_KEPT)
        self._last = -math.inf

    def admit(self, pending: int) -> float:
        """Admit one more beside `pending` others; returns the current time. Raises Overloaded with the time to wait."""
        gap_s = self._gap_s()
        wait_s, limit_s = pending * gap_s, self._max_wait_s
        if pending >= self._max_pending:
            raise _refusal(f"answers running or waiting: {pending}, which is the limit", gap_s)
        if limit_s and pending >= _ALWAYS and wait_s > limit_s:
            what = f"answers running or waiting: {pending}, which takes about {wait_s:.0f} s"
            raise _refusal(f"{what}; the limit is {limit_s:g} s", wait_s - limit_s)
        return self._clock()

    def finish(self, admitted: float, pending: int) -> None:
        """Record that the answer admitted at that time has finished (not been abandoned), as one of `pending`."""
        now = self._clock()
        self._gaps.append(_Gap(now, now - max(admitted, self._last), pending))
        self._last = now

    def _gap_s(self) -> float:
        """Mean time between two answers. Old measurements count less, and so do those with few answers pending: how
        long one takes alone says little about how fast many finish side by side."""
        if not self._gaps:
            return _UNMEASURED_S
        weights = [gap.pending * 0.5 ** ((self._last - gap.finished) / _HALF_LIFE_S) for gap in self._gaps]
        return fmean([gap.seconds for gap in self._gaps], weights)


class _Gap(NamedTuple):
    """Seconds of work between the end of the previous answer and one that `finished` as one of `pending`."""

    finished: float
    seconds: float
    pending: int


def _refusal(what: str, wait_s: float) -> Overloaded:
    again_s = max(1, math.ceil(round(wait_s, 3)))
    return Overloaded(f"{what}; try again in {again_s} s", again_s)
