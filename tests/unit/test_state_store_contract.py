"""What every store promises, run over every store; then the one in memory, and writing behind."""

import os
import threading

import pytest
import torch
from state_kit import Gate, all_keys, open_store, running_server

from model.device_store import StateTensors
from model.state_codec import decode_value
from model.state_store import MemoryStateStore, StateItem
from model.write_behind import WriteBehind


@pytest.fixture(scope="module")
def server():
    with running_server() as server:
        yield server


@pytest.fixture(params=["memory", "redis", "redis in parts"])
def store(request, server):
    with server.client() as client:
        client.flushall()
    if request.param == "memory":
        store = MemoryStateStore(1 << 20)
    else:
        store = open_store(server, part_bytes=5 if "parts" in request.param else 4 << 20)
    yield store
    store.close()


def put(store, *items: tuple) -> None:
    store.put_many([StateItem(key, value, frozenset(tags)) for key, value, *tags in items])


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
    moved = {"read_bytes": 0, "written_bytes": 45}
    assert store.stats() == {"items": 2, "bytes": 25, "max_bytes": 30, "evicted": 2, "dropped": 0} | moved
    put_snapshots(("e", 31))
    assert store.contains_many("ade", peek=True) == [True, True, False]
    assert store.stats()["dropped"] == 1
    store.delete(tags=["x"])
    assert store.stats()["bytes"] == store.stats()["items"] == 0


def state(key: str, nbytes: int, tags: str = "") -> StateItem:
    return StateItem(key, StateTensors((torch.zeros(nbytes, dtype=torch.int8),)), frozenset(tags))


def counts(behind: WriteBehind) -> tuple[int, int]:
    """Values dropped, and bytes that wait in memory of their own."""
    stats = behind.stats()
    return stats["dropped"], stats["pending_bytes"]


def test_write_behind_never_waits_and_drops_what_is_too_much():
    gate = Gate()
    behind = WriteBehind([gate], "layout", max_pending_bytes=100)
    behind.put_many([state("writing", 90)])
    assert gate.entered.wait(10)
    behind.put_many([state("waits", 90), state("too much", 20), state("fits", 10)])
    assert counts(behind) == (1, 100)
    assert not behind.flush(timeout_s=0.01)
    gate.opened.set()
    assert behind.flush(timeout_s=10)
    assert gate.contains_many(["writing", "waits", "too much", "fits"]) == [True, True, False, True]
    behind.close()


def test_what_is_brought_up_waits_in_bounded_memory_and_behind_what_is_saved():
    """Values that their source still has take none; what it has lost by its turn is dropped."""
    gate, source, skipped = Gate(), MemoryStateStore(1000), MemoryStateStore(1000)
    seconds: list[float] = []
    behind = WriteBehind([gate, skipped], "layout", 100, lambda tier, took: seconds.append(took))
    behind.promote([state("writing", 90)], levels=1)
    assert gate.entered.wait(10)
    there = [state("there", 500), state("evicted", 500)]
    source.put_many(there)
    behind.promote([*there, state("held", 60), state("too much", 60)], levels=1, source=source)
    behind.put_many([state("saved", 40), state("too much, too", 1)])
    assert counts(behind) == (2, 100)
    source.delete(keys=["evicted"])
    gate.opened.set()
    assert behind.flush(timeout_s=10)
    assert list(gate._items) == ["writing", "saved", "there", "held"]
    assert gate.get_many(["there"])[0].tensors == there[0].value.tensors
    assert list(skipped._items) == ["saved"]
    assert len(seconds) == 4 and min(seconds) > 0  # of "saved" into both, the others together into one
    assert counts(behind) == (3, 0)
    behind.close()


def test_what_is_too_much_is_taken_from_where_it_is_kept():
    gate, source = Gate(), MemoryStateStore(1000)
    behind = WriteBehind([gate], "layout", max_pending_bytes=100)
    behind.put_many([state("writing", 90)], source)
    assert gate.entered.wait(10)
    items = [state("waits", 90), state("kept", 20), state("evicted", 20), state("nowhere", 20)]
    source.put_many(items[:3])
    behind.put_many(items, source)
    assert counts(behind) == (1, 90)
    assert behind.stats()["pending"] == 4
    source.delete(keys=["waits", "evicted"])
    gate.opened.set()
    assert behind.flush(timeout_s=10)
    assert list(gate._items) == ["writing", "waits", "kept"]
    assert counts(behind) == (2, 0)
    behind.close()


def prefix(name: str, blocks: int) -> list[StateItem]:
    items = [state(f"{name}{i}", 10)._replace(after=f"{name}{i - 1}" if i else "") for i in range(blocks)]
    return [*items, state(name, 10)._replace(after=items[-1].key, saves_tokens=100 * blocks)]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("promoted", [False, True])
def test_a_full_store_takes_a_prefix_of_any_length(promoted: bool, kept: bool):
    """Though it comes bit by bit, and of use at the end alone."""
    store, source = MemoryStateStore(400), MemoryStateStore(10_000)
    behind = WriteBehind([store], "layout")
    for name in "abcd":
        items = prefix(name, 25)
        source.put_many(items if kept else [])
        if promoted:
            behind.promote(items, 1, source)
        else:
            behind.put_many(items, source)
        assert behind.flush(timeout_s=10)
        assert all(store.contains_many([item.key for item in items])), name
    assert counts(behind) == (0, 0) and store.stats()["bytes"] <= 400
    behind.close()


def test_nothing_is_brought_up_twice_or_while_closing():
    gate, source = Gate(), MemoryStateStore(1000)
    source.put_many([state("a", 1), state("b", 2)])
    behind = WriteBehind([gate], "layout")
    behind.promote([state("first", 1)], levels=1)
    assert gate.entered.wait(10)  # the others come together
    for item in (state("a", 1), state("a", 1), state("b", 2)):
        behind.promote([item], levels=1, source=source)
    gate.opened.set()
    assert behind.flush(timeout_s=10)
    assert gate.puts == ["first", "a", "b"]
    gate.entered.clear(), gate.opened.clear()
    behind.promote([state("c", 3)], levels=1)
    assert gate.entered.wait(10)
    behind.promote([state("d", 4)], levels=1)
    behind.close(timeout_s=0.01)
    gate.opened.set()
    behind.close()
    assert (list(gate._items), counts(behind)) == (["first", "a", "b", "c"], (0, 0))


def test_what_is_forgotten_is_neither_written_nor_on_its_way():
    gate = Gate()
    behind = WriteBehind([gate], "layout")
    behind.put_many([state("writing", 1, "x")])
    assert gate.entered.wait(10)
    behind.put_many([state("waiting", 2, "x"), state("other", 3)])
    forgetting = threading.Thread(target=behind.forget, args=(["x"],))
    forgetting.start()
    gate.opened.set()
    forgetting.join()
    gate.delete(tags=["x"])
    assert behind.flush(timeout_s=10)
    assert gate.contains_many(["writing", "waiting", "other"]) == [False, False, True]
    behind.close()


def test_write_behind_writes_on_close_and_survives_a_broken_store(caplog):
    """Of what is put together, only what a store fails to take is lost, and only there."""

    class Broken(Gate):
        def put_many(self, items) -> None:
            super().put_many(items)
            if any(item.key == "bad" for item in items):
                self.delete(keys=[item.key for item in items])
                raise OSError("no")

    inner, other = Broken(), MemoryStateStore(1 << 20)
    behind = WriteBehind([inner, other], "layout")
    behind.put_many([state("first", 1)])
    assert inner.entered.wait(10)  # the others come together
    behind.put_many([state("good", 1), state("bad", 1), state("as good", 1)])
    inner.opened.set()
    assert behind.flush(timeout_s=10)
    assert "the host store failed to take a state" in caplog.text
    assert inner.contains_many(["first", "good", "bad", "as good"]) == [True, True, False, True]
    assert all(other.contains_many(["first", "good", "bad", "as good"]))
    behind.put_many([state("last", 1)])
    behind.close()
    assert inner.contains_many(["last"]) == [True]
    behind.put_many([state("late", 1)])
    assert (inner.contains_many(["late"]), behind.stats()["dropped"]) == ([False], 2)


def test_stores_of_tensors_get_tensors_and_all_of_bytes_the_same_ones(server):
    memory, servers = MemoryStateStore(1 << 20), [open_store(server, key_prefix=name) for name in ("one:", "two:")]
    tensors = (torch.arange(6.0).view(2, 3), torch.ones(5, dtype=torch.bfloat16))
    behind = WriteBehind([memory, *servers], "layout")
    behind.put_many([StateItem("a", StateTensors(tensors), frozenset("x"))])
    behind.close()
    assert memory.get_many(["a"])[0].tensors == tensors
    one, other = (bytes(store.get_many(["a"])[0]) for store in servers)
    assert one == other
    for found, tensor in zip(decode_value("a", "layout", bytearray(one), 2), tensors, strict=True):
        assert torch.equal(found, tensor)
    for store in servers:
        store.close()
