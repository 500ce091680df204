"""Threads of their own for what takes long, so that whatever else blocks for a moment finds one at once."""

from collections.abc import Callable
from typing import TypeVar

import anyio.to_thread
from anyio import CapacityLimiter
from anyio.lowlevel import RunVar

Result = TypeVar("Result")


class Lane:
    """At most `places` of one kind of work at once; the rest waits without a thread."""

    def __init__(self, name: str, places: int) -> None:
        self._places = places
        self._limiter: RunVar[CapacityLimiter] = RunVar(name)  # one for each event loop

    async def run(self, work: Callable[..., Result], *arguments: object) -> Result:
        """What `work` returns, or raises, in a thread."""
        try:
            limiter = self._limiter.get()
        except LookupError:
            limiter = CapacityLimiter(self._places)
            self._limiter.set(limiter)
        return await anyio.to_thread.run_sync(work, *arguments, limiter=limiter)


SEARCHES = Lane("searches", 8)  # each computes on all cores
