"""The retrieval benchmark: its measures against worked examples, its sets, and that it runs."""

import json
from collections import Counter

import numpy as np
import pytest
from retrieval_kit import HashEmbedder

from bench import retrieval as bench
from bench.retrieval_sets import DATA, Span, load_beir, words_pattern
from retrieval.store import DocumentStore


def test_measures_are_those_of_the_literature():
    assert bench.ndcg([7, 1, 8, 2], {1: 1, 2: 1}) == pytest.approx(
        (1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    )
    assert bench.ndcg([2, 1], {1: 3, 2: 1}) == pytest.approx((1 + 3 / np.log2(3)) / (3 + 1 / np.log2(3)))
    assert bench.ndcg(list(range(20)), {15: 1}) == 0 and bench.ndcg([], {1: 1}) == 0
    assert bench.recall([1, 2, 3], {2: 1, 9: 1}, 2) == 0.5
    assert bench.reciprocal_rank([5, 6, 7], {7: 1, 6: 1}) == 0.5 and bench.reciprocal_rank([5], {6: 1}) == 0


def test_a_chunk_answers_when_it_holds_half_of_the_words():
    span = Span("a", 100, 120)
    assert span.is_in("a", 0, 110) and span.is_in("a", 105, 300) and not span.is_in("a", 0, 109)
    assert not span.is_in("b", 100, 120)
    assert Span("a").is_in("a", 5, 6) and not Span("a").is_in("b", 5, 6)
    assert words_pattern("a  (b)\nc").search("x a (b)   c")


def test_the_questions_are_many_of_each_kind_and_name_their_manual():
    rows = [json.loads(line) for line in (DATA / "questions.jsonl").read_text().splitlines()]
    packages = {package["name"] for package in json.loads((DATA / "packages.json").read_text())["packages"]}
    assert len({row["id"] for row in rows}) == len({row["question"] for row in rows}) == len(rows) >= 300
    assert all(row["source"] in packages and row["gold"].strip() for row in rows)
    kinds = Counter(row["kind"] for row in rows)
    assert set(kinds) == {"plain", "name", "paraphrase"} and min(kinds.values()) >= 60


@pytest.fixture
def beir(tmp_path):
    """Three documents; the second question is about two of them, with different grades."""
    documents = {"d1": "the tide turns at noon", "d2": "harbour opening hours", "d3": "harbour closing hours\n\n" * 40}
    (tmp_path / "qrels").mkdir()
    lines = [json.dumps({"_id": name, "title": name.upper(), "text": text}) for name, text in documents.items()]
    (tmp_path / "corpus.jsonl").write_text("\n".join([*lines, json.dumps({"_id": "empty", "text": " "})]))
    queries = {"q1": "tide noon", "q2": "harbour hours", "q3": "unjudged"}
    (tmp_path / "queries.jsonl").write_text("\n".join(json.dumps({"_id": k, "text": v}) for k, v in queries.items()))
    qrels = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t2\nq2\td3\t1\nq2\td1\t0\n"
    (tmp_path / "qrels" / "test.tsv").write_text(qrels)
    return tmp_path


def test_a_beir_folder_is_read(beir):
    found = load_beir(beir)
    assert list(found.documents) == ["d1", "d2", "d3"] and found.by_document
    assert [(q.id, [(span.document, grade) for span, grade in q.gold]) for q in found.questions] == [
        ("q1", [("d1", 1)]),
        ("q2", [("d2", 2), ("d3", 1)]),
    ]
    with pytest.raises(ValueError, match="splits there: test"):
        load_beir(beir, "dev")
    (beir / "qrels" / "test.tsv").write_text("q1 d1 1\n")
    with pytest.raises(ValueError, match="tabs between"):
        load_beir(beir)


class CountingEmbedder(HashEmbedder):
    dtype = "float32"

    def count_tokens(self, texts):
        return [len(text.split()) + 2 for text in texts]


def test_documents_of_many_chunks_count_once(beir, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    store, questions = DocumentStore(tmp_path / "rag.sqlite3"), load_beir(beir)
    corpus = bench.fill_store(store, questions, 16, CountingEmbedder())
    store.close()
    assert len(corpus.chunks) > 5 and [sorted(gold.values()) for gold in corpus.gold] == [[1], [1, 2]]
    rows = list(corpus.chunks)
    assert len(corpus.unite(rows)) == 3 and set(corpus.gold[1]) <= set(corpus.unite(rows))


def test_intervals_hold_the_value():
    values = np.linspace(0, 1, 50)
    low, high = bench.bootstrap(lambda pick: values[pick].mean(), len(values))
    assert 0.35 < low < values.mean() < high < 0.65
