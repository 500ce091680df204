"""The time of a store: the machine's, which may be set forward, but never back while the process lives."""

import threading
import time
from collections.abc import Callable


class ForwardClock:
    """Unix seconds that follow `wall` and, when that is set back, go on at the pace of `steady`. Thread safe.

    What is written down with it is meant by the machine's clock, so another process may read it.
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
