"""The schema, as numbered migrations from an empty file; `PRAGMA user_version` counts those applied.

A published migration is never edited; append a new one instead.
Content (texts, chunks, vectors) belongs to the current version of a document; `versions` also has a newer one that is
being ingested. Row ids of chunks are never reused, because the indexes refer to chunks by them.
"""

import sqlite3

NEXT_VECTORS = """CREATE TABLE next_vectors (
    chunk_row INTEGER PRIMARY KEY REFERENCES chunks(row) ON DELETE CASCADE, vector BLOB NOT NULL)"""
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        """CREATE TABLE collections (
            row INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
            next_ordinal INTEGER NOT NULL DEFAULT 1, created_at REAL NOT NULL)""",
        "INSERT INTO collections(name, created_at) VALUES ('default', strftime('%s', 'now') + 0.0)",
        """CREATE TABLE documents (
            row INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
            collection_row INTEGER NOT NULL REFERENCES collections(row),
            newest_version INTEGER NOT NULL, current_version INTEGER,
            deleting INTEGER NOT NULL DEFAULT 0, created_at REAL NOT NULL)""",
        "CREATE INDEX documents_by_collection ON documents(collection_row)",
        """CREATE TABLE versions (
            document_row INTEGER NOT NULL REFERENCES documents(row) ON DELETE CASCADE, version INTEGER NOT NULL,
            ordinal INTEGER NOT NULL, filename TEXT NOT NULL, media_type TEXT NOT NULL, bytes INTEGER NOT NULL,
            sha256 TEXT NOT NULL, metadata TEXT NOT NULL, title TEXT,
            status TEXT NOT NULL DEFAULT 'queued', done INTEGER NOT NULL DEFAULT 0, total INTEGER NOT NULL DEFAULT 0,
            unit TEXT NOT NULL DEFAULT '', attempts INTEGER NOT NULL DEFAULT 0, error TEXT,
            not_before REAL NOT NULL DEFAULT 0, lease_owner TEXT, lease_until REAL,
            pages INTEGER, chunks INTEGER NOT NULL DEFAULT 0, tokens INTEGER NOT NULL DEFAULT 0,
            updated_at REAL NOT NULL, PRIMARY KEY (document_row, version)) WITHOUT ROWID""",
        "CREATE INDEX versions_by_sha256 ON versions(sha256)",
        "CREATE INDEX versions_unfinished ON versions(status) WHERE status NOT IN ('ready', 'failed')",
        """CREATE TABLE contents (
            document_row INTEGER PRIMARY KEY REFERENCES documents(row) ON DELETE CASCADE,
            text TEXT NOT NULL, pages TEXT NOT NULL, headings TEXT NOT NULL)""",
        """CREATE TABLE chunks (
            row INTEGER PRIMARY KEY AUTOINCREMENT,
            document_row INTEGER NOT NULL REFERENCES documents(row) ON DELETE CASCADE,
            ordinal INTEGER NOT NULL, generation INTEGER NOT NULL, id TEXT NOT NULL,
            char_start INTEGER NOT NULL, char_end INTEGER NOT NULL, page_start INTEGER, page_end INTEGER,
            heading_path TEXT NOT NULL, tokens INTEGER NOT NULL, context TEXT NOT NULL, text TEXT NOT NULL)""",
        "CREATE UNIQUE INDEX chunks_by_document ON chunks(document_row, ordinal)",
        "CREATE INDEX chunks_by_generation ON chunks(generation)",
        """CREATE TABLE vectors (
            chunk_row INTEGER PRIMARY KEY REFERENCES chunks(row) ON DELETE CASCADE, vector BLOB NOT NULL)""",
        # Contentless: text and context are in chunks, and must be passed again to remove a row.
        """CREATE VIRTUAL TABLE chunk_words USING fts5(
            text, context, content='', tokenize="porter unicode61 remove_diacritics 2")""",
        "INSERT INTO chunk_words(chunk_words, rank) VALUES ('rank', 'bm25(1.0, 0.5)')",
        "CREATE TABLE generations (generation INTEGER PRIMARY KEY)",
        """CREATE TABLE removed_chunks (
            generation INTEGER NOT NULL, chunk_row INTEGER NOT NULL,
            PRIMARY KEY (generation, chunk_row)) WITHOUT ROWID""",
        """CREATE TABLE api_keys (
            id TEXT PRIMARY KEY, hash TEXT NOT NULL UNIQUE, name TEXT NOT NULL, role TEXT NOT NULL,
            collections TEXT, created_at REAL NOT NULL, revoked_at REAL) WITHOUT ROWID""",
        """CREATE TABLE replies (
            key TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, status INTEGER NOT NULL, body TEXT NOT NULL,
            created_at REAL NOT NULL) WITHOUT ROWID""",
    ),
    # Words in title and headings have the same weight as those in the text: docs/retrieval.md.
    ("INSERT INTO chunk_words(chunk_words, rank) VALUES ('rank', 'bm25(1.0, 1.0)')",),
    # Replaced by an index beside the database, built from chunks: words.py.
    ("DROP TABLE chunk_words",),
    # Vectors of another embedder while they are being computed: store_embedder.py.
    (NEXT_VECTORS,),
    # List positions of deleted documents, so that clients can continue paging from there: store_documents.py.
    (
        """CREATE TABLE deleted_documents (
            id_digest BLOB PRIMARY KEY, row INTEGER NOT NULL, collection TEXT NOT NULL, deleted_at REAL NOT NULL)
            WITHOUT ROWID""",
        "CREATE INDEX deleted_documents_by_time ON deleted_documents(deleted_at)",
    ),
    # Documents with removed content, until everything derived from it elsewhere is removed as well: store_content.py.
    ("CREATE TABLE to_forget (document_id TEXT PRIMARY KEY) WITHOUT ROWID",),
)
_APPLICATION_ID = 0x4A524147  # "JRAG" in the file header, to recognise databases of other programs


def migrate(connection: sqlite3.Connection) -> None:
    """Migrate the database to the newest schema, each step in its own transaction; safe to interrupt and repeat.

    Raises ValueError if the file belongs to another program or was written by a newer version of this one.
    """
    while (done := _steps_done(connection)) < len(MIGRATIONS):
        connection.execute("BEGIN IMMEDIATE")
        try:
            if _steps_done(connection) == done:  # else another process was faster
                for statement in MIGRATIONS[done]:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {done + 1}")
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")


def _steps_done(connection: sqlite3.Connection) -> int:
    (done,) = connection.execute("PRAGMA user_version").fetchone()
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application_id != _APPLICATION_ID and (done or tables):
        raise ValueError("this database belongs to another program; choose another data directory")
    if done > len(MIGRATIONS):
        raise ValueError(
            f"schema {done} is newer than {len(MIGRATIONS)}, the newest this version knows; upgrade Jamba RAG"
        )
    return done
