"""What the indexes need of the store: which chunks came and went since a generation. Part of DocumentStore."""

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
        """Grows with every change of the searchable chunks; 0 before the first. Unique to this database's history."""
        with self._db.read() as c:
            return content.generation(c)

    def knows_generation(self, generation: int) -> bool:
        """Whether changes since then can be told; False for another history or one too long ago."""
        with self._db.read() as c:
            return content.knows_generation(c, generation)

    def removed_chunks(self, after: int, upto: int) -> np.ndarray:
        """Rows (int64) removed by generations after < g <= upto."""
        with self._db.read() as c:
            return content.removed_chunks(c, after, upto)

    def vectors(self, after: int, upto: int, batch: int = 8192) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows (n,) int64 and vectors (n, dim) float32 added by generations after < g <= upto and still there."""
        position = (after + 1, 0)
        while True:
            with self._db.read() as c:
                position, rows, vectors = content.read_vectors(c, position, upto, batch)
            if not len(rows):
                return
            yield rows, vectors

    def chunk_texts(self, after: Position, upto: int, batch: int = 1024) -> Iterator[tuple[Position, list[ChunkText]]]:
        """Batches of chunks behind `after` and still there, up to generation `upto`, each with where it ends."""
        while True:
            with self._db.read() as c:
                after, found = content.read_texts(c, after, upto, batch)
            if not found:
                return
            yield after, found

    def count_chunks(self) -> int:
        with self._db.read() as c:
            return content.count_chunks(c)

    # Whose vectors they are

    def require_embedder(self, name: str, dim: int) -> None:
        """Raises EmbedderMismatch if the vectors stored are another embedder's."""
        with self._db.read() as c:
            embedder.require_embedder(c, name, dim)

    def begin_embedding(self, name: str, dim: int) -> int:
        """Go on making vectors of another embedder beside those in use, or begin; returns how many chunks lack one."""
        with self._db.write() as c:
            return embedder.begin_embedding(c, name, dim)

    def count_to_embed(self, name: str, dim: int) -> int:
        """Chunks that have no vector of this embedder, which is not the one in use."""
        with self._db.read() as c:
            return embedder.count_to_embed(c, name, dim)

    def chunks_to_embed(self, number: int) -> list[tuple[int, str | None, Chunk]]:
        """(row, title of its document, chunk) of the next `number` that lack a vector of that embedder."""
        with self._db.read() as c:
            return searching.chunks_behind(c, embedder.last_row(c), number)

    def add_vectors(self, name: str, dim: int, rows: Sequence[int], vectors: np.ndarray) -> None:
        """Keep them, in the order that `chunks_to_embed` gave; (len(rows), dim) float32 of unit length.

        Raises EmbedderMismatch when vectors of yet another embedder are being made by now.
        """
        with self._db.write() as c:
            embedder.add_vectors(c, name, dim, rows, vectors)

    def uses(self, name: str, dim: int) -> bool:
        """Whether it is this embedder's vectors that are in use."""
        with self._db.read() as c:
            return embedder.is_in_use(c, name, dim)

    def adopts(self, name: str, dim: int) -> bool:
        """Whether it is this embedder's vectors that are being made beside those in use."""
        with self._db.read() as c:
            return embedder.is_next(c, name, dim)

    def adopt_embedder(self, name: str, dim: int) -> bool:
        """Use that embedder's vectors from now on, if no chunk lacks one; whether it did. Make indexes anew then."""
        with self._db.write() as c:
            return embedder.adopt_embedder(c, name, dim)
