"""SQL that reads content: whole documents, chunks by position, the scope of a search, and hits."""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .store_documents import collection_rows, get_current, ready_rows
from .types import Chunk, Filters, Heading, Hit, Page, ParsedDocument


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The scope of a search. All None: everything. `chunk_rows`: sorted int64, all chunks in scope.

    `document_rows` None: all documents of the collections.
    """

    collection_rows: tuple[int, ...] | None = None
    document_rows: tuple[int, ...] | None = None
    chunk_rows: np.ndarray | None = None

    @property
    def is_empty(self) -> bool:
        return self.chunk_rows is not None and len(self.chunk_rows) == 0


def get_content(c: sqlite3.Connection, document_id: str) -> ParsedDocument:
    document_row, document = get_current(c, document_id)
    row = c.execute("SELECT text, pages, headings FROM contents WHERE document_row = ?", (document_row,)).fetchone()
    pages, headings = _load_pages(row), _load_headings(row)
    return ParsedDocument(row["text"], pages, headings, document.title, document.media_type)


def _load_pages(row: sqlite3.Row) -> tuple[Page, ...]:
    return tuple(Page(*values) for values in json.loads(row["pages"]))


def _load_headings(row: sqlite3.Row) -> tuple[Heading, ...]:
    return tuple(Heading(*values) for values in json.loads(row["headings"]))


def get_chunks(c: sqlite3.Connection, document_id: str) -> list[Chunk]:
    document_row, _ = get_current(c, document_id)
    rows = c.execute("SELECT * FROM chunks WHERE document_row = ? ORDER BY ordinal", (document_row,))
    return [_chunk(row, document_id) for row in rows]


def chunk_spans(c: sqlite3.Connection, document_id: str) -> list[tuple[int, int]]:
    document_row, _ = get_current(c, document_id)
    rows = c.execute("SELECT char_start, char_end FROM chunks WHERE document_row = ? ORDER BY ordinal", (document_row,))
    return [tuple(row) for row in rows]


def chunks_behind(c: sqlite3.Connection, row: int, number: int) -> list[tuple[int, str | None, Chunk]]:
    """(row, title of its document, chunk) of the next `number` chunks after `row`."""
    rows = c.execute(
        """SELECT c.*, d.id AS document_id, v.title FROM chunks c JOIN documents d ON d.row = c.document_row
        JOIN versions v ON v.document_row = d.row AND v.version = d.current_version
        WHERE c.row > ? ORDER BY c.row LIMIT ?""",
        (row, number),
    )
    return [(row["row"], row["title"], _chunk(row, row["document_id"])) for row in rows]


def chunk_at(c: sqlite3.Connection, document_id: str, char_start: int, char_end: int) -> Chunk | None:
    document_row, _ = get_current(c, document_id)
    row = c.execute(
        """SELECT * FROM chunks WHERE document_row = ? AND char_start < ? AND char_end > ?
        ORDER BY min(char_end, ?) - max(char_start, ?) DESC, ordinal LIMIT 1""",
        (document_row, char_end, char_start, char_end, char_start),
    ).fetchone()
    return None if row is None else _chunk(row, document_id)


def _chunk(row: sqlite3.Row, document_id: str) -> Chunk:
    return Chunk(
        *(row["id"], document_id, row["ordinal"], row["char_start"], row["char_end"], row["text"]),
        *(row["page_start"], row["page_end"], tuple(json.loads(row["heading_path"])), row["tokens"]),
    )


def select_chunks(
    c: sqlite3.Connection, collections: Sequence[str], document_ids: Sequence[str] | None, filters: Filters | None
) -> Selection:
    named, whole = set(collection_rows(c, collections)), document_ids is None and not filters
    filled = {row for (row,) in c.execute("SELECT DISTINCT collection_row FROM documents")}
    if whole and filled <= named:
        return Selection()
    rows = tuple(row["document_row"] for row in ready_rows(c, collections, document_ids, filters))
    chunks = c.execute(
        "SELECT row FROM chunks WHERE document_row IN (SELECT value FROM json_each(?)) ORDER BY row",
        (json.dumps(rows),),
    ).fetchall()
    among = None if filled <= named else tuple(sorted(named))
    return Selection(among, None if whole else rows, np.array([row for (row,) in chunks], dtype=np.int64))


def load_hits(c: sqlite3.Connection, chunk_rows: Sequence[int]) -> dict[int, Hit]:
    rows = c.execute(
        """SELECT c.*, d.id AS document_id, k.name AS collection, v.filename, v.title, v.metadata, v.version
        FROM chunks c JOIN documents d ON d.row = c.document_row JOIN collections k ON k.row = d.collection_row
        JOIN versions v ON v.document_row = d.row AND v.version = d.current_version
        WHERE c.row IN (SELECT value FROM json_each(?))""",
        (json.dumps([int(row) for row in chunk_rows]),),
    )
    return {row["row"]: _hit(row) for row in rows}


def _hit(row: sqlite3.Row) -> Hit:
    return Hit(
        chunk=_chunk(row, row["document_id"]),
        filename=row["filename"],
        collection=row["collection"],
        score=0.0,
        scores={},
        attributes=json.loads(row["metadata"]),
        document_version=row["version"],
        title=row["title"],
    )
