"""What every store promises, run over every store; then what only the ones in this process do."""

import os
import threading

import pytest
from state_kit import all_keys, open_store, running_server

from model.state_store import MemoryStateStore, StateItem, WriteBehindStore


@pytest.fixture(scope="module")
def server():
    with running_server() as server:
        yield server


@pytest.fixture(params=["memory", "redis", "redis in parts", "redis, written behind"])
def store(request, server):
    """Every put is followed by `settle` in these tests: only a write-behind store needs it."""
    with server.client() as client:
        client.flushall()
    if request.param == "memory":
        inner = store = MemoryStateStore(1 << 20)
    else:
        inner = store = open_store(server, part_bytes=5 if "parts" in request.param else 4 << 20)
    if "behind" in request.param:
        store = WriteBehindStore(inner)
    yield store
    if store is not inner:
        store.close()
    inner.close()


def settle(store) -> None:
    if isinstance(store, WriteBehindStore):
        assert store.flush(timeout_s=10)


def put(store, *items: tuple) -> None:
    store.put_many([StateItem(key, value, frozenset(tags)) for key, value, *tags in items])
    settle(store)


@pytest.mark.parametrize("value", [b"", b"x", b"12345", b"123456", bytes(1000), os.urandom(999), b"JAMBAPARTS1 2 9"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_was_put_is_got(store, value, kind):
    put(store, ("a", kind(value)))
    assert [found and bytes(found) for found in store.get_many(["b", "a", "a"])] == [None, value, value]
    assert store.contains_many(["b", "a"]) == [False, True]


def test_the_last_value_put_counts(store):
    put(store, ("a", b"first, and longer"), ("b", b"other"), ("a", b"second"))
    assert list(map(bytes, store.get_many(["a", "b"]))) == [b"second", b"other"]


def test_nothing_asked_nothing_given(store):
    store.put_many([])
    store.delete()
    assert store.get_many([]) == store.contains_many([]) == []


def test_delete_by_key_and_by_tag(store):
    put(store, ("a", b"1" * 20, "x"), ("b", b"2" * 20, "x", "y"), ("c", b"3" * 20, "y"), ("d", b"4" * 20))
    store.delete(tags=["x", "unknown"])
    assert store.contains_many("abcd") == [False, False, True, True]
    store.delete(keys=["d", "unknown"])
    assert store.get_many("abd") == [None, None, None]
    store.delete(keys=["c"], tags=["y"])
    assert store.get_many("abcd") == [None] * 4


def test_a_deleted_key_can_be_put_again_and_deleted_again(store):
    put(store, ("a", b"1", "x"))
    store.delete(tags=["x"])
    put(store, ("a", b"2", "x"))
    assert bytes(store.get_many(["a"])[0]) == b"2"
    store.delete(tags=["x"])
    assert store.contains_many(["a"]) == [False]


def test_nothing_is_left_after_a_delete(store, server):
    put(store, *((f"key {i}", bytes(50), "x", f"tag {i % 3}") for i in range(100)))
    store.delete(tags=["x"])
    assert not any(store.contains_many([f"key {i}" for i in range(100)]))
    left = all_keys(server)
    assert all(b"tag:tag" in key for key in left)  # what is left of other documents' indexes names no value
    store.delete(tags=["tag 0", "tag 1", "tag 2"])
    assert all_keys(server) == []


def test_many_threads(store):
    def work(number: int) -> None:
        for i in range(20):
            key = f"{number}-{i}"
            store.put_many([StateItem(key, key.encode() * 10, frozenset({str(number)}))])
            store.get_many([key])
        if number % 2:
            store.delete(tags=[str(number)])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settle(store)
    for number in range(6):
        found = store.get_many([f"{number}-{i}" for i in range(20)])
        expected = [None if number % 2 else f"{number}-{i}".encode() * 10 for i in range(20)]
        assert [value and bytes(value) for value in found] == expected
    assert store.stats()["dropped"] == 0


def test_memory_gives_up_values_by_bytes():
    store = MemoryStateStore(max_bytes=30)

    def put_snapshots(*sizes: tuple[str, int]) -> None:
        store.put_many([StateItem(key, bytes(size), frozenset("x"), saves_tokens=100) for key, size in sizes])

    put_snapshots(("a", 10), ("b", 10), ("c", 10))
    for _ in range(3):
        store.contains_many("a")
    put_snapshots(("d", 15))
    assert store.contains_many("abcd", peek=True) == [True, False, False, True]
    assert store.stats() == {"items": 2, "bytes": 25, "max_bytes": 30, "evicted": 2, "dropped": 0}
    put_snapshots(("e", 31))
    assert store.contains_many("ade", peek=True) == [True, True, False]
    assert store.stats()["dropped"] == 1
    store.delete(tags=["x"])
    assert store.stats()["bytes"] == store.stats()["items"] == 0


class Gate(MemoryStateStore):
    """A store whose puts wait until they are let through, as those of a slow server do."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.entered, self.opened = threading.Event(), threading.Event()

    def put_many(self, items) -> None:
        self.entered.set()
        assert self.opened.wait(10)
        super().put_many(items)


def test_write_behind_never_waits_and_drops_what_is_too_much():
    gate = Gate()
    store = WriteBehindStore(gate, max_pending_bytes=100)
    store.put_many([StateItem("writing", bytes(90))])
    assert gate.entered.wait(10)
    store.put_many([StateItem("waits", bytes(90)), StateItem("too much", bytes(20)), StateItem("fits", bytes(10))])
    assert store.stats()["pending_bytes"] == 100
    assert not store.flush(timeout_s=0.01)
    gate.opened.set()
    assert store.flush(timeout_s=10)
    assert store.contains_many(["writing", "waits", "too much", "fits"]) == [True, True, False, True]
    assert store.stats()["dropped"] == 1
    store.close()


def test_a_delete_holds_for_what_is_being_written_and_what_waits():
    gate = Gate()
    store = WriteBehindStore(gate)
    store.put_many([StateItem("writing", b"1", frozenset("x"))])
    assert gate.entered.wait(10)
    store.put_many([StateItem("waiting", b"2", frozenset("x")), StateItem("other", b"3")])
    deleting = threading.Thread(target=store.delete, kwargs={"tags": ["x"]})
    deleting.start()
    gate.opened.set()
    deleting.join()
    assert gate.contains_many(["writing", "waiting"]) == [False, False]
    assert store.flush(timeout_s=10)
    assert gate.contains_many(["writing", "waiting", "other"]) == [False, False, True]
    store.close()


def test_write_behind_writes_on_close_and_survives_a_broken_store(caplog):
    class Broken(MemoryStateStore):
        def put_many(self, items) -> None:
            if items[0].key == "bad":
                raise OSError("no")
            super().put_many(items)

    inner = Broken(1 << 20)
    store = WriteBehindStore(inner)
    put(store, ("bad", b"1"))
    assert "failed to take 1 states" in caplog.text
    store.put_many([StateItem("good", b"2")])
    store.close()
    assert inner.contains_many(["good"]) == [True]
    store.put_many([StateItem("late", b"3")])
    assert (inner.contains_many(["late"]), store.stats()["dropped"]) == ([False], 2)
