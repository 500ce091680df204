"""SQL for leases: which worker is ingesting which version, and what happens when it stops.

A version can be leased if it is queued and its pause is over, or if its lease has expired during a stage.
"""

import json
import sqlite3
from dataclasses import asdict

from .store_documents import get_document, take_ordinal
from .types import Document, DocumentError

_INTERRUPTIONS = 3  # tolerated per attempt, because a killed service is rarely the fault of the document
_PAUSE_S = 2.0  # before the second attempt; doubles with each further one


class LeaseLost(RuntimeError):
    """The version was superseded, deleted, or leased to another worker: stop working on it."""


def lease_next(
    c: sqlite3.Connection, worker_id: str, lease_s: float, max_bytes: int | None, max_attempts: int, now: float
) -> Document | None:
    free = """
        SELECT d.id, v.version, v.status, v.attempts FROM versions v
        JOIN documents d ON d.row = v.document_row AND d.newest_version = v.version AND NOT d.deleting
        WHERE v.status NOT IN ('ready', 'failed') AND v.bytes <= ifnull(?, v.bytes)
        AND CASE WHEN v.lease_until IS NULL THEN v.not_before ELSE v.lease_until END <= ?
        ORDER BY v.document_row LIMIT 1"""
    while (row := c.execute(free, (max_bytes, now)).fetchone()) is not None:
        if row["attempts"] < _INTERRUPTIONS * max_attempts:
            _update(
                *(c, row["id"], row["version"], now),
                *("attempts = attempts + 1, lease_owner = ?, lease_until = ?", (worker_id, now + lease_s)),
            )
            return get_document(c, row["id"])
        message = (
            f"the service ended {row['attempts']} times while it worked on this, last while {row['status']}; "
            "if it was stopped for another reason, retry"
        )
        _fail(c, row["id"], row["version"], DocumentError("too_many_attempts", message, True), now)
    return None


def require_version(c: sqlite3.Connection, document_id: str, version: int, worker_id: str | None) -> int:
    """The document's row, if `version` is its newest and leased to the worker. Raises LeaseLost.

    worker_id None: a caller without a lease, for versions that no worker holds.
    """
    row = c.execute(
        """SELECT d.row, d.newest_version, d.deleting, v.lease_owner, v.status FROM documents d
        JOIN versions v ON v.document_row = d.row AND v.version = d.newest_version WHERE d.id = ?""",
        (document_id,),
    ).fetchone()
    if row is None or row["deleting"]:
        raise LeaseLost(f"document {document_id} was deleted")
    if row["newest_version"] != version:
        raise LeaseLost(f"version {version} of document {document_id} was superseded by {row['newest_version']}")
    if row["lease_owner"] != worker_id:
        raise LeaseLost(f"version {version} of document {document_id} is not leased by {worker_id}")
    return row["row"]


def end_leases(c: sqlite3.Connection) -> None:
    c.execute(
        """UPDATE versions SET lease_owner = NULL, lease_until = NULL, not_before = 0
        WHERE status NOT IN ('ready', 'failed')"""
    )


def renew_lease(
    c: sqlite3.Connection, document_id: str, version: int, worker_id: str, lease_s: float, now: float
) -> None:
    require_version(c, document_id, version, worker_id)
    _update(c, document_id, version, now, "lease_until = ?", (now + lease_s,))


def release_lease(c: sqlite3.Connection, document_id: str, version: int, worker_id: str, now: float) -> None:
    require_version(c, document_id, version, worker_id)
    _update(c, document_id, version, now, f"{_QUEUED}, attempts = attempts - 1", ())


def set_progress(
    c: sqlite3.Connection,
    document_id: str,
    version: int,
    worker_id: str | None,
    stage: str,
    counts: tuple[int, int, str],
    now: float,
) -> None:
    require_version(c, document_id, version, worker_id)
    _update(c, document_id, version, now, "status = ?, done = ?, total = ?, unit = ?", (stage, *counts))


def fail_document(
    c: sqlite3.Connection,
    document_id: str,
    version: int,
    worker_id: str | None,
    error: DocumentError,
    max_attempts: int,
    now: float,
) -> Document:
    require_version(c, document_id, version, worker_id)
    document = get_document(c, document_id)
    if error.retryable and document.attempts < max_attempts:
        pause_s = _PAUSE_S * 2 ** max(0, document.attempts - 1)
        values = (json.dumps(asdict(error)), now + pause_s)
        _update(c, document_id, version, now, f"{_QUEUED}, error = ?, not_before = ?", values)
    else:
        _fail(c, document_id, version, error, now)
    return get_document(c, document_id)


def postpone_document(
    c: sqlite3.Connection,
    document_id: str,
    version: int,
    worker_id: str,
    error: DocumentError,
    pause_s: float,
    now: float,
) -> None:
    require_version(c, document_id, version, worker_id)
    values = (json.dumps(asdict(error)), now + pause_s)
    _update(c, document_id, version, now, f"{_QUEUED}, attempts = attempts - 1, error = ?, not_before = ?", values)


def retry_document(c: sqlite3.Connection, document_id: str, now: float) -> Document:
    document = get_document(c, document_id)
    if document.status == "failed":
        ordinal = take_ordinal(c, document_id)
        _update(
            *(c, document_id, document.version, now),
            *(f"{_QUEUED}, attempts = 0, not_before = 0, error = NULL, ordinal = ?", (ordinal,)),
        )
    return get_document(c, document_id)


_QUEUED = "status = 'queued', done = 0, total = 0, unit = '', lease_owner = NULL, lease_until = NULL"


def _fail(c: sqlite3.Connection, document_id: str, version: int, error: DocumentError, now: float) -> None:
    values = (json.dumps(asdict(error)),)
    _update(
        c, document_id, version, now, "status = 'failed', error = ?, lease_owner = NULL, lease_until = NULL", values
    )


def _update(
    c: sqlite3.Connection, document_id: str, version: int, now: float, assignments: str, values: tuple[object, ...]
) -> None:
    c.execute(
        f"""UPDATE versions SET {assignments}, updated_at = ?
        WHERE document_row = (SELECT row FROM documents WHERE id = ?) AND version = ?""",
        (*values, now, document_id, version),
    )
