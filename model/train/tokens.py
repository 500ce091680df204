"""Tokenizes the corpora into one uint16 array, documents shuffled and separated by `<|endoftext|>`.

Run: `python -m model.train.tokens --corpora DIR --tokenizer DIR --out tokens.npy`. Uses every core.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers


def read_records(folder: Path, part: int = 0, parts: int = 1) -> Iterator[dict[str, str]]:
    """Every `parts`-th {source, doc, title, text} of the `corpus-*.jsonl.xz` (or unpacked `.jsonl`) of `folder`."""
    for path in sorted(folder.glob("corpus-*.jsonl*")):
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            yield from (json.loads(line) for i, line in enumerate(file) if i % parts == part)


def read_texts(folder: Path, part: int = 0, parts: int = 1) -> Iterator[tuple[str, str]]:
    """(title, text) of `read_records`."""
    for record in read_records(folder, part, parts):
        yield record.get("title") or "", record["text"]


def encode_texts(texts: list[str], tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """Token ids of all texts, concatenated, each followed by id 0: (tokens,) uint16."""
    tokenizer.encode_special_tokens = True
    pieces = []
    for start in range(0, len(texts), 2000):
        for encoding in tokenizer.encode_batch(texts[start : start + 2000], add_special_tokens=False):
            pieces += [np.array(encoding.ids, dtype=np.uint16), np.zeros(1, np.uint16)]
    return np.concatenate(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("corpora", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start, texts = time.monotonic(), [f"{title}\n\n{text}".strip() for title, text in read_texts(args.corpora)]
    random.Random(args.seed).shuffle(texts)
    tokens = encode_texts(texts, tokenizers.Tokenizer.from_file(str(args.tokenizer / "tokenizer.json")))
    np.save(args.out, tokens)
    print(f"{len(texts)} texts, {len(tokens)} tokens in {time.monotonic() - start:.0f} s -> {args.out}")


if __name__ == "__main__":
    main()
