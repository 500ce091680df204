"""The store as the truth: collections, uploads, versions, deletion; on real SQLite files."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from retrieval_kit import HashEmbedder, add, chunk_paragraphs, find_words, ingest, queue, sha

from retrieval.location import locate
from retrieval.store import (
    CollectionExists,
    CollectionNotFound,
    DocumentNotFound,
    DocumentNotReady,
    DocumentStore,
    DuplicateDocument,
    EmbedderMismatch,
    LeaseLost,
)
from retrieval.types import Heading, Location, Page, ParsedDocument


def rows_naming(path: Path, needle: str) -> list[str]:
    """Every table of the file that still holds the text anywhere."""
    connection = sqlite3.connect(path)
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    holding = [t for t in tables if any(needle in str(row) for row in connection.execute(f"SELECT * FROM {t}"))]
    connection.close()
    return holding


def test_default_collection_is_always_there(store):
    assert [c.name for c in store.list_collections()] == ["default"]
    add(store, "kept for a while")
    store.delete_collection("default")
    assert store.get_collection("default").documents == 0


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a b", "ü", "x" * 65, "a\0", "a\n"])
def test_collection_names_are_checked(store, name):
    with pytest.raises(ValueError, match="collection name"):
        store.create_collection(name)


def test_collection_counts(store):
    store.create_collection("manuals")
    with pytest.raises(CollectionExists):
        store.create_collection("manuals")
    add(store, "one two\n\nthree", "manuals")
    queue(store, "waiting", "manuals")
    broken = queue(store, "broken", "manuals")
    store.fail_document(broken.id, "parse_failed", "no", retryable=False, version=1)
    counts = store.get_collection("manuals")
    assert (counts.documents, counts.chunks, counts.tokens, counts.pending, counts.failed) == (1, 2, 3, 1, 1)
    store.delete_collection("manuals")
    with pytest.raises(CollectionNotFound, match="manuals"):
        store.get_collection("manuals")
    assert store.count_chunks() == 0


def test_upload_to_unknown_collection_stores_nothing(store, tmp_path):
    with pytest.raises(CollectionNotFound):
        queue(store, "text", "nowhere")
    assert store.list_documents() == []


def test_upload_fields(store):
    document, created = store.create_document("default", "ü '\"; DROP.txt", "text/plain", 4, sha("t"), {"a": [1, "ü"]})
    assert created
    assert (document.filename, document.bytes, document.status, document.ordinal) == ("ü '\"; DROP.txt", 4, "queued", 1)
    assert (document.version, document.pages, document.last_error, document.duplicate_of) == (1, None, None, None)
    assert document.metadata == {"a": [1, "ü"]}
    assert store.get_document(document.id) == document


def test_same_bytes_are_one_document(store):
    first = add(store, "same", name="first.txt")
    again, created = store.create_document("default", "second.txt", "text/plain", 4, sha("same"))
    assert (again.id, again.duplicate_of, created) == (first.id, first.id, False)
    with pytest.raises(DuplicateDocument) as refused:
        store.create_document("default", "second.txt", "text/plain", 4, sha("same"), on_conflict="error")
    assert refused.value.document_id == first.id
    assert len(store.list_documents()) == 1


def test_same_bytes_in_two_collections_are_two_documents(store):
    store.create_collection("other")
    assert add(store, "same").id != add(store, "same", "other").id


def test_same_bytes_with_replace_are_a_new_version(store):
    first = add(store, "same", name="first.txt")
    again, created = store.create_document(
        "default", "second.txt", "text/plain", 4, sha("same"), {"k": 1}, on_conflict="replace"
    )
    assert created
    assert (again.id, again.version, again.filename, again.metadata) == (first.id, 2, "second.txt", {"k": 1})
    assert find_words(store, "same") == ["same"]


def test_many_threads_upload_the_same_bytes_once(store):
    with ThreadPoolExecutor(8) as pool:
        ids = {document.id for document in pool.map(lambda _: queue(store, "same"), range(32))}
    assert len(ids) == 1


def test_ordinals_count_up_and_are_not_reused(store):
    documents = [add(store, f"text {i}") for i in range(3)]
    assert [d.ordinal for d in documents] == [1, 2, 3]
    store.delete_document(documents[2].id)
    assert add(store, "later").ordinal == 4
    store.create_collection("other")
    assert add(store, "elsewhere", "other").ordinal == 1


def test_old_version_answers_until_the_new_one_is_ready(store):
    old = add(store, "the old wording", name="old.txt", kept="yes")
    add(store, "a neighbour")
    new, created = store.replace_document(old.id, "new.txt", "text/plain", 3, sha("the new wording"))
    assert created
    assert (new.version, new.status, new.metadata, new.ordinal) == (2, "queued", {"kept": "yes"}, 3)
    assert find_words(store, "wording") == ["the old wording"]
    assert [d.version for d in store.ready_documents(["default"], [old.id])] == [1]
    assert store.file_in_use(old.sha256)

    change = ingest(store, new, "the new wording")
    assert (len(change.added), len(change.removed), change.originals) == (1, 1, (old.sha256,))
    assert find_words(store, "wording") == ["the new wording"]
    assert store.get_text(old.id) == "the new wording"
    assert [d.ordinal for d in store.ready_documents(["default"])] == [2, 3]
    assert not store.file_in_use(old.sha256)


def test_a_failed_replacement_leaves_the_old_version_answering(store):
    old = add(store, "the old wording")
    new, _ = store.replace_document(old.id, "new.txt", "text/plain", 3, sha("new"))
    store.fail_document(old.id, "parse_failed", "broken", retryable=False, version=new.version)
    assert store.get_document(old.id).status == "failed"
    assert find_words(store, "wording") == ["the old wording"]
    again, created = store.replace_document(old.id, "new.txt", "text/plain", 3, sha("new"))
    assert created
    assert again.version == 3


def test_a_superseded_version_can_no_longer_be_written(store):
    old = add(store, "first")
    second, _ = store.replace_document(old.id, "b", "text/plain", 3, sha("second"))
    third, _ = store.replace_document(old.id, "c", "text/plain", 3, sha("third"))
    with pytest.raises(LeaseLost, match="superseded by 3"):
        ingest(store, second, "second")
    ingest(store, third, "third")
    assert store.get_text(old.id) == "third"
    assert not store.file_in_use(sha("second"))


def test_replacing_with_the_same_bytes_does_nothing(store):
    document = add(store, "same")
    same, created = store.replace_document(document.id, "a.txt", "text/plain", 4, sha("same"))
    assert (same.version, same.duplicate_of, created) == (1, document.id, False)


def test_replacing_with_bytes_of_another_document_is_refused(store):
    first, second = add(store, "first"), add(store, "second")
    with pytest.raises(DuplicateDocument):
        store.replace_document(second.id, "b", "text/plain", 5, sha("first"))
    assert store.get_document(first.id).version == store.get_document(second.id).version == 1


def test_bytes_about_to_vanish_are_no_duplicate(store):
    changing = add(store, "moving away")
    store.replace_document(changing.id, "b", "text/plain", 3, sha("something else"))
    _, created = store.create_document("default", "c", "text/plain", 3, sha("moving away"))
    assert created


def test_deletion_leaves_nothing_behind(store, tmp_path):
    kept = add(store, "this stays here")
    gone = add(store, "zebra quagga\n\nzebra again", name="zebra.txt", owner="zebra")
    change = store.delete_document(gone.id)
    assert (change.added, len(change.removed), change.originals) == ((), 2, (gone.sha256,))
    assert find_words(store, "zebra") == []
    assert find_words(store, "stays") == ["this stays here"]
    for read in (store.get_document, store.get_text, store.get_chunks, store.delete_document):
        with pytest.raises(DocumentNotFound):
            read(gone.id)
    store.close()
    assert rows_naming(tmp_path / "rag.sqlite3", "zebra") == []
    assert rows_naming(tmp_path / "rag.sqlite3", gone.id) == []
    assert store.check() == []
    assert store.get_document(kept.id).status == "ready"


def test_hiding_takes_it_out_of_reading_at_once(store):
    document = add(store, "secret words")
    store.hide_document(document.id)
    assert find_words(store, "secret") == []
    assert store.ready_documents(["default"]) == []
    assert [d.id for d in store.list_documents(status="deleting")] == [document.id]
    assert store.lease_next("w", 60) is None
    with pytest.raises(DocumentNotReady):
        store.get_text(document.id)
    with pytest.raises(DocumentNotFound):
        store.replace_document(document.id, "a", "text/plain", 1, sha("x"))
    with pytest.raises(LeaseLost):
        ingest(store, document, "secret words")
    assert store.hide_document(document.id).removed == ()
    assert store.file_in_use(document.sha256)
    store.delete_document(document.id)
    assert not store.file_in_use(document.sha256)


def test_pages_of_the_file_that_a_hundred_threads_keep_are_less_than_a_gigabyte(store):
    with store.snapshot() as connection:
        (kib,) = connection.execute("PRAGMA cache_size").fetchone()
    assert 0 < -kib * 100 < 1 << 20


def test_listing_in_pages(store):
    ids = [queue(store, f"text {i}").id for i in range(5)]
    pages, after = [], None
    while page := store.list_documents(limit=2, after=after):
        pages.append([document.id for document in page])
        after = page[-1].id
    assert pages == [ids[:2], ids[2:4], ids[4:]]
    assert len(store.list_documents(collections=["default"], status="queued")) == 5
    assert store.list_documents(status="ready") == []
    assert store.list_documents(collections=[]) == []
    with pytest.raises(DocumentNotFound):
        store.list_documents(after="doc_unknown")


def test_a_listing_goes_on_from_a_deleted_document_for_a_day(tmp_path):
    now = 1000.0
    store = DocumentStore(tmp_path / "rag.sqlite3", clock=lambda: now)
    store.create_collection("birds")
    ids = [queue(store, f"text {i}", collection="birds").id for i in range(4)]
    store.delete_document(ids[1])
    assert [document.id for document in store.list_documents(limit=2, after=ids[1])] == ids[2:]
    store.delete_collection("birds")
    last = queue(store, "later").id
    assert [document.id for document in store.list_documents(after=ids[3])] == [last]
    assert store.collection_of(ids[0]) == "birds"
    now += 2 * 86_400
    store.delete_document(last)
    with pytest.raises(DocumentNotFound):
        store.list_documents(after=ids[1])
    assert store.list_documents(after=last) == []
    store.close()


def test_metadata_filters(store):
    add(store, "one", lang="en", year=2020, tags=["a", "b"], draft=False)
    add(store, "two", lang="de", year=2021, tags=["b"], draft=True)

    def texts(**filters: object) -> list[str]:
        return [store.get_text(d.id) for d in store.ready_documents(["default"], filters=filters)]

    assert texts(lang="en") == ["one"]
    assert texts(lang=["en", "de"], year=2021.0) == ["two"]
    assert texts(tags="b") == ["one", "two"]
    assert texts(tags=["a", "z"]) == ["one"]
    assert texts(draft=0) == []
    assert texts(draft=False) == ["one"]
    assert texts(missing=None) == []
    assert texts(**{'"; DROP TABLE documents; --': 1}) == []


def test_content_round_trip(store):
    text = "Title\nfirst page\n\nsecond page"
    pages = (Page(1, "i", 0, 16), Page(2, None, 18, 29))
    headings = (Heading(1, "Title", 0),)
    document = queue(store, text)
    with pytest.raises(DocumentNotReady, match="queued"):
        store.get_content(document.id)
    ingest(store, document, text, headings=headings, pages=pages)
    assert store.get_content(document.id) == ParsedDocument(text, pages, headings, None, "text/plain")
    assert store.get_document(document.id).pages == 2
    assert [chunk.text for chunk in store.get_chunks(document.id)] == ["Title\nfirst page", "second page"]
    assert store.chunk_at(document.id, 14, 22).ordinal == 1
    assert store.chunk_at(document.id, 16, 18) is None
    assert locate(pages, headings, 10, 22) == Location(10, 22, 1, 2, ("Title",))


@pytest.mark.parametrize("text", ["nul \0 inside", "𝔘nicode 🎉 ﬁne", "東京都の天気", "‮right to left"])
def test_odd_text_comes_back_as_it_was(store, text):
    assert store.get_text(add(store, text).id) == text


def test_half_characters_are_refused_whole(store):
    document = queue(store, "x")
    with pytest.raises(ValueError, match="surrogates"):
        ingest(store, document, "half a \ud800 character")
    assert store.get_document(document.id).status == "queued"
    assert store.count_chunks() == 0


def test_bad_chunks_and_vectors_are_refused(store):
    document = queue(store, "some text")
    parsed = ParsedDocument("some text")
    (chunk,) = chunk_paragraphs(parsed, document.id)
    unit = np.eye(1, 4, dtype=np.float32)
    for bad in (unit.astype(np.float64), unit * 2, unit * np.nan, unit[0], np.eye(2, 4, dtype=np.float32)):
        with pytest.raises(ValueError, match="vectors"):
            store.replace_chunks(document.id, parsed, [chunk], bad, "e", version=1)
    with pytest.raises(ValueError, match="not the document's text"):
        store.replace_chunks(document.id, ParsedDocument("other text"), [chunk], unit, "e", version=1)
    assert store.get_document(document.id).status == "queued"


def test_empty_document_is_ready_without_chunks(store):
    document = queue(store, "")
    ingest(store, document, "")
    assert (store.get_document(document.id).status, store.get_text(document.id)) == ("ready", "")


def test_another_embedder_is_refused(store):
    first = add(store, "made by one")
    second = queue(store, "made by another")
    other = HashEmbedder(dim=32)
    with pytest.raises(EmbedderMismatch, match=r"hashed-words \(64 numbers each\)"):
        ingest(store, second, "made by another", other)
    with pytest.raises(EmbedderMismatch):
        store.require_embedder("other-name", 64)
    store.require_embedder("hashed-words", 64)
    store.delete_document(first.id)
    ingest(store, second, "made by another", other)  # no vector is left that it would not fit


def test_ingesting_twice_is_ingesting_once(store):
    document = queue(store, "once")
    ingest(store, document, "once")
    ingest(store, document, "once")
    assert find_words(store, "once") == ["once"]
    assert store.count_chunks() == 1


def test_generations_tell_what_changed(store):
    assert store.generation() == 0
    first = add(store, "one\n\ntwo")
    middle = store.generation()
    second = add(store, "three")
    store.delete_document(first.id)
    newest = store.generation()
    assert 0 < middle < newest
    assert [store.knows_generation(g) for g in (0, middle, newest, newest + 1)] == [True, True, True, False]
    (rows, vectors), *rest = store.vectors(middle, newest)
    assert rest == []
    assert [store.load_hits(rows.tolist())[int(row)].document_id for row in rows] == [second.id]
    np.testing.assert_array_equal(vectors, HashEmbedder().embed_passages(["three"]))
    assert len(store.removed_chunks(middle, newest)) == 2
    assert len(store.removed_chunks(newest, newest)) == 0
    assert [len(rows) for rows, _ in store.vectors(0, newest, batch=1)] == [1]


def test_snapshot_sees_one_state(store):
    document = add(store, "before")
    with store.snapshot():
        assert store.get_text(document.id) == "before"
        with ThreadPoolExecutor(1) as pool:
            pool.submit(store.delete_document, document.id).result()
        assert store.get_text(document.id) == "before"
    with pytest.raises(DocumentNotFound):
        store.get_text(document.id)


def test_readers_and_writers_in_many_threads(store):
    def work(worker: int) -> None:
        for i in range(5):
            document = add(store, f"worker {worker} text {i}")
            assert find_words(store, f"worker {worker} text {i}")
            if i % 2:
                store.delete_document(document.id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert store.count_chunks() == len(store.list_documents()) == 4 * 3
    assert store.check() == []


def test_what_was_not_read_of_a_ready_document_is_said(store):
    document = queue(store, "words")
    parsed = ParsedDocument("words", unread="page 3 is a picture without text")
    chunks = chunk_paragraphs(parsed, document.id)
    vectors = HashEmbedder().embed_passages(["words"])
    store.replace_chunks(document.id, parsed, chunks, vectors, "hashed-words", version=1)
    document = store.get_document(document.id)
    assert (document.status, document.last_error.code) == ("ready", "partly_read")
    assert (document.last_error.message, document.last_error.retryable) == ("page 3 is a picture without text", False)
