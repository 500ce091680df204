"""What the indexes need of the store: which chunks came and went since a generation. Part of DocumentStore."""

from collections.abc import Iterator

import numpy as np

from . import store_content as content
from .database import Database
from .types import ChunkText, Position


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

    def require_embedder(self, name: str, dim: int) -> None:
        """Raises EmbedderMismatch if the vectors stored are another embedder's."""
        with self._db.read() as c:
            content.require_embedder(c, name, dim)
