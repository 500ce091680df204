"""What else the store keeps: API keys, replies to repeated requests, settings; and whose file it opens."""

import sqlite3

import pytest

from retrieval.store import DocumentStore, IdempotencyConflict, StorageUnwritable, StoreUnusable
from retrieval.types import StoredReply


def test_keys(store):
    key = store.add_key("ci", "writer", "h" * 64, ["default"])
    assert store.find_key("h" * 64) == key
    assert key.collections == ("default",)
    assert store.find_key("other") is None
    assert store.revoke_key(key.id)
    assert not store.revoke_key(key.id)
    assert store.find_key("h" * 64) is None
    assert [k.revoked_at is None for k in store.list_keys()] == [False]


def test_a_database_that_takes_no_writes_is_told_as_such_and_read(store):
    with store.snapshot() as connection:
        pass
    connection.execute("PRAGMA query_only=ON")
    with pytest.raises(StorageUnwritable, match=r"rag.sqlite3 cannot be written \(attempt to write a readonly"):
        store.set_setting("name", "value")
    assert store.get_setting("name") is None
    connection.execute("PRAGMA query_only=OFF")
    store.set_setting("name", "value")


def test_replies_to_repeated_requests(tmp_path):
    now = [1000.0]
    store = DocumentStore(tmp_path / "rag.sqlite3", clock=lambda: now[0])
    assert store.find_reply("k", "f") is None
    store.save_reply("k", "f", StoredReply(202, "{}"))
    store.save_reply("k", "f", StoredReply(500, "later"))
    assert store.find_reply("k", "f") == StoredReply(202, "{}")
    with pytest.raises(IdempotencyConflict):
        store.find_reply("k", "another request")
    now[0] += 90_000
    assert store.find_reply("k", "another request") is None
    store.save_reply("k2", "f", StoredReply(202, "{}"))
    assert store.find_reply("k", "f") is None
    store.close()


def test_settings_survive_reopening(tmp_path):
    store = DocumentStore(tmp_path / "rag.sqlite3")
    store.set_setting("nonce", "1")
    store.set_setting("nonce", "2")
    store.close()
    store = DocumentStore(tmp_path / "rag.sqlite3")
    assert (store.get_setting("nonce"), store.get_setting("unknown")) == ("2", None)
    store.close()


def test_files_that_are_not_ours_are_refused(tmp_path):
    garbage = tmp_path / "garbage.sqlite3"
    garbage.write_bytes(b"not a database at all, but long enough to have a header" * 20)
    with pytest.raises(StoreUnusable, match="not a database; restore a backup"):
        DocumentStore(garbage)

    foreign = tmp_path / "foreign.sqlite3"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE theirs (x)")
    connection.commit()
    connection.close()
    with pytest.raises(StoreUnusable, match="another program"):
        DocumentStore(foreign)

    newer = tmp_path / "newer.sqlite3"
    DocumentStore(newer).close()
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 999")
    connection.commit()
    connection.close()
    with pytest.raises(StoreUnusable, match="newer"):
        DocumentStore(newer)


def test_a_disk_that_takes_no_log_is_not_put_down_to_the_database(tmp_path):
    (tmp_path / "rag.sqlite3-wal").mkdir()
    with pytest.raises(StoreUnusable, match="disk I/O error; see that its disk"):
        DocumentStore(tmp_path / "rag.sqlite3")
