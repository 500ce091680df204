"""Selections read whole: all of their documents in order, made evidence once until a document changes."""

import threading

import pytest
from retrieval_kit import add, ingest, queue, sha

from retrieval.store import CollectionNotFound, DocumentStore
from retrieval.whole import EvidenceTooLarge, WholeSelections

COUNT = lambda passages: 3 + sum(1 + len(passage.text.split()) for passage in passages)


class Counting:
    """`WholeSelections` and what it read."""

    def __init__(self, store: DocumentStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read, self.ahead = [], []
        get_content = store.get_content
        monkeypatch.setattr(store, "get_content", lambda i: self.read.append(i) or get_content(i))
        self.whole = WholeSelections(store, COUNT, lambda batch: self.ahead.append([one.text for one in batch]))


@pytest.fixture
def counting(store, monkeypatch):
    return Counting(store, monkeypatch)


def test_all_that_has_text_stands_in_the_order_of_collections_and_documents(store, counting):
    store.create_collection("other")
    for text, collection in (("first text", "other"), ("third one\n\nof two", "default"), ("", "default")):
        add(store, text, collection)
    add(store, "an apple")
    evidence = counting.whole.pack(["other", "default"], 100)
    found = [(passage.ordinal, passage.text) for passage in evidence.passages]
    assert found == [(1, "third one\n\nof two"), (3, "an apple"), (1, "first text")]
    assert (evidence.mode, evidence.tokens, evidence.relevance) == ("full_context", 8 + 6 + 6, ())


def test_a_selection_is_read_once(store, counting):
    one, _ = add(store, "one two", lang="en"), add(store, "three", lang="de")
    for selection in ({}, {"document_ids": [one.id]}, {"filters": {"lang": ["de", "fr"]}}, {"filters": {"lang": "xx"}}):
        expected = WholeSelections(store, COUNT, len).pack(["default"], 50, **selection)
        counting.read.clear()
        first = counting.whole.pack(["default"], 50, **selection)
        assert first == expected
        assert len(counting.read) == len(first.passages)
        assert counting.whole.pack(["default"], first.tokens, **selection) is first
        assert len(counting.read) == len(first.passages)
    with pytest.raises(CollectionNotFound):
        counting.whole.pack(["nowhere"], 50)


def test_every_change_is_seen(store, counting):
    def texts() -> list[str]:
        return [passage.text for passage in counting.whole.pack(["default"], 50).passages]

    one = add(store, "one")
    assert texts() == ["one"]
    two = add(store, "two")
    assert texts() == ["one", "two"]
    version, _ = store.replace_document(one.id, "new name.txt", "text/plain", 5, sha("three"))
    assert texts() == ["one", "two"]
    ingest(store, version, "three")
    assert texts() == ["two", "three"]
    assert counting.whole.pack(["default"], 50).passages[1].filename == "new name.txt"
    store.hide_document(two.id)
    assert texts() == ["three"]
    store.delete_collection("default")
    assert texts() == []


def test_nothing_stays_behind_a_change(store, counting):
    document = add(store, "one")
    counting.whole.pack(["default"], 50)
    store.delete_document(document.id)
    counting.whole.pack(["default"], 50)
    assert [made[0].passages for made in counting.whole._kept.values()] == [()]
    counting.whole.forget()
    assert not counting.whole._kept


def test_nothing_is_kept_that_was_read_before_a_change(store):
    document, ahead = add(store, "one"), []

    def delete_meanwhile(passages):
        ahead.extend(passage.text for passage in passages)
        change = threading.Thread(target=lambda: (store.delete_document(document.id), whole.forget()))
        change.start()
        change.join()

    whole = WholeSelections(store, COUNT, delete_meanwhile)
    assert whole.pack(["default"], 50).passages and ahead == ["one"]
    assert not whole._kept


def test_what_is_too_large_is_not_read_again_for_less(store, counting):
    for text in ("one two three", "four five"):
        add(store, text)
    total = 3 + 1 + 3 + 3 + 1 + 2
    for budget, reads in ((total - 1, True), (total - 1, False), (5, False), (total, True), (total - 1, False)):
        counting.read.clear()
        if budget == total:
            assert counting.whole.pack(["default"], budget).tokens == total
        else:
            with pytest.raises(EvidenceTooLarge, match=f"2 documents selected take more than the {budget} tokens"):
                counting.whole.pack(["default"], budget)
        assert bool(counting.read) is reads


def test_documents_are_cut_ahead_about_as_many_as_fit(store, counting):
    for number in range(5):
        add(store, f"{number} is a number" + " " * 20)
    add(store, "")
    counting.whole.pack(["default"], 50)
    assert [len(batch) for batch in counting.ahead] == [5]
    with pytest.raises(EvidenceTooLarge):
        counting.whole.pack(["default", "default"], 12)  # not kept under this name
    assert [len(batch) for batch in counting.ahead] == [5, 2]


def test_what_was_read_of_an_earlier_state_is_not_kept(store, counting):
    add(store, "one")
    with store.snapshot():
        store.generation()  # all that this thread reads until the end of the block is of this moment
        other = DocumentStore(store._db.path)
        change = ingest(other, queue(other, "two"), "two")
        other.close()
        counting.whole._find(change.generation, "")  # as by another question, after the change
        assert len(counting.whole.pack(["default"], 50).passages) == 1
    assert not counting.whole._kept
    assert len(counting.whole.pack(["default"], 50).passages) == 2
