"""Finds and saves the longest cached prefix of a prompt.

Knows what of a prompt is kept and when it may be used again; not where cuts and keys come from (prefix_plan.py), not
Redis (state_store.py), not layers (state.py). Start at `PrefixCache.longest_prefix`. KV is kept densely, a block a key;
a snapshot of the recurrent part only where reuse is likely: it weighs as much as hundreds of tokens of KV.
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

_MAX_INVALIDATED = 1 << 16  # tags that are remembered; of plans made before the oldest of them nothing is kept
_BLOCKS_A_SNAPSHOT = 12  # that main memory is locked for
_READERS, _READ_TOGETHER = 4, 8  # threads, each with a connection of its own, and values they read at a time
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """The state of the first `num_tokens` tokens of a prompt, checked and ready for `PrefixCache.restore`."""

    num_tokens: int
    snapshot: Snapshot
    kv: tuple[Tensor, ...]  # pieces of (n_attn, 2, t, g, p) that cover num_tokens in order, but for what is lent
    tier: str  # the slowest one that something had to come from
    origin: Origin


@dataclass(slots=True)
class CacheStats:
    """Counted since the start. `damaged` values were found but could not be used."""

    lookups: int = 0
    hits: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    damaged: int = 0
    saved: int = 0
    refused: int = 0  # saves that came after their documents were invalidated


class PrefixCache:
    """One cache over `stores`, the fastest first. Safe to use from several threads.

    `fingerprint` names the model (prefix_plan.state_fingerprint). A DeviceStateStore, which only the first may be, has
    a state at once; the others are written on a thread, which `close` ends. What is found in a slower store is copied
    into the faster ones in the same way. The stores stay their owner's to close. `on_moved("save" or "load", tier,
    seconds)` is called, from any thread, whenever a store was given states or asked for them.
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
        """Of the stores below the device."""
        return 0 if self._device is None else 1

    @property
    def keeps_states(self) -> bool:
        return bool(self._stores)

    @property
    def has_near_states(self) -> bool:
        """Whether the fastest store is memory, not a server."""
        return bool(self._stores) and self._stores[0].keeps_tensors

    @property
    def epoch(self) -> int:
        """Grows with every invalidation. Read it before choosing documents for a prompt and hand it to `plan`: then
        nothing is kept of a document that was deleted in between."""
        return self._epoch

    def plan(
        self,
        token_ids: Sequence[int],
        boundaries: Iterable[int] = (),
        salt: bytes = b"",
        tags: Mapping[str, int] | None = None,
        epoch: int | None = None,
    ) -> PrefixPlan:
        """Cuts and keys of a prompt; `tags` say which document's tokens begin where, `salt` separates tenants."""
        epoch = self._epoch if epoch is None else epoch
        return plan_prefix(root_key(self._fingerprint, salt), token_ids, boundaries, self.settings, tags, epoch)

    def longest_prefix(self, plan: PrefixPlan, counted: bool = True, lent_tokens: int = 0) -> PrefixHit | None:
        """The deepest position of the plan with a snapshot and all KV before it, leaving a token to compute.

        Loads what it returns, less the KV of `lent_tokens`. Values that cannot be used are dropped, counted, and the
        next position is tried. What is not `counted` is no question: neither a lookup nor a use of what it finds.
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
        """How deep `longest_prefix` would start, without loading anything or counting it as a use; `nearest`: from the
        fastest store alone, and without asking a server."""
        stores = self._stores[: int(self.has_near_states)] if nearest else self._stores
        return plan.deepest(locate(stores, plan.keys_deepest_first(plan.num_tokens - 1), peek=True))

    def restore(self, hit: PrefixHit, state: HybridState) -> None:
        """Make an empty state that of the hit. Raises ValueError, leaving it empty, if it is another model's."""
        state.restore(hit.snapshot, hit.kv)
        state.origin = hit.origin

    def save(self, plan: PrefixPlan, state: HybridState, kept_tokens: int = 0) -> bool:
        """Keep `state` if the plan has a snapshot at its position; the first `kept_tokens` tokens' KV was kept before.

        With int8 snapshots it goes on rounded, whether or not it is kept: then it makes no difference whether it was.
        False if there was nothing to keep, or a document of it was invalidated meanwhile.
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
        """Forget every state made from these documents, in all stores, those still being computed included."""
        with self._lock:
            self._epoch += 1
            for tag in tags:
                self._invalidated.pop(tag, None)
                self._invalidated[tag] = self._epoch
            while len(self._invalidated) > _MAX_INVALIDATED:
                self._forgotten_epoch = self._invalidated.pop(next(iter(self._invalidated)))
        for tell in self.on_invalidated:  # before the stores, which may be slow
            tell(tags)
        if self._behind is not None:  # before the stores that it writes
            self._behind.forget(tags)
        for store in self._stores:
            store.delete(tags=tags)

    def is_current(self, plan: PrefixPlan, tags: Iterable[str]) -> bool:
        """Whether none of these documents was invalidated since the plan was made."""
        with self._lock:
            return all(self._invalidated.get(tag, self._forgotten_epoch) <= plan.epoch for tag in tags)

    def prepare(self, layout: StateLayout) -> Iterator[None]:
        """Lock main memory for states of this layout, a little between two yields."""
        snapshot = HybridState(layout, "meta").snapshot(self.settings.int8_snapshots)
        block_bytes = math.prod(layout.kv_shape(self.settings.block_tokens)) * layout.kv_dtype.itemsize
        sizes = [*[block_bytes] * _BLOCKS_A_SNAPSHOT, *(tensor.nbytes for tensor in snapshot.tensors), block_bytes]
        for store in self._stores:
            while isinstance(store, PinnedStateStore) and store.reserve(sizes):
                yield

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the stores below the device have all that was saved or found; False if it took longer."""
        return self._behind is None or self._behind.flush(timeout_s)

    def close(self) -> None:
        """Write what was saved, and end all threads. To be called before the stores are closed; twice does no harm."""
        self._readers.shutdown()
        if self._behind is not None:
            self._behind.close()

    def stats(self) -> tuple[CacheStats, dict[str, dict[str, int]]]:
        """Counters of the cache, and those of each tier by name."""
        with self._lock:
            counted = replace(self._stats)
        tiers = {store.tier: store.stats() for store in self._stores}
        if self._behind is not None:
            behind, nearest = self._behind.stats(), tiers[self._stores[0].tier]
            nearest |= behind | {"dropped": nearest["dropped"] + behind["dropped"]}
        return counted, tiers

    def _blocks_to_save(self, plan: PrefixPlan, start: int, end: int) -> list[int]:
        """Blocks `start` to `end`, and of those before them what this process has given up since it was kept."""
        nearest = self._stores[0]
        if not start or nearest.tier == "redis":  # asking a server would make the answer wait
            return list(range(start, end))
        waiting = self._behind.keys() if self._device is None and self._behind is not None else frozenset()
        there = nearest.contains_many(plan.block_keys[:start], peek=True)
        return [i for i in range(end) if i >= start or not (there[i] or plan.block_keys[i] in waiting)]

    def _put(self, plan: PrefixPlan, items: Sequence[StateItem], *puts: Callable[[Sequence[StateItem]], None]) -> bool:
        """Put the items unless one of their documents was invalidated since the plan was made."""
        with self._lock:  # an invalidation waits, and then deletes what was put
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
        """Fetch and check one position; None if that failed, and then what is missing has left `where`."""
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
        """Add to `loaded` what can be had of `keys`, values of that many tensors; the rest leaves `where`.

        Values whose size is known go to the device as they come, if it has room for all of them.
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
        """Each key's value. Of a server some at a time, side by side, received into memory of those copied before."""

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
        """A store's value checked, and on the device if one is given and has the memory."""
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
        """Copy what came from slower stores to the device, and behind the answer to the stores between."""
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
        """Put there what was loaded from elsewhere, and use that, unless it is more than the store holds."""
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
        there = device.contains_many([key for key, _ in ends], peek=True)  # less what has just made room
        missing = [end for end, kept in zip(ends, there, strict=True) if not kept]
        self._put(plan, [_describe(plan, key, end, loaded[key]) for key, end in missing], self._put_on_device)


def _describe(plan: PrefixPlan, key: str, end: int, value: StateTensors) -> StateItem:
    """A block or a snapshot of the first `end` tokens, with what the stores should know of it."""
    is_snapshot = plan.snapshot_keys.get(end) == key
    before = end // plan.block_tokens - (not is_snapshot)  # blocks without which it is of no use
    after = plan.block_keys[before - 1] if before else ""
    ends_prompt = is_snapshot and end == max(plan.snapshot_keys)
    return StateItem(key, value, plan.tags_before(end), after, end if is_snapshot else 0, ends_prompt)


def _copy_to(device: DeviceStateStore, value: StateTensors) -> StateTensors:
    # what is not pinned was received into memory that is used again as soon as nobody has it
    return StateTensors(tuple(x.to(device.device, non_blocking=x.is_pinned()) for x in value.tensors))


def _token_bytes(kv: Tensor) -> int:
    """Of the KV of one token; (n_attn, 2, t, g, p), where t may be 0."""
    return kv.element_size() * math.prod(kv.shape[:2] + kv.shape[3:])


def _origin(plan: PrefixPlan, position: int) -> Origin:
    """Of a state of the plan's first `position` tokens whose blocks are stored."""
    return Origin(plan.block_keys[: position // plan.block_tokens], plan.block_tokens)
