"""States in Redis or Valkey, one server or a cluster: they outlive this process and can be shared by several.

Transfer of the bytes: redis_bulk.py. A value over `part_bytes` is stored in parts, and a manifest under the value's own
key is written after them. Every key expires. The index from tags to keys is one Redis set per tag, written before the
values, so that a delete works after a restart too. Any failure of the server is a miss or a dropped write, counted; a
circuit breaker keeps a broken server from being asked again and again. Raw bytes only, nothing is unpickled.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import redis
from redis.cluster import RedisCluster
from redis.exceptions import RedisClusterException

from model.owed_deletes import OwedDeletes
from model.redis_bulk import get_bulk, open_client, set_bulk
from model.redis_url import explain, read_url
from model.state_store import Buffer, StateItem

_MANIFEST = b"JAMBAPARTS1 "  # a value that happens to begin with this is stored in parts, whatever its size
_MANIFEST_BYTES = 64
_READ_BATCH = 16  # values in one round trip
_WRITE_BATCH_BYTES = 32 << 20
_MOVED = (redis.exceptions.MovedError, redis.exceptions.AskError)  # to another server of the cluster
_NAME_BATCH = 1000  # names in one command or pipeline
_MAX_PARTS = 1 << 16
_INDEX_SLACK_S = 3600  # an index outlives what it points to
_PROBE_BYTES = 1 << 15
_FAILURES = (redis.RedisError, RedisClusterException, OSError)
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class StateServerFault(RuntimeError):
    """The server cannot store states; the message says why and what to do, without the secrets of its url."""


class CircuitBreaker:
    """Decides whether a failing server is tried: not for `open_s` after a failure, then one trial at a time."""

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

    The server is asked whether it is a cluster. `timeout_s` bounds connecting and each read or write of the socket;
    `retry_after_s`: how long the server is not tried after a failure; `connections`: how many transfer the values of
    one call. `owed_file` keeps deletes by tag that the server could not receive, also across restarts. `clock` is for
    tests. Raises ValueError for an invalid url.
    """

    tier, keeps_tensors = "redis", False

    def __init__(
        self,
        url: str,
        key_prefix: str = "jamba-rag:",
        ttl_s: int = 7 * 24 * 3600,
        part_bytes: int = 32 << 20,
        timeout_s: float = 0.08,
        retry_after_s: float = 5.0,
        connections: int = 2,
        owed_file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        read_url(url)
        self._url, self._timeout_s = url, timeout_s
        self._opened: redis.Redis | RedisCluster | None = None
        self._stale = False  # a server of the cluster may have gone or come since the client looked
        self._opening = threading.Lock()
        self._movers = ThreadPoolExecutor(connections, thread_name_prefix="state-server")
        self._prefix, self._ttl_s, self._part_bytes = key_prefix, ttl_s, part_bytes
        self._server = CircuitBreaker(retry_after_s, clock)
        self._room = CircuitBreaker(retry_after_s, clock)  # open while the server takes no writes
        self._refusal = ""
        self._owed = OwedDeletes(owed_file)
        self._counts = dict.fromkeys(("errors", "skipped", "dropped", "read_bytes", "written_bytes"), 0)
        self._lock = threading.Lock()
        self._indexing = threading.Lock()  # between the names in an index and their values, and while that is deleted
        self._opener: threading.Thread | None = None

    def open(self) -> None:
        """Connect now, in the background, so that a problem is in the log right after the start."""
        work = (lambda: self._client, None)
        self._opener = threading.Thread(target=self._ask, args=work, name="state-server-open", daemon=True)
        self._opener.start()

    def probe(self) -> list[Mapping[str, Any]]:
        """INFO memory of each server that holds keys, after writing, reading and deleting a test value.

        Deletes everything under the key prefix of a server that evicts. Raises StateServerFault.
        """
        item = StateItem("probe", bytes(_PROBE_BYTES), frozenset({"probe"}))
        try:
            if not self._write([item]):
                raise StateServerFault(f"it takes no writes: {self._refusal}")
            if not (self._exist([item.key])[0] and self._read([item.key])[0] == item.value):
                raise StateServerFault("it does not give back what was written to it")
            self._owed.add(tags=["probe"])
            self._pay_deletes()
            return _memory(self._client)
        except _FAILURES as error:
            raise StateServerFault(explain(error, self._url)) from None

    def contains_many(self, keys: Sequence[str], peek: bool = False) -> list[bool]:
        return self._ask(lambda: self._exist(keys), [False] * len(keys))

    def get_many(self, keys: Sequence[str]) -> list[Buffer | None]:
        return self._ask(lambda: self._read(keys), [None] * len(keys))

    def put_many(self, items: Sequence[StateItem]) -> None:
        def write() -> int:
            with self._indexing:
                return self._write(items)

        written = self._ask(write, 0) if self._room.allows() else 0
        self._count("dropped", len(items) - written)

    def delete(self, keys: Collection[str] = (), tags: Collection[str] = ()) -> None:
        """An unreachable server gets the delete later, before anything else is asked of it, even by a later process.

        A server that evicts may have lost an index: there, deleting by tag drops everything under the key prefix.
        """
        self._owed.add(keys, tags)
        self._ask(lambda: None, None, even_if_open=True)
        self._owed.note()

    def stats(self) -> dict[str, int]:
        with self._lock:
            return {**self._counts, "owed_deletes": len(self._owed), "open": int(self._server.is_open)}

    def close(self) -> None:
        if self._opener is not None:
            self._opener.join()
        self._movers.shutdown()
        if self._opened is not None:
            self._opened.close()

    @property
    def _client(self) -> redis.Redis | RedisCluster:
        """The client, opened at first use: only the server knows whether it is a cluster. Raises as redis-py does."""
        with self._opening:
            if self._opened is None:
                client: Any = open_client(self._url, self._timeout_s)
                try:
                    if client.info("cluster").get("cluster_enabled"):
                        client.close()
                        client = open_client(self._url, self._timeout_s, cluster=True)
                    evicting = _evicting(client)
                except BaseException:
                    client.close()
                    raise
                if evicting:
                    _log.warning(
                        "the state server evicts by %s, also what it noted of which states saw a document: "
                        "deleting or replacing one drops all states in it",
                        evicting,
                    )
                self._opened = client
            elif self._stale and isinstance(self._opened, RedisCluster):
                self._opened.nodes_manager.initialize()
            self._stale = False
            return self._opened

    def _ask(self, work: Callable[[], _T], otherwise: _T, even_if_open: bool = False) -> _T:
        """`work()`, or `otherwise` if the server fails or the circuit breaker is open. Owed deletes go first."""
        if not self._server.allows() and not even_if_open:
            self._count("skipped")
            return otherwise
        try:
            self._pay_deletes()
            result = work()
        except _FAILURES as error:
            if not self._server.is_open:
                _log.warning("the state server fails: %s; going on without it", explain(error, self._url))
            self._server.record(False)
            self._stale = True
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
            if value is not None and (manifest := bytes(value[:_MANIFEST_BYTES])).startswith(_MANIFEST):
                values[i] = self._read_parts(self._name(keys[i]), manifest)
        self._count("read_bytes", sum(len(value) for value in values if value is not None))
        return values

    def _read_parts(self, name: str, manifest: bytes) -> Buffer | None:
        count, size = _parse_manifest(manifest)
        parts = self._fetch(_part_names(name, count))
        if None in parts or sum(map(len, parts)) != size:
            return None
        return bytearray().join(parts)

    def _fetch(self, names: Sequence[str]) -> list[Buffer | None]:
        jobs = self._jobs(names, [1] * len(names), _READ_BATCH)
        replies = self._move(jobs, lambda job: get_bulk(job.client, [names[i] for i in job.places]))
        values: list[Buffer | None] = [None] * len(names)
        for i, reply in replies.items():
            values[i] = self._client.get(names[i]) if isinstance(reply, _MOVED) else reply
            if isinstance(reply, redis.ResponseError) and not isinstance(reply, _MOVED):
                raise reply
        return values

    def _set(self, pieces: Sequence[tuple[str, Buffer]]) -> list[object]:
        """The server's replies, its refusals among them."""
        jobs = self._jobs([name for name, _ in pieces], [len(piece) for _, piece in pieces], _WRITE_BATCH_BYTES)
        replies = self._move(jobs, lambda job: set_bulk(job.client, [pieces[i] for i in job.places], self._ttl_s))
        moved = [i for i, reply in replies.items() if isinstance(reply, _MOVED)]
        replies |= {i: self._client.set(pieces[i][0], pieces[i][1], ex=self._ttl_s) for i in moved}
        return [replies[i] for i in range(len(pieces))]

    def _jobs(self, names: Sequence[str], weights: Sequence[int], max_weight: int) -> list[_Job]:
        """The names' places by the server that has them, in runs of about `max_weight`."""
        client, jobs = self._client, []
        last: dict[Any, tuple[_Job, int]] = {}
        for i, (name, weight) in enumerate(zip(names, weights, strict=True)):
            node = client.get_node_from_key(name) if isinstance(client, RedisCluster) else None
            job, total = last.get(node, (None, 0))
            if job is None or total + weight > max_weight:
                job, total = _Job(client if node is None else client.get_redis_connection(node), []), 0
                jobs.append(job)
            job.places.append(i)
            last[node] = (job, total + weight)
        return jobs

    def _move(self, jobs: Sequence[_Job], transfer: Callable[[_Job], list[Any]]) -> dict[int, Any]:
        """place -> reply; on several connections when there are several jobs."""
        results = map(transfer, jobs) if len(jobs) == 1 else self._movers.map(transfer, jobs)
        pairs = (zip(job.places, replies, strict=True) for job, replies in zip(jobs, results, strict=True))
        return dict(itertools.chain.from_iterable(pairs))

    def _write(self, items: Sequence[StateItem]) -> int:
        """How many items the server accepted. The index goes first, so that deletes find everything that is there."""
        pieces = [list(self._pieces(item)) for item in items]
        names_of_tag: dict[str, set[str]] = defaultdict(set)
        for item, parts in zip(items, pieces, strict=True):
            for tag in item.tags:
                names_of_tag[tag].update((self._name(item.key), *(name for name, _ in parts)))
        pipe = self._client.pipeline(transaction=False)
        for tag, names in names_of_tag.items():
            pipe.sadd(self._tag_name(tag), *names)
            pipe.expire(self._tag_name(tag), self._ttl_s + _INDEX_SLACK_S)
        if self._refusals(pipe.execute(raise_on_error=False)):
            return 0
        owners = [i for i, parts in enumerate(pieces) for _ in parts]
        refused = {owners[i] for i in self._refusals(self._set([piece for parts in pieces for piece in parts]))}
        whole = [i for i in range(len(items)) if i not in refused]
        manifests = [(self._name(items[i].key), _manifest(items[i], pieces[i])) for i in whole if len(pieces[i]) > 1]
        if (manifests and self._refusals(self._set(manifests))) or refused:
            whole = [i for i in whole if len(pieces[i]) == 1]
        else:
            self._room.record(success=True)
        self._count("written_bytes", sum(len(items[i].value) for i in whole))
        return len(whole)

    def _refusals(self, replies: Sequence[object]) -> set[int]:
        """Indices of the writes that the server refused (full, read-only); writes then pause, reads continue."""
        refused = {i: reply for i, reply in enumerate(replies) if isinstance(reply, Exception)}
        if refused:
            self._refusal = explain(next(iter(refused.values())), self._url)
            if not self._room.is_open:
                _log.warning("the state server takes no writes: %s", self._refusal)
            self._room.record(success=False)
        return set(refused)

    def _pieces(self, item: StateItem) -> Iterator[tuple[str, Buffer]]:
        """(name, bytes) to set for one item, several if it needs a manifest."""
        name, view, step = self._name(item.key), memoryview(item.value), self._part_bytes
        if len(view) <= step and bytes(view[: len(_MANIFEST)]) != _MANIFEST:
            yield name, view
            return
        for i, part in enumerate(_part_names(name, max(2, -(-len(view) // step)))):
            yield part, view[i * step : (i + 1) * step]

    def _pay_deletes(self) -> None:
        if len(self._owed):
            with self._indexing:
                self._delete(*self._owed.pending())

    def _delete(self, keys: Collection[str], tags: Collection[str]) -> None:
        if tags and _evicting(self._client):
            self._unlink(self._client.scan_iter(match=_glob_escape(self._prefix) + "*", count=_NAME_BATCH))
        else:
            for tag in tags:
                members = self._client.smembers(self._tag_name(tag))
                self._unlink(members)
                for batch in _batched(members, _NAME_BATCH):
                    self._client.srem(self._tag_name(tag), *batch)
        for name in map(self._name, keys):
            manifest = self._client.getrange(name, 0, _MANIFEST_BYTES)
            parts = _part_names(name, _parse_manifest(manifest)[0]) if manifest.startswith(_MANIFEST) else ()
            self._unlink([name, *parts])
        self._owed.settle(keys, tags)

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


class _Job(NamedTuple):
    """A transfer in one round trip: the indices of the values to transfer, and the server."""

    client: redis.Redis
    places: list[int]


def _memory(client: redis.Redis | RedisCluster) -> list[Mapping[str, Any]]:
    """INFO memory of each server that holds keys."""
    if not isinstance(client, RedisCluster):
        return [client.info("memory")]
    return [client.get_redis_connection(node).info("memory") for node in client.get_primaries()]


def _evicting(client: redis.Redis | RedisCluster) -> str | None:
    """The eviction policy by which some server may lose a value before it expires; None if none may."""
    found = (memory["maxmemory_policy"] for memory in _memory(client) if memory.get("maxmemory"))
    return next((policy for policy in found if policy != "noeviction"), None)


def _manifest(item: StateItem, parts: Sequence[object]) -> bytes:
    return _MANIFEST + f"{len(parts)} {len(item.value)}".encode()


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
