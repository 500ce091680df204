"""SQL for the embedder of the stored vectors, and for computing vectors of another embedder beside them.

`next_vectors` is filled in the order of chunk rows, in which chunks are added; so the chunks after its last row are
those without a vector, whatever is added or removed meanwhile. `adopt_embedder` replaces `vectors` with it.
"""

import json
import sqlite3
from collections.abc import Sequence

import numpy as np

from .migrations import NEXT_VECTORS

_EMBEDDER = "embedder"
_NEXT = "next_embedder"


class EmbedderMismatch(RuntimeError):
    """The database holds vectors of another embedder; they cannot be compared."""


def remember_embedder(c: sqlite3.Connection, name: str, dim: int) -> None:
    require_embedder(c, name, dim)
    _set(c, _EMBEDDER, (name, dim))


def require_embedder(c: sqlite3.Connection, name: str, dim: int) -> None:
    known_name, known_dim = _get(c, _EMBEDDER) or (name, dim)
    if (known_name, known_dim) != (name, dim) and c.execute("SELECT 1 FROM vectors LIMIT 1").fetchone():
        raise EmbedderMismatch(
            f"the vectors stored were made by {known_name} ({known_dim} numbers each), not by {name} ({dim}): "
            f"{count_to_embed(c, name, dim)} chunks have none of its yet; go back to {known_name} and run "
            f"`jamba-rag reembed`, which makes them while the service answers with the old ones"
        )


def is_in_use(c: sqlite3.Connection, name: str, dim: int) -> bool:
    return _get(c, _EMBEDDER) == (name, dim)


def is_next(c: sqlite3.Connection, name: str, dim: int) -> bool:
    return _get(c, _NEXT) == (name, dim)


def begin_embedding(c: sqlite3.Connection, name: str, dim: int) -> int:
    """Begin or resume computing vectors of this embedder; returns how many chunks lack one."""
    if _get(c, _NEXT) != (name, dim):
        c.execute("DELETE FROM next_vectors")
        _set(c, _NEXT, (name, dim))
    return count_to_embed(c, name, dim)


def count_to_embed(c: sqlite3.Connection, name: str, dim: int) -> int:
    """Number of chunks without a vector of this embedder, which must not be the one in use."""
    last = last_row(c) if _get(c, _NEXT) == (name, dim) else 0
    (count,) = c.execute("SELECT count(*) FROM chunks WHERE row > ?", (last,)).fetchone()
    return count


def add_vectors(c: sqlite3.Connection, name: str, dim: int, rows: Sequence[int], vectors: np.ndarray) -> None:
    """Raises EmbedderMismatch if vectors of another embedder are being computed now. Deleted rows are skipped."""
    if _get(c, _NEXT) != (name, dim):
        raise EmbedderMismatch(f"another `jamba-rag reembed` has begun, for {_get(c, _NEXT)}; end one of them")
    c.executemany(
        "INSERT OR REPLACE INTO next_vectors(chunk_row, vector) SELECT row, ? FROM chunks WHERE row = ?",
        [(vector.astype("<f4").tobytes(), int(row)) for row, vector in zip(rows, vectors, strict=True)],
    )


def adopt_embedder(c: sqlite3.Connection, name: str, dim: int) -> bool:
    """Switch to the vectors of this embedder; False if it is not the next one, or chunks lack vectors."""
    if _get(c, _NEXT) != (name, dim):
        return False
    if c.execute("SELECT 1 FROM chunks WHERE row NOT IN (SELECT chunk_row FROM next_vectors) LIMIT 1").fetchone():
        return False
    c.execute("DROP TABLE vectors")
    c.execute("ALTER TABLE next_vectors RENAME TO vectors")
    c.execute(NEXT_VECTORS)
    _set(c, _EMBEDDER, (name, dim))
    c.execute("DELETE FROM settings WHERE name = ?", (_NEXT,))
    return True


def last_row(c: sqlite3.Connection) -> int:
    """The last chunk row with a vector of the next embedder; 0: none."""
    (last,) = c.execute("SELECT coalesce(max(chunk_row), 0) FROM next_vectors").fetchone()
    return last


def _get(c: sqlite3.Connection, setting: str) -> tuple[str, int] | None:
    row = c.execute("SELECT value FROM settings WHERE name = ?", (setting,)).fetchone()
    return None if row is None else tuple(json.loads(row["value"]))


def _set(c: sqlite3.Connection, setting: str, value: tuple[str, int]) -> None:
    c.execute("INSERT OR REPLACE INTO settings(name, value) VALUES (?, ?)", (setting, json.dumps(value)))
