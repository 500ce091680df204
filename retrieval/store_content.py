"""SQL that changes or enumerates searchable content: text, chunks, vectors, and generations.

Each change of the searchable chunks is a generation. Chunks record the generation that added them, `removed_chunks` the
one that removed them, so that all changes since a given generation can be listed. Numbers follow the clock, so that a
database restored from a backup never reuses a number.
"""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from .store_embedder import remember_embedder
from .types import Chunk, ChunkText, DocumentError, Heading, IndexChange, Page, ParsedDocument, Position

_KEPT_GENERATIONS = 10_000


def check_chunks(parsed: ParsedDocument, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
    """Raise ValueError unless every chunk is its span of the text and has a vector of unit length."""
    if vectors.ndim != 2 or len(vectors) != len(chunks) or vectors.dtype != np.float32:
        raise ValueError(
            f"vectors must be ({len(chunks)}, dim) float32, one a chunk; got {vectors.shape} {vectors.dtype}"
        )
    lengths = np.linalg.norm(vectors, axis=1)
    if not np.all(np.abs(lengths - 1) < 1e-3):  # NaN fails too
        raise ValueError("vectors must be of unit length and finite")
    for chunk in chunks:
        if parsed.text[chunk.char_start : chunk.char_end] != chunk.text:
            span = f"[{chunk.char_start}:{chunk.char_end}]"
            raise ValueError(f"chunk {chunk.id} is not the document's text{span}")


def replace_content(
    c: sqlite3.Connection,
    document_row: int,
    parsed: ParsedDocument,
    chunks: Sequence[Chunk],
    vectors: np.ndarray,
    embedder_name: str,
    now: float,
) -> IndexChange:
    """Make the newest version current, with this content; drop the previous one."""
    if len(chunks):
        remember_embedder(c, embedder_name, vectors.shape[1])
    removed = _remove_rows(c, [document_row])
    generation = _next_generation(c, removed, now)
    replaced = c.execute(
        """DELETE FROM versions WHERE document_row = ?
        AND version != (SELECT newest_version FROM documents WHERE row = ?) RETURNING sha256""",
        (document_row, document_row),
    ).fetchall()
    c.execute("UPDATE documents SET current_version = newest_version WHERE row = ?", (document_row,))
    (filename,) = c.execute(
        """UPDATE versions SET status = 'ready', done = ?, total = ?, unit = 'chunks', error = ?, title = ?,
            media_type = ?, pages = ?, chunks = ?, tokens = ?, lease_owner = NULL, lease_until = NULL, updated_at = ?
        WHERE document_row = ? RETURNING filename""",
        (
            *(len(chunks), len(chunks), _dump_unread(parsed), parsed.title, parsed.media_type),
            len(parsed.pages) or None,
            *(len(chunks), sum(chunk.tokens for chunk in chunks), now, document_row),
        ),
    ).fetchone()
    c.execute(
        "INSERT INTO contents(document_row, text, pages, headings) VALUES (?, ?, ?, ?)",
        (document_row, parsed.text, _dump(parsed.pages), _dump(parsed.headings)),
    )
    added = [_insert_chunk(c, document_row, generation, chunk, f"{filename}\n{parsed.title or ''}") for chunk in chunks]
    c.executemany(
        "INSERT INTO vectors(chunk_row, vector) VALUES (?, ?)",
        [(row, vector.astype("<f4").tobytes()) for row, vector in zip(added, vectors, strict=True)],
    )
    return IndexChange(generation, tuple(added), tuple(removed), tuple(sha256 for (sha256,) in replaced))


def _dump_unread(parsed: ParsedDocument) -> str | None:
    return parsed.unread and json.dumps(asdict(DocumentError("partly_read", parsed.unread, retryable=False)))


def _dump(items: Sequence[Page] | Sequence[Heading]) -> str:
    return json.dumps(items, ensure_ascii=False)


def _insert_chunk(c: sqlite3.Connection, document_row: int, generation: int, chunk: Chunk, source: str) -> int:
    context = "\n".join((source, *chunk.heading_path))
    (row,) = c.execute(
        """INSERT INTO chunks(document_row, ordinal, generation, id, char_start, char_end, page_start, page_end,
            heading_path, tokens, context, text) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING row""",
        (
            *(document_row, chunk.ordinal, generation, chunk.id, chunk.char_start, chunk.char_end, chunk.page_start),
            *(chunk.page_end, json.dumps(chunk.heading_path), chunk.tokens, context, chunk.text),
        ),
    ).fetchone()
    return row


def remove_content(c: sqlite3.Connection, document_rows: Sequence[int], now: float) -> IndexChange:
    """Remove the content of these documents."""
    removed = _remove_rows(c, document_rows)
    return IndexChange(_next_generation(c, removed, now), (), tuple(removed))


def _remove_rows(c: sqlite3.Connection, document_rows: Sequence[int]) -> list[int]:
    removed = []
    for document_row in document_rows:
        removed += [row for (row,) in c.execute("SELECT row FROM chunks WHERE document_row = ?", (document_row,))]
        c.execute("DELETE FROM chunks WHERE document_row = ?", (document_row,))
        if c.execute("DELETE FROM contents WHERE document_row = ?", (document_row,)).rowcount:
            c.execute("INSERT OR IGNORE INTO to_forget SELECT id FROM documents WHERE row = ?", (document_row,))
    return removed


def to_forget(c: sqlite3.Connection) -> list[str]:
    return [document_id for (document_id,) in c.execute("SELECT document_id FROM to_forget")]


def forgotten(c: sqlite3.Connection, document_ids: Sequence[str]) -> None:
    c.executemany("DELETE FROM to_forget WHERE document_id = ?", [(document_id,) for document_id in document_ids])


def generation(c: sqlite3.Connection) -> int:
    (newest,) = c.execute("SELECT coalesce(max(generation), 0) FROM generations").fetchone()
    return newest


def _next_generation(c: sqlite3.Connection, removed: Sequence[int], now: float) -> int:
    following = max(generation(c) + 1, int(now * 1e6))
    c.execute("INSERT INTO generations VALUES (?)", (following,))
    c.executemany("INSERT INTO removed_chunks VALUES (?, ?)", [(following, row) for row in removed])
    oldest = c.execute(
        "SELECT generation FROM generations ORDER BY generation DESC LIMIT 1 OFFSET ?", (_KEPT_GENERATIONS,)
    ).fetchone()
    if oldest is not None:
        c.execute("DELETE FROM generations WHERE generation <= ?", tuple(oldest))
        c.execute("DELETE FROM removed_chunks WHERE generation <= ?", tuple(oldest))
    return following


def knows_generation(c: sqlite3.Connection, wanted: int) -> bool:
    return wanted == 0 or c.execute("SELECT 1 FROM generations WHERE generation = ?", (wanted,)).fetchone() is not None


def removed_chunks(c: sqlite3.Connection, after: int, upto: int) -> np.ndarray:
    rows = c.execute(
        "SELECT chunk_row FROM removed_chunks WHERE generation > ? AND generation <= ?", (after, upto)
    ).fetchall()
    return np.array([row for (row,) in rows], dtype=np.int64)


def read_vectors(
    c: sqlite3.Connection, position: Position, upto: int, batch: int
) -> tuple[Position, np.ndarray, np.ndarray]:
    """(next position, rows, vectors) of the next `batch` chunks."""
    found = c.execute(
        """SELECT c.generation, c.row, v.vector FROM chunks c JOIN vectors v ON v.chunk_row = c.row
        WHERE (c.generation, c.row) > (?, ?) AND c.generation <= ? ORDER BY c.generation, c.row LIMIT ?""",
        (*position, upto, batch),
    ).fetchall()
    if not found:
        return position, np.empty(0, dtype=np.int64), np.empty((0, 0), dtype=np.float32)
    rows = np.array([row for _, row, _ in found], dtype=np.int64)
    vectors = np.frombuffer(b"".join(vector for _, _, vector in found), dtype="<f4").reshape(len(found), -1)
    return (found[-1]["generation"], found[-1]["row"]), rows, vectors.astype(np.float32, copy=False)


def read_texts(c: sqlite3.Connection, position: Position, upto: int, batch: int) -> tuple[Position, list[ChunkText]]:
    """(next position, the next `batch` chunks)."""
    found = c.execute(
        """SELECT c.generation, c.row, d.collection_row, c.document_row, c.text, c.context
        FROM chunks c JOIN documents d ON d.row = c.document_row
        WHERE (c.generation, c.row) > (?, ?) AND c.generation <= ? ORDER BY c.generation, c.row LIMIT ?""",
        (*position, upto, batch),
    ).fetchall()
    if not found:
        return position, []
    return (found[-1]["generation"], found[-1]["row"]), [tuple(row)[1:] for row in found]


def count_chunks(c: sqlite3.Connection) -> int:
    (count,) = c.execute("SELECT count(*) FROM chunks").fetchone()  # counting vectors would read all of them
    return count


def check(c: sqlite3.Connection) -> list[str]:
    faults = [text for (text,) in c.execute("PRAGMA quick_check") if text != "ok"]
    faults += [f"a row of {row['table']} refers to nothing" for row in c.execute("PRAGMA foreign_key_check")]
    (without,) = c.execute("SELECT count(*) FROM chunks WHERE row NOT IN (SELECT chunk_row FROM vectors)").fetchone()
    return faults + ([f"{without} chunks have no vector"] if without else [])
