"""From a question to hits: both halves, their fusion, filters, and that nothing stale is ever found."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from retrieval_kit import HashEmbedder, add, ingest, queue, sha

from retrieval.embedder import MiniLMEmbedder
from retrieval.index import FaissIndex, open_index
from retrieval.lexical import query_identifiers, query_terms
from retrieval.location import locate
from retrieval.rerank import rerank
from retrieval.search import FusionWeights, Retriever, fuse_scores
from retrieval.store import CollectionNotFound, DocumentStore, EmbedderMismatch
from retrieval.types import Heading, Location, Page, SearchParams
from retrieval.words import WordIndex

LIBRARY = {
    "bread.txt": "Knead the dough for ten minutes.\n\nBake it in a hot oven until the crust is brown.",
    "pump.txt": "Part XJ-900 seals the pump.\n\nReplace the gasket whenever water drips from the housing.",
    "law.txt": "Tenants must be given three months of notice.\n\nThe deposit is paid back within six weeks.",
}


@pytest.fixture
def store(store):
    store.create_collection("other")
    return store


@pytest.fixture
def retriever(store):
    embedder = HashEmbedder()
    return Retriever(store, FaissIndex(embedder.dim, embedder.name), embedder)


def texts(hits) -> list[str]:
    return [hit.chunk.text for hit in hits]


def test_questions_in_other_words_and_exact_codes_with_the_real_embedder(store, tmp_path):
    embedder = MiniLMEmbedder(dtype=torch.float32)
    for name, text in LIBRARY.items():
        ingest(store, queue(store, text, name=name), text, embedder)
    index = open_index(store, tmp_path / "faiss", embedder.dim, embedder.name)
    retriever = Retriever(store, index, embedder)

    def first(question: str, mode: str = "hybrid") -> str:
        return retriever.search(question, ["default"], SearchParams(mode=mode))[0].chunk.text

    assert "gasket" in first("How do I stop a leak?")
    assert "Tenants" in first("How early do I have to end the rental contract of my lodger?")
    assert "XJ-900" in first("xj-900")
    assert "XJ-900" in first("XJ-900", "lexical")
    assert "oven" in first("temperature for making loaves", "dense")


def test_hit_says_where_it_stands(store, retriever):
    text = "Title\nsome words\n\nother words"
    document = queue(store, text, name="a.pdf", lang="en")
    pages, headings = (Page(1, None, 0, 16), Page(2, None, 18, 29)), (Heading(1, "Title", 0),)
    ingest(store, document, text, pages=pages, headings=headings)
    hit = retriever.search("other", ["default"])[0]
    assert (hit.filename, hit.collection, hit.document_id, hit.attributes) == (
        "a.pdf",
        "default",
        document.id,
        {"lang": "en"},
    )
    assert hit.document_version == 1
    assert hit.location == Location(18, 29)  # the test's chunker knows no pages
    content = store.get_content(document.id)
    assert locate(content.pages, content.headings, 18, 29) == Location(18, 29, 2, 2, ("Title",))


@pytest.mark.parametrize("mode", ["hybrid", "dense", "lexical"])
def test_what_another_collection_gets_during_a_search_is_not_found(store, retriever, mode, monkeypatch):
    add(store, "red apple")

    def select_then_add(*arguments):  # `other` is empty when it is looked at what may be seen
        selection = DocumentStore.select_chunks(store, *arguments)
        add(store, "secret apple", "other")
        return selection

    monkeypatch.setattr(store, "select_chunks", select_then_add)
    assert texts(retriever.search("apple", ["default"], SearchParams(mode=mode))) == ["red apple"]


@pytest.mark.parametrize(
    ("mode", "names"), [("hybrid", {"dense", "lexical", "fused"}), ("dense", {"dense"}), ("lexical", {"lexical"})]
)
def test_scores_by_mode(store, retriever, mode, names):
    add(store, "red apple\n\ngreen apple\n\nblue plum")
    hits = retriever.search("green apple", ["default"], SearchParams(mode=mode))
    assert texts(hits)[:2] == ["green apple", "red apple"]
    assert set(hits[0].scores) == names
    assert hits[0].score == hits[0].scores["fused" if mode == "hybrid" else mode]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len(hits) == (2 if mode == "lexical" else 3)


def test_number_of_results(store, retriever):
    add(store, "\n\n".join(f"apple {i}" for i in range(30)))
    for number in (1, 7, 30):
        assert len(retriever.search("apple", ["default"], SearchParams(max_num_results=number))) == number
    with pytest.raises(ValueError, match="max_num_results"):
        retriever.search("apple", ["default"], SearchParams(max_num_results=0))


def test_equal_scores_keep_the_order_of_storing(store, retriever):
    added = [add(store, f"same words\n\nfiller {i}").id for i in range(6)]
    hits = retriever.search("same words", ["default"], SearchParams(max_num_results=6))
    assert [hit.document_id for hit in hits] == added


@pytest.mark.parametrize("mode", ["hybrid", "dense", "lexical"])
def test_filters_act_inside_the_search(store, retriever, mode):
    """The wanted chunk is behind hundreds of better ones, which a filter after the search would have to reach."""
    for i in range(3):
        add(store, "\n\n".join(f"apple apple {i} {j}" for j in range(100)))
    wanted = add(store, "one apple among many other fruits", "other", lang="de")

    def found(collections, **params) -> list[str]:
        return texts(retriever.search("apple", collections, SearchParams(mode=mode, max_num_results=3, **params)))

    assert found(["other"]) == ["one apple among many other fruits"]
    assert found(["default", "other"], document_ids=[wanted.id]) == ["one apple among many other fruits"]
    assert found(["default", "other"], filters={"lang": ["de", "fr"]}) == ["one apple among many other fruits"]
    assert found(["default", "other"], filters={"lang": "fr"}) == []
    assert found(["default"], document_ids=[wanted.id]) == []
    assert found(["default", "other"], document_ids=[]) == []
    assert "one apple among many other fruits" not in found(["default"])
    with pytest.raises(CollectionNotFound):
        found(["nowhere"])


@pytest.mark.parametrize("mode", ["hybrid", "dense", "lexical"])
def test_sees_every_write_at_once(store, retriever, mode):
    def found() -> list[str]:
        return texts(retriever.search("apple", ["default"], SearchParams(mode=mode)))

    assert found() == []
    document = add(store, "an apple")
    assert found() == ["an apple"]
    new, _ = store.replace_document(document.id, "b", "text/plain", 3, sha("apple pie"))
    assert found() == ["an apple"]
    ingest(store, new, "apple pie")
    assert found() == ["apple pie"]
    store.create_collection("third")
    assert found() == ["apple pie"]
    add(store, "apple of another", "third")
    assert found() == ["apple pie"]
    store.delete_document(document.id)
    assert found() == []


@pytest.mark.parametrize("query", ["", "  ", "?", "\0", "\ud800", "x" * 20_000, "to be or not to be"])
def test_odd_queries(store, retriever, query):
    add(store, "an apple")
    assert len(retriever.search(query, ["default"])) <= 1


def test_another_embedder_is_refused(store):
    add(store, "an apple")
    other = HashEmbedder(dim=32)
    with pytest.raises(EmbedderMismatch):
        Retriever(store, FaissIndex(32, other.name), other)


def test_weights_decide(store):
    assert fuse_scores({1: 0.8, 2: 0.4}, {2: 9.0}, FusionWeights(dense=1, lexical=0)) == {1: 1.0, 2: 0.5}
    assert fuse_scores({1: 0.8, 2: 0.4}, {2: 9.0}, FusionWeights(dense=0, lexical=3)) == {1: 0.0, 2: 1.0}
    assert fuse_scores({1: 0.8, 2: 0.4}, {2: 9.0}, FusionWeights(1, 1)) == {1: 0.5, 2: 0.75}
    assert fuse_scores({1: -0.1}, {}, FusionWeights()) == {1: 0.0}
    for weights in ({"dense": -1}, {"dense": 0, "lexical": 0}):
        with pytest.raises(ValueError, match="weights"):
            FusionWeights(**weights)


SCORES = st.dictionaries(st.integers(1, 20), st.floats(-1, 50, allow_nan=False))


@given(dense=SCORES, lexical=SCORES, fusion=st.sampled_from(["minmax", "rrf"]), weight=st.floats(0.01, 1))
def test_fusion_stays_in_range_and_respects_dominance(dense, lexical, fusion, weight):
    """What is better in both halves is never worse when fused."""
    fused = fuse_scores(dense, lexical, FusionWeights(weight, 1, fusion))
    assert fused.keys() == dense.keys() | lexical.keys()
    assert all(0 <= score <= 1 + 1e-9 for score in fused.values())
    for a, b in itertools.permutations(dense.keys() & lexical.keys(), 2):
        if dense[a] > dense[b] and lexical[a] > lexical[b]:
            assert fused[a] >= fused[b]


def test_words_count_for_as_much_as_was_found_of_them():
    weights = FusionWeights(dense=1, lexical=3, trust_from=0.5, trust_all=0.9)
    assert [weights.trust(best, 10.0) for best in (0, 5, 7, 9, 30)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert weights.trust(3.0, 0.0) == 1.0  # words so common that nothing can be expected of them
    dense, lexical = {1: 0.8, 2: 0.4}, {2: 9.0}
    assert fuse_scores(dense, lexical, weights, 0.5) == pytest.approx({1: 0.625, 2: 0.6875})
    assert fuse_scores(dense, lexical, weights, 0.0) == {1: 1.0, 2: 0.5}
    assert fuse_scores(dense, lexical, FusionWeights(dense=0, lexical=1), 0.0) == {1: 0.0, 2: 1.0}
    with pytest.raises(ValueError, match="trust_from"):
        FusionWeights(trust_from=0.8, trust_all=0.8)


def test_expected_score_is_that_of_an_average_chunk_with_each_word_once(store):
    add(
        store,
        "red apple tart\n\ngreen apple cake\n\nblue plum stew\n\nwhite bread loaf\n\nold brown shoe\n\nnew tin can",
    )
    terms = query_terms("green plum")
    words = WordIndex()
    words.catch_up(store)
    scores = dict(words.search(["green"], 9)), dict(words.search(["plum"], 9))
    found = sum(value for found in scores for value in found.values())
    assert words.expected_score(terms) == pytest.approx(found, rel=0.1)  # the marker shortens the average chunk
    assert words.expected_score([]) == 0
    assert words.expected_score(query_terms("unheard")) > words.expected_score(query_terms("green"))
    assert words.expected_score(query_terms("apple")) < words.expected_score(query_terms("green"))


def test_a_question_in_other_words_is_not_led_astray_by_one_common_word(store, retriever):
    """Only "machine" occurs; the passage that holds it must not pass the one that the embedder finds."""
    for i in range(30):
        add(store, f"filler {i}")
    add(store, "the machine is green")
    add(store, "halt motor stop engine")
    found = retriever.search("how do we halt motor stop engine bolts screws nails washers machine", ["default"])
    assert texts(found)[0] == "halt motor stop engine"


def test_words_of_few_chunks_say_little(store, retriever, monkeypatch):
    """While the word index is filled, what it does not hold yet is not to stand behind what it does."""
    add(store, "the green machine")
    add(store, "green green machine")
    monkeypatch.setattr(WordIndex, "share", 0.1)
    found = retriever.search("green green machine", ["default"], SearchParams(mode="hybrid"))
    partial = [hit.scores["fused"] for hit in found]
    monkeypatch.undo()
    found = retriever.search("green green machine", ["default"], SearchParams(mode="hybrid"))
    dense = [hit.scores["dense"] / found[0].scores["dense"] for hit in found]
    lexical = [hit.scores["lexical"] / found[0].scores["lexical"] for hit in found]
    assert partial == pytest.approx([0.93 * d + 0.07 * w for d, w in zip(dense, lexical, strict=True)])


class Backwards:
    """A reranker that likes the shortest passage best."""

    hits, prior = 6, 0.0

    def __init__(self) -> None:
        self.seen: list[str] = []

    def score(self, query: str, passages: Sequence[str]) -> np.ndarray:
        self.seen += passages
        return np.array([-len(passage) for passage in passages], dtype=np.float32)


@pytest.mark.parametrize("mode", ["hybrid", "dense", "lexical"])
def test_a_reranker_orders_the_best_hits_anew(store, mode):
    for i in range(12):
        add(store, "apple " * (i + 1))
    embedder, reranker = HashEmbedder(), Backwards()
    retriever = Retriever(store, FaissIndex(embedder.dim, embedder.name), embedder, reranker=reranker)
    plain = retriever.search("apple", ["default"], SearchParams(3, mode, rerank=False))
    assert not reranker.seen and "rerank" not in plain[0].scores
    hits = retriever.search("apple", ["default"], SearchParams(3, mode))
    assert len(hits) == 3 and len(reranker.seen) == 6
    assert (
        [hit.score for hit in hits]
        == [hit.scores["rerank"] for hit in hits]
        == sorted(-len(p) for p in reranker.seen)[:-4:-1]
    )


def test_passages_go_to_the_reranker_under_their_headings(store):
    text = "Pump\nwater drips"
    ingest(store, queue(store, text), text, headings=(Heading(1, "Pump", 0),))
    hits = Retriever(store, FaissIndex(64, HashEmbedder.name), HashEmbedder()).search("water", ["default"])
    reranker = Backwards()
    chunk = dataclasses.replace(hits[0].chunk, heading_path=("Guide", "Pump"))
    rerank(reranker, "water", [dataclasses.replace(hits[0], chunk=chunk)])
    assert reranker.seen == ["Guide\nPump\nwater drips"]


def test_what_the_reranker_does_not_read_stays_behind_and_the_search_has_its_say(store):
    for i in range(9):
        add(store, "apple " * (i + 1))
    retriever = Retriever(store, FaissIndex(64, HashEmbedder.name), HashEmbedder())
    hits = retriever.search("apple", ["default"], SearchParams(9))
    reranker = Backwards()
    ranked = rerank(reranker, "apple", hits)
    assert ranked[6:] == [dataclasses.replace(hit, score=ranked[-1].score) for hit in hits[6:]]
    assert ["rerank" in hit.scores for hit in ranked] == [True] * 6 + [False] * 3
    reranker.prior = 1e6
    ranked = rerank(reranker, "apple", hits)
    assert [hit.chunk for hit in ranked] == [hit.chunk for hit in hits]
    assert [hit.score for hit in ranked] == sorted((hit.score for hit in ranked), reverse=True)
    assert rerank(reranker, "apple", []) == []


def test_a_code_leads_to_its_rows_whatever_the_other_words_are(store, retriever):
    """Words that stand nowhere ("go", "ordered") let the words count for less, but codes have no other spelling."""
    add(store, "\n\n".join(f"order ORD-{number} city Porto product lamp" for number in range(7000, 7060)))
    for number in (7005, 7037, 7058):
        query = f"Which town did the parcel that someone ordered as ORD-{number} finally go to?"
        (hit,) = retriever.search(query, ["default"], SearchParams(1))
        assert f"ORD-{number}" in hit.chunk.text


def test_identifiers_are_codes_of_letters_and_digits():
    assert query_identifiers("Is ORD-7020, v2.3 or B204 from 2024-01-02 (state-of-the-art)?") == [
        "ord 7020",
        "v2 3",
        "b204",
    ]
