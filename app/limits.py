"""Rate limits and quotas per key: requests and tokens per minute, uploaded bytes per day, documents per collection.

Counts per minute are in memory; those per day are in the database, to survive restarts. Limits of a key override those
of the deployment. Without authentication (`auth.enabled=false`) nothing is limited. Start at `Meter`.
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
    """A key has exceeded one of its limits; `retry_after_s` is the time until it may try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = max(1, math.ceil(retry_after_s))
        super().__init__(f"{message}; try again in {self.retry_after_s} s")


class CollectionFull(ValueError):
    """The collection has reached the number of documents up to which this key may add."""


@dataclass(frozen=True)
class KeyLimits:
    """0 = no limit. Tokens are those computed by the model: uncached prompt tokens and output tokens."""

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    upload_bytes_per_day: int = 0
    documents_per_collection: int = 0

    def override(self, own: Mapping[str, int | None]) -> "KeyLimits":
        """These limits, overridden by the values of `own` that are not None."""
        return KeyLimits(**asdict(self) | {name: value for name, value in own.items() if value is not None})


@dataclass
class _Bucket:
    """Token bucket of capacity `limit`, refilled over a minute. May go negative: the cost of an answer is only known
    afterwards."""

    level: float
    at: float

    def refill(self, limit: int, now: float) -> None:
        self.level = min(limit, self.level + max(0.0, now - self.at) * limit / 60)
        self.at = now

    def wait_s(self, limit: int, wanted: float) -> float:
        return (wanted - self.level) * 60 / limit


@dataclass
class _Usage:
    """The usage of one key."""

    limits: KeyLimits
    requests: _Bucket
    tokens: _Bucket
    day: int = 0  # since 1970, UTC
    day_bytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Meter:
    """Counts the usage of each key. Thread safe. `clock` returns Unix seconds."""

    def __init__(self, store: DocumentStore, defaults: KeyLimits, clock: Callable[[], float] = time.time) -> None:
        self._store, self._defaults, self._clock = store, defaults, clock
        self._usage: dict[str, _Usage] = {}
        self._lock = threading.Lock()

    def set_own_limits(self, key_id: str, own: Mapping[str, int | None]) -> None:
        """Set a key's own limits; None: as the deployment. Blocks."""
        given = {name: value for name, value in own.items() if value is not None}
        self._store.set_setting(f"limits:{key_id}", json.dumps(given))
        with self._lock:
            self._usage.pop(key_id, None)

    def limits_of(self, key_id: str) -> KeyLimits:
        """The effective limits of a key. Blocks."""
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
        """Raises RateLimited while earlier answers have used up the key's tokens. Blocks."""
        if principal == LOCAL_ADMIN:
            return
        usage, now = self._of(principal), self._clock()
        limit = usage.limits.tokens_per_minute
        with usage.lock:
            usage.tokens.refill(limit, now)
            if limit and usage.tokens.level <= 0:
                raise RateLimited(f"this key may use {limit} tokens a minute", usage.tokens.wait_s(limit, 1))

    def charge_tokens(self, principal: Principal, tokens: int) -> None:
        """Count tokens used by an answer."""
        usage = self._usage.get(principal.key_id)
        if usage is not None and usage.limits.tokens_per_minute:
            with usage.lock:
                usage.tokens.level -= tokens

    def charge_bytes(self, principal: Principal, nbytes: int) -> None:
        """Count bytes of an upload as they arrive; 0 only checks that any are left. Raises RateLimited. Blocks."""
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
        """Persist the day's bytes; call it before acknowledging an upload. Blocks."""
        usage = self._usage.get(principal.key_id)
        if usage is not None and usage.limits.upload_bytes_per_day:
            with usage.lock:
                value = {"day": usage.day, "bytes": usage.day_bytes}
                self._store.set_setting(f"usage:{principal.key_id}", json.dumps(value))

    def documents_limit(self, principal: Principal) -> int:
        """Number of documents in a collection up to which this key may add; 0: no limit. Blocks."""
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
