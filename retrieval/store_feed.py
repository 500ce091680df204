"""The store's interface for indexes: chunks added and removed since a generation. Part of DocumentStore."""

from collections.abc import Iterator, Sequence

import numpy as np

from . import store_content as content
from . import store_embedder as embedder
from . import store_search as searching
from .database import Database
from .types import Chunk, ChunkText, Position


class IndexFeed:
    """See DocumentStore."""

    _db: Database

    def generation(self) -> int:
        """Increases with every change of the searchable chunks; 0 before the first. Unique within the database."""
        with self._db.read() as c:
            return content.generation(c)

    def knows_generation(self, generation: int) -> bool:
        """Whether changes since then can be listed; False for another history, or too old a generation."""
        with self._db.read() as c:
            return content.knows_generation(c, generation)

    def removed_chunks(self, after: int, upto: int) -> np.ndarray:
        """Rows (int64) removed by generations after < g <= upto."""
        with self._db.read() as c:
            return content.removed_chunks(c, after, upto)

    def vectors(self, after: int, upto: int, batch: int = 8192) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows (n,) int64 and vectors (n, dim) float32 added by generations after < g <= upto that still exist."""
        position = (after + 1, 0)
        while True:
            with self._db.read() as c:
                position, rows, vectors = content.read_vectors(c, position, upto, batch)
            if not len(rows):
                return
            yield rows, vectors

    def chunk_texts(self, after: Position, upto: int, batch: int = 1024) -> Iterator[tuple[Position, list[ChunkText]]]:
        """Batches of existing chunks after position `after`, up to generation `upto`, each with its end position."""
        while True:
            with self._db.read() as c:
                after, found = content.read_texts(c, after, upto, batch)
            if not found:
                return
            yield after, found

    def count_chunks(self) -> int:
        with self._db.read() as c:
            return content.count_chunks(c)

    # Embedder of the vectors

    def require_embedder(self, name: str, dim: int) -> None:
        """Raises EmbedderMismatch if the stored vectors are those of another embedder."""
        with self._db.read() as c:
            embedder.require_embedder(c, name, dim)

    def begin_embedding(self, name: str, dim: int) -> int:
        """Begin or resume computing vectors of another embedder; returns how many chunks lack one."""
        with self._db.write() as c:
            return embedder.begin_embedding(c, name, dim)

    def count_to_embed(self, name: str, dim: int) -> int:
        """Number of chunks without a vector of this embedder, which must not be the one in use."""
        with self._db.read() as c:
            return embedder.count_to_embed(c, name, dim)

    def chunks_to_embed(self, number: int) -> list[tuple[int, str | None, Chunk]]:
        """(row, title of its document, chunk) of the next `number` chunks without a vector of that embedder."""
        with self._db.read() as c:
            return searching.chunks_behind(c, embedder.last_row(c), number)

    def add_vectors(self, name: str, dim: int, rows: Sequence[int], vectors: np.ndarray) -> None:
        """Store them, in the order of `chunks_to_embed`; (len(rows), dim) float32, unit length.

        Raises EmbedderMismatch if vectors of yet another embedder are being computed now.
        """
        with self._db.write() as c:
            embedder.add_vectors(c, name, dim, rows, vectors)

    def uses(self, name: str, dim: int) -> bool:
        """Whether the vectors of this embedder are in use."""
        with self._db.read() as c:
            return embedder.is_in_use(c, name, dim)

    def adopts(self, name: str, dim: int) -> bool:
        """Whether vectors of this embedder are being computed beside those in use."""
        with self._db.read() as c:
            return embedder.is_next(c, name, dim)

    def adopt_embedder(self, name: str, dim: int) -> bool:
        """Switch to that embedder if no chunk lacks a vector; returns whether it did. Rebuild indexes then."""
        with self._db.write() as c:
            return embedder.adopt_embedder(c, name, dim)
