"""Stores pairs of `model.train.asking` without their passages, which are restored from the corpora.

`python -m model.train.made strip made.jsonl made_pairs.jsonl.xz`, and `… restore made_pairs.jsonl.xz made.jsonl
--corpora DIR` on any machine. `made_pairs*.jsonl.xz` beside this file hold all pairs generated so far: source, doc,
question, answer, start, kind, read, f1, sure, and the beginning and CRC-32 of the passage.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from model.train.passages import cut_passages
from model.train.tokens import read_records

SHIPPED = tuple(sorted(Path(__file__).parent.glob("made_pairs*.jsonl.xz")))
_BEGINS = 48


def document_random(document: dict[str, str]) -> random.Random:
    """The random generator for a document, the same on every machine."""
    return random.Random(zlib.crc32(f"{document['source']}/{document['doc']}".encode()))


def cut_document(document: dict[str, str], rng: random.Random) -> list[tuple[str, str]]:
    """(title, passage) pairs of a corpus record; `rng` from `document_random`."""
    pieces = cut_passages(document["text"], rng)
    return [((heading or document["title"] or document["doc"])[:80], text) for heading, text in pieces]


def strip(pairs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs without title and passage, sorted by document."""
    rows = [{k: v for k, v in pair.items() if k not in ("title", "passage")} | _mark(pair["passage"]) for pair in pairs]
    return sorted(rows, key=lambda row: (row["source"], row["doc"], row["begins"]))


def asked_before(paths: Sequence[Path] = SHIPPED) -> set[tuple[str, str, int]]:
    """Source, document and CRC-32 of each passage that has pairs."""
    return {(row["source"], row["doc"], row["crc32"]) for row in _read(*paths)}


def _mark(passage: str) -> dict[str, Any]:
    """Identifies a passage within its document."""
    return {"begins": passage[:_BEGINS], "crc32": zlib.crc32(passage.encode())}


def restore(rows: Iterable[dict[str, Any]], corpora: Path) -> Iterator[dict[str, Any]]:
    """The pairs with title and passage; those whose passage is not in the corpora (any more) are left out."""
    wanted: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        wanted[row["source"], row["doc"]][row["crc32"]].append(row)
    for document in read_records(corpora):
        asked = wanted.get((document["source"], document["doc"]))
        for title, text in cut_document(document, document_random(document)) if asked else ():
            mark = _mark(text)
            for row in asked.pop(mark["crc32"], ()):
                if row["begins"] == mark["begins"]:
                    yield {k: v for k, v in row.items() if k not in mark} | {"title": title, "passage": text}


def restore_files(sources: Sequence[Path], out: Path, corpora: Path) -> None:
    """`restore` JSONL(.xz) files into another, written atomically."""
    rows = _read(*sources)
    _write(out, list(restore(rows, corpora)), len(rows))


def _read(*paths: Path) -> list[dict[str, Any]]:
    rows = []
    for path in paths:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as file:
            rows += map(json.loads, file)
    return rows


def _write(path: Path, rows: Sequence[dict[str, Any]], of: int) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(lzma.compress(text) if path.suffix == ".xz" else text)
    part.rename(path)
    print(f"{len(rows)} of {of} pairs -> {path}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("strip", "restore"))
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpora", type=Path, help="output folder of model.train.corpora, for restore")
    args = parser.parse_args()
    if args.what == "strip":
        rows = _read(args.source)
        _write(args.out, strip(rows), len(rows))
    elif args.corpora is None:
        parser.error("restore needs --corpora")
    else:
        restore_files([args.source], args.out, args.corpora)


if __name__ == "__main__":
    main()
