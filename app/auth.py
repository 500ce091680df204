"""API keys: creation, storage and verification, and what a key's role and collections allow.

A key has 256 random bits and a 48-bit MAC under the database's salt, so that invalid keys are refused without slow
hashing. The database stores only scrypt hashes under the same salt; keys are looked up by hash. Hashes of valid keys
are cached by SHA-256, so each key is hashed with scrypt once per process. Keys of the first release have no MAC and are
stored as SHA-256, which is safe for 256 random bits; they stay valid until revoked.
"""

import base64
import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from app.settings import LOOPBACK_HOSTS
from retrieval.store import DocumentStore
from retrieval.types import ApiKey, Role

log = logging.getLogger(__name__)

KEY_PREFIX = "jrk_"
ADMIN_KEY_FILE = "admin.key"
_SALT = "key_salt"
_CHECK_CHARS = 8
_RANK: dict[Role, int] = {"reader": 0, "writer": 1, "admin": 2}


class Unauthorized(ValueError):
    """No key, or one that is unknown or revoked."""


class Forbidden(ValueError):
    """The key is valid but its role is insufficient, or the request has a forbidden origin."""


@dataclass(frozen=True)
class Principal:
    """The authenticated caller. `collections`: None for all; others do not exist for this caller."""

    key_id: str
    role: Role
    collections: frozenset[str] | None = None

    def require(self, role: Role) -> None:
        """Raise Forbidden unless the role is at least `role`; admins must not be bound to collections."""
        if role == "admin" and self.collections is not None:
            raise Forbidden("this call concerns the whole service; this key is bound to collections")
        if _RANK[self.role] < _RANK[role]:
            raise Forbidden(f"this call needs a key with the role {role}; yours is {self.role}")

    @property
    def may_write(self) -> bool:
        return self.role != "reader"

    def may_see(self, collection: str) -> bool:
        return self.collections is None or collection in self.collections

    def visible(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.may_see(name)]


LOCAL_ADMIN = Principal("local", "admin")


class Authenticator:
    """Turns an `Authorization` header into a Principal. Unless `enabled`, every caller is an admin. Thread safe."""

    def __init__(self, store: DocumentStore, enabled: bool) -> None:
        self._store, self._enabled = store, enabled
        self._salt = bytes.fromhex(store.get_setting(_SALT) or self._begin())
        self._hashes: dict[bytes, str] = {}  # SHA-256 -> scrypt hash of valid keys

    def authenticate(self, authorization: str | None) -> Principal:
        """Raise Unauthorized unless the header has a known key that is not revoked. Blocks."""
        if not self._enabled:
            return LOCAL_ADMIN
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorized("send an API key as `Authorization: Bearer <key>`")
        found = self._find(key.strip())
        if found is None:
            raise Unauthorized("this API key is unknown or revoked")
        return Principal(found.id, found.role, None if found.collections is None else frozenset(found.collections))

    def check_in_force(self, principal: Principal) -> None:
        """Raise Unauthorized if the key has been revoked meanwhile; for long-running requests. Blocks."""
        if self._enabled and not self._store.is_in_force(principal.key_id):
            raise Unauthorized("this API key is unknown or revoked")

    def check_sender(self, host: str, site: str | None) -> None:
        """Without keys: raise Forbidden unless the request is to a loopback host and not from another site.

        `host` and `site` are the headers Host and Sec-Fetch-Site. Otherwise pages of any site could reach the service
        through the user's browser, by cross-site forms or DNS rebinding.
        """
        if self._enabled:
            return
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if name not in LOOPBACK_HOSTS:
            raise Forbidden(
                f"without keys only requests to {', '.join(LOOPBACK_HOSTS)} are answered, not to {host[:80]!r}"
            )
        if site in ("cross-site", "same-site"):
            raise Forbidden("without keys no requests from pages of other sites are answered")

    def _begin(self) -> str:
        """Create and store the salt of this database."""
        salt = secrets.token_hex(16)
        self._store.set_setting(_SALT, salt)
        return salt

    def _find(self, key: str) -> ApiKey | None:
        """Blocks."""
        digest = hashlib.sha256(key.encode()).digest()
        if not is_well_formed(key, self._salt):
            return self._store.find_key(digest.hex())  # key of the first release, or invalid
        key_hash = self._hashes.get(digest) or hash_key(key, self._salt)
        found = self._store.find_key(key_hash)
        if found is not None:
            self._hashes[digest] = key_hash
        return found

    def create_key(self, name: str, role: Role, collections: Iterable[str] | None = None) -> tuple[ApiKey, str]:
        """Create a key; returns its row and the key itself, which is not stored."""
        key = new_key(self._salt)
        bound = None if collections is None else tuple(sorted(set(collections)))
        return self._store.add_key(name, role, hash_key(key, self._salt), bound), key

    def ensure_admin_key(self, data_dir: Path) -> None:
        """If no unrevoked admin key exists, create one and write it to `<data_dir>/admin.key` (mode 600)."""
        admins = (key for key in self._store.list_keys() if key.role == "admin" and key.collections is None)
        if not self._enabled or any(key.revoked_at is None for key in admins):
            return
        key, path = new_key(self._salt), data_dir / ADMIN_KEY_FILE
        write_private(path, key + "\n")
        self._store.add_key("admin", "admin", hash_key(key, self._salt))
        log.info("no admin key was in force: a new one is in %s", path)


def new_key(salt: bytes) -> str:
    """`jrk_`, 256 random bits, and their MAC."""
    random = secrets.token_urlsafe(32)
    return KEY_PREFIX + random + _check(random, salt)


def is_well_formed(key: str, salt: bytes) -> bool:
    """Whether the MAC of a key is valid for this database; constant time for keys of equal length."""
    random, check = key.removeprefix(KEY_PREFIX)[:-_CHECK_CHARS], key[-_CHECK_CHARS:]
    return hmac.compare_digest(check.encode(), _check(random, salt).encode())


def _check(random: str, salt: bytes) -> str:
    mac = hmac.digest(salt, random.encode(), "sha256")
    return base64.urlsafe_b64encode(mac[: _CHECK_CHARS * 3 // 4]).decode()


def hash_key(key: str, salt: bytes) -> str:
    """scrypt hash of a key, in hex; takes about 50 ms and 16 MiB."""
    return hashlib.scrypt(key.encode(), salt=salt, n=1 << 14, r=8, p=1, dklen=32).hex()


def write_private(path: Path, text: str) -> None:
    """Create or replace a file with mode 600; it never exists with wider permissions."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
