"""Finds and saves the longest cached prefix of a prompt.

Decides what of a prompt is stored and when it may be reused. Not here: where cuts and keys come from (prefix_plan.py),
Redis (redis_store.py), layers (state.py). Start at `PrefixCache.longest_prefix`. Every block of KV is stored, one key
each; the recurrent part only where reuse is likely, because a snapshot is as large as the KV of hundreds of tokens.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from model.device_store import DeviceStateStore, PinnedStateStore, StateTensors
from model.prefix_plan import PlanSettings, PrefixPlan, plan_prefix, root_key
from model.state import HybridState, Origin, Snapshot, StateLayout
from model.state_codec import DamagedValue, decode_value
from model.state_store import Buffer, StateItem, StateStore, locate
from model.write_behind import WriteBehind

_MAX_INVALIDATED = 1 << 16  # tags that are remembered; plans older than the oldest of them are no longer saved
_BLOCKS_A_SNAPSHOT = 12  # assumed when main memory is page-locked
_READERS, _READ_TOGETHER = 4, 8  # threads, each with its own connection; values that each reads at a time
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The state of a prompt's first `num_tokens` tokens, verified and ready for `PrefixCache.restore`."""

    num_tokens: int
    snapshot: Snapshot
    kv: tuple[Tensor, ...]  # pieces (n_attn, 2, t, g, p) that cover num_tokens in order, without lent tokens
    tier: str  # the slowest tier that was needed
    origin: Origin


@dataclass(slots=True)
class CacheStats:
    """Counters since the start. `damaged` values were found but could not be used."""

    lookups: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    damaged: int = 0
    saved: int = 0
    refused: int = 0  # saves that came after one of their documents was invalidated


class PrefixCache:
    """One cache over `stores`, fastest first. Thread safe.

    `fingerprint` identifies the model (prefix_plan.state_fingerprint). Only the first store may be a DeviceStateStore;
    it is written at once, the others on a write-behind thread, which `close` ends. States found in a slower store are
    copied into the faster ones in the same way. The caller closes the stores. `on_moved("save" or "load", tier,
    seconds)` is called, from any thread, after each write to and read from a store.
    """

    def __init__(
        self, stores: Sequence[StateStore], fingerprint: bytes = b"", settings: PlanSettings | None = None
    ) -> None:
        self.settings = settings or PlanSettings()
        if self.settings.int8_snapshots:  # found and read by no cache of the other kind
            fingerprint += b"int8 snapshots"
        self._stores, self._fingerprint, self._layout = tuple(stores), fingerprint, fingerprint.hex()
        self._device = stores[0] if stores and isinstance(stores[0], DeviceStateStore) else None
        slower = self._stores[self._first :]
        self.on_moved: Callable[[str, str, float], None] = lambda what, tier, seconds: None
        self.on_invalidated: list[Callable[[Collection[str]], None]] = []
        on_saved = lambda tier, seconds: self.on_moved("save", tier, seconds)
        self._behind = WriteBehind(slower, self._layout, on_saved=on_saved) if slower else None
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="prefix-read")
        self._stats = CacheStats()
        self._epoch = 0
        self._invalidated: dict[str, int] = {}  # tag -> epoch that its invalidation began, the oldest first
        self._forgotten_epoch = -1  # of those no longer in there, the last
        self._lock = threading.RLock()

    @property
    def _first(self) -> int:
        """Index of the first store below the device."""
        return 0 if self._device is None else 1

    @property
    def keeps_states(self) -> bool:
        return bool(self._stores)

    @property
    def has_near_states(self) -> bool:
        """Whether the fastest store is in memory, not a server."""
        return bool(self._stores) and self._stores[0].keeps_tensors

    @property
    def epoch(self) -> int:
        """Increases with every invalidation. Read it before choosing the documents of a prompt and pass it to `plan`:
        then nothing is stored of a document that was deleted in between."""
        return self._epoch

    def plan(
        self,
        token_ids: Sequence[int],
        boundaries: Iterable[int] = (),
        salt: bytes = b"",
        tags: Mapping[str, int] | None = None,
        epoch: int | None = None,
    ) -> PrefixPlan:
        """Cuts and keys of a prompt; `tags`: document -> where its tokens begin; `salt` separates tenants."""
        epoch = self._epoch if epoch is None else epoch
        return plan_prefix(root_key(self._fingerprint, salt), token_ids, boundaries, self.settings, tags, epoch)

    def longest_prefix(self, plan: PrefixPlan, counted: bool = True, lent_tokens: int = 0) -> PrefixHit | None:
        """The deepest position of the plan with a stored snapshot and all KV before it, and a token left to compute.

        Loads the state, without the KV of the first `lent_tokens`. Unusable values are dropped and counted, and the
        next position is tried. Without `counted` it neither counts as a lookup nor as a use of what it finds.
        """
        where = locate(self._stores, plan.keys_deepest_first(plan.num_tokens - 1), peek=not counted)
        loaded: dict[str, StateTensors] = {}
        hit, lent_blocks = None, lent_tokens // plan.block_tokens
        while hit is None and (position := plan.deepest(where, lent_blocks)) and position >= lent_tokens:
            hit = self._load(plan, position, where, loaded, lent_blocks)
        if not counted:
            return hit
        with self._lock:
            self._stats.lookups += 1
            self._stats.prompt_tokens += plan.num_tokens
            if hit is not None:
                self._stats.hits += 1
                self._stats.cached_tokens += hit.num_tokens
        return hit

    def kept_tokens(self, plan: PrefixPlan, nearest: bool = False) -> int:
        """The position that `longest_prefix` would find, without loading anything or counting it as a use; `nearest`:
        looks only in the fastest store, and never in a server."""
        stores = self._stores[: int(self.has_near_states)] if nearest else self._stores
        return plan.deepest(locate(stores, plan.keys_deepest_first(plan.num_tokens - 1), peek=True))

    def restore(self, hit: PrefixHit, state: HybridState) -> None:
        """Fill an empty state from the hit. Raises ValueError, leaving it empty, if the hit is another model's."""
        state.restore(hit.snapshot, hit.kv)
        state.origin = hit.origin

    def save(self, plan: PrefixPlan, state: HybridState, kept_tokens: int = 0) -> bool:
        """Store `state` if the plan has a snapshot at its position; `kept_tokens`: tokens whose KV was stored before.

        With int8 snapshots `state` is rounded even if nothing is stored, so that answers do not depend on that.
        False if there was nothing to store, or one of its documents was invalidated meanwhile.
        """
        position, int8 = state.num_tokens, self.settings.int8_snapshots
        if (key := plan.snapshot_keys.get(position)) is None or not (self._stores or int8):
            return False
        snapshot = state.snapshot(int8)
        if not self._stores:
            return False
        size = plan.block_tokens
        items = []
        for i in self._blocks_to_save(plan, kept_tokens // size, position // size):
            block = state.read_kv(i * size, (i + 1) * size)
            items.append(_describe(plan, plan.block_keys[i], (i + 1) * size, StateTensors((block,))))
        tail = state.read_kv(position - position % size, position)
        items.append(_describe(plan, key, position, StateTensors((*snapshot.tensors, tail))))
        puts = [self._put_on_device] if self._device is not None else []
        if self._behind is not None:
            puts.append(partial(self._behind.put_many, source=self._device))
        if not self._put(plan, items, *puts):
            return False
        state.origin = _origin(plan, position)
        with self._lock:
            self._stats.saved += 1
        return True

    def invalidate(self, tags: Collection[str]) -> None:
        """Delete every state computed from these documents in all stores; those still being computed are not stored."""
        with self._lock:
            self._epoch += 1
            for tag in tags:
                self._invalidated.pop(tag, None)
                self._invalidated[tag] = self._epoch
            while len(self._invalidated) > _MAX_INVALIDATED:
                self._forgotten_epoch = self._invalidated.pop(next(iter(self._invalidated)))
        for tell in self.on_invalidated:  # before the stores, which may be slow
            tell(tags)
        if self._behind is not None:  # before the stores to which it writes
            self._behind.forget(tags)
        for store in self._stores:
            store.delete(tags=tags)

    def is_current(self, plan: PrefixPlan, tags: Iterable[str]) -> bool:
        """Whether none of these documents was invalidated since the plan was made."""
        with self._lock:
            return all(self._invalidated.get(tag, self._forgotten_epoch) <= plan.epoch for tag in tags)

    def prepare(self, layout: StateLayout) -> Iterator[None]:
        """Page-lock main memory for states of this layout, a little between two yields."""
        snapshot = HybridState(layout, "meta").snapshot(self.settings.int8_snapshots)
        block_bytes = math.prod(layout.kv_shape(self.settings.block_tokens)) * layout.kv_dtype.itemsize
        sizes = [*[block_bytes] * _BLOCKS_A_SNAPSHOT, *(tensor.nbytes for tensor in snapshot.tensors), block_bytes]
        for store in self._stores:
            while isinstance(store, PinnedStateStore) and store.reserve(sizes):
                yield

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until all saved and found states are written to the stores below the device; False on timeout."""
        return self._behind is None or self._behind.flush(timeout_s)

    def close(self) -> None:
        """Write pending states and end all threads. Call it before closing the stores; calling it twice is harmless."""
        self._readers.shutdown()
        if self._behind is not None:
            self._behind.close()

    def stats(self) -> tuple[CacheStats, dict[str, dict[str, int]]]:
        """Counters of the cache, and counters of each tier by name."""
        with self._lock:
            counted = replace(self._stats)
        tiers = {store.tier: store.stats() for store in self._stores}
        if self._behind is not None:
            behind, nearest = self._behind.stats(), tiers[self._stores[0].tier]
            nearest |= behind | {"dropped": nearest["dropped"] + behind["dropped"]}
        return counted, tiers

    def _blocks_to_save(self, plan: PrefixPlan, start: int, end: int) -> list[int]:
        """Blocks `start` to `end`, and those before them that the fastest store has evicted since they were stored."""
        nearest = self._stores[0]
        if not start or nearest.tier == "redis":  # asking a server would make the answer wait
            return list(range(start, end))
        waiting = self._behind.keys() if self._device is None and self._behind is not None else frozenset()
        there = nearest.contains_many(plan.block_keys[:start], peek=True)
        return [i for i in range(end) if i >= start or not (there[i] or plan.block_keys[i] in waiting)]

    def _put(self, plan: PrefixPlan, items: Sequence[StateItem], *puts: Callable[[Sequence[StateItem]], None]) -> bool:
        """Put the items unless one of their documents was invalidated since the plan was made."""
        with self._lock:  # an invalidation waits for this, and then deletes what was put
            if not self.is_current(plan, frozenset().union(*(item.tags for item in items))):
                self._stats.refused += 1
                return False
            for put in puts:
                put(items)
        return True

    def _put_on_device(self, items: Sequence[StateItem]) -> None:
        assert self._device is not None
        started = time.perf_counter()
        self._device.put_many(items)
        self.on_moved("save", self._device.tier, time.perf_counter() - started)

    def _load(
        self, plan: PrefixPlan, position: int, where: dict[str, int], loaded: dict[str, StateTensors], lent_blocks: int
    ) -> PrefixHit | None:
        """Load and verify the state at one position; if that fails, None, and missing keys are removed from `where`."""
        snapshot_key = plan.snapshot_keys[position]
        block_keys = plan.block_keys[lent_blocks : position // plan.block_tokens]
        self._fetch([snapshot_key], 4 if self.settings.int8_snapshots else 3, where, loaded)
        if snapshot_key in loaded:
            block_bytes = plan.block_tokens * _token_bytes(loaded[snapshot_key].tensors[-1])
            self._fetch([key for key in block_keys if key not in loaded], 1, where, loaded, block_bytes)
        keys = (*block_keys, snapshot_key)
        if any(key not in loaded for key in keys):
            return None
        self._promote(plan, position, where, loaded)
        *recurrent, tail = loaded[snapshot_key].tensors
        kv = tuple(loaded[key].tensors[0] for key in block_keys)
        tier = self._stores[max(where[key] for key in keys)].tier
        return PrefixHit(position, Snapshot(position, *recurrent), (*kv, tail), tier, _origin(plan, position))

    def _fetch(
        self,
        keys: Sequence[str],
        tensors: int,
        where: dict[str, int],
        loaded: dict[str, StateTensors],
        value_bytes: int = 0,
    ) -> None:
        """Load values of `tensors` tensors each into `loaded`; keys that cannot be loaded are removed from `where`.

        Values of known size are copied to the device as they arrive, if it has room for all of them.
        """
        for level, store in enumerate(self._stores):
            asked, started = [key for key in keys if where.get(key) == level], time.perf_counter()
            if not asked:
                continue
            device = self._device if level and value_bytes else None
            if device is not None and not device.make_room(value_bytes * sum(where.get(key, 0) > 0 for key in keys)):
                device = None
            for key, value in self._read(store, asked, tensors, device):
                if isinstance(value, StateTensors):
                    loaded[key] = value
                    continue
                del where[key]
                if value is None:  # evicted since it was located
                    continue
                _log.warning("dropped a damaged state from the %s store: %s", store.tier, value)
                store.delete(keys=[key])
                with self._lock:
                    self._stats.damaged += 1
            self.on_moved("load", store.tier, time.perf_counter() - started)

    def _read(
        self, store: StateStore, keys: Sequence[str], tensors: int, device: DeviceStateStore | None
    ) -> Iterable[tuple[str, StateTensors | DamagedValue | None]]:
        """Each key's value. From a server in parallel batches, reusing the memory of values already copied."""

        def read_some(some: Sequence[str]) -> list[tuple[str, StateTensors | DamagedValue | None]]:
            values = zip(some, store.get_many(some), strict=True)
            return [(key, self._open_value(key, value, tensors, device)) for key, value in values]

        size = len(keys) if store.keeps_tensors else _READ_TOGETHER
        parts = [keys[i : i + size] for i in range(0, len(keys), size)]
        if len(parts) == 1:
            return read_some(keys)
        return list(chain.from_iterable(self._readers.map(read_some, parts)))

    def _open_value(
        self, key: str, value: Buffer | StateTensors | None, tensors: int, device: DeviceStateStore | None
    ) -> StateTensors | DamagedValue | None:
        """A store's value, verified and, if `device` is given and has the memory, copied there."""
        if value is None:
            return None
        if not isinstance(value, StateTensors):
            whole = bytearray(value) if memoryview(value).readonly else value
            try:
                value = StateTensors(tuple(decode_value(key, self._layout, whole, tensors)))
            except DamagedValue as error:
                return error
        with suppress(torch.OutOfMemoryError):
            return value if device is None else _copy_to(device, value)
        return value

    def _promote(self, plan: PrefixPlan, position: int, where: dict[str, int], loaded: dict[str, StateTensors]) -> None:
        """Copy what came from slower stores to the device, and in the background to the stores between."""
        size = plan.block_tokens
        ends = [(key, (i + 1) * size) for i, key in enumerate(plan.block_keys[: position // size]) if key in loaded]
        ends.append((plan.snapshot_keys[position], position))
        if self._device is not None:
            self._bring_to_device(plan, self._device, ends, where, loaded)
        for level in range(self._first + 1, len(self._stores)):
            items = [_describe(plan, key, end, loaded[key]) for key, end in ends if where[key] == level]
            if items and self._behind is not None:
                self._put(plan, items, partial(self._behind.promote, levels=level - self._first, source=self._device))

    def _bring_to_device(
        self,
        plan: PrefixPlan,
        device: DeviceStateStore,
        ends: Sequence[tuple[str, int]],
        where: Mapping[str, int],
        loaded: dict[str, StateTensors],
    ) -> None:
        """Put loaded states into the device store and use those copies, unless they exceed its capacity."""
        strangers = [key for key, _ in ends if where[key]]
        nbytes = sum(len(loaded[key]) for key in strangers)
        if not strangers or not device.make_room(nbytes):
            return
        try:
            for key in strangers:
                loaded[key] = _copy_to(device, loaded[key])
        except torch.OutOfMemoryError:
            _log.warning("no memory on %s to bring %d bytes of states there", device.device, nbytes)
            return
        there = device.contains_many([key for key, _ in ends], peek=True)  # without what was just evicted for room
        missing = [end for end, kept in zip(ends, there, strict=True) if not kept]
        self._put(plan, [_describe(plan, key, end, loaded[key]) for key, end in missing], self._put_on_device)


def _describe(plan: PrefixPlan, key: str, end: int, value: StateTensors) -> StateItem:
    """A block or snapshot that ends at token `end`, with the metadata that the stores need."""
    is_snapshot = plan.snapshot_keys.get(end) == key
    before = end // plan.block_tokens - (not is_snapshot)  # blocks that it needs
    after = plan.block_keys[before - 1] if before else ""
    ends_prompt = is_snapshot and end == max(plan.snapshot_keys)
    return StateItem(key, value, plan.tags_before(end), after, end if is_snapshot else 0, ends_prompt)


def _copy_to(device: DeviceStateStore, value: StateTensors) -> StateTensors:
    # memory that is not pinned is a receive buffer, reused as soon as nobody holds it
    return StateTensors(tuple(x.to(device.device, non_blocking=x.is_pinned()) for x in value.tensors))


def _token_bytes(kv: Tensor) -> int:
    """Bytes of one token's KV, given some (n_attn, 2, t, g, p), where t may be 0."""
    return kv.element_size() * math.prod(kv.shape[:2] + kv.shape[3:])


def _origin(plan: PrefixPlan, position: int) -> Origin:
    """The origin of a state of the plan's first `position` tokens, all of whose blocks are stored."""
    return Origin(plan.block_keys[: position // plan.block_tokens], plan.block_tokens)
