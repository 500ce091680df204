"""Text to token ids and back, safe against forged special tokens, with incremental decoding for streaming.

Special tokens enter a prompt only by id (`Tokenizer.special`): text of users and documents is always encoded as
ordinary tokens, even if it spells a special token. `StreamDecoder` decodes one token at a time.
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
        backend.encode_special_tokens = True  # despite its name: encode special tokens in text as plain text
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        # chat markers are not always declared special; added tokens for runs of white space are not markers
        marks = {token.content: i for i, token in added.items() if len(token.content) > 1 and token.content.strip()}
        self._control_ids = marks | self._special_ids
        self._control_set = frozenset(self._control_ids.values())
        names = sorted(self._control_ids, key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, names))})") if names else None
        self.eos_id = eos_id
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def load(cls, checkpoint: Path | str) -> Self:
        """Read tokenizer.json and the EOS token of a checkpoint directory. Raises ValueError without tokenizer.json."""
        path = Path(checkpoint) / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path} is missing: the checkpoint has no tokenizer")
        backend = tokenizers.Tokenizer.from_file(str(path))
        return cls(backend, _read_eos_id(path.parent, backend))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens spelled out in it are encoded as ordinary text."""
        return self.encode_with_offsets(text)[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` each text, as int32 (t,); runs on all cores and releases the GIL."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        found = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        controls = np.fromiter(self._control_set, dtype=np.int32)
        return [
            np.array(self.encode(text), dtype=np.int32) if np.isin(ids, controls).any() else ids
            for text, ids in zip(texts, found, strict=True)
        ]

    def encode_template(self, text: str) -> list[int]:
        """Ids of trusted text, such as a chat template's; special tokens spelled out in it become those tokens."""
        pieces = self._control.split(text) if self._control else [text]
        ids: list[int] = []
        for piece in pieces:
            if piece:
                ids += [self._control_ids[piece]] if piece in self._control_ids else self.encode(piece)
        return ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and the (start, end) of each in `text`; tokens of one split character share its offsets."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        if self._control_set.isdisjoint(encoding.ids):
            return encoding.ids, encoding.offsets
        return self._encode_around_special(text)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD."""
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
        """Whether it is a special token or another added marker; `encode` never produces one."""
        return token_id in self._control_set

    def _encode_around_special(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode with the spelling of each special token split after its first character, so that it cannot match."""
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
    """Decodes ids one at a time; all results of `push` and `finish` joined equal `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._window: list[int] = []  # the ids of the text emitted last, then those not emitted yet
        self._given = 0  # how many of them are emitted

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; empty while a character is incomplete."""
        self._window.append(token_id)
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return text

    def finish(self) -> str:
        """The text held back; an incomplete character becomes U+FFFD."""
        text = self._pending()
        self._window, self._given = [], 0
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._window[: self._given], self._skip_special)
        return self._tokenizer.decode(self._window, self._skip_special)[len(before) :]


def _read_eos_id(checkpoint: Path, backend: tokenizers.Tokenizer) -> int | None:
    """The EOS token: by name from tokenizer_config.json, otherwise by id from config.json."""
    token = _read_json(checkpoint / "tokenizer_config.json").get("eos_token")
    name = token.get("content") if isinstance(token, dict) else token
    if name is not None and (token_id := backend.token_to_id(name)) is not None:
        return token_id
    token_id = _read_json(checkpoint / "config.json").get("eos_token_id")
    return token_id[0] if isinstance(token_id, list) else token_id


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
