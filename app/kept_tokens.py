"""Tokens of the pieces that prompts are put together from, cut once for all questions about the same documents.

What the pieces are say prompting.py and text_format.py. Start at `KeptTokens`.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

import numpy as np

from model.tokenizer import Tokenizer
from retrieval.types import Passage

_MAX_TOKENS = 8_000_000

Value = TypeVar("Value")


class KeptTokens:
    """Thread safe. Ids are arrays (t,) int32, to be read only; `prepare` is what becomes of a passage's text first."""

    def __init__(self, tokenizer: Tokenizer, prepare: Callable[[str], str] = str) -> None:
        self._tokenizer, self._prepare = tokenizer, prepare
        self._kept = LruByWeight[np.ndarray](_MAX_TOKENS)

    def cut_ahead(self, passages: Iterable[Passage]) -> None:
        """Cut what is not kept of these passages, on all cores."""
        missing = {key: one for one in passages if self._kept.get(key := passage_key(one)) is None}
        if missing:
            texts = [self._prepare(passage.text) for passage in missing.values()]
            for key, ids in zip(missing, self._tokenizer.encode_many(texts), strict=True):
                self._kept.put(key, ids, weight=len(ids))

    def of_passage(self, passage: Passage) -> np.ndarray:
        key = passage_key(passage)
        ids = self._kept.get(key)
        if ids is None:
            (ids,) = self._tokenizer.encode_many([self._prepare(passage.text)])
            self._kept.put(key, ids, weight=len(ids))
        return ids

    def of(self, cut: Callable[..., Sequence[int]], *arguments: Hashable) -> np.ndarray:
        """What `cut` gives for these arguments."""
        key = (cut, *arguments)
        ids = self._kept.get(key)
        if ids is None:
            ids = as_ids(cut(*arguments))
            self._kept.put(key, ids, weight=1 + len(ids))
        return ids

    def forget(self) -> None:
        self._kept.clear()


class TokenRow:
    """Pieces of a prompt, one behind the other; `len` counts tokens."""

    def __init__(self) -> None:
        self._pieces: list[np.ndarray] = []
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, *pieces: Sequence[int] | np.ndarray) -> None:
        self._pieces += map(as_ids, pieces)
        self._length += sum(map(len, pieces))

    def joined(self) -> np.ndarray:
        """(t,) int64, as engines take them."""
        return np.concatenate([as_ids(()), *self._pieces], dtype=np.int64)


def as_ids(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


def passage_key(passage: Passage) -> Hashable:
    """Equal for passages with the same text."""
    return (passage.document_id, passage.document_version, passage.char_start, passage.char_end)


class LruByWeight(Generic[Value]):
    """A small mapping that forgets what was used longest ago once the weights exceed `max_weight`."""

    def __init__(self, max_weight: int) -> None:
        self._max_weight, self._weight = max_weight, 0
        self._entries: OrderedDict[Hashable, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Value | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Hashable, value: Value, weight: int) -> None:
        with self._lock:
            if key in self._entries:
                self._weight -= self._entries.pop(key)[1]
            self._entries[key] = (value, weight)
            self._weight += weight
            while self._weight > self._max_weight and len(self._entries) > 1:
                self._weight -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self._weight = 0
