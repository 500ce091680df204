"""SQL for API keys, replies stored for repeated requests, and settings of the database itself."""

import json
import sqlite3
from collections.abc import Sequence
from uuid import uuid4

from .types import ApiKey, Role, StoredReply

_REPLY_TTL_S = 86_400.0


class IdempotencyConflict(ValueError):
    """The Idempotency-Key was used before with another request."""


def add_key(
    c: sqlite3.Connection, name: str, role: Role, key_hash: str, collections: Sequence[str] | None, now: float
) -> ApiKey:
    key_id = f"key_{uuid4().hex}"
    bound = None if collections is None else json.dumps(list(collections))
    c.execute("INSERT INTO api_keys VALUES (?, ?, ?, ?, ?, ?, NULL)", (key_id, key_hash, name, role, bound, now))
    return _key(c.execute("SELECT * FROM api_keys WHERE id = ?", (key_id,)).fetchone())


def find_key(c: sqlite3.Connection, key_hash: str) -> ApiKey | None:
    row = c.execute("SELECT * FROM api_keys WHERE hash = ? AND revoked_at IS NULL", (key_hash,)).fetchone()
    return None if row is None else _key(row)


def is_in_force(c: sqlite3.Connection, key_id: str) -> bool:
    return c.execute("SELECT 1 FROM api_keys WHERE id = ? AND revoked_at IS NULL", (key_id,)).fetchone() is not None


def list_keys(c: sqlite3.Connection) -> list[ApiKey]:
    return [_key(row) for row in c.execute("SELECT * FROM api_keys ORDER BY created_at, id")]


def revoke_key(c: sqlite3.Connection, key_id: str, now: float) -> bool:
    revoked = c.execute("UPDATE api_keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (now, key_id))
    return revoked.rowcount == 1


def _key(row: sqlite3.Row) -> ApiKey:
    collections = None if row["collections"] is None else tuple(json.loads(row["collections"]))
    return ApiKey(row["id"], row["name"], row["role"], collections, row["created_at"], row["revoked_at"])


def find_reply(c: sqlite3.Connection, key: str, fingerprint: str, now: float) -> StoredReply | None:
    kept = "SELECT fingerprint, status, body FROM replies WHERE key = ? AND created_at >= ?"
    row = c.execute(kept, (key, now - _REPLY_TTL_S)).fetchone()
    if row is None:
        return None
    if row["fingerprint"] != fingerprint:
        raise IdempotencyConflict("this Idempotency-Key was used with another request; choose a new one")
    return StoredReply(row["status"], row["body"])


def save_reply(c: sqlite3.Connection, key: str, fingerprint: str, reply: StoredReply, now: float) -> None:
    c.execute("DELETE FROM replies WHERE created_at < ?", (now - _REPLY_TTL_S,))
    values = (key, fingerprint, reply.status, reply.body, now)
    c.execute(
        "INSERT OR IGNORE INTO replies(key, fingerprint, status, body, created_at) VALUES (?, ?, ?, ?, ?)", values
    )


def get_setting(c: sqlite3.Connection, name: str) -> str | None:
    row = c.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
    return None if row is None else row["value"]


def set_setting(c: sqlite3.Connection, name: str, value: str) -> None:
    c.execute("INSERT OR REPLACE INTO settings(name, value) VALUES (?, ?)", (name, value))
