"""Brings states from where they are made to the stores below, on a thread of its own: no answer waits for these.

They are encoded once for all stores that keep bytes, and copied for those that keep tensors. Start at
`WriteBehind.put_many`; who reads the stores, and decides what is kept: prefix_cache.py.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from model.state_codec import encode_value
from model.state_store import StateItem, StateStore

_BATCH_BYTES = 16 << 20
_log = logging.getLogger(__name__)


class WriteBehind:
    """Puts StateTensors into `stores`. Thread safe. At most `max_pending_bytes` wait; what comes on top is dropped.

    On a GPU the copies have a stream of their own, so that the model's work does not queue up behind them.
    """

    def __init__(self, stores: Sequence[StateStore], layout: str, max_pending_bytes: int = 1 << 30) -> None:
        self._stores, self._layout, self._max_pending_bytes = tuple(stores), layout, max_pending_bytes
        self._stream: torch.cuda.Stream | None = None
        self._pending: deque[StateItem] = deque()
        self._writing: tuple[StateItem, ...] = ()
        self._pending_bytes = self._dropped = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)
        self._thread.start()

    def put_many(self, items: Sequence[StateItem]) -> None:
        with self._changed:
            for item in items:
                if self._closed or self._pending_bytes + len(item.value) > self._max_pending_bytes:
                    self._dropped += 1
                    continue
                self._pending.append(item)
                self._pending_bytes += len(item.value)
            self._changed.notify_all()

    def forget(self, tags: Collection[str]) -> None:
        """Drop what waits and has one of these tags; returns when nothing of the kind can still reach a store."""
        wanted = frozenset(tags)
        with self._changed:
            self._pending = deque(item for item in self._pending if wanted.isdisjoint(item.tags))
            self._pending_bytes = sum(len(item.value) for item in self._pending)
            batch = self._writing
            if not all(wanted.isdisjoint(item.tags) for item in batch):
                self._changed.wait_for(lambda: self._writing is not batch)
            self._changed.notify_all()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until everything put so far is written or dropped; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._pending and not self._writing, timeout_s)

    def stats(self) -> dict[str, int]:
        with self._changed:
            return {"dropped": self._dropped, "pending_bytes": self._pending_bytes}

    def close(self, timeout_s: float = 10.0) -> None:
        """Write what waits, for at most `timeout_s`, and end the thread. The stores stay open."""
        self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._dropped += len(self._pending)
            self._pending.clear()
            self._pending_bytes = 0
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while batch := self._next_batch():
            failed = 0
            try:
                self._write(batch)
            except Exception:
                _log.exception("the stores failed to take %d states; they are dropped", len(batch))
                failed = len(batch)
            with self._changed:
                self._dropped += failed
                self._writing = ()
                self._changed.notify_all()

    def _next_batch(self) -> tuple[StateItem, ...]:
        """Wait for work; at least one item and at most about _BATCH_BYTES. Nothing once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._closed)
            batch, size = [], 0
            while self._pending and (not batch or size + len(self._pending[0].value) <= _BATCH_BYTES):
                batch.append(self._pending.popleft())
                size += len(batch[-1].value)
            self._pending_bytes -= size
            self._writing = tuple(batch)
            return self._writing

    @torch.inference_mode()
    def _write(self, items: Sequence[StateItem]) -> None:
        for item in items:
            with self._copying_from(item.value.device):
                item = item._replace(value=item.value.pinned())
            encoded = None
            for store in self._stores:
                if not store.keeps_tensors:
                    encoded = encoded or encode_value(item.key, self._layout, item.value.tensors)
                store.put_many([item if store.keeps_tensors else item._replace(value=encoded)])

    def _copying_from(self, device: torch.device) -> AbstractContextManager[object]:
        if device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.default_stream(device))  # where the tensors were computed
        return torch.cuda.stream(self._stream)
