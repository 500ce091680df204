"""The vector index: one contract for every implementation, and a saved file that is never trusted blindly."""

import json
import logging
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from retrieval_kit import HashEmbedder, add

import retrieval.index
from retrieval.index import FaissIndex, IndexDamaged, VectorIndex, open_index
from retrieval.store import DocumentStore

IMPLEMENTATIONS: list[Callable[[int, str], VectorIndex]] = [FaissIndex]
EMBEDDER = HashEmbedder()


class ArraySource:
    """A store's history kept in lists: one generation an entry."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.changes: list[tuple[dict[int, np.ndarray], list[int]]] = []

    def change(self, added: dict[int, np.ndarray], removed: list[int]) -> None:
        self.changes.append((added, removed))

    def alive(self) -> dict[int, np.ndarray]:
        alive: dict[int, np.ndarray] = {}
        for added, removed in self.changes:
            alive = {row: vector for row, vector in (alive | added).items() if row not in removed}
        return alive

    def generation(self) -> int:
        return len(self.changes)

    def knows_generation(self, generation: int) -> bool:
        return 0 <= generation <= len(self.changes)

    def removed_chunks(self, after: int, upto: int) -> np.ndarray:
        return np.array([row for _, removed in self.changes[after:upto] for row in removed], dtype=np.int64)

    def vectors(self, after: int, upto: int):
        alive = self.alive()
        for added, _ in self.changes[after:upto]:
            if rows := [row for row in added if row in alive]:
                yield np.array(rows, dtype=np.int64), np.stack([added[row] for row in rows])


@pytest.mark.parametrize("make", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_holds_and_ranks_what_the_source_does(make, data):
    """Against brute force in numpy, catching up after any number of changes, with and without a selection."""
    source, index, next_row = ArraySource(8), make(8, "e"), 1
    unit = hnp.arrays(np.float32, 8, elements=st.floats(-1, 1, width=16)).map(
        lambda v: (v + 1e-3) / np.linalg.norm(v + 1e-3)
    )
    for _ in range(data.draw(st.integers(1, 6))):
        added = {next_row + i: vector for i, vector in enumerate(data.draw(st.lists(unit, max_size=5)))}
        next_row += len(added)
        known = sorted(source.alive())
        source.change(added, data.draw(st.lists(st.sampled_from(known), unique=True)) if known else [])
        if data.draw(st.booleans()):
            assert index.catch_up(source)
            assert not index.catch_up(source)
    index.catch_up(source)
    alive = source.alive()
    assert (index.count, index.generation) == (len(alive), source.generation())
    query, limit = data.draw(unit), data.draw(st.integers(1, 30))
    allowed = data.draw(st.none() | st.lists(st.integers(1, next_row + 3), unique=True).map(sorted))
    rows, scores = index.search(query, limit, None if allowed is None else np.array(allowed, dtype=np.int64))
    candidates = {row: float(vector @ query) for row, vector in alive.items() if allowed is None or row in allowed}
    assert (rows.dtype, scores.dtype, len(rows)) == (np.int64, np.float32, min(limit, len(candidates)))
    assert len(set(rows.tolist())) == len(rows)
    np.testing.assert_allclose(scores, [candidates[row] for row in rows.tolist()], atol=1e-5)
    np.testing.assert_allclose(scores, sorted(candidates.values(), reverse=True)[: len(rows)], atol=1e-5)


@pytest.mark.parametrize("make", IMPLEMENTATIONS)
def test_vectors_of_another_dim_are_refused(make):
    with pytest.raises(ValueError, match="do not fit an index of 8"):
        make(8, "e").search(np.ones(9, dtype=np.float32), 1)


@pytest.fixture
def store(store):
    add(store, "one apple\n\ntwo pears")
    return store


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "faiss"


def open_and_check(store: DocumentStore, directory) -> FaissIndex:
    index = open_index(store, directory, EMBEDDER.dim, EMBEDDER.name)
    assert (index.count, index.generation) == (store.count_chunks(), store.generation())
    for rows, vectors in store.vectors(0, store.generation()):
        for row, vector in zip(rows, vectors, strict=True):
            assert index.search(vector, 1)[1][0] == pytest.approx(1, abs=1e-5)
            assert index.search(vector, 1, np.array([row]))[0][0] == row
    return index


def test_what_was_saved_is_loaded(store, directory, caplog):
    open_and_check(store, directory)
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    with caplog.at_level(logging.WARNING):
        open_and_check(store, directory)
    assert caplog.messages == []
    assert {
        path.name: path.stat().st_mtime_ns for path in directory.iterdir()
    } == before  # nothing to do: not rewritten


def test_catches_up_from_an_older_save(store, directory, caplog):
    open_and_check(store, directory)
    add(store, "three plums")
    store.delete_document(store.list_documents()[0].id)
    with caplog.at_level(logging.WARNING):
        open_and_check(store, directory)
    assert caplog.messages == []
    assert len(list(directory.iterdir())) == 2


def flip_a_byte(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "index truncated": lambda d: next(d.glob("*.faiss")).write_bytes(next(d.glob("*.faiss")).read_bytes()[:-7]),
    "index empty": lambda d: next(d.glob("*.faiss")).write_bytes(b""),
    "index missing": lambda d: next(d.glob("*.faiss")).unlink(),
    "a byte flipped": lambda d: flip_a_byte(next(d.glob("*.faiss"))),
    "manifest missing": lambda d: (d / "index.json").unlink(),
    "manifest torn": lambda d: (d / "index.json").write_bytes((d / "index.json").read_bytes()[:20]),
    "manifest not an object": lambda d: (d / "index.json").write_text("[1, 2]"),
    "manifest with other fields": lambda d: (d / "index.json").write_text('{"a": 1}'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_noticed_and_rebuilt(store, directory, damage, caplog):
    open_and_check(store, directory)
    damage(directory)
    with pytest.raises(IndexDamaged):
        FaissIndex.load(directory, EMBEDDER.dim, EMBEDDER.name)
    with caplog.at_level(logging.WARNING):
        open_and_check(store, directory)
    assert "rebuilding" in caplog.text
    FaissIndex.load(directory, EMBEDDER.dim, EMBEDDER.name)


@pytest.mark.parametrize("shift", [-1, 1])
def test_generation_of_another_history_is_rebuilt(store, directory, shift, caplog):
    """As after a database was restored from a backup: its numbers never were this index's."""
    open_and_check(store, directory)
    manifest = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(manifest | {"generation": manifest["generation"] + shift}))
    with caplog.at_level(logging.WARNING):
        open_and_check(store, directory)
    assert "not of this database's history" in caplog.text


def test_index_of_another_embedder_is_not_used(store, directory):
    open_and_check(store, directory)
    for dim, name in ((EMBEDDER.dim, "other"), (32, EMBEDDER.name)):
        with pytest.raises(IndexDamaged):
            FaissIndex.load(directory, dim, name)


def test_leftovers_of_a_crash_do_no_harm(store, directory):
    open_and_check(store, directory)
    (directory / "flat-9-00000000.faiss").write_bytes(b"written, but the manifest was not")
    (directory / "index.json.tmp").write_bytes(b"{")
    open_and_check(store, directory)
    add(store, "three plums")
    open_and_check(store, directory)
    assert len(list(directory.glob("*.faiss"))) == 1


@pytest.fixture
def many(store, monkeypatch) -> DocumentStore:
    """43 vectors, of which an index takes twelve at once; the thread for the others stands still."""
    monkeypatch.setattr(retrieval.index, "_AT_ONCE", 10)
    monkeypatch.setattr(retrieval.index, "_BREATH_S", 60.0)
    monkeypatch.setattr(DocumentStore.vectors, "__defaults__", (4,))
    for i in range(41):
        add(store, f"apple {i}")
    return store


def test_a_new_index_over_many_vectors_is_filled_behind_the_searches(many, directory, monkeypatch):
    index = open_index(many, directory, EMBEDDER.dim, EMBEDDER.name)
    assert (index.count, index.is_filling, index.generation) == (12, True, many.generation())
    assert not directory.exists()
    add(many, "pear tree")
    many.delete_document(many.list_documents()[1].id)  # one that is in
    many.delete_document(many.list_documents()[-2].id)  # and one that is to come
    index.catch_up(many)
    assert index.count == 12
    assert index.search(EMBEDDER.embed_query("pear tree"), 1)[1] == pytest.approx(1, abs=1e-5)
    index.close()
    index.save(directory)
    assert not directory.exists()  # half of an index is never kept
    monkeypatch.setattr(retrieval.index, "_BREATH_S", 0.001)
    index = open_index(many, directory, EMBEDDER.dim, EMBEDDER.name)
    for i in range(10):
        many.delete_document(many.list_documents()[0].id)
        add(many, f"plum {i}")
        index.catch_up(many)
    index.settle()
    assert not index.is_filling
    index = FaissIndex.load(directory, EMBEDDER.dim, EMBEDDER.name)
    index.catch_up(many)
    assert index.count == many.count_chunks() == 41
    open_and_check(many, directory)


def test_an_index_begun_anew_while_it_is_filled_is_not_filled_twice(many, directory, monkeypatch):
    index = open_index(many, directory, EMBEDDER.dim, EMBEDDER.name)
    monkeypatch.setattr(retrieval.index, "_BREATH_S", 0.0)
    monkeypatch.setattr(many, "knows_generation", lambda generation: generation == 0)
    add(many, "pear tree")
    index.catch_up(many)
    index.settle()
    assert index.count == many.count_chunks() == 44


def test_a_failed_catch_up_is_made_good_by_the_next(store):
    class Broken(ArraySource):
        def vectors(self, after: int, upto: int):
            yield np.array([99]), np.ones((1, 3), dtype=np.float32)

    index = FaissIndex(EMBEDDER.dim, EMBEDDER.name)
    index.catch_up(store)
    broken = Broken(3)
    broken.changes = [({}, [])] * 2
    with pytest.raises(ValueError, match="do not fit"):
        index.catch_up(broken)
    index.catch_up(store)
    assert (index.count, index.generation) == (2, store.generation())
