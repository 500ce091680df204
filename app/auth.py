"""API keys: how they are made, kept and checked, and what a key's role and collections allow.

A key is 256 random bits and a check of 48, which is a MAC under the database's salt: what was never a key is refused
before anything slow is done for it. The database holds only scrypt hashes, under the same salt, so that a key is found
by its hash; the hash of a key that was found is remembered under its SHA-256, so that a key is slow once per process.
Keys of the first release have no check and are kept as SHA-256, which nobody can reverse for 256 random bits either;
they stay valid until they are revoked, so that an upgrade locks nobody out.
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
    """The key is valid, but its role is too low; or the request comes from where none may come from."""


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

    @property
    def may_write(self) -> bool:
        return self.role != "reader"

    def may_see(self, collection: str) -> bool:
        return self.collections is None or collection in self.collections

    def visible(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if self.may_see(name)]


LOCAL_ADMIN = Principal("local", "admin")


class Authenticator:
    """Turns an `Authorization` header into a Principal. With `enabled` false everyone is an admin. Thread safe."""

    def __init__(self, store: DocumentStore, enabled: bool) -> None:
        self._store, self._enabled = store, enabled
        self._salt = bytes.fromhex(store.get_setting(_SALT) or self._begin())
        self._hashes: dict[bytes, str] = {}  # of keys found before, by their SHA-256

    def authenticate(self, authorization: str | None) -> Principal:
        """Raise Unauthorized unless the header carries a known key that is not revoked."""
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
        """Raise Unauthorized if the key has been revoked since: for calls that go on for long. Blocks."""
        if self._enabled and not self._store.is_in_force(principal.key_id):
            raise Unauthorized("this API key is unknown or revoked")

    def check_sender(self, host: str, site: str | None) -> None:
        """Where no key is asked for: raise Forbidden unless the request names this machine and no other site sent it.

        `host` and `site` are the headers Host and Sec-Fetch-Site. A browser reaches loopback for pages of any site:
        by forms, and under a name of theirs that they let lead there.
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
        """A salt for this database."""
        salt = secrets.token_hex(16)
        self._store.set_setting(_SALT, salt)
        return salt

    def _find(self, key: str) -> ApiKey | None:
        """Blocks."""
        digest = hashlib.sha256(key.encode()).digest()
        if not is_well_formed(key, self._salt):
            return self._store.find_key(digest.hex())  # of the first release, or none
        key_hash = self._hashes.get(digest) or hash_key(key, self._salt)
        found = self._store.find_key(key_hash)
        if found is not None:
            self._hashes[digest] = key_hash
        return found

    def create_key(self, name: str, role: Role, collections: Iterable[str] | None = None) -> tuple[ApiKey, str]:
        """Make a key; returns its row and the key itself, which is kept nowhere."""
        key = new_key(self._salt)
        bound = None if collections is None else tuple(sorted(set(collections)))
        return self._store.add_key(name, role, hash_key(key, self._salt), bound), key

    def ensure_admin_key(self, data_dir: Path) -> None:
        """While no admin key is in force, make one; it is written to `<data_dir>/admin.key`, for its owner only."""
        admins = (key for key in self._store.list_keys() if key.role == "admin" and key.collections is None)
        if not self._enabled or any(key.revoked_at is None for key in admins):
            return
        key, path = new_key(self._salt), data_dir / ADMIN_KEY_FILE
        write_private(path, key + "\n")
        self._store.add_key("admin", "admin", hash_key(key, self._salt))
        log.info("no admin key was in force: a new one is in %s", path)


def new_key(salt: bytes) -> str:
    """`jrk_`, 256 random bits, and their check."""
    random = secrets.token_urlsafe(32)
    return KEY_PREFIX + random + _check(random, salt)


def is_well_formed(key: str, salt: bytes) -> bool:
    """Whether a key of this database could look so. Takes as long for every key of the same length."""
    random, check = key.removeprefix(KEY_PREFIX)[:-_CHECK_CHARS], key[-_CHECK_CHARS:]
    return hmac.compare_digest(check.encode(), _check(random, salt).encode())


def _check(random: str, salt: bytes) -> str:
    mac = hmac.digest(salt, random.encode(), "sha256")
    return base64.urlsafe_b64encode(mac[: _CHECK_CHARS * 3 // 4]).decode()


def hash_key(key: str, salt: bytes) -> str:
    """scrypt of a key, in hex; some 50 ms and 16 MiB."""
    return hashlib.scrypt(key.encode(), salt=salt, n=1 << 14, r=8, p=1, dklen=32).hex()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, replacing one that is there; it is never readable in between."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
