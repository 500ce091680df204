"""Builds an inverted file (IVF) index: trains it on a sample and tunes `nprobe` for recall.

index.py decides when one is built, and keeps it up to date. Start at `build_ivf`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np

# Recall@10 for synthetic queries; real ones have 0.97: docs/retrieval.md
LEAST_RECALL = 0.98
_LISTS_PER_ROOT = 2.0
_TRAINING_PER_LIST = 50
_TRAINING_ROUNDS = 8
_QUERIES = 256
_NEAREST = 10
_MOST_PROBED = 0.5  # share of the lists; with more, exact search is as fast
_MORE_PROBED = 15  # filtered searches probe up to this many times `nprobe` beyond what their share needs,
_MOST_READ = 8  # and score up to this many times as many rows as unfiltered ones
_BLENDED = 3  # stored vectors that a synthetic query is a mixture of,
_NOISE = 1.0  # and the length of the noise added to it, because real queries lie apart from all passages

Batches = Iterator[tuple[np.ndarray, np.ndarray]]  # rows (n,) int64, vectors (n, dim) float32


@dataclass(frozen=True, slots=True)
class BuiltIndex:
    """`recall` was measured with `index.nprobe`; `trained`: number of vectors at that time."""

    index: faiss.IndexIVFFlat
    recall: float
    trained: int


def build_ivf(first: Batches, again: Batches, count: int, dim: int) -> BuiltIndex | None:
    """Train on a sample of `first`, fill from `again` (the same vectors), and choose `nprobe` for the target recall.

    None if that needs more than half of the lists, because the vectors do not form clusters. Needs memory for the index
    and for the sample, which is at most a fifth of it.
    """
    rng = np.random.default_rng(count)
    lists = max(1, min(int(_LISTS_PER_ROOT * math.sqrt(count)), count // _TRAINING_PER_LIST))
    sample = _take_sample(first, count, lists * _TRAINING_PER_LIST, rng)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.niter, index.cp.seed = _TRAINING_ROUNDS, 42
    index.train(sample)
    index.set_direct_map_type(faiss.DirectMap.Hashtable)  # to remove and read single rows without a scan
    exact = _Nearest(_make_queries(sample, rng))
    for rows, vectors in again:
        index.add_with_ids(vectors, rows)
        exact.add(rows, vectors)
    for probed in (2**power for power in range(3, 32)):
        if probed > _MOST_PROBED * lists:
            return None
        index.nprobe = probed
        recall = exact.recall(index.search(exact.queries, _NEAREST)[1])
        if recall >= LEAST_RECALL:
            return BuiltIndex(index, recall, index.ntotal)
    return None


def imbalance(index: faiss.IndexIVFFlat) -> float:
    """Relative cost of a probe compared with lists of equal length; 1: equal."""
    return index.invlists.imbalance_factor()


def _take_sample(batches: Batches, count: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    share = min(1.0, 1.1 * wanted / max(1, count))
    parts = [vectors[rng.random(len(vectors)) < share] for _, vectors in batches]
    return np.ascontiguousarray(np.concatenate(parts)[:wanted], dtype=np.float32)


def _make_queries(sample: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    between = _unit(sample[rng.choice(len(sample), (_QUERIES, _BLENDED))].sum(axis=1))
    noise = rng.standard_normal(between.shape).astype(np.float32)
    return _unit(between + _NOISE * _unit(noise))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Within:
    """A row filter for searches of one inverted file, prepared for reuse."""

    def __init__(self, index: faiss.IndexIVFFlat, allowed: np.ndarray, lists: np.ndarray) -> None:
        """`allowed`: sorted rows (int64); `lists`: `list_numbers` of the current index."""
        self.selector = select(allowed)
        inside = lists[allowed[: np.searchsorted(allowed, len(lists))]]
        self._counts = np.bincount(inside[inside >= 0], minlength=index.nlist)
        self._share = self._counts.sum() / max(1, index.ntotal)

    def search(self, index: faiss.IndexIVFFlat, query: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """(scores, rows), padded with row -1; query (1, dim).

        Probes only lists that contain allowed rows: enough that about as many rows are scored as without a filter, and
        some more, because the allowed rows may be clustered far from the query; scores up to eight times as many rows.
        """
        scores, rows = np.empty(limit, dtype=np.float32), np.full(limit, -1, dtype=np.int64)
        near, order = index.quantizer.search(query, index.nlist)
        holding = self._counts[order[0]] > 0
        order, near = np.ascontiguousarray(order[0][holding]), np.ascontiguousarray(near[0][holding])
        read = np.cumsum(self._counts[order])
        usual = index.nprobe * index.ntotal / index.nlist
        least, most = np.searchsorted(read, (usual, _MOST_READ * usual)) + 1
        alike = index.nprobe / max(self._share, 1e-9)
        probed = min(len(order), most, max(least, math.ceil(alike + min(alike, _MORE_PROBED * index.nprobe))))
        if probed:
            params = faiss.SearchParametersIVF(sel=self.selector, nprobe=int(probed))
            pointers = [faiss.swig_ptr(array) for array in (query, order, near, scores, rows)]
            index.search_preassigned_c(1, pointers[0], limit, *pointers[1:], False, params)
        return scores, rows


def select(rows: np.ndarray) -> faiss.IDSelectorBitmap:
    """A bitmap selector of sorted rows."""
    bits = np.zeros(int(rows[-1]) + 1, dtype=bool)
    bits[rows] = True
    return faiss.IDSelectorBitmap(np.packbits(bits, bitorder="little"))


def list_numbers(index: faiss.IndexIVFFlat) -> np.ndarray:
    """Row -> number of its list (int32), -1 for rows that do not exist."""
    sizes = [index.invlists.list_size(number) for number in range(index.nlist)]
    filled = [number for number, size in enumerate(sizes) if size]
    rows = [faiss.rev_swig_ptr(index.invlists.get_ids(number), sizes[number]) for number in filled]
    found = np.full(max((int(part.max()) for part in rows), default=-1) + 1, -1, dtype=np.int32)
    for number, part in zip(filled, rows, strict=True):
        found[part] = number
    return found


class _Nearest:
    """The exact ten nearest rows of each query, accumulated over batches."""

    def __init__(self, queries: np.ndarray) -> None:
        self.queries = queries
        self._rows = np.full((len(queries), _NEAREST), -1, dtype=np.int64)
        self._scores = np.full((len(queries), _NEAREST), -np.inf, dtype=np.float32)

    def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        scores = np.concatenate([self._scores, self.queries @ vectors.T], axis=1)
        rows = np.concatenate([self._rows, np.broadcast_to(rows, (len(self.queries), len(rows)))], axis=1)
        best = np.argpartition(-scores, _NEAREST - 1, axis=1)[:, :_NEAREST]
        self._rows = np.take_along_axis(rows, best, axis=1)
        self._scores = np.take_along_axis(scores, best, axis=1)

    def recall(self, found: np.ndarray) -> float:
        pairs = zip(self._rows, found, strict=True)
        return float(np.mean([len(set(wanted.tolist()) & set(got.tolist())) / _NEAREST for wanted, got in pairs]))
