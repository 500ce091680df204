"""Text to token ids and back, for prompts that must not be forged and answers that are streamed.

Special tokens are put into a prompt by id (`Tokenizer.special`), never by text: what a user or a document writes is
always encoded as plain characters. `StreamDecoder` turns ids into text one at a time.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import tokenizers


class Tokenizer:
    """The tokenizer.json of a checkpoint. Safe to share between threads."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_id: int | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # the library's name for "read special tokens in text as plain text"
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        # a chat's marks are not always declared special; added runs of white space are no marks
        marks = {token.content: i for i, token in added.items() if len(token.content) > 1 and token.content.strip()}
        self._control_ids = marks | self._special_ids
        self._control_set = frozenset(self._control_ids.values())
        names = sorted(self._control_ids, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
        self.eos_id = eos_id
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, checkpoint: Path | str) -> Self:
        """Read tokenizer.json and the end-of-text token of a checkpoint directory. Raises ValueError if it has none."""
        path = Path(checkpoint) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint has no tokenizer")
        backend = tokenizers.Tokenizer.from_file(str(path))
        return cls(backend, _read_eos_id(path.parent, backend))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; a special token written out in it becomes ordinary characters."""
        return self.encode_with_offsets(text)[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (t,) int32 of each text, as `encode` gives them; cut on all cores, without holding up other threads."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        found = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        controls = np.fromiter(self._control_set, dtype=np.int32)
        return [
            np.array(self.encode(text), dtype=np.int32) if np.isin(ids, controls).any() else ids
            for text, ids in zip(texts, found, strict=True)
        ]

    def encode_template(self, text: str) -> list[int]:
        """Ids of trusted text, such as a chat template's own: a special token written out in it becomes that token."""
        pieces = self._control.split(text) if self._control else [text]
        ids: list[int] = []
        for piece in pieces:
            if piece:
                ids += [self._control_ids[piece]] if piece in self._control_ids else self.encode(piece)
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids, and for each the characters of `text` it stands for; tokens of one split character share its place."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        if self._control_set.isdisjoint(encoding.ids):
            return encoding.ids, encoding.offsets
        return self._encode_around_special(text)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def special(self, name: str) -> int:
        """Id of a special token such as "<|doc|>". Raises ValueError if the vocabulary lacks it."""
        try:
            return self._special_ids[name]
        except KeyError:
            raise ValueError(
                f"the tokenizer has no special token {name!r}; it has {sorted(self._special_ids)}"
            ) from None

    def has_special(self, name: str) -> bool:
        return name in self._special_ids

    def is_control(self, token_id: int) -> bool:
        """Whether it is a special token, or another that was added as a mark: no text of a user becomes one."""
        return token_id in self._control_set

    def _encode_around_special(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode with every special token's text cut behind its first character, for backends that would merge it."""
        cuts = {0, len(text)}
        for name in self._control_ids:
            at = text.find(name)
            while at >= 0:
                cuts.add(at + 1)
                at = text.find(name, at + 1)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, end in itertools.pairwise(sorted(cuts)):
            piece = self._backend.encode(text[start:end], add_special_tokens=False)
            ids += piece.ids
            offsets += [(start + a, start + b) for a, b in piece.offsets]
        if not self._control_set.isdisjoint(ids):
            raise ValueError("the tokenizer turns plain text into special tokens: each needs at least two characters")
        return ids, offsets


class StreamDecoder:
    """Text of a growing list of ids: the pushes joined, and `finish`, equal the text of all of them at once."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._window: list[int] = []  # the ids behind the text given out last, then those not given out yet
        self._given = 0  # how many of them are given out

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes; empty while a character's bytes are not all there."""
        self._window.append(token_id)
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return text

    def finish(self) -> str:
        """What was held back; an unfinished character comes out as U+FFFD."""
        text = self._pending()
        self._window, self._given = [], 0
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._window[: self._given], self._skip_special)
        return self._tokenizer.decode(self._window, self._skip_special)[len(before) :]


def _read_eos_id(checkpoint: Path, backend: tokenizers.Tokenizer) -> int | None:
    """The chat's end token: tokenizer_config.json names it, otherwise config.json gives its id."""
    token = _read_json(checkpoint / "tokenizer_config.json").get("eos_token")
    name = token.get("content") if isinstance(token, dict) else token
    if name is not None and (token_id := backend.token_to_id(name)) is not None:
        return token_id
    token_id = _read_json(checkpoint / "config.json").get("eos_token_id")
    return token_id[0] if isinstance(token_id, list) else token_id


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
