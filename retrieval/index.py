"""The vector index, which is derived from the store.

Writers only have to call `VectorIndex.catch_up`; searchers call it too, so that they see all changes of the store,
whichever process made them. Start at `open_index`.
"""

import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import faiss
import numpy as np

from .ivf import Within, build_ivf, imbalance, list_numbers, select

_LOG = logging.getLogger(__name__)
_MANIFEST = "index.json"
_LAYOUT = 2
_FLAT_MAX = 200_000
_EXACT_ROWS = 4096  # up to this many allowed rows are scored exhaustively,
_BLOCK_ROWS = 1024  # in blocks that fit the CPU cache
_KEPT_SELECTIONS = 16
_AT_ONCE = 50_000  # vectors added synchronously, which takes about a second; a thread adds the rest,
_BREATH_S = 0.002  # with pauses for other users of the index
_GROWTH = 2.0  # an inverted file is retrained after growing by this factor,
_DRIFT = 1.5  # or when the imbalance of its lists has


class IndexDamaged(ValueError):
    """The files of a saved index are missing, damaged or those of another index; rebuild it from the store."""


class VectorSource(Protocol):
    """The part of DocumentStore that an index needs."""

    def generation(self) -> int: ...
    def knows_generation(self, generation: int) -> bool: ...
    def removed_chunks(self, after: int, upto: int) -> np.ndarray: ...
    def vectors(self, after: int, upto: int) -> Iterator[tuple[np.ndarray, np.ndarray]]: ...


class VectorIndex(Protocol):
    """Finds the nearest chunk rows by inner product. Thread safe."""

    @property
    def count(self) -> int: ...

    @property
    def generation(self) -> int:
        """The store's generation that the index is at; 0: empty."""

    def catch_up(self, source: VectorSource) -> bool:
        """Apply the changes of the store since then; returns whether there were any. Cheap if not."""

    def search(
        self, vector: np.ndarray, limit: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(rows int64, scores float32) of at most `limit` chunks, best first; vector (dim,) float32.

        `allowed`: sorted chunk rows (int64), filtered during the search; None: all. Do not modify it: it is cached.
        """

    def save(self, directory: Path) -> None:
        """Write the index atomically: after a crash the files are either the old or the new ones."""


@dataclass(frozen=True, slots=True)
class _Manifest:
    layout: int
    file: str
    blake2b: str
    generation: int
    count: int
    dim: int
    embedder: str
    trained: int
    balance: float


class FaissIndex:
    """Exact search up to `flat_max` vectors (`IndexFlatIP`), then an inverted file; 1.5 KB per chunk at dim 384.

    The inverted file is trained in the background when there are too many vectors for exact search, and retrained after
    growth or drift; it is used only if its recall is at least 98% of exact search. Filtered searches are exact up to
    4,096 allowed rows, and otherwise about as good as unfiltered ones.
    """

    def __init__(self, dim: int, embedder_name: str, flat_max: int = _FLAT_MAX) -> None:
        self._dim = dim
        self._flat_max = flat_max
        self._trained = 0  # number of vectors when the inverted file was trained; 0: flat
        self._balance = 1.0  # imbalance of its lists at that time
        self._refused = 0  # number of vectors for which no inverted file was good enough
        self._trainer: threading.Thread | None = None
        self._directory: Path | None = None  # where it is saved after expensive work
        self._filler: threading.Thread | None = None
        self._closing, self._filling = threading.Event(), False  # it is filled before the thread ends, which saves it
        self._embedder_name = embedder_name
        self._generation = 0
        self._index = _empty_index(dim)
        self._lists: np.ndarray | None = None  # row -> list of the inverted file, for filtered searches
        self._prepared: dict[int, tuple[np.ndarray, Within]] = {}
        self._lock = threading.Lock()  # around each use of self._index: FAISS does not allow reads during writes
        self._writer = threading.Lock()  # one catch-up at a time
        self._saver = threading.Lock()  # one save at a time

    @property
    def count(self) -> int:
        return self._index.ntotal

    @property
    def generation(self) -> int:
        return self._generation

    def catch_up(self, source: VectorSource) -> bool:
        if source.generation() == self._generation:
            return False
        with self._writer:
            upto, after = source.generation(), self._generation
            if upto == after:
                return False
            if after > upto or not source.knows_generation(after):
                _LOG.warning("vector index at generation %d is not of this database's history: rebuilding it", after)
                after = 0
            if after == 0:
                self._rebuild(source, upto)
            else:
                self._advance(source, after, upto)
            self._consider_training(source)
            return True

    @property
    def is_exact(self) -> bool:
        """Whether searches are exhaustive instead of probing some lists."""
        return self._trained == 0

    @property
    def is_filling(self) -> bool:
        """Whether a thread is still adding vectors that the index lacks."""
        return self._filling

    def settle(self) -> None:
        """Wait until the index is neither being filled nor trained."""
        for name in ("_filler", "_trainer"):
            if (thread := getattr(self, name)) is not None:
                thread.join()

    def close(self) -> None:
        """Stop filling; the next start adds the rest from the store. The result of a running training is discarded."""
        self._closing.set()
        if (filler := self._filler) is not None:
            filler.join()

    def _rebuild(self, source: VectorSource, upto: int) -> None:
        """Rebuild from scratch; beyond 50,000 vectors in the background, while searches find those already added."""
        fresh, batches = _empty_index(self._dim), source.vectors(0, upto)
        for rows, vectors in batches:
            fresh.add_with_ids(self._checked(vectors), rows)
            if fresh.ntotal >= _AT_ONCE:
                break
        with self._lock:
            self._index, self._generation, self._trained = fresh, upto, 0
        self._filling = fresh.ntotal >= _AT_ONCE
        if self._filling:
            _LOG.warning("vector index: more than %d vectors are still to come from the database", fresh.ntotal)
            self._filler = threading.Thread(
                target=self._fill, args=(source, fresh, batches), name="index-filling", daemon=True
            )
            self._filler.start()

    def _fill(self, source: VectorSource, fresh: faiss.Index, batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> None:
        """Add the remaining vectors batch by batch; later changes are added meanwhile by `catch_up`."""
        trains = False
        try:
            while not self._closing.wait(_BREATH_S):
                with self._writer:
                    if self._index is not fresh:  # rebuilt meanwhile
                        return
                    rows, vectors = next(batches, (None, None))
                    if rows is None:
                        self._filling = False
                        _LOG.info("vector index: complete with %d vectors", fresh.ntotal)
                        trains = self._consider_training(source)
                        break
                    vectors = self._checked(vectors)
                    with self._lock:
                        fresh.add_with_ids(vectors, rows)
            if not self.is_filling and not trains:  # training saves it, too
                self._keep()
        except Exception:
            if not self._closing.is_set():
                _LOG.exception("cannot fill the vector index; the next search starts over")
                self._generation = 0

    def _keep(self) -> None:
        if self._directory is not None:
            try:
                self.save(self._directory)
            except OSError:
                _LOG.exception("cannot save the vector index; it is rebuilt at the next start")

    def _consider_training(self, source: VectorSource) -> bool:
        """Start a training thread if due; returns whether it did. The caller holds `_writer`."""
        count = self._index.ntotal
        if count <= self._flat_max or count < _GROWTH * self._refused or self._filling:
            return False
        if self._trainer and self._trainer.is_alive():
            return False
        grown = count > _GROWTH * self._trained  # also when it was never trained
        if not grown and imbalance(self._index) <= _DRIFT * self._balance:
            return False
        self._trainer = threading.Thread(target=self._train, args=(source,), name="index-training", daemon=True)
        self._trainer.start()
        return True

    def _train(self, source: VectorSource) -> None:
        """Build an inverted file beside the index in use, then update it and switch to it."""
        upto, count = self._generation, self._index.ntotal
        try:
            built = build_ivf(source.vectors(0, upto), source.vectors(0, upto), count, self._dim)
            if self._closing.is_set():  # the directory may belong to another process by now
                return
            with self._writer:
                if built is None:
                    self._refused = count
                    _LOG.warning("vector index stays exact: no inverted file over %d vectors is good enough", count)
                elif self._generation >= upto and source.knows_generation(upto):
                    _change(built.index, *self._changes(source, upto, self._generation))
                    with self._lock:
                        self._index, self._trained = built.index, built.trained
                        self._forget_prepared()
                        self._balance = imbalance(built.index)
                    numbers = (built.trained, built.index.nlist, built.index.nprobe, built.recall)
                    _LOG.info("vector index: %d vectors in %d lists, %d probed, recall@10 %.3f", *numbers)
            self._keep()
        except Exception:
            if not self._closing.is_set():
                _LOG.exception("cannot train the vector index; the one in use goes on")

    def _changes(
        self, source: VectorSource, after: int, upto: int
    ) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        """Rows removed and (rows, vectors) added."""
        added = [(rows, self._checked(vectors)) for rows, vectors in source.vectors(after, upto)]
        return source.removed_chunks(after, upto), added

    def _advance(self, source: VectorSource, after: int, upto: int) -> None:
        changes = self._changes(source, after, upto)
        with self._lock:
            self._generation = 0  # if the rest fails, the next call rebuilds
            self._forget_prepared()
            _change(self._index, *changes)
            self._generation = upto

    def _checked(self, vectors: np.ndarray) -> np.ndarray:
        if vectors.shape[1] != self._dim:
            raise ValueError(f"vectors of {vectors.shape[1]} numbers do not fit an index of {self._dim}")
        return np.ascontiguousarray(vectors, dtype=np.float32)

    def search(
        self, vector: np.ndarray, limit: int, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        query = self._checked(vector[None])
        if allowed is not None and not len(allowed):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        with self._lock:
            number = min(limit, max(1, self._index.ntotal))
            if allowed is None:
                scores, rows = self._index.search(query, number)
            elif self._trained == 0:
                params = faiss.SearchParameters(sel=select(allowed))
                scores, rows = self._index.search(query, number, params=params)
            elif len(allowed) <= _EXACT_ROWS and (read := _score_rows(self._index, query[0], allowed)) is not None:
                return _rank(allowed, read, limit)
            else:
                scores, rows = self._prepare(self._index, allowed).search(self._index, query, number)
        scores, rows = scores.reshape(-1), rows.reshape(-1)
        return rows[rows >= 0], scores[rows >= 0]

    def _forget_prepared(self) -> None:
        self._lists = None
        self._prepared.clear()

    def _prepare(self, index: faiss.IndexIVFFlat, allowed: np.ndarray) -> Within:
        """The caller holds `_lock`."""
        if self._lists is None:
            self._lists = list_numbers(index)
        known = self._prepared.pop(id(allowed), None)
        within = known[1] if known else Within(index, allowed, self._lists)
        self._prepared[id(allowed)] = (allowed, within)  # the reference keeps the id from being reused
        while len(self._prepared) > _KEPT_SELECTIONS:
            del self._prepared[next(iter(self._prepared))]
        return within

    def save(self, directory: Path) -> None:
        """As `VectorIndex.save`; does nothing while the index is being filled."""
        if self.is_filling:
            return
        directory.mkdir(parents=True, exist_ok=True)
        with self._saver:
            with self._writer:  # searches are not blocked
                generation, count = self._generation, self._index.ntotal
                trained, balance = self._trained, self._balance
                content = faiss.serialize_index(self._index)
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            name = f"{'ivf' if trained else 'flat'}-{generation}-{digest[:8]}.faiss"
            manifest = _Manifest(
                *(_LAYOUT, name, digest, generation, count, self._dim, self._embedder_name, trained, balance)
            )
            _write_durably(directory / name, memoryview(content))
            _write_durably(directory / _MANIFEST, json.dumps(asdict(manifest)).encode())
            for old in directory.glob("*.faiss"):
                if old.name != name:
                    old.unlink()

    @classmethod
    def load(cls, directory: Path, dim: int, embedder_name: str) -> "FaissIndex":
        """Raises IndexDamaged if there is no complete index of this dimension and embedder."""
        try:
            manifest = _Manifest(**json.loads((directory / _MANIFEST).read_bytes()))
            if (manifest.layout, manifest.dim, manifest.embedder) != (_LAYOUT, dim, embedder_name):
                raise IndexDamaged(f"{directory} holds an index of {manifest.embedder}, not of {embedder_name}")
            content = np.memmap(directory / Path(manifest.file).name, dtype=np.uint8, mode="r")
        except (OSError, ValueError, TypeError) as error:
            raise IndexDamaged(f"{directory / _MANIFEST}: {error}") from error
        if hashlib.blake2b(content, digest_size=16).hexdigest() != manifest.blake2b:
            raise IndexDamaged(f"{directory / manifest.file} is not what was written (checksum)")
        index = cls(dim, embedder_name)
        index._index = faiss.deserialize_index(content)
        index._generation = manifest.generation
        index._trained, index._balance = manifest.trained, manifest.balance
        return index


def open_index(source: VectorSource, directory: Path | str, dim: int, embedder_name: str) -> FaissIndex:
    """The saved index, updated, or a new one if that is damaged; a large one is filled in the background.

    The saved files are replaced if they were not up to date.
    """
    directory = Path(directory)
    try:
        index = FaissIndex.load(directory, dim, embedder_name)
    except IndexDamaged as error:
        if directory.exists():
            _LOG.warning("vector index: %s: rebuilding it", error)
        index = FaissIndex(dim, embedder_name)
    index._directory = directory
    if index.catch_up(source):
        index.save(directory)
    return index


def _empty_index(dim: int) -> faiss.IndexIDMap2:
    return faiss.IndexIDMap2(faiss.IndexFlatIP(dim))


def _change(index: faiss.Index, removed: np.ndarray, added: list[tuple[np.ndarray, np.ndarray]]) -> None:
    if len(removed):
        has_map = isinstance(index, faiss.IndexIVFFlat)  # fast, but needs an array
        index.remove_ids(faiss.IDSelectorArray(removed) if has_map else faiss.IDSelectorBatch(removed))
    for rows, vectors in added:
        index.add_with_ids(vectors, rows)


def _score_rows(index: faiss.IndexIVFFlat, query: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
    """(len(rows),) inner products; None if one of the rows has been removed."""
    scores = np.empty(len(rows), dtype=np.float32)
    try:
        for start in range(0, len(rows), _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            scores[block] = index.reconstruct_batch(rows[block]) @ query
    except RuntimeError:
        return None
    return scores


def _rank(rows: np.ndarray, scores: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    best = np.argsort(-scores, kind="stable")[:limit]
    return rows[best], scores[best].astype(np.float32)


def _write_durably(path: Path, content: bytes | memoryview) -> None:
    """Replace `path` atomically and durably."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
