"""The test sets of bench/retrieval.py: documents, questions, and locations of their answers.

Two kinds: a folder in BEIR format (corpus.jsonl, queries.jsonl, qrels/*.tsv), and the manuals set made for this
project. Its questions and the words of their answers are in bench/data/retrieval/questions.jsonl; its documents are
freely licensed manuals from the Debian packages of packages.json, fetched into a folder that git ignores by
    python -m bench.retrieval_sets
which needs apt-get and dpkg-deb of Debian 12. Packages are unpacked, never installed.
"""

import argparse
import hashlib
import json
import re
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingest.parse import ParseError, parse_file
from ingest.sniff import SNIFF_BYTES, UnsupportedMediaType, sniff_media_type
from retrieval.types import ParsedDocument

DATA = Path(__file__).parent / "data" / "retrieval"
FOLDER = Path(__file__).parent.parent / "data" / "retrieval-bench"
_LEAST_SHARE = 0.5  # share of a gold span that makes a chunk relevant


@dataclass(frozen=True, slots=True)
class Span:
    """Characters of a document's parsed text; `end` None = all of it."""

    document: str
    start: int = 0
    end: int | None = None

    def is_in(self, document: str, start: int, end: int) -> bool:
        """Whether text[start:end] of that document holds at least half of this span, or is part of a whole one."""
        if document != self.document or self.end is None:
            return document == self.document
        return min(end, self.end) - max(start, self.start) >= _LEAST_SHARE * (self.end - self.start)


@dataclass(frozen=True, slots=True)
class Question:
    """`gold`: spans that each answer it, with a grade above 0. `kind` groups questions in the report."""

    id: str
    text: str
    kind: str
    gold: tuple[tuple[Span, int], ...]


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """`by_document`: ranks count documents, not chunks, as the qrels of BEIR do."""

    name: str
    documents: dict[str, ParsedDocument]
    questions: list[Question]
    by_document: bool


def load_beir(folder: Path, split: str = "test") -> QuestionSet:
    """Read a folder in the format of BEIR. Raises ValueError when a file or a column is missing.

    Source: Thakur et al. 2021; beir/datasets/data_loader.py.
    """
    documents = {
        row["_id"]: ParsedDocument(text=row["text"], title=row.get("title") or None)
        for row in _read_lines(folder / "corpus.jsonl")
        if row["text"].strip()
    }
    texts = {row["_id"]: row["text"] for row in _read_lines(folder / "queries.jsonl")}
    gold: dict[str, list[tuple[Span, int]]] = {}
    path = folder / "qrels" / f"{split}.tsv"
    if not path.is_file():
        found = ", ".join(sorted(other.stem for other in path.parent.glob("*.tsv"))) or "none"
        raise ValueError(f"there is no {path}; splits there: {found}")
    for number, line in enumerate(path.read_text().splitlines()):
        columns = line.split("\t")
        if len(columns) < 3:
            raise ValueError(f"{path}, line {number + 1}: not query-id, corpus-id and score with tabs between")
        if columns[2].strip().isdigit() and int(columns[2]) > 0:  # the first line is a header
            gold.setdefault(columns[0], []).append((Span(columns[1]), int(columns[2])))
    questions = [Question(key, texts[key], split, tuple(spans)) for key, spans in gold.items() if key in texts]
    return QuestionSet(folder.name, documents, questions, by_document=True)


def load_manuals(folder: Path = FOLDER, packages: Collection[str] = ()) -> QuestionSet:
    """Parse the fetched manuals as an upload is and find each question's gold words in them, wherever they stand.

    With `packages`, only those of these. Raises ValueError when one is missing, or a question's words are not in it.
    """
    documents = dict(_parse_manuals(folder, packages))
    questions = []
    for row in _read_lines(DATA / "questions.jsonl"):
        if packages and row["source"] not in packages:
            continue
        pattern = words_pattern(row["gold"])
        spans = [
            (Span(name, match.start(), match.end()), 1)
            for name, parsed in documents.items()
            if name.startswith(row["source"] + "/")
            for match in pattern.finditer(parsed.text)
        ]
        if not spans:
            raise ValueError(
                f"{row['id']}: {row['gold']!r} is not in {row['source']}; fetch the versions in packages.json"
            )
        questions.append(Question(row["id"], row["question"], row["kind"], tuple(spans)))
    return QuestionSet("manuals", documents, questions, by_document=False)


def words_pattern(words: str) -> re.Pattern[str]:
    """Finds the words whatever white space stands between them."""
    return re.compile(r"\s+".join(map(re.escape, words.split())))


def manual_paths(folder: Path = FOLDER) -> Iterator[tuple[str, Path]]:
    """Names and files of the manuals. Raises ValueError when they are not there."""
    for package in json.loads((DATA / "packages.json").read_text())["packages"]:
        root = folder / package["name"] / package["root"]
        if not root.is_dir():
            raise ValueError(f"{root} is not there; fetch the manuals: python -m bench.retrieval_sets")
        left_out = {path for pattern in package["without"] for path in root.glob(pattern)}
        paths = {path for pattern in package["files"] for path in root.glob(pattern)} - left_out
        for path in sorted(paths):
            yield f"{package['name']}/{path.relative_to(root)}", path


def _parse_manuals(folder: Path, packages: Collection[str]) -> Iterator[tuple[str, ParsedDocument]]:
    for name, path in manual_paths(folder):
        if packages and name.partition("/")[0] not in packages:
            continue
        with path.open("rb") as file:
            head = file.read(SNIFF_BYTES)
        try:
            yield name, parse_file(path, sniff_media_type(head, path.name))
        except (ParseError, UnsupportedMediaType):
            continue  # a page of links, without text


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def fetch_manuals(folder: Path = FOLDER) -> None:
    """Download, check and unpack what is missing. Raises ValueError when a package is not the one named."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in json.loads((DATA / "packages.json").read_text())["packages"]:
        target = folder / package["name"]
        if target.is_dir():
            continue
        subprocess.run(
            ["apt-get", "download", "-qq", f"{package['name']}={package['version']}"], cwd=folder, check=True
        )
        (archive,) = folder.glob(f"{package['name']}_*.deb")
        if hashlib.sha256(archive.read_bytes()).hexdigest() != package["sha256"]:
            raise ValueError(f"{archive} is not the {package['name']} {package['version']} of packages.json (SHA-256)")
        subprocess.run(["dpkg-deb", "--extract", archive, target.with_suffix(".part")], check=True)
        target.with_suffix(".part").rename(target)
        archive.unlink()
        print(f"{package['name']} {package['version']}, {package['licence']}", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    fetch_manuals()
