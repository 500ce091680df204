"""The word index follows the store: whatever happens to its files, it ends with what the database holds."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import tantivy
from retrieval_kit import add, ingest, sha

import retrieval.words
from retrieval.lexical import query_terms
from retrieval.migrations import MIGRATIONS
from retrieval.store import DocumentStore
from retrieval.words import WordIndex, check_files, open_words


def texts(words: WordIndex, store: DocumentStore, text: str) -> list[str]:
    found = words.search(query_terms(text), 100)
    hits = store.load_hits([row for row, _ in found])
    return [hits[row].chunk.text for row, _ in found]


def assert_holds_all(words: WordIndex, store: DocumentStore) -> None:
    stored = sorted(row for _, batch in store.chunk_texts((0, 0), store.generation()) for row, *_ in batch)
    assert sorted(row for row, _ in words.search(["txt"], 10_000)) == stored  # each file name ends so
    assert (words.count, words.generation) == (len(stored), store.generation())


def test_follows_every_change(store, tmp_path):
    words = open_words(store, tmp_path / "words")
    assert (words.count, words.generation) == (0, 0)
    kept, changed = add(store, "red apple\n\ngreen apple"), add(store, "blue plum")
    assert words.catch_up(store)
    assert not words.catch_up(store)
    assert texts(words, store, "apples") == ["red apple", "green apple"]
    store.replace_document(changed.id, "a.txt", "text/plain", 9, sha("blue pear"))
    ingest(store, store.get_document(changed.id), "blue pear")
    words.catch_up(store)
    assert (texts(words, store, "plum"), texts(words, store, "pear")) == ([], ["blue pear"])
    store.delete_document(kept.id)
    words.catch_up(store)
    assert texts(words, store, "apple") == []
    assert_holds_all(words, store)
    del words
    again = WordIndex(tmp_path / "words")
    assert not again.catch_up(store)
    assert_holds_all(again, store)


def test_closed_it_holds_all_and_lets_others_write(store, tmp_path):
    words = open_words(store, tmp_path / "words")
    add(store, "red apple")
    words.close(store)
    assert words.generation == store.generation()
    again = WordIndex(tmp_path / "words")
    add(store, "blue plum")
    assert again.catch_up(store)
    assert texts(again, store, "plum") == ["blue plum"]


@pytest.fixture
def many(store, monkeypatch) -> DocumentStore:
    """41 documents of one chunk each, of which an index takes ten at once; the thread for the others stands still."""
    for number, size in (("_AT_ONCE", 10), ("_PIECE", 4), ("_COMMIT_CHUNKS", 8), ("_BREATH_S", 60.0)):
        monkeypatch.setattr(retrieval.words, number, size)
    monkeypatch.setattr(DocumentStore.chunk_texts, "__defaults__", (3,))
    for i in range(41):
        add(store, f"apple {i}")
    return store


def test_a_new_index_over_many_chunks_is_filled_behind_the_searches(many, tmp_path, monkeypatch):
    words = open_words(many, tmp_path / "words")
    assert (words.count, words.missing, words.generation) == (12, 29, many.generation())
    assert words.share == pytest.approx(12 / 41)
    assert len(texts(words, many, "apple")) == 12
    add(many, "apple pie")
    many.delete_document(many.list_documents()[0].id)  # one that is in
    many.delete_document(many.list_documents()[-2].id)  # and one that is to come
    words.catch_up(many)
    assert texts(words, many, "pie") == ["apple pie"] and len(texts(words, many, "apple")) == 12
    words.close(many)
    words = open_words(many, tmp_path / "words")  # goes on where the other one was
    assert words.count == 12 and words.missing
    words.close(many)
    monkeypatch.setattr(retrieval.words, "_BREATH_S", 0.0)
    words = open_words(many, tmp_path / "words")
    words.settle()
    assert words.missing == 0 and words.share == 1
    assert_holds_all(words, many)
    del words
    again = WordIndex(tmp_path / "words")
    assert not again.catch_up(many)
    assert_holds_all(again, many)


def test_what_changes_while_it_is_filled_comes_in_between(many, monkeypatch):
    monkeypatch.setattr(retrieval.words, "_BREATH_S", 0.001)
    words = WordIndex()
    words.catch_up(many)
    for i in range(20):
        many.delete_document(many.list_documents()[i % 7].id)
        assert add(many, f"pear {i}\n\napple pear {i}").chunks == 2
        words.catch_up(many)
        assert len(texts(words, many, "pear")) == 2 * (i + 1)
    words.settle()
    assert not words.missing
    assert_holds_all(words, many)


def test_an_index_of_another_history_is_made_anew_behind_the_searches(many, tmp_path, monkeypatch):
    words = open_words(many, tmp_path / "words")
    monkeypatch.setattr(many, "knows_generation", lambda generation: generation == 0)
    add(many, "apple pie")
    words.catch_up(many)
    assert (words.count, words.missing) == (12, 30)
    monkeypatch.undo()
    words.close(many)
    words = open_words(many, tmp_path / "words")
    words.settle()
    assert_holds_all(words, many)


def test_filling_that_fails_goes_on(many, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval.words, "_BREATH_S", 0.0)
    monkeypatch.setattr(retrieval.words, "_RETRY_S", 0.0)
    said: list[str] = []
    monkeypatch.setattr(retrieval.words._LOG, "exception", said.append)  # a record kept would keep the writer
    added, failures = retrieval.words._add_chunks, iter([False, False, False, True, False, True])

    def add_chunks(writer, chunks):
        added(writer, chunks)
        if len(chunks) == 4 and next(failures, False):
            raise OSError("no room")

    monkeypatch.setattr(retrieval.words, "_add_chunks", add_chunks)
    words = open_words(many, tmp_path / "words")
    words.settle()
    assert len(said) == 2
    assert_holds_all(words, many)


def test_a_filter_is_applied_inside_the_search(store):
    for i in range(60):
        add(store, "apple " * (i + 1))
    add(store, "an apple beside many other words")
    batches = store.chunk_texts((0, 0), store.generation())
    rows = {row: document_row for _, batch in batches for row, _, document_row, *_ in batch}
    words = WordIndex()
    words.catch_up(store)
    everywhere = dict(words.search(["apple"], 100))
    for allowed in ([max(rows.values())], list(rows.values())[::2], list(rows.values()), [10**12], []):
        found = words.search(["apple"], 100, document_rows=allowed)
        assert dict(found) == pytest.approx({row: everywhere[row] for row in rows if rows[row] in allowed})
    assert len(words.search(["apple"], 3, document_rows=list(rows.values())[30:])) == 3


@pytest.mark.parametrize("term", ["apple", "red apple"])
def test_words_are_as_rare_as_in_the_collections_searched(store, term):
    """Else whoever may see some collections could count the words of the others."""
    words = WordIndex()
    for name in ("own", "also", "other"):
        store.create_collection(name)
    for name, texts in (
        ("own", ["red apple", "blue plum", "dry nut"]),
        ("also", ["green pear", "old bread", "new wine"]),
    ):
        for text in texts:
            add(store, f"a {text} 0", collection=name)
    for number in range(30):
        add(store, f"no such word {number}", collection="other")
    words.catch_up(store)
    seen = store.select_chunks(["own"]).collection_rows, store.select_chunks(["own", "also"]).collection_rows
    before = [(words.search([term], 9, rows), words.expected_score([term], rows)) for rows in seen]
    assert before[0][1] < before[1][1]  # one of three, one of six
    for number in range(30):
        add(store, f"a red apple {number}", collection="other")
    words.catch_up(store)
    after = [(words.search([term], 9, rows), words.expected_score([term], rows)) for rows in seen]
    for (found, expected), (found_after, expected_after) in zip(before, after, strict=True):
        assert expected == expected_after
        assert dict(found) == pytest.approx(dict(found_after), rel=0.02)  # the average length is still everybody's
    assert len(words.search([term], 99)) == 31


def test_a_phrase_weighs_as_rare_as_it_is(store):
    for i in range(20):
        add(store, f"error {i}\n\ncode {i}")
    add(store, "error code\n\ncode error")
    words = WordIndex()
    words.catch_up(store)
    (row, score), *others = words.search(["error code"], 10)
    assert not others
    assert score == pytest.approx(words.expected_score(["error code"]), rel=0.3)
    assert score > 1.5 * words.search(["error"], 10)[0][1]
    assert store.load_hits([row])[row].chunk.text == "error code"


def test_a_phrase_does_not_run_from_the_text_into_the_title(store):
    add(store, "the last word", name="first.txt")
    words = WordIndex()
    words.catch_up(store)
    assert words.search(["word first"], 9) == []


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": shutil.rmtree,
    "without its list": lambda d: (d / "meta.json").unlink(),
    "list empty": lambda d: (d / "meta.json").write_bytes(b""),
    "list of nonsense": lambda d: (d / "meta.json").write_text('{"segments": 7}'),
    "segment gone": lambda d: next(d.glob("*.term")).unlink(),
    "segment truncated": lambda d: [os.truncate(path, 20) for path in d.glob("*.idx")],
    "segments empty": lambda d: [os.truncate(path, 0) for path in d.glob("*.*") if path.name != "meta.json"],
    "a byte flipped": lambda d: flip_a_byte(next(d.glob("*.term"))),
    "a deletion flipped": lambda d: flip_a_byte(next(d.glob("*.del"))),
    "another's": lambda d: (shutil.rmtree(d), d.mkdir(), tantivy.Index(tantivy.SchemaBuilder().build(), path=str(d))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_ends_in_a_rebuilt_index(store, tmp_path, damage):
    add(store, "red apple\n\ngreen apple")
    gone = add(store, "old pear")
    words = open_words(store, tmp_path / "words")
    store.delete_document(gone.id)
    words.catch_up(store)
    del words
    check_files(tmp_path / "words")
    damage(tmp_path / "words")
    words = open_words(store, tmp_path / "words")
    assert_holds_all(words, store)
    add(store, "blue plum")
    words.catch_up(store)
    assert_holds_all(words, store)


def test_what_a_crash_left_half_written_is_no_damage(store, tmp_path, caplog):
    add(store, "red apple")
    words = open_words(store, tmp_path / "words")
    del words
    (tmp_path / "words" / "0123456789abcdef0123456789abcdef.idx").write_bytes(b"half")
    words = open_words(store, tmp_path / "words")
    assert_holds_all(words, store)
    assert "rebuilding" not in caplog.text


def test_a_commit_that_a_crash_cut_off_can_be_made_again(store, tmp_path):
    gone, _ = add(store, "red apple"), add(store, "green apple")
    open_words(store, tmp_path / "words").close(store)
    meta = (tmp_path / "words" / "meta.json").read_bytes()
    store.delete_document(gone.id)
    open_words(store, tmp_path / "words").close(store)
    (tmp_path / "words" / "meta.json").write_bytes(meta)  # which is what a commit writes last
    assert_holds_all(open_words(store, tmp_path / "words"), store)


def test_an_index_of_another_history_is_rebuilt(store, tmp_path):
    words = open_words(store, tmp_path / "words")
    store.close()
    shutil.copytree(tmp_path, tmp_path / "backup", ignore=shutil.ignore_patterns("words", "backup"))
    add(store, "lost with the disk")
    words.catch_up(store)
    del words
    restored = DocumentStore(tmp_path / "backup" / "rag.sqlite3")
    add(restored, "after the backup\n\nand more")
    words = open_words(restored, tmp_path / "words")
    assert_holds_all(words, restored)
    assert words.search(["lost"], 9) == []
    restored.close()


def test_an_index_that_cannot_be_written_goes_on_answering(store, tmp_path, monkeypatch):
    add(store, "red apple")
    words = open_words(store, tmp_path / "words")
    del words
    other = tantivy.Index.open(str(tmp_path / "words"))
    busy = other.writer(15_000_000, 1)
    words = WordIndex(tmp_path / "words")
    add(store, "green apple")
    assert not words.catch_up(store)
    assert texts(words, store, "apple") == ["red apple"]
    del busy
    assert not words.catch_up(store)  # not at once again
    monkeypatch.setattr(retrieval.words, "_RETRY_S", 0.0)
    assert words.catch_up(store)
    assert_holds_all(words, store)


def test_commits_can_be_kept_apart(store):
    words = WordIndex()
    add(store, "red apple")
    assert words.catch_up(store, 60)
    add(store, "green apple")
    assert not words.catch_up(store, 60)
    assert words.catch_up(store)
    assert_holds_all(words, store)


def test_a_database_of_the_time_of_fts5_is_taken_over(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("retrieval.migrations.MIGRATIONS", MIGRATIONS[:2])
        old = DocumentStore(tmp_path / "rag.sqlite3")
        add(old, "red apple\n\ngreen apple")
        old.close()
    store = DocumentStore(tmp_path / "rag.sqlite3")
    tables = sqlite3.connect(tmp_path / "rag.sqlite3")
    assert tables.execute("SELECT name FROM sqlite_master WHERE name LIKE 'chunk_words%'").fetchall() == []
    tables.close()
    words = open_words(store, tmp_path / "words")
    assert texts(words, store, "green") == ["green apple"]
    assert store.check() == []
    store.close()
