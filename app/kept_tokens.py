"""Caches the tokens of the pieces that prompts consist of, so that each document is tokenized only once.

prompting.py and text_format.py define the pieces. Start at `KeptTokens`.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from model.tokenizer import Tokenizer
from retrieval.types import Passage

_MAX_TOKENS = 8_000_000  # of passages
_MAX_PIECES = 10_000

PassageKey = tuple[str, int, int, int]  # document, version, start, end
Value = TypeVar("Value")


class KeptTokens:
    """Thread safe. Ids are read-only arrays (t,) int32; `prepare` is applied to the text of passages first."""

    def __init__(self, tokenizer: Tokenizer, prepare: Callable[[str], str] = str) -> None:
        self._tokenizer, self._prepare = tokenizer, prepare
        self._passages, self._pieces = (LruByWeight[np.ndarray](weight) for weight in (_MAX_TOKENS, _MAX_PIECES))

    def cut_ahead(self, passages: Iterable[Passage]) -> None:
        """Tokenize those of these passages that are not cached yet, on all cores."""
        missing = {key: one for one in passages if self._passages.get(key := passage_key(one)) is None}
        if missing:
            self._cut(missing)

    def of_passage(self, passage: Passage) -> np.ndarray:
        key = passage_key(passage)
        ids = self._passages.get(key)
        return self._cut({key: passage})[0] if ids is None else ids

    def of(self, cut: Callable[..., Sequence[int]], *arguments: Hashable) -> np.ndarray:
        """The result of `cut` for these arguments, cached."""
        key = (cut, *arguments)
        ids = self._pieces.get(key)
        if ids is None:
            ids = as_ids(cut(*arguments))
            self._pieces.put(key, ids, weight=1)
        return ids

    def forget(self, document_ids: Collection[str]) -> None:
        """Drop what is cached of these documents."""
        self._passages.drop(lambda key: key[0] in document_ids)
        self._pieces.drop(lambda key: True)  # some are titles of these documents; all are quickly recomputed

    def _cut(self, passages: Mapping[PassageKey, Passage]) -> list[np.ndarray]:
        texts = [self._prepare(passage.text) for passage in passages.values()]
        cut = self._tokenizer.encode_many(texts)
        for key, ids in zip(passages, cut, strict=True):
            self._passages.put(key, ids, weight=len(ids))
        return cut


class TokenRow:
    """Successive pieces of a prompt; `len` counts tokens."""

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


def passage_key(passage: Passage) -> PassageKey:
    """Equal for passages with the same text."""
    return (passage.document_id, passage.document_version, passage.char_start, passage.char_end)


class LruByWeight(Generic[Value]):
    """A small LRU mapping that evicts once the sum of weights exceeds `max_weight`."""

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

    def drop(self, is_gone: Callable[[Any], bool]) -> None:
        """Remove the keys for which `is_gone` is true."""
        with self._lock:
            for key in [key for key in self._entries if is_gone(key)]:
                self._weight -= self._entries.pop(key)[1]
