"""SQL for collections, documents and their versions; each function runs inside a transaction of its caller.

A document has at most two versions: the current one (`current_version`) and a newer one being ingested.
"""

import json
import re
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from uuid import uuid4

from . import store_content as content
from .types import Collection, Document, DocumentError, Filters, FilterValue, IndexChange, OnConflict, Progress, Status

DEFAULT_COLLECTION = "default"


class CollectionNotFound(ValueError):
    """No collection has this name."""


class CollectionExists(ValueError):
    """The name is taken."""


class DocumentNotFound(ValueError):
    """No document has this id."""


class DocumentNotReady(ValueError):
    """No version of the document is ready yet."""


class DuplicateDocument(ValueError):
    """The collection already has the document `document_id` with the same bytes."""

    def __init__(self, document_id: str, filename: str, collection: str) -> None:
        super().__init__(f"the same bytes are document {document_id} ({filename!r}) in collection {collection!r}")
        self.document_id = document_id


@dataclass(frozen=True, slots=True)
class Upload:
    filename: str
    media_type: str
    nbytes: int
    sha256: str
    metadata: Mapping[str, object]


def create_collection(c: sqlite3.Connection, name: str, now: float) -> Collection:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"collection name {name[:80]!r} is not 1 to 64 of a-z A-Z 0-9 . _ - after a letter or digit")
    try:
        c.execute("INSERT INTO collections(name, created_at) VALUES (?, ?)", (name, now))
    except sqlite3.IntegrityError as error:
        raise CollectionExists(f"there is a collection {name!r} already") from error
    return get_collection(c, name)


_COLLECTIONS = """
    SELECT k.name, k.created_at, count(cur.version) AS documents, coalesce(sum(cur.chunks), 0) AS chunks,
        coalesce(sum(cur.tokens), 0) AS tokens,
        coalesce(sum(new.status NOT IN ('ready', 'failed') AND NOT d.deleting), 0) AS pending,
        coalesce(sum(new.status = 'failed' AND NOT d.deleting), 0) AS failed
    FROM collections k
    LEFT JOIN documents d ON d.collection_row = k.row
    LEFT JOIN versions new ON new.document_row = d.row AND new.version = d.newest_version
    LEFT JOIN versions cur ON cur.document_row = d.row AND cur.version = d.current_version
"""


def list_collections(c: sqlite3.Connection) -> list[Collection]:
    return [Collection(**row) for row in c.execute(f"{_COLLECTIONS} GROUP BY k.row ORDER BY k.row")]


def get_collection(c: sqlite3.Connection, name: str) -> Collection:
    row = c.execute(f"{_COLLECTIONS} WHERE k.name = ? GROUP BY k.row", (name,)).fetchone()
    if row is None:
        raise CollectionNotFound(f"there is no collection {name[:80]!r}")
    return Collection(**row)


def delete_collection(c: sqlite3.Connection, name: str, now: float) -> IndexChange:
    (collection_row,) = collection_rows(c, [name])
    rows = [row for (row,) in c.execute("SELECT row FROM documents WHERE collection_row = ?", (collection_row,))]
    change = _delete_rows(c, rows, now)
    if name != DEFAULT_COLLECTION:
        c.execute("DELETE FROM collections WHERE row = ?", (collection_row,))
    return change


def collection_rows(c: sqlite3.Connection, names: Sequence[str]) -> list[int]:
    """Row ids in the order of `names`. Raises CollectionNotFound."""
    known = dict(tuple(row) for row in c.execute("SELECT name, row FROM collections"))
    if missing := [name for name in names if name not in known]:
        raise CollectionNotFound(f"there is no collection {missing[0][:80]!r}")
    return [known[name] for name in names]


_PLACES_KEPT_S = 86_400.0  # how long clients can continue a listing from a deleted document

_DOCUMENT = """
    SELECT d.row AS document_row, d.id, k.name AS collection, d.deleting, d.created_at, v.*
    FROM documents d JOIN collections k ON k.row = d.collection_row
    JOIN versions v ON v.document_row = d.row
"""
_NEWEST = f"{_DOCUMENT} AND v.version = d.newest_version"
_CURRENT = f"{_DOCUMENT} AND v.version = d.current_version"


def document_from_row(row: sqlite3.Row) -> Document:
    status: Status = "deleting" if row["deleting"] else row["status"]
    return Document(
        **{name: row[name] for name in _PLAIN_FIELDS},
        status=status,
        progress=Progress(status, row["done"], row["total"], row["unit"]),
        last_error=None if row["error"] is None else DocumentError(**json.loads(row["error"])),
        metadata=json.loads(row["metadata"]),
    )


_PLAIN_FIELDS = (
    *("id", "collection", "ordinal", "filename", "media_type", "bytes", "sha256", "version", "attempts"),
    *("pages", "chunks", "tokens", "created_at", "updated_at", "title"),
)


def get_document(c: sqlite3.Connection, document_id: str) -> Document:
    row = c.execute(f"{_NEWEST} WHERE d.id = ?", (document_id,)).fetchone()
    if row is None:
        raise DocumentNotFound(f"there is no document {document_id[:80]!r}")
    return document_from_row(row)


def get_current(c: sqlite3.Connection, document_id: str) -> tuple[int, Document]:
    """(document row, current version). Raises DocumentNotFound, DocumentNotReady."""
    row = c.execute(f"{_CURRENT} WHERE d.id = ?", (document_id,)).fetchone()
    if row is None:
        newest = get_document(c, document_id)
        raise DocumentNotReady(f"document {document_id} is {newest.status}; its content is not there yet")
    return row["document_row"], document_from_row(row)


def answering_version(c: sqlite3.Connection, document_id: str) -> Document:
    row = c.execute(f"{_CURRENT} WHERE d.id = ?", (document_id,)).fetchone()
    return get_document(c, document_id) if row is None else document_from_row(row)


def create_document(
    c: sqlite3.Connection, collection: str, upload: Upload, on_conflict: OnConflict, now: float
) -> tuple[Document, bool]:
    (collection_row,) = collection_rows(c, [collection])
    if twin := _find_twin(c, collection_row, upload.sha256):
        if on_conflict == "error":
            raise DuplicateDocument(twin.id, twin.filename, collection)
        if on_conflict == "skip":
            return replace(twin, duplicate_of=twin.id), False
        return _add_version(c, twin, upload, now), True
    document_id = f"doc_{uuid4().hex}"
    c.execute(
        "INSERT INTO documents(id, collection_row, newest_version, created_at) VALUES (?, ?, 0, ?)",
        (document_id, collection_row, now),
    )
    return _insert_version(c, document_id, 1, upload, now), True


def replace_document(c: sqlite3.Connection, old: Document, upload: Upload, now: float) -> tuple[Document, bool]:
    if old.status == "deleting":
        raise DocumentNotFound(f"document {old.id} is being deleted")
    (collection_row,) = collection_rows(c, [old.collection])
    if (twin := _find_twin(c, collection_row, upload.sha256)) and twin.id != old.id:
        raise DuplicateDocument(twin.id, twin.filename, old.collection)
    is_same = twin and (twin.filename, twin.metadata) == (upload.filename, upload.metadata)
    if twin and is_same and twin.status != "failed":
        return replace(twin, duplicate_of=twin.id), False
    return _add_version(c, old, upload, now), True


def _find_twin(c: sqlite3.Connection, collection_row: int, sha256: str) -> Document | None:
    """The document whose newest version has these bytes; older versions do not count, as they are about to vanish."""
    twin = f"{_NEWEST} WHERE v.sha256 = ? AND d.collection_row = ? AND NOT d.deleting ORDER BY d.row LIMIT 1"
    row = c.execute(twin, (sha256, collection_row)).fetchone()
    return None if row is None else document_from_row(row)


def _add_version(c: sqlite3.Connection, old: Document, upload: Upload, now: float) -> Document:
    c.execute(
        """DELETE FROM versions WHERE document_row = (SELECT row FROM documents WHERE id = ?)
        AND version IS NOT (SELECT current_version FROM documents WHERE id = ?)""",
        (old.id, old.id),
    )
    return _insert_version(c, old.id, old.version + 1, upload, now)


def _insert_version(c: sqlite3.Connection, document_id: str, version: int, upload: Upload, now: float) -> Document:
    c.execute("UPDATE documents SET newest_version = ? WHERE id = ?", (version, document_id))
    c.execute(
        """INSERT INTO versions(document_row, version, ordinal, filename, media_type, bytes, sha256, metadata,
            updated_at) SELECT row, ?, ?, ?, ?, ?, ?, ?, ? FROM documents WHERE id = ?""",
        (
            *(version, take_ordinal(c, document_id), upload.filename, upload.media_type, upload.nbytes),
            *(upload.sha256, json.dumps(upload.metadata, allow_nan=False), now, document_id),
        ),
    )
    return get_document(c, document_id)


def take_ordinal(c: sqlite3.Connection, document_id: str) -> int:
    """The next ordinal (d-number) of the document's collection; never reused."""
    (following,) = c.execute(
        """UPDATE collections SET next_ordinal = next_ordinal + 1
        WHERE row = (SELECT collection_row FROM documents WHERE id = ?) RETURNING next_ordinal""",
        (document_id,),
    ).fetchone()
    return following - 1


def list_documents(
    c: sqlite3.Connection, collections: Sequence[str] | None, status: str | None, limit: int, after: str | None
) -> list[Document]:
    where, values = ["true"], []
    if collections is not None:
        where.append("d.collection_row IN (SELECT value FROM json_each(?))")
        values.append(json.dumps(collection_rows(c, collections)))
    if status is not None:
        where.append("CASE WHEN d.deleting THEN 'deleting' ELSE v.status END = ?")
        values.append(status)
    if after is not None:
        where.append("d.row > ?")
        values.append(find_place(c, after)[0])
    rows = c.execute(f"{_NEWEST} WHERE {' AND '.join(where)} ORDER BY d.row LIMIT ?", (*values, limit))
    return [document_from_row(row) for row in rows]


def find_place(c: sqlite3.Connection, document_id: str) -> tuple[int, str]:
    """(row, collection) of a document, also of one deleted within the last day. Raises DocumentNotFound."""
    place = c.execute(
        """SELECT d.row, k.name FROM documents d JOIN collections k ON k.row = d.collection_row WHERE d.id = ?
        UNION ALL SELECT row, collection FROM deleted_documents WHERE id_digest = ?""",
        (document_id, _digest(document_id)),
    ).fetchone()
    if place is None:
        raise DocumentNotFound(f"there is no document {document_id[:80]!r}")
    return tuple(place)


def _delete_rows(c: sqlite3.Connection, rows: Sequence[int], now: float) -> IndexChange:
    change, gone = content.remove_content(c, rows, now), json.dumps(rows)
    originals = "SELECT DISTINCT sha256 FROM versions WHERE document_row IN (SELECT value FROM json_each(?))"
    sha256s = tuple(sha256 for (sha256,) in c.execute(originals, (gone,)))
    c.execute("DELETE FROM deleted_documents WHERE deleted_at < ?", (now - _PLACES_KEPT_S,))
    places = c.execute(
        """SELECT d.id, d.row, k.name FROM documents d JOIN collections k ON k.row = d.collection_row
        WHERE d.row IN (SELECT value FROM json_each(?))""",
        (gone,),
    ).fetchall()
    c.executemany(
        "INSERT INTO deleted_documents VALUES (?, ?, ?, ?)", [(_digest(place[0]), *place[1:], now) for place in places]
    )
    c.execute("DELETE FROM documents WHERE row IN (SELECT value FROM json_each(?))", (gone,))
    return replace(change, originals=sha256s, documents=tuple(place[0] for place in places))


def _digest(document_id: str) -> bytes:
    return sha256(document_id.encode(errors="surrogatepass")).digest()


def ready_documents(
    c: sqlite3.Connection, collections: Sequence[str], document_ids: Sequence[str] | None, filters: Filters | None
) -> list[Document]:
    return [document_from_row(row) for row in ready_rows(c, collections, document_ids, filters)]


def ready_rows(
    c: sqlite3.Connection, collections: Sequence[str], document_ids: Sequence[str] | None, filters: Filters | None
) -> list[sqlite3.Row]:
    """Rows of the current ready versions, in canonical order."""
    where, values = ["d.collection_row IN (SELECT value FROM json_each(?))"], []
    values.append(json.dumps(collection_rows(c, collections)))
    if document_ids is not None:
        where.append("d.id IN (SELECT value FROM json_each(?))")
        values.append(json.dumps(list(document_ids)))
    rows = c.execute(f"{_CURRENT} WHERE {' AND '.join(where)} ORDER BY k.row, v.ordinal", values).fetchall()
    return [row for row in rows if not filters or matches_filters(json.loads(row["metadata"]), filters)]


def matches_filters(metadata: Mapping[str, object], filters: Filters) -> bool:
    """Whether every key has the wanted value or one of the wanted values; a list in `metadata` has all its members.

    Booleans and numbers differ (true is not 1), but 1 equals 1.0. A missing key matches nothing.
    """
    for key, wanted in filters.items():
        if key not in metadata:
            return False
        stored = _as_set(metadata[key])
        if stored.isdisjoint(_as_set(wanted)):
            return False
    return True


def _as_set(value: object | FilterValue | Sequence[FilterValue]) -> set[tuple[bool, object]]:
    values = value if isinstance(value, list | tuple | set | frozenset) else [value]
    return {(isinstance(v, bool), v if isinstance(v, str | int | float | None) else json.dumps(v)) for v in values}


def hide_document(c: sqlite3.Connection, document_id: str, now: float) -> IndexChange:
    get_document(c, document_id)
    (row,) = c.execute("UPDATE documents SET deleting = 1 WHERE id = ? RETURNING row", (document_id,)).fetchone()
    change = content.remove_content(c, [row], now)
    c.execute("UPDATE documents SET current_version = NULL WHERE row = ?", (row,))
    c.execute(
        "UPDATE versions SET lease_owner = NULL, lease_until = NULL, updated_at = ? WHERE document_row = ?", (now, row)
    )
    return change


def delete_document(c: sqlite3.Connection, document_id: str, now: float) -> IndexChange:
    get_document(c, document_id)
    (row,) = c.execute("SELECT row FROM documents WHERE id = ?", (document_id,)).fetchone()
    change = _delete_rows(c, [row], now)
    content.forgotten(c, [document_id])
    return change


def file_in_use(c: sqlite3.Connection, sha256: str) -> bool:
    return c.execute("SELECT 1 FROM versions WHERE sha256 = ? LIMIT 1", (sha256,)).fetchone() is not None
