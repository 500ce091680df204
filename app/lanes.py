"""Separate thread limits for slow work, so that it does not exhaust the default thread pool."""

from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

Result = TypeVar("Result")


class Lane:
    """Runs at most `places` calls of one kind at once; the others wait without a thread."""

    def __init__(self, name: str, places: int) -> None:
        self._places = places
        self._limiter: RunVar[CapacityLimiter] = RunVar(name)  # one for each event loop

    async def run(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Run `work` in a thread; returns or raises what it does."""
        try:
            limiter = self._limiter.get()
        except LookupError:
            limiter = CapacityLimiter(self._places)
            self._limiter.set(limiter)
        return await anyio.to_thread.run_sync(work, *arguments, limiter=limiter)


SEARCHES = Lane("searches", 8)  # each computes on all cores
