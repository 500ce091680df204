"""How much a key may ask for: requests and tokens a minute, uploaded bytes a day, documents in a collection.

What a minute holds is kept in memory; what a day holds is in the database, so that no restart gives it back. A key's
own limits stand before the deployment's. Without keys (`auth.enabled=false`) nobody is limited. Start at `Meter`.
"""

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields

from app.auth import LOCAL_ADMIN, Principal
from retrieval.store import DocumentStore

_DAY_S = 86_400


class RateLimited(ValueError):
    """A key has used up what it may ask for now; `retry_after_s` says when there is more."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = max(1, math.ceil(retry_after_s))
        super().__init__(f"{message}; try again in {self.retry_after_s} s")


class CollectionFull(ValueError):
    """The collection holds as many documents as this key may put there."""


@dataclass(frozen=True)
class KeyLimits:
    """0 = no limit. Tokens are those that the model computed: prompts without what came from the cache, and answers."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    upload_bytes_per_day: int = 0
    documents_per_collection: int = 0

    def override(self, own: Mapping[str, int | None]) -> "KeyLimits":
        """These limits, with those of `own` that are not None in their place."""
        return KeyLimits(**asdict(self) | {name: value for name, value in own.items() if value is not None})


@dataclass
class _Bucket:
    """Holds up to `limit`, refilled evenly in a minute. May go below 0: what an answer costs is known afterwards."""

    level: float
    at: float

    def refill(self, limit: int, now: float) -> None:
        self.level = min(limit, self.level + max(0.0, now - self.at) * limit / 60)
        self.at = now

    def wait_s(self, limit: int, wanted: float) -> float:
        return (wanted - self.level) * 60 / limit


@dataclass
class _Usage:
    """What one key has used."""

    limits: KeyLimits
    requests: _Bucket
    tokens: _Bucket
    day: int = 0  # since 1970, UTC
    day_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Meter:
    """Counts what each key uses. Thread safe. `clock` gives Unix seconds."""

    def __init__(self, store: DocumentStore, defaults: KeyLimits, clock: Callable[[], float] = time.time) -> None:
        self._store, self._defaults, self._clock = store, defaults, clock
        self._usage: dict[str, _Usage] = {}
        self._lock = threading.Lock()

    def set_own_limits(self, key_id: str, own: Mapping[str, int | None]) -> None:
        """Give a key limits of its own; None leaves the deployment's in place. Blocks."""
        given = {name: value for name, value in own.items() if value is not None}
        self._store.set_setting(f"limits:{key_id}", json.dumps(given))
        with self._lock:
            self._usage.pop(key_id, None)

    def limits_of(self, key_id: str) -> KeyLimits:
        """What holds for a key. Blocks."""
        own = json.loads(self._store.get_setting(f"limits:{key_id}") or "{}")
        return self._defaults.override({f.name: own.get(f.name) for f in fields(KeyLimits)})

    def admit_request(self, principal: Principal) -> None:
        """Count a request. Raises RateLimited. Blocks."""
        if principal == LOCAL_ADMIN:
            return
        usage, now = self._of(principal), self._clock()
        limit = usage.limits.requests_per_minute
        with usage.lock:
            usage.requests.refill(limit, now)
            if limit and usage.requests.level < 1:
                raise RateLimited(f"this key may send {limit} requests a minute", usage.requests.wait_s(limit, 1))
            usage.requests.level -= bool(limit)

    def admit_answer(self, principal: Principal) -> None:
        """Raises RateLimited while the answers before have used more tokens than the key may. Blocks."""
        if principal == LOCAL_ADMIN:
            return
        usage, now = self._of(principal), self._clock()
        limit = usage.limits.tokens_per_minute
        with usage.lock:
            usage.tokens.refill(limit, now)
            if limit and usage.tokens.level <= 0:
                raise RateLimited(f"this key may use {limit} tokens a minute", usage.tokens.wait_s(limit, 1))

    def charge_tokens(self, principal: Principal, tokens: int) -> None:
        """Count what an answer has cost so far."""
        usage = self._usage.get(principal.key_id)
        if usage is not None and usage.limits.tokens_per_minute:
            with usage.lock:
                usage.tokens.level -= tokens

    def charge_bytes(self, principal: Principal, nbytes: int) -> None:
        """Count bytes of an upload as they arrive; 0 asks whether any may. Raises RateLimited. Blocks."""
        if principal == LOCAL_ADMIN:
            return
        usage, now = self._of(principal), self._clock()
        limit = usage.limits.upload_bytes_per_day
        with usage.lock:
            if usage.day != int(now // _DAY_S):
                usage.day, usage.day_bytes = int(now // _DAY_S), 0
            if limit and usage.day_bytes + max(nbytes, 1) > limit:
                rest_s = _DAY_S - now % _DAY_S
                raise RateLimited(f"this key may upload {limit} bytes a day and has sent {usage.day_bytes}", rest_s)
            usage.day_bytes += nbytes

    def save(self, principal: Principal) -> None:
        """Put the day's bytes on the disk: to be called before an upload is acknowledged. Blocks."""
        usage = self._usage.get(principal.key_id)
        if usage is not None and usage.limits.upload_bytes_per_day:
            with usage.lock:
                value = {"day": usage.day, "bytes": usage.day_bytes}
                self._store.set_setting(f"usage:{principal.key_id}", json.dumps(value))

    def documents_limit(self, principal: Principal) -> int:
        """Most documents in a collection that this key may add to; 0: any number. Blocks."""
        return 0 if principal == LOCAL_ADMIN else self._of(principal).limits.documents_per_collection

    def _of(self, principal: Principal) -> _Usage:
        with self._lock:
            usage = self._usage.get(principal.key_id)
            if usage is None:
                limits, now = self.limits_of(principal.key_id), self._clock()
                day = json.loads(self._store.get_setting(f"usage:{principal.key_id}") or '{"day": 0, "bytes": 0}')
                usage = _Usage(
                    limits,
                    _Bucket(limits.requests_per_minute, now),
                    _Bucket(limits.tokens_per_minute, now),
                    day["day"],
                    day["bytes"],
                )
                self._usage[principal.key_id] = usage
            return usage
