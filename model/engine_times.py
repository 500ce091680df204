"""Where an engine's thread spends its time: at any moment in one part of its work, or idle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from model.drafting import DraftCounts


class EngineTimes:
    """Seconds since the start by part. `decode_steps` and `decoded_tokens` say how full batches are, `prefill_tokens`
    what prefills came to, `drafts` what guesses did. To be written by the engine's thread alone, read by any."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._part, self._since = clock, "idle", clock()
        self._seconds: dict[str, float] = {}
        self.drafts = DraftCounts()
        self.decode_steps = self.decoded_tokens = self.prefill_tokens = 0

    def enter(self, part: str) -> None:
        """From now on it is in this part."""
        now = self._clock()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """In this part for the block, then in the one before it."""
        before = self._part
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    @property
    def seconds(self) -> dict[str, float]:
        """The present part counts when it ends, but for idling."""
        seconds, part, since = dict(self._seconds), self._part, self._since
        if part == "idle":
            seconds[part] = seconds.get(part, 0.0) + self._clock() - since
        return seconds

    @property
    def done(self) -> dict[str, int]:
        names = ("decode_steps", "decoded_tokens", "prefill_tokens")
        return {name: getattr(self, name) for name in names}
