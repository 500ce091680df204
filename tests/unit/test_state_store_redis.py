"""A server that is away, slow, full, locked, or holds what it should not."""

import threading

import pytest
from clock_kit import Clock
from state_kit import all_keys, open_store, running_server, silent_server

from model.redis_store import CircuitBreaker, RedisStateStore
from model.state_store import StateItem


@pytest.fixture
def server():
    with running_server() as server:
        yield server


def item(key: str, value: bytes, *tags: str) -> StateItem:
    return StateItem(key, value, frozenset(tags))


def test_breaker_opens_tries_once_and_closes():
    clock = Clock()
    breaker = CircuitBreaker(open_s=5, clock=clock)
    assert breaker.allows() and breaker.allows()
    breaker.record(success=False)
    assert breaker.is_open and not breaker.allows()
    clock.now = 5
    assert breaker.allows() and not breaker.allows()  # one trial
    breaker.record(success=False)
    clock.now = 9
    assert not breaker.allows()
    clock.now = 10
    assert breaker.allows()
    breaker.record(success=True)
    assert breaker.allows() and breaker.allows() and not breaker.is_open


def test_another_process_finds_the_states(server):
    store = open_store(server, part_bytes=10)
    store.put_many([item("a", b"0123456789ABCDEF", "x")])
    store.close()
    again = open_store(server, part_bytes=3)  # how it was cut is written in the manifest
    assert again.get_many(["a"]) == [b"0123456789ABCDEF"]
    again.delete(tags=["x"])
    assert all_keys(server) == []
    again.close()


def test_keys_expire_and_do_not_mix_with_others(server):
    store, other = open_store(server, ttl_s=100), open_store(server, key_prefix="other:")
    store.put_many([item("a", b"1", "x")])
    assert other.get_many(["a"]) == [None]
    other.delete(tags=["x"], keys=["a"])
    assert store.get_many(["a"]) == [b"1"]
    with server.client() as client:
        lives = {key: client.ttl(key) for key in client.keys("*")}
    assert 0 < lives[b"jamba-rag:a"] <= 100 < lives[b"jamba-rag:tag:x"]
    store.close()
    other.close()


def test_a_delete_between_a_value_and_its_place_in_the_index_takes_it_too(server, monkeypatch):
    store = open_store(server)
    deletion = threading.Thread(target=store.delete, kwargs={"tags": ["x"]})
    write = store._set

    def write_late(pieces):
        deletion.start()
        deletion.join(0.2)  # as long as it takes if nothing keeps it back
        return write(pieces)

    monkeypatch.setattr(store, "_set", write_late)
    store.put_many([item("a", b"1", "x")])
    deletion.join()
    assert all_keys(server) == []
    store.close()


def test_a_missing_part_or_a_broken_manifest_is_a_miss(server):
    store = open_store(server, part_bytes=4)
    store.put_many([item("a", b"0123456789"), item("b", b"0123456789")])
    with server.client() as client:
        client.delete("jamba-rag:a#1")
        client.set("jamba-rag:b", b"JAMBAPARTS1 99999999999 x")
    assert store.get_many(["a", "b"]) == [None, None]
    store.delete(keys=["a", "b"])
    assert store.contains_many(["a", "b"]) == [False, False]
    assert store.stats()["errors"] == 0
    store.close()


def test_a_full_server_drops_writes_and_goes_on_reading():
    with running_server(maxmemory="8mb", maxmemory_policy="noeviction") as server:
        store = open_store(server)
        store.put_many([item("small", b"1", "x")])
        for i in range(12):
            store.put_many([item(f"big {i}", bytes(1 << 20), "x")])
        stats = store.stats()
        assert 0 < stats["dropped"] < 12 and stats["errors"] == stats["open"] == 0
        assert store.get_many(["small", "big 11"]) == [b"1", None]
        store.delete(tags=["x"])
        assert all_keys(server) == []
        store.put_many([item("big", bytes(1 << 20))])
        assert store.contains_many(["big"]) == [True]
        store.close()


def test_a_full_server_is_not_asked_to_write_again_at_once():
    clock = Clock()
    with running_server(maxmemory="2mb", maxmemory_policy="noeviction") as server:
        store = open_store(server, retry_after_s=5.0, clock=clock)
        store.put_many([item("a", bytes(4 << 20))])
        with server.client() as client:
            client.config_set("maxmemory", 0)
        store.put_many([item("b", b"1")])
        assert (store.contains_many(["a", "b"]), store.stats()["dropped"]) == ([False, False], 2)
        clock.now = 5
        store.put_many([item("c", b"1")])
        assert store.contains_many(["c"]) == [True]
        store.close()


def test_on_a_server_that_evicts_a_delete_by_tag_drops_everything():
    """The index itself may have been evicted: better too much than a deleted document's state."""
    with running_server(maxmemory="50mb", maxmemory_policy="allkeys-lru") as server:
        store = open_store(server, key_prefix="[jamba]*:")
        store.put_many([item("a", b"1", "x"), item("b", b"2", "y")])
        with server.client() as client:
            client.delete("[jamba]*:tag:x")
            client.set("j:tag", b"somebody else's")
        store.delete(tags=["x"])
        assert all_keys(server) == [b"j:tag"]
        store.close()


def use_all(store: RedisStateStore) -> None:
    store.put_many([item("a", b"1", "x")])
    assert store.get_many(["a", "b"]) == [None, None]
    assert store.contains_many(["a"]) == [False]
    store.delete(keys=["a"], tags=["x"])


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1", "redis://no-such-host.invalid:6379", "unix:///no/such/socket"])
def test_no_server(url, caplog):
    store = RedisStateStore(url, timeout_s=0.2)
    use_all(store)
    stats = store.stats()
    assert (stats["dropped"], stats["open"], stats["owed_deletes"]) == (1, 1, 2)
    assert stats["errors"] == 2 and stats["skipped"] == 2  # the first call and the delete are tried
    assert caplog.text.count("the state server fails") == 1
    store.close()


def test_wrong_password(server):
    with server.client() as client:
        client.config_set("requirepass", "secret")
    url = f"redis://:{{}}@127.0.0.1:{server.port}"
    wrong = RedisStateStore(url.format("guess"), retry_after_s=0.0)
    use_all(wrong)
    assert wrong.stats()["errors"] == 4
    right = RedisStateStore(url.format("secret"))
    right.put_many([item("a", b"1")])
    assert right.get_many(["a"]) == [b"1"]
    wrong.close()
    right.close()


def test_a_server_that_never_answers_is_asked_once():
    with silent_server() as url:
        store = RedisStateStore(url, timeout_s=0.1)
        for _ in range(50):
            assert store.get_many(["a"]) == [None]
        assert (store.stats()["errors"], store.stats()["skipped"]) == (1, 49)
        store.close()


def test_a_server_that_comes_back_is_noticed_and_gets_the_deletes_it_missed(server):
    clock = Clock()
    store = open_store(server, retry_after_s=5.0, clock=clock)
    store.put_many([item("a", b"1", "x"), item("b", b"2", "y"), item("c", b"3")])
    with server.client() as client:
        client.config_set("requirepass", "secret")
        client.client_kill_filter(_type="normal", skipme=True)
        store.delete(tags=["x"], keys=["c"])
        assert store.stats()["owed_deletes"] == 2
        client.config_set("requirepass", "")
    assert store.get_many(["b"]) == [None]  # the breaker is open
    clock.now = 5
    assert store.get_many(["a", "b", "c"]) == [None, b"2", None]
    assert store.stats()["owed_deletes"] == 0
    store.close()


def test_deletes_that_a_server_missed_reach_it_from_the_next_process(server, tmp_path):
    owed = tmp_path / "owed.json"
    store = open_store(server, owed_file=owed)
    store.put_many([item("a", b"1", "x"), item("b", b"2", "y")])
    store.delete(tags=["z"])
    assert not owed.exists()  # nothing was missed
    with server.client() as client:
        client.config_set("requirepass", "secret")
        client.client_kill_filter(_type="normal", skipme=True)
        store.delete(tags=["x"])
        client.config_set("requirepass", "")
    store.close()
    again = open_store(server, owed_file=owed)
    assert again.stats()["owed_deletes"] == 1
    assert again.get_many(["a", "b"]) == [None, b"2"]
    again.close()
    assert open_store(server, owed_file=owed).stats()["owed_deletes"] == 0


@pytest.mark.parametrize("text", ["", "{", "7", "null"])
def test_a_damaged_note_of_missed_deletes_is_said_and_left(server, tmp_path, caplog, text):
    owed = tmp_path / "owed.json"
    owed.write_text(text)
    store = open_store(server, owed_file=owed)
    assert store.stats()["owed_deletes"] == 0 and str(owed) in caplog.text
    store.close()
