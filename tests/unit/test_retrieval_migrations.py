"""A database of every schema there ever was becomes one of today's, with all that stood in it."""

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from retrieval.database import Database
from retrieval.migrations import MIGRATIONS
from retrieval.store import DocumentStore
from retrieval.types import StoredReply

TEXT = "# Fruit\n\nThe red apple."
VECTOR = np.array([0.6, 0.8], dtype="<f4")
# Rows as the first version wrote them: a ready document, one that waits, one that has failed, a key, a reply.
ROWS = {
    "settings": [("embedder", json.dumps(["minilm", 2])), ("salt", "00ff")],
    "collections": [(2, "other", 3, 1000.0)],
    "documents": [
        (1, "doc_ready", 2, 1, 1, 0, 1000.0),
        (2, "doc_waiting", 2, 1, None, 0, 1001.0),
        (3, "doc_failed", 1, 1, None, 0, 1002.0),
    ],
    "versions": [
        (
            *(1, 1, 1, "fruit.md", "text/markdown", 23, "aa", '{"kind": "fruit"}', "Fruit"),
            *("ready", 1, 1, "chunks", 1, None, 0, None, None, None, 1, 5, 1003.0),
        ),
        (
            *(2, 1, 2, "b.md", "text/markdown", 5, "bb", "{}", None),
            *("parsing", 0, 0, "", 1, None, 0, "worker", 1004.0, None, 0, 0, 1004.0),
        ),
        (
            *(3, 1, 1, "c.pdf", "application/pdf", 7, "cc", "{}", None, "failed", 0, 0, "", 1),
            json.dumps({"code": "broken_pdf", "message": "it is damaged", "retryable": False, "page": 2}),
            *(0, None, None, None, 0, 0, 1005.0),
        ),
    ],
    "contents": [(1, TEXT, "[]", '[[1, "Fruit", 0]]')],
    "chunks": [(1, 1, 0, 1, "chunk_1", 9, 23, None, None, '["Fruit"]', 5, "fruit.md\nFruit", "The red apple.")],
    "vectors": [(1, VECTOR.tobytes())],
    "generations": [(1,), (2,)],
    "removed_chunks": [(2, 99)],
    "api_keys": [("key_1", "digest", "reader", "read", '["other"]', 1000.0, None)],
    "replies": [("key_1:again", "print", 202, "{}", 1000.0)],
}


def write_old(path: Path, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database with the first `steps` steps taken, and ROWS in it since the first."""
    for step in range(1, steps + 1):
        with monkeypatch.context() as patched:
            patched.setattr("retrieval.migrations.MIGRATIONS", MIGRATIONS[:step])
            Database(path).close()
        if step == 1:
            with sqlite3.connect(path) as connection:
                for table, rows in ROWS.items():
                    values = ", ".join("?" * len(rows[0]))
                    connection.executemany(f"INSERT INTO {table} VALUES ({values})", rows)
                connection.execute("INSERT INTO chunk_words(rowid, text, context) VALUES (1, 'The red apple.', 'x')")
            connection.close()


def schema(path: Path) -> list[tuple[str, ...]]:
    connection = sqlite3.connect(path)
    try:
        found = connection.execute(
            "SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY 1, 2"
        )
        return [tuple(row) for row in found]
    finally:
        connection.close()


@pytest.mark.parametrize("steps", range(1, len(MIGRATIONS) + 1))
def test_what_stood_in_a_database_of_any_version_is_there_today(tmp_path, monkeypatch, steps):
    path = tmp_path / "rag.sqlite3"
    write_old(path, steps, monkeypatch)
    DocumentStore(tmp_path / "new.sqlite3").close()
    store = DocumentStore(path, clock=lambda: 1010.0)
    assert schema(path) == schema(tmp_path / "new.sqlite3")
    assert store.check() == []
    ready, waiting, failed = (store.get_document(name) for name in ("doc_ready", "doc_waiting", "doc_failed"))
    assert (ready.status, ready.filename, ready.title, ready.collection) == ("ready", "fruit.md", "Fruit", "other")
    assert ready.metadata == {"kind": "fruit"}
    assert failed.last_error is not None and (failed.last_error.code, failed.last_error.page) == ("broken_pdf", 2)
    assert [c.name for c in store.list_collections()] == ["default", "other"]
    assert store.get_text("doc_ready") == TEXT
    assert [(h.level, h.title) for h in store.get_content("doc_ready").headings] == [(1, "Fruit")]
    assert [(c.text, c.heading_path) for c in store.get_chunks("doc_ready")] == [("The red apple.", ("Fruit",))]
    assert store.uses("minilm", 2) and store.generation() == 2 and store.count_chunks() == 1
    ((rows, vectors),) = store.vectors(0, store.generation())
    assert rows.tolist() == [1] and np.array_equal(vectors, VECTOR[None])
    assert store.removed_chunks(1, 2).tolist() == [99]
    key = store.find_key("digest")
    assert key is not None and (key.role, key.collections) == ("read", ("other",))
    assert store.find_reply("key_1:again", "print") == StoredReply(202, "{}")
    assert waiting.status == "parsing"
    store.close()


@pytest.mark.parametrize("steps", range(1, len(MIGRATIONS)))
def test_a_database_of_any_version_can_be_worked_on(tmp_path, monkeypatch, steps):
    path = tmp_path / "rag.sqlite3"
    write_old(path, steps, monkeypatch)
    store = DocumentStore(path, clock=lambda: 10_000_000_000.0)
    store.end_leases()
    leased = store.lease_next("worker", 30.0)
    assert leased is not None and leased.id == "doc_waiting"
    change = store.delete_document("doc_ready")
    assert change.originals == ("aa",) and store.count_chunks() == 0
    assert store.create_document("other", "d.md", "text/markdown", 1, "dd")[0].ordinal == 3
    assert store.check() == []
    store.close()
