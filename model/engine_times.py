"""Where the engine thread spends its time: at any moment in one part of its work, or idle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from model.drafting import DraftCounts


class EngineTimes:
    """Seconds since the start by part. `decode_steps` and `decoded_tokens` show how full batches are; `prefill_tokens`
    counts computed prompt tokens, `drafts` guessed tokens. Written only by the engine thread, readable from any."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._now: tuple[dict[str, float], str, float] = {}, "idle", clock()  # whole parts, the present one, since when
        self.drafts = DraftCounts()
        self.decode_steps = self.decoded_tokens = self.prefill_tokens = 0

    def enter(self, part: str) -> None:
        """From now on the thread is in this part."""
        seconds, before, since = self._now
        now = self._clock()
        self._now = {**seconds, before: seconds.get(before, 0.0) + now - since}, part, now

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """In this part for the block, then in the one before it."""
        before = self._now[1]
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part; the current part counts only once it ends, except idle time."""
        seconds, part, since = self._now
        if part == "idle":
            return {**seconds, part: seconds.get(part, 0.0) + self._clock() - since}
        return dict(seconds)

    @property
    def done(self) -> dict[str, int]:
        names = ("decode_steps", "decoded_tokens", "prefill_tokens")
        return {name: getattr(self, name) for name in names}
