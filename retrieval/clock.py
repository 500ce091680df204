"""The clock of a store: wall-clock time that never goes back within a process."""

import threading
import time
from collections.abc import Callable


class ForwardClock:
    """Unix seconds that follow `wall` and, if that is set back, continue at the pace of `steady`. Thread safe.

    Stored times stay comparable with those of other processes.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._now, self._at = wall(), steady()
        self._lock = threading.Lock()

    def __call__(self) -> float:
        with self._lock:
            at = self._steady()
            self._now, self._at = max(self._wall(), self._now + at - self._at), at
            return self._now
