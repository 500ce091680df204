"""Above its limit the index is an inverted file: as good as exact search, exact in what is gone and what is allowed."""

import logging

import numpy as np
import pytest

from retrieval import index as index_module
from retrieval.index import FaissIndex
from retrieval.ivf import LEAST_RECALL, build_ivf

DIM = 16
LIMIT = 2000


class Source:
    """A store's history: what each generation added and removed."""

    def __init__(self) -> None:
        self.added: list[dict[int, np.ndarray]] = []
        self.removed: list[list[int]] = []

    def change(self, added: dict[int, np.ndarray], removed: list[int]) -> None:
        self.added.append(added)
        self.removed.append(removed)

    def alive(self) -> dict[int, np.ndarray]:
        gone = {row for removed in self.removed for row in removed}
        return {row: vector for added in self.added for row, vector in added.items() if row not in gone}

    def generation(self) -> int:
        return len(self.added)

    def knows_generation(self, generation: int) -> bool:
        return 0 <= generation <= len(self.added)

    def removed_chunks(self, after: int, upto: int) -> np.ndarray:
        return np.array([row for removed in self.removed[after:upto] for row in removed], dtype=np.int64)

    def vectors(self, after: int, upto: int):
        alive = self.alive()
        for added in self.added[after:upto]:
            if rows := [row for row in added if row in alive]:
                yield np.array(rows, dtype=np.int64), np.stack([added[row] for row in rows])


def clustered(number: int, seed: int, centres: int = 40, around: int = 0) -> np.ndarray:
    """Unit vectors about a few centres, as texts about a few subjects are."""
    middle = np.random.default_rng(around).standard_normal((centres, DIM))
    rng = np.random.default_rng(seed)
    vectors = middle[rng.integers(0, centres, number)] + 0.3 * rng.standard_normal((number, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def fill(source: Source, number: int, seed: int, first: int, around: int = 0) -> None:
    source.change({first + i: v for i, v in enumerate(clustered(number, seed, around=around))}, [])


def nearest(source: Source, query: np.ndarray, limit: int, allowed: np.ndarray | None = None) -> list[int]:
    alive = source.alive()
    rows = np.array(sorted(alive if allowed is None else set(allowed.tolist()) & alive.keys()), dtype=np.int64)
    scores = np.stack([alive[row] for row in rows.tolist()]) @ query
    return rows[np.argsort(-scores, kind="stable")][:limit].tolist()


def recall(index: FaissIndex, source: Source) -> float:
    shares = [len(set(index.search(q, 10)[0].tolist()) & set(nearest(source, q, 10))) / 10 for q in clustered(50, 99)]
    return float(np.mean(shares))


@pytest.fixture
def source() -> Source:
    source = Source()
    fill(source, LIMIT, 1, 1)
    return source


@pytest.fixture
def index(source) -> FaissIndex:
    """Just trained, over 3,000 vectors."""
    index = FaissIndex(DIM, "e", LIMIT)
    index.catch_up(source)
    assert index.is_exact
    fill(source, 1000, 2, LIMIT + 1)
    index.catch_up(source)
    index.settle()
    assert not index.is_exact and index.count == 3000
    return index


def test_it_finds_what_exact_search_does(index, source):
    assert recall(index, source) >= LEAST_RECALL - 0.02  # other questions than those it was tuned with


def test_what_is_deleted_is_gone_and_what_is_new_is_found(index, source):
    doomed = nearest(source, clustered(1, 5)[0], 300)
    fill(source, 200, 3, 10_000)
    source.change({}, doomed)
    index.catch_up(source)
    assert index.count == 2900
    for query in [clustered(1, 5)[0], *clustered(20, 6)]:
        assert not set(index.search(query, 100)[0].tolist()) & set(doomed)
    new = source.added[2][10_000]
    assert index.search(new, 1)[0].tolist() == [10_000]


@pytest.mark.parametrize("compared_singly", [0, 4096])
def test_within_given_rows_it_is_exact(index, source, compared_singly, monkeypatch):
    monkeypatch.setattr(index_module, "_EXACT_ROWS", compared_singly)
    rng = np.random.default_rng(4)
    for query in clustered(10, 7):
        allowed = np.sort(rng.choice(np.arange(1, 3001), 500, replace=False)).astype(np.int64)
        rows, scores = index.search(query, 20, allowed)
        assert rows.tolist() == nearest(source, query, 20, allowed)
        assert scores == pytest.approx([source.alive()[row] @ query for row in rows.tolist()], abs=1e-5)
    gone = np.array([3, 999_999], dtype=np.int64)
    assert index.search(clustered(1, 7)[0], 5, gone)[0].tolist() == [3]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("together", [False, True])
def test_within_many_rows_it_is_as_good_as_without_a_filter(index, source, share, together, monkeypatch):
    """Also where they lie together and questions elsewhere; what is removed and added counts at once."""
    monkeypatch.setattr(index_module, "_EXACT_ROWS", 0)
    alive = source.alive()
    near = sorted(alive, key=lambda row: -float(alive[row] @ alive[7])) if together else list(alive)
    allowed = np.array(sorted(near[:: 1 if together else 2][: int(share * len(near))]), dtype=np.int64)
    for change in (None, {9000: clustered(1, 60)[0]}):
        if change:
            source.change(change, [int(allowed[0])])
            index.catch_up(source)
            allowed = np.append(allowed, 9000)
        shares = []
        for query in clustered(40, 61):
            rows, scores = index.search(query, 10, allowed)
            assert set(rows.tolist()) <= set(allowed.tolist()) & source.alive().keys()
            assert scores.tolist() == sorted(scores.tolist(), reverse=True)
            shares.append(len(set(rows.tolist()) & set(nearest(source, query, 10, allowed))) / 10)
        assert np.mean(shares) >= LEAST_RECALL - 0.02
    assert index.search(clustered(1, 60)[0], 1, allowed)[0].tolist() == [9000]


def test_a_selection_is_not_taken_for_another(index, monkeypatch):
    monkeypatch.setattr(index_module, "_EXACT_ROWS", 0)
    for number in range(40):
        allowed = np.arange(1 + 70 * number, 71 + 70 * number, dtype=np.int64)
        found = index.search(clustered(1, number)[0], 70, allowed)[0].tolist()
        assert found and set(found) <= set(allowed.tolist())


def test_saved_and_loaded_it_goes_on(index, source, tmp_path):
    index.save(tmp_path)
    loaded = FaissIndex.load(tmp_path, DIM, "e")
    assert (loaded.is_exact, loaded.count, loaded.generation) == (False, 3000, index.generation)
    query = clustered(1, 8)[0]
    assert loaded.search(query, 10)[0].tolist() == index.search(query, 10)[0].tolist()
    source.change({50_000: query}, [1, 2, 3])
    loaded.catch_up(source)
    assert loaded.count == 2998 and loaded.search(query, 1)[0].tolist() == [50_000]


def test_it_is_trained_anew_when_the_vectors_have_drifted(index, source):
    fill(source, 2500, 9, 20_000, around=7)  # other subjects, less than double
    index.catch_up(source)
    index.settle()
    queries = clustered(50, 10, around=7)
    shares = [len(set(index.search(q, 10)[0].tolist()) & set(nearest(source, q, 10))) / 10 for q in queries]
    assert index.count == 5500 and np.mean(shares) >= LEAST_RECALL - 0.02


def test_changes_during_training_are_taken_over(source, monkeypatch):
    index, built = FaissIndex(DIM, "e", LIMIT), []

    def build(*arguments):
        built.append(build_ivf(*arguments))
        source.change({70_000: clustered(1, 12)[0]}, [5, 6])
        index.catch_up(source)  # another thread's: this one is not holding the writer's lock
        return built[-1]

    monkeypatch.setattr(index_module, "build_ivf", build)
    fill(source, 1000, 2, LIMIT + 1)
    index.catch_up(source)
    index.settle()
    assert not index.is_exact and index.count == 2999 and index.generation == 3
    assert index.search(clustered(1, 12)[0], 1)[0].tolist() == [70_000]
    assert not set(index.search(clustered(1, 13)[0], 2999)[0].tolist()) & {5, 6}


def test_a_training_that_outlasts_the_index_changes_nothing(source, tmp_path, monkeypatch):
    """Its directory may be another process' by then."""
    index = FaissIndex(DIM, "e", LIMIT)
    index._directory = tmp_path

    def build(*arguments):
        index.close()
        return build_ivf(*arguments)

    monkeypatch.setattr(index_module, "build_ivf", build)
    fill(source, 1000, 2, LIMIT + 1)
    index.catch_up(source)
    index.settle()
    assert index.is_exact and not list(tmp_path.iterdir())


def test_without_clusters_it_stays_exact(caplog):
    rng, source, index = np.random.default_rng(0), Source(), FaissIndex(256, "e", 1500)
    vectors = rng.standard_normal((2000, 256)).astype(np.float32)
    source.change(dict(enumerate(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))), [])
    with caplog.at_level(logging.WARNING):
        index.catch_up(source)
        index.settle()
    assert index.is_exact and "stays exact" in caplog.text
