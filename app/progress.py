"""Progress of an answer before its first text. Start at `ReadingProgress.begin`."""

import bisect
import time
from collections.abc import Callable
from typing import Any

_FEW_MARKS = 6


class ReadingProgress:
    """Progress of one answer. `note` may be called from the engine's thread, everything else from the event loop.

    `clock` returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._total = 0
        self._marks: list[tuple[int, float]] = []  # (tokens read, time), both increasing

    def begin(self, total_tokens: int) -> None:
        """The model is about to read this many tokens, in one prompt or several."""
        self._total, self._marks = total_tokens, []

    def note(self, read_tokens: int) -> None:
        marks = self._marks
        if not marks or read_tokens > marks[-1][0]:
            marks.append((read_tokens, self._clock()))

    def show(self) -> dict[str, Any] | None:
        """The data of `answer.progress`; None before `begin`."""
        if not self._total:
            return None
        marks = list(self._marks)
        done = marks[-1][0] if marks else 0
        stage = "waiting" if not marks else "reading" if done < self._total else "writing"
        left_s = self._seconds_left(marks) if stage == "reading" else None
        return {"stage": stage, "done": done, "total": self._total, "unit": "tokens", "seconds_left": left_s}

    def _seconds_left(self, marks: list[tuple[int, float]]) -> float | None:
        """Extrapolates the time per token, which grows because of attention: linearly, from the growth between the two
        halves of what was read, at most in proportion to the position. With few marks, assumes a constant pace."""
        (first, first_s), (last, last_s) = marks[0], marks[-1]
        if first == last:
            return None
        pace = (last_s - first_s) / (last - first)
        if len(marks) >= _FEW_MARKS:
            half, half_s = marks[min(bisect.bisect(marks, ((first + last) / 2,)), len(marks) - 2)]
            early, late = (half_s - first_s) / (half - first), (last_s - half_s) / (last - half)
            growth = max(0.0, late - early) / ((last - first) / 2)  # between the middles of the halves
            ahead, behind = (self._total + last) / 2, (last + half) / 2
            pace = min(late + growth * (ahead - behind), late * ahead / behind)
        return round(max(0.0, (self._total - last) * pace - (self._clock() - last_s)), 1)
