"""API keys: how they are made, kept and checked, and what a key's role and collections allow.

A key is 256 random bits, so nobody can guess it offline and a fast hash (SHA-256) keeps it as safely as a slow one
would; slow hashes are for passwords. The database holds hashes only. A key is found by its hash: how long that takes
can say something about the hash, which the sender knows anyway, and nothing about a key that hashes to another.
"""

import hashlib
import logging
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from retrieval.store import DocumentStore
from retrieval.types import ApiKey, Role

log = logging.getLogger(__name__)

KEY_PREFIX = "jrk_"
ADMIN_KEY_FILE = "admin.key"
_RANK: dict[Role, int] = {"reader": 0, "writer": 1, "admin": 2}


class Unauthorized(ValueError):
    """No key, or one that is unknown or revoked."""


class Forbidden(ValueError):
    """The key is valid, but its role is too low."""


@dataclass(frozen=True)
class Principal:
    """Who is asking. `collections` None = all of them; what lies outside is answered as if it didn't exist."""

    key_id: str
    role: Role
    collections: frozenset[str] | None = None

    def require(self, role: Role) -> None:
        """Raise Forbidden unless this key's role is at least `role`; what admins do concerns all collections."""
        if role == "admin" and self.collections is not None:
            raise Forbidden("this call concerns the whole service; this key is bound to collections")
        if _RANK[self.role] < _RANK[role]:
            raise Forbidden(f"this call needs a key with the role {role}; yours is {self.role}")

    def may_see(self, collection: str) -> bool:
        return self.collections is None or collection in self.collections

    def visible(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.may_see(name)]


LOCAL_ADMIN = Principal("local", "admin")


class Authenticator:
    """Turns an `Authorization` header into a Principal. With `enabled` false everyone is an admin."""

    def __init__(self, store: DocumentStore, enabled: bool) -> None:
        self._store = store
        self._enabled = enabled

    def authenticate(self, authorization: str | None) -> Principal:
        """Raise Unauthorized unless the header carries a known key that is not revoked."""
        if not self._enabled:
            return LOCAL_ADMIN
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("send an API key as `Authorization: Bearer <key>`")
        found = self._store.find_key(hash_key(key.strip()))
        if found is None:
            raise Unauthorized("this API key is unknown or revoked")
        return Principal(found.id, found.role, None if found.collections is None else frozenset(found.collections))

    def create_key(self, name: str, role: Role, collections: Iterable[str] | None = None) -> tuple[ApiKey, str]:
        """Make a key; returns its row and the key itself, which is kept nowhere."""
        key = new_key()
        bound = None if collections is None else tuple(sorted(set(collections)))
        return self._store.add_key(name, role, hash_key(key), bound), key

    def ensure_admin_key(self, data_dir: Path) -> None:
        """While no admin key is in force, make one; it is written to `<data_dir>/admin.key`, for its owner only."""
        admins = (key for key in self._store.list_keys() if key.role == "admin" and key.collections is None)
        if not self._enabled or any(key.revoked_at is None for key in admins):
            return
        key, path = new_key(), data_dir / ADMIN_KEY_FILE
        write_private(path, key + "\n")
        self._store.add_key("admin", "admin", hash_key(key))
        log.info("no admin key was in force: a new one is in %s", path)


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """SHA-256 in hex of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, replacing one that is there; it is never readable in between."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
