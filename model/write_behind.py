"""Write-behind: copies states to the slower stores on a thread of its own, so that no answer waits for them.

States are taken in batches: encoded in parallel, once for all stores that keep bytes, and copied for stores that keep
tensors; page-locking memory takes a second per GB. Start at `WriteBehind.put_many` (new states) and
`WriteBehind.promote` (states found in slower stores). Reading, and what is stored: prefix_cache.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from model.device_store import StateTensors
from model.state_codec import encode_value
from model.state_store import MemoryStateStore, StateItem, StateStore

_MAX_JOBS = 1 << 14  # waiting jobs of each kind, because values still in another store do not count as bytes here
_TOGETHER = 8  # jobs taken at a time
_ENCODERS = 4  # threads with a GPU; without one the model needs the cores
_log = logging.getLogger(__name__)


class _Job(NamedTuple):
    """`held`: bytes of the value stored in the job; 0 if it will be read from `source`, if still there. `room`: for the
    first value of a prefix, bytes of all its values; a full store that received them one by one would evict each at
    once, because nothing useful follows it yet."""

    item: StateItem
    stores: Sequence[StateStore]
    held: int
    source: StateStore | None = None
    promotes: bool = False
    made: torch.cuda.Event | None = None  # when a GPU has computed the value
    room: int = 0


class WriteBehind:
    """Puts StateTensors into `stores`. Thread safe. At most `max_pending_bytes` wait; more is dropped, unless it can
    still be read from its source.

    On a GPU the copies have a stream of their own, so that they do not delay the model's work. `on_saved` gets the tier
    and the seconds of each batch put there, including encoding and copying for that store.
    """

    def __init__(
        self,
        stores: Sequence[StateStore],
        layout: str,
        max_pending_bytes: int = 1 << 30,
        on_saved: Callable[[str, float], None] = lambda tier, seconds: None,
    ) -> None:
        self._on_saved = on_saved
        self._stores, self._layout, self._max_pending_bytes = tuple(stores), layout, max_pending_bytes
        self._stream: torch.cuda.Stream | None = None
        self._saves: deque[_Job] = deque()
        self._promotions: deque[_Job] = deque()  # done only when nothing is left to save
        self._writing: Sequence[_Job] = ()
        self._pending_bytes = self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        self._encoders = ThreadPoolExecutor(_ENCODERS, thread_name_prefix="state-encoder")
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)
        self._thread.start()

    def put_many(self, items: Sequence[StateItem], source: StateStore | None = None) -> None:
        """Queue new states. `source`: a store that keeps tensors and has just been given them too."""
        made = _event(items)
        self._add(_with_room([_Job(item, self._stores, len(item.value), source, made=made) for item in items], items))

    def promote(self, items: Sequence[StateItem], levels: int, source: StateStore | None = None) -> None:
        """Copy states found in a slower store into the first `levels` stores, except those that they have by then.

        Items that `source`, a store that keeps tensors, has are read from it later and need no memory here. Of others
        (no GPU store) at most `max_pending_bytes` wait: for a longer prefix each question promotes the next part, and
        reads the rest from the slower store; a full store evicts a part again, since it is useless by itself. The limit
        leaves room for new states, which exist nowhere else yet.
        """
        stores = self._stores[:levels]
        there = source.contains_many([item.key for item in items], peek=True) if source else [False] * len(items)
        jobs, made = [], _event(items)
        for item, kept in zip(items, there, strict=True):
            if kept:
                jobs.append(_Job(item._replace(value=b""), stores, 0, source, True, made))
            else:
                jobs.append(_Job(item, stores, len(item.value), promotes=True, made=made))
        self._add(_with_room(jobs, items))

    def forget(self, tags: Collection[str]) -> None:
        """Drop waiting values with one of these tags; returns when none of them can reach a store any more."""
        wanted = frozenset(tags)
        with self._changed:
            self._saves = deque(job for job in self._saves if wanted.isdisjoint(job.item.tags))
            self._promotions = deque(job for job in self._promotions if wanted.isdisjoint(job.item.tags))
            self._pending_bytes = sum(job.held for job in (*self._saves, *self._promotions))
            writing = self._writing
            if any(not wanted.isdisjoint(job.item.tags) for job in writing):
                self._changed.wait_for(lambda: self._writing is not writing)
            self._changed.notify_all()

    def keys(self) -> frozenset[str]:
        """Keys of values that are waiting or being written."""
        with self._changed:
            return frozenset(job.item.key for job in (*self._writing, *self._saves, *self._promotions))

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything put so far is written or dropped; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._saves or self._promotions or self._writing), timeout_s)

    def stats(self) -> dict[str, int]:
        with self._changed:
            pending = len(self._writing) + len(self._saves) + len(self._promotions)
            return {"dropped": self._dropped, "pending": pending, "pending_bytes": self._pending_bytes}

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what was saved, for at most `timeout_s`, and end the thread. The stores stay open."""
        with self._changed:
            self._closed = True
            self._promotions.clear()
            self._changed.wait_for(lambda: not (self._saves or self._writing), timeout_s)
            self._dropped += len(self._saves)
            self._saves.clear()
            self._pending_bytes = 0
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._encoders.shutdown(wait=False)

    def _add(self, jobs: Sequence[_Job]) -> None:
        with self._changed:
            for job in jobs:
                queue = self._promotions if job.promotes else self._saves
                if self._pending_bytes + job.held > self._max_pending_bytes and _is_kept(job):
                    job = job._replace(item=job.item._replace(value=b""), held=0)
                full = len(queue) >= _MAX_JOBS or self._pending_bytes + job.held > self._max_pending_bytes
                if self._closed or full:
                    self._dropped += 1
                    continue
                queue.append(job)
                self._pending_bytes += job.held
            self._changed.notify_all()

    def _run(self) -> None:
        while jobs := self._next_jobs():
            written = 0
            try:
                written = self._write(jobs)
            except Exception:
                _log.exception("states that were to be written are dropped")
            with self._changed:
                self._dropped += len(jobs) - written
                self._writing = ()
                self._changed.notify_all()
            del jobs  # and with them the values, before the next ones are waited for

    def _next_jobs(self) -> Sequence[_Job]:
        """Wait for work; none once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._saves or self._promotions or self._closed)
            queue = self._saves or self._promotions
            self._writing = [queue.popleft() for _ in range(min(len(queue), _TOGETHER))]
            self._pending_bytes -= sum(job.held for job in self._writing)
            return self._writing

    @torch.inference_mode()
    def _write(self, jobs: Sequence[_Job]) -> int:
        """How many were written or needed nothing; of others the value is gone by now, or a store failed to take it."""
        started, done = time.perf_counter(), []
        items: dict[str, tuple[StateItem, Sequence[StateStore]]] = {}
        for job in jobs:
            key, stores = job.item.key, job.stores
            if job.promotes:
                stores = [store for store in stores if not store.contains_many([key], peek=True)[0]]
            value = job.item.value if job.held or job.source is None else job.source.get_many([key])[0]
            if stores and isinstance(value, StateTensors):
                if key in items:  # promoted by two answers
                    stores = [*items[key][1], *stores]
                if job.made is not None:
                    self._copies().wait_event(job.made)
                items[key] = job.item._replace(value=value), stores
            if not stores or isinstance(value, StateTensors):
                done.append(key)
        encoded: dict[str, StateItem] = {}
        failed = set[str]()
        for store in self._stores:
            wanted = [item for item, stores in items.values() if store in stores]
            if wanted:
                if isinstance(store, MemoryStateStore):
                    store.make_room(_room_for(jobs, {item.key: len(item.value) for item in wanted}))
                failed |= self._put(store, wanted, encoded)
                before, started = started, time.perf_counter()
                self._on_saved(store.tier, started - before)
        return sum(key not in failed for key in done)

    def _put(self, store: StateStore, items: Sequence[StateItem], encoded: dict[str, StateItem]) -> set[str]:
        """Keys of items that the store failed to take: after a fault it gets them one at a time."""
        try:
            if not store.keeps_tensors:
                encoded |= self._encode([item for item in items if item.key not in encoded])
            wanted = items if store.keeps_tensors else [encoded[item.key] for item in items]
            with self._copying_from(wanted):
                store.put_many(wanted)
        except Exception:
            if len(items) > 1:
                return set().union(*(self._put(store, [item], encoded) for item in items))
            _log.exception("the %s store failed to take a state; it is dropped", store.tier)
            return {items[0].key}
        return set()

    def _encode(self, items: Sequence[StateItem]) -> dict[str, StateItem]:
        """The items by key, encoded as bytes."""

        @torch.inference_mode()
        def encode(item: StateItem, value: StateTensors) -> StateItem:
            return item._replace(value=encode_value(item.key, self._layout, value.tensors))

        with self._copying_from(items):
            values = [item.value.pinned() for item in items]
        run = self._encoders.map if torch.cuda.is_available() else map
        return {item.key: item for item in run(encode, items, values)}

    def _copying_from(self, items: Sequence[StateItem]) -> AbstractContextManager[object]:
        on_gpu = any(isinstance(item.value, StateTensors) and item.value.device.type == "cuda" for item in items)
        return torch.cuda.stream(self._copies()) if on_gpu else nullcontext()

    def _copies(self) -> torch.cuda.Stream:
        self._stream = self._stream or torch.cuda.Stream()
        return self._stream


def _with_room(jobs: Sequence[_Job], items: Sequence[StateItem]) -> list[_Job]:
    """The jobs of one prefix, whose first knows how much they are."""
    return [job._replace(room=0 if i else sum(len(item.value) for item in items)) for i, job in enumerate(jobs)]


def _room_for(jobs: Sequence[_Job], sizes: Mapping[str, int]) -> int:
    """Bytes of the prefixes that begin with one of these jobs that are wanted, and of others before; 0: none."""
    room = 0
    for job in reversed(jobs):
        if job.item.key in sizes:
            room += job.room or (room and sizes[job.item.key])
    return room


def _event(items: Sequence[StateItem]) -> torch.cuda.Event | None:
    """An event for the end of this thread's queued GPU work; None if no value is on a GPU."""
    for item in items:
        if isinstance(item.value, StateTensors) and item.value.device.type == "cuda":
            return torch.cuda.current_stream(item.value.device).record_event()
    return None


def _is_kept(job: _Job) -> bool:
    return job.source is not None and job.source.contains_many([job.item.key], peek=True)[0]
