"""States in Redis or Valkey: they outlive this process and can be shared by several.

A value over `part_bytes` is stored in parts, and a manifest under the value's own key is written after them. Every key
expires. The index from tags to keys is a Redis set a tag, written before the values, so that a delete works after a
restart too. Whatever goes wrong with the server is a miss or a dropped write, counted; a circuit breaker keeps a
broken server from being asked again and again. Raw bytes only, nothing is unpickled.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from model.state_store import Buffer, StateItem

_MANIFEST = b"JAMBAPARTS1 "  # a value that happens to begin like this is stored in parts, whatever its size
_READ_BATCH = 16  # values in one round trip
_NAME_BATCH = 1000  # names in one command or pipeline
_MAX_PARTS = 1 << 16
_INDEX_SLACK_S = 3600  # an index outlives what it points to
_FAILURES = (redis.RedisError, OSError)
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class CircuitBreaker:
    """Says whether a failing server may be asked: not for `open_s` after a failure, then one trial at a time."""

    def __init__(self, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._open_s, self._clock = open_s, clock
        self._closed_at: float | None = None  # None: closed, requests flow
        self._lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        return self._closed_at is not None

    def allows(self) -> bool:
        """Whether to try now; the trial after a failure is granted to one caller in `open_s`."""
        with self._lock:
            if self._closed_at is None:
                return True
            if self._clock() < self._closed_at:
                return False
            self._closed_at = self._clock() + self._open_s
            return True

    def record(self, success: bool) -> None:
        with self._lock:
            self._closed_at = None if success else self._clock() + self._open_s


class RedisStateStore:
    """`url` as redis-py reads it: redis://, rediss:// (TLS) or unix://, with user and password.

    `timeout_s` bounds connecting and each read or write of the socket; `retry_after_s` is how long the server is left
    alone after a failure. `clock` is for tests. Raises ValueError for a url that is none.
    """

    tier = "redis"

    def __init__(
        self,
        url: str,
        key_prefix: str = "jamba-rag:",
        ttl_s: int = 7 * 24 * 3600,
        part_bytes: int = 4 << 20,
        timeout_s: float = 0.25,
        retry_after_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = redis.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
        self._prefix, self._ttl_s, self._part_bytes = key_prefix, ttl_s, part_bytes
        self._server = CircuitBreaker(retry_after_s, clock)
        self._room = CircuitBreaker(retry_after_s, clock)  # open while the server takes no writes
        self._owed_keys: set[str] = set()  # deletes that a missing server still has to carry out
        self._owed_tags: set[str] = set()
        self._counts = dict.fromkeys(("errors", "skipped", "dropped", "read_bytes", "written_bytes"), 0)
        self._lock = threading.Lock()

    def contains_many(self, keys: Sequence[str]) -> list[bool]:
        return self._ask(lambda: self._exist(keys), [False] * len(keys))

    def get_many(self, keys: Sequence[str]) -> list[Buffer | None]:
        return self._ask(lambda: self._read(keys), [None] * len(keys))

    def put_many(self, items: Sequence[StateItem]) -> None:
        written = self._ask(lambda: self._write(items), 0) if self._room.allows() else 0
        self._count("dropped", len(items) - written)

    def delete(self, keys: Collection[str] = (), tags: Collection[str] = ()) -> None:
        """A server that is away gets the delete before it is asked for anything else.

        A server that evicts may have lost an index: there, deleting by tag drops everything under the key prefix.
        """
        with self._lock:
            self._owed_keys |= set(keys)
            self._owed_tags |= set(tags)
        self._ask(lambda: None, None, even_if_open=True)

    def stats(self) -> dict[str, int]:
        with self._lock:
            owed = len(self._owed_keys) + len(self._owed_tags)
            return {**self._counts, "owed_deletes": owed, "open": int(self._server.is_open)}

    def close(self) -> None:
        self._client.close()

    def _ask(self, work: Callable[[], _T], otherwise: _T, even_if_open: bool = False) -> _T:
        """`work()`, or `otherwise` when the server fails or is being left alone. Deletes that are owed go first."""
        if not self._server.allows() and not even_if_open:
            self._count("skipped")
            return otherwise
        try:
            self._pay_deletes()
            result = work()
        except _FAILURES as error:
            if not self._server.is_open:
                _log.warning("the state server fails (%s: %s); going on without it", type(error).__name__, error)
            self._server.record(False)
            self._count("errors")
            return otherwise
        if self._server.is_open:
            _log.info("the state server answers again")
        self._server.record(True)
        return result

    def _exist(self, keys: Sequence[str]) -> list[bool]:
        found: list[bool] = []
        for batch in _batched(keys, _NAME_BATCH):
            pipe = self._client.pipeline(transaction=False)
            for key in batch:
                pipe.exists(self._name(key))
            found += map(bool, pipe.execute())
        return found

    def _read(self, keys: Sequence[str]) -> list[Buffer | None]:
        values = self._fetch([self._name(key) for key in keys])
        for i, value in enumerate(values):
            if value is not None and value.startswith(_MANIFEST):
                values[i] = self._read_parts(self._name(keys[i]), value)
        self._count("read_bytes", sum(len(value) for value in values if value is not None))
        return values

    def _read_parts(self, name: str, manifest: bytes) -> bytes | None:
        count, size = _parse_manifest(manifest)
        parts = self._fetch(_part_names(name, count))
        if None in parts or sum(map(len, parts)) != size:
            return None
        return b"".join(parts)

    def _fetch(self, names: Sequence[str]) -> list[bytes | None]:
        values: list[bytes | None] = []
        for batch in _batched(names, _READ_BATCH):
            pipe = self._client.pipeline(transaction=False)
            for name in batch:
                pipe.get(name)
            values += pipe.execute()
        return values

    def _write(self, items: Sequence[StateItem]) -> int:
        """How many items the server took. Index first: nothing is ever there that a delete would not find."""
        commands = [list(self._pieces(item)) for item in items]
        names_of_tag: dict[str, set[str]] = defaultdict(set)
        for item, pieces in zip(items, commands, strict=True):
            for tag in item.tags:
                names_of_tag[tag].update(name for name, _ in pieces)
        pipe = self._client.pipeline(transaction=False)
        for tag, names in names_of_tag.items():
            pipe.sadd(self._tag_name(tag), *names)
            pipe.expire(self._tag_name(tag), self._ttl_s + _INDEX_SLACK_S)
        if self._refusals(pipe.execute(raise_on_error=False)):
            return 0
        for name, piece in itertools.chain.from_iterable(commands):
            pipe.set(name, piece, ex=self._ttl_s)
        replies = pipe.execute(raise_on_error=False)
        refused = self._refusals(replies)
        if not refused:
            self._room.record(success=True)
        ends = list(itertools.accumulate(map(len, commands), initial=0))
        taken = [refused.isdisjoint(range(start, end)) for start, end in itertools.pairwise(ends)]
        self._count("written_bytes", sum(len(item.value) for item, ok in zip(items, taken, strict=True) if ok))
        return sum(taken)

    def _refusals(self, replies: Sequence[object]) -> set[int]:
        """Places of the writes that the server (full, read-only) said no to; then writes pause and reads go on."""
        refused = {i: reply for i, reply in enumerate(replies) if isinstance(reply, Exception)}
        if refused and not self._room.is_open:
            _log.warning("the state server takes no writes: %s", next(iter(refused.values())))
        if refused:
            self._room.record(success=False)
        return set(refused)

    def _pieces(self, item: StateItem) -> Iterator[tuple[str, Buffer]]:
        """(name, bytes) to set for one item, its manifest last."""
        name, view, step = self._name(item.key), memoryview(item.value), self._part_bytes
        if len(view) <= step and bytes(view[: len(_MANIFEST)]) != _MANIFEST:
            yield name, view
            return
        count = -(-len(view) // step)
        for i, part in enumerate(_part_names(name, count)):
            yield part, view[i * step : (i + 1) * step]
        yield name, _MANIFEST + f"{count} {len(view)}".encode()

    def _pay_deletes(self) -> None:
        with self._lock:
            keys, tags = set(self._owed_keys), set(self._owed_tags)
        if tags and self._evicts():
            self._unlink(self._client.scan_iter(match=_glob_escape(self._prefix) + "*", count=_NAME_BATCH))
        else:
            for tag in tags:
                members = self._client.smembers(self._tag_name(tag))
                self._unlink(members)
                for batch in _batched(members, _NAME_BATCH):
                    self._client.srem(self._tag_name(tag), *batch)
        for name in map(self._name, keys):
            manifest = self._client.getrange(name, 0, 64)
            parts = _part_names(name, _parse_manifest(manifest)[0]) if manifest.startswith(_MANIFEST) else ()
            self._unlink([name, *parts])
        with self._lock:
            self._owed_keys -= keys
            self._owed_tags -= tags

    def _evicts(self) -> bool:
        memory = self._client.info("memory")
        return memory["maxmemory"] > 0 and memory["maxmemory_policy"] != "noeviction"

    def _unlink(self, names: Collection[str] | Iterator[str]) -> None:
        for batch in _batched(names, _NAME_BATCH):
            self._client.unlink(*batch)

    def _name(self, key: str) -> str:
        return self._prefix + key

    def _tag_name(self, tag: str) -> str:
        return f"{self._prefix}tag:{tag}"

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] += amount


def _part_names(name: str, count: int) -> list[str]:
    return [f"{name}#{i}" for i in range(count)]


def _parse_manifest(manifest: bytes) -> tuple[int, int]:
    """(number of parts, bytes in all); of a manifest that cannot be read: one part of impossible size."""
    count, _, size = manifest.removeprefix(_MANIFEST).partition(b" ")
    if not (count.isdigit() and size.isdigit() and int(count) <= _MAX_PARTS):
        return 1, -1
    return int(count), int(size)


def _glob_escape(text: str) -> str:
    return "".join(f"\\{char}" if char in "*?[]^\\" else char for char in text)


def _batched(items: Collection[_T] | Iterator[_T], size: int) -> Iterator[list[_T]]:
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch
