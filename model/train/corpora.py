"""Builds the text corpus: downloads Debian packages, extracts English prose, removes duplicates, writes shards.

`python -m model.train.corpora --out scratch/corpora` is resumable: the text of each package is kept in `parts/`, and
only missing packages are fetched. Packages are unpacked, never installed. sources.py lists the packages, extract.py
turns files into paragraphs. Start at `main`.
"""

import argparse
import hashlib
import json
import lzma
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from lxml import etree

from model.train import sources
from model.train.extract import Block, extract_file

_BATCH = 24  # packages per apt-get call, because reading the package lists takes longer than fetching
_SUFFIXES = (
    *(".html", ".htm", ".xhtml", ".txt", ".text", ".pod", ".docbook", ".page", ".dict", ".info", ".md", ".rst"),
    *(".help", ".manual", ".tex.txt", ".cfg", ".rdb", ".ms", ".asciidoc"),
)
_SKIP_PATH = re.compile(
    r"/(?:_sources|_static|_modules|_downloads|examples?|tests?|search|genindex|l10n|locale|translations|"
    r"(?:[a-z]{2}(?:[-_][A-Za-z]{2,6})?)(?=/))/|"
    r"change_?log|copyright|copying|licen[cs]e|authors|credits|thanks|genindex|modindex|classes\.html|hierarchy|"
    r"functions_|globals_|annotated|_8h|_8cpp|-source\.html|members\.html|deprecated-list|allclasses|overview-tree|"
    r"package-(?:tree|use|frame)|class-use|index-all|/index-\d|sitemap|todo\.|\.[a-z]{2}\.html|\.(?:de|fr|es|ja|ru)\.",
    re.IGNORECASE,
)
_ENGLISH = re.compile(r"/(?:en|en[-_](?:us|gb)|c|man)/", re.IGNORECASE)
_STOPWORDS = frozenset(sources.read_word_lists(Path(__file__).parent / "words.txt")["stopwords"])
_BOILERPLATE = re.compile(
    r"^definition at line|^referenced by|^references |^generated (?:by|on)|^copyright|^\(c\)|©|all rights reserved|"
    r"^(?:next|previous|prev|up|home|back|top|contents|index)\b[\s:|]|^see also:?$|^table of contents|"
    r"javascript|^this (?:page|document) was (?:last|generated)|^last (?:updated|modified)|^\[?edit\]?$|"
    r"^reimplemented (?:from|in)|^inherited|^(?:public|protected|private) |^the documentation for this class|"
    r"permission is (?:hereby )?granted|without (?:any )?warranty|^menu:|^(?:click|return) here|"
    r"free documentation license",
    re.IGNORECASE,
)


def main(argv: list[str] | None = None) -> None:
    """Fetch, extract, deduplicate, write; prints one line per package."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--packages", nargs="*", help="instead of the list in sources.py")
    parser.add_argument("--held-out", action="store_true", help="extract the held-out packages, for test sets only")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard-mb", type=float, default=20.0)
    args = parser.parse_args(argv)
    packages = list(sources.HELD_OUT) if args.held_out else args.packages or sources.training_packages()
    parts = args.out / ("held_out" if args.held_out else "parts")
    parts.mkdir(parents=True, exist_ok=True)
    _extract_all(packages, parts, args.workers)
    if not args.held_out:
        _write_shards(packages, parts, args.out, int(args.shard_mb * 1e6))


def _extract_all(packages: list[str], parts: Path, workers: int) -> None:
    known = _known_packages()
    for name in [name for name in packages if name not in known]:
        print(f"{name}: not available", flush=True)
    missing = [name for name in packages if name in known and not (parts / f"{name}.json").exists()]
    done = 0
    with ProcessPoolExecutor(workers) as pool, tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        archives = _download(missing[:_BATCH], Path(folder))
        for start in range(0, len(missing), _BATCH):
            jobs = {pool.submit(extract_package, name, path, parts): name for name, path in archives.items()}
            archives = _download(missing[start + _BATCH : start + 2 * _BATCH], Path(folder))
            for job in as_completed(jobs):
                try:
                    entry = job.result()
                    note = f"{entry['documents']} documents, {entry['chars'] / 1e6:.2f} MB"
                except (OSError, subprocess.SubprocessError) as error:
                    note = f"left out: {error}"
                done += 1
                print(f"[{done}/{len(missing)}] {jobs[job]}: {note}", flush=True)


def _known_packages() -> set[str]:
    """Names in the package lists: apt-get fetches nothing of a batch that has an unknown name."""
    listed = subprocess.run(["apt-cache", "pkgnames"], check=True, capture_output=True, text=True)
    return set(listed.stdout.split())


def _download(names: list[str], folder: Path) -> dict[str, Path]:
    """Fetch packages with one apt-get call, or one by one if it fails; returns the archives that were fetched."""
    if not names:
        return {}
    command = ["apt-get", "download", "-qq"]
    try:
        subprocess.run([*command, *names], cwd=folder, check=True, capture_output=True, timeout=900)
    except subprocess.SubprocessError:
        for name in names:
            subprocess.run([*command, name], cwd=folder, check=False, capture_output=True, timeout=300)
    found = {path.name.split("_")[0]: path for path in folder.glob("*.deb")}
    for name in [name for name in names if name not in found]:
        print(f"{name}: not available", flush=True)
    return {name: found[name] for name in names if name in found}


def extract_package(name: str, archive: Path, parts: Path) -> dict[str, Any]:
    """Write a package's documents to parts/<name>.jsonl, its manifest entry to parts/<name>.json; delete the archive.

    Raises subprocess.SubprocessError when the package cannot be unpacked.
    """
    entry: dict[str, Any] = {
        "package": name,
        "version": archive.name.split("_")[1].replace("%3a", ":"),
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "deb_bytes": archive.stat().st_size,
    }
    with tempfile.TemporaryDirectory(prefix="corpus-") as folder:
        tree = Path(folder)
        subprocess.run(["dpkg", "-x", archive, tree], check=True, capture_output=True, timeout=300)
        archive.unlink()
        entry["licence"] = _licence(tree, name)
        documents = list(_documents(name, tree))
    with (parts / f"{name}.jsonl").open("w") as out:
        for document in documents:
            out.write(json.dumps(document, ensure_ascii=False) + "\n")
    entry |= {"documents": len(documents), "chars": sum(len(d["text"]) for d in documents)}
    (parts / f"{name}.json").write_text(json.dumps(entry))
    return entry


def _documents(name: str, tree: Path) -> Iterator[dict[str, str]]:
    """Clean documents of an unpacked package, in a fixed order (by path hash), up to the package's cap."""
    left = sources.cap_chars(name)
    files = [path for path in tree.rglob("*") if path.is_file() and not path.is_symlink() and _wanted(path, tree)]
    for path in sorted(files, key=lambda p: hashlib.md5(str(p.relative_to(tree)).encode()).digest()):
        if left <= 0:
            return
        try:
            title, blocks = extract_file(path)
        except (OSError, EOFError, RecursionError, ValueError, etree.LxmlError, subprocess.SubprocessError):
            continue
        text = clean_text(blocks)
        if len(text) > left:  # every n-th paragraph, so that a dictionary is not cut to its first letters
            paragraphs = text.split("\n\n")
            text = "\n\n".join(paragraphs[:: -(-len(text) // left)])
        if text:
            left -= len(text)
            yield {"source": name, "doc": path.name, "title": title[:200], "text": text}


def _wanted(path: Path, tree: Path) -> bool:
    relative = f"/{path.relative_to(tree)}"
    size = path.stat().st_size
    if not 600 < size < 12_000_000:
        return False
    if "/games/fortunes/" in relative:
        return path.suffix not in (".dat", ".u8")
    if "/endless-sky/data/" in relative:
        return path.suffix == ".txt"
    bare = path.name.lower().removesuffix(".gz").removesuffix(".dz")
    if "/man/man" in relative:
        return bare[-1:].isdigit() or bool(re.search(r"\.[1-8][a-z]*$", bare))
    if bare.endswith(".xml"):
        return "/help/C/" in relative
    if _SKIP_PATH.search(_ENGLISH.sub("/", _ENGLISH.sub("/", relative.removeprefix("/usr")))):
        return False
    return bare.endswith(_SUFFIXES) or (".info" in bare) or ("/doc/" in relative and "." not in bare)


def clean_text(blocks: Iterable[Block]) -> str:
    """The prose of a document, paragraphs separated by blank lines; "" for an index, code or other languages."""
    kept: list[Block] = []
    for block in blocks:
        if block.kind == "code":
            intro = kept[-1] if kept else None
            if intro and intro.kind in ("p", "li") and intro.text.endswith(":") and 8 <= len(block.text) <= 400:
                kept.append(block)
        elif _keep(block):
            kept.append(block)
    kept = [
        b for b, after in zip(kept, [*kept[1:], None], strict=False) if b.kind != "h" or (after and after.kind != "h")
    ]
    prose = [b.text for b in kept if b.kind in ("p", "li") and len(b.text) >= 60]
    total = sum(len(b.text) for b in kept)
    length = sum(map(len, prose))
    if length < 350 or length < 0.6 * total or length / len(prose) < 90 or _stopword_share(" ".join(prose[:60])) < 0.22:
        return ""
    return "\n\n".join(b.text if b.kind != "li" else f"- {b.text}" for b in kept)


def _keep(block: Block) -> bool:
    text = block.text
    if block.kind == "h":
        return 3 <= len(text) <= 120 and sum(c.isalpha() for c in text) > 0.5 * len(text)
    if len(text) < 25 or len(text) > 6000 or _BOILERPLATE.search(text[:300]) or "\ufffd" in text:
        return False
    letters = sum(c.isalpha() or c == " " for c in text) / len(text)
    if block.kind == "row":
        return letters > 0.6 and len(text) < 400
    return letters > 0.75 and (len(text) < 80 or _stopword_share(text) > 0.12)


def _stopword_share(text: str) -> float:
    words = re.findall(r"[a-zA-Z']+", text.lower())
    return sum(w in _STOPWORDS for w in words) / max(1, len(words))


def _licence(tree: Path, name: str) -> str:
    """Licence names from the package's copyright file: its License fields, else the licences it mentions."""
    path = tree / "usr/share/doc" / name / "copyright"
    if not path.exists():
        others = sorted(tree.glob("usr/share/doc/*/copyright"))
        if not others:
            return "see the copyright file of its source package"
        path = others[0]
    text = path.read_text(errors="replace")
    fields = list(dict.fromkeys(m.strip() for m in re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)))
    if fields:
        return "; ".join(fields)[:300]
    known = {
        "GFDL": r"Free Documentation License|GFDL", "GPL": r"(?<!Lesser )General Public Licen[sc]e|\bGPL",
        "LGPL": r"Lesser General Public|LGPL", "MIT": r"\bMIT\b|Permission is hereby granted, free of charge",
        "BSD": r"\bBSD\b|Redistribution and use in source and binary", "Apache-2.0": r"Apache License",
        "Artistic": r"Artistic", "CC-BY-SA": r"CC[- ]BY[- ]SA|ShareAlike", "PSF": r"Python Software Foundation License",
        "public domain": r"public domain", "MPL": r"Mozilla Public",
    }  # fmt: skip
    return "; ".join(k for k, pattern in known.items() if re.search(pattern, text)) or "see its copyright file"


def _write_shards(packages: list[str], parts: Path, out: Path, shard_chars: int) -> None:
    """Deduplicate paragraphs over all parts; write corpus-NN.jsonl.xz, dev.jsonl.xz, manifest.json."""
    manifest, seen, short = [], set[bytes](), Counter[str]()
    writers = {
        "train": _ShardWriter(out, "corpus-{:02d}.jsonl.xz", shard_chars),
        "dev": _ShardWriter(out, "dev.jsonl.xz"),
    }
    for name in packages:
        if not (parts / f"{name}.json").exists():
            continue
        entry = json.loads((parts / f"{name}.json").read_text()) | {"documents": 0, "chars": 0}
        with (parts / f"{name}.jsonl").open() as lines:
            for line in lines:
                document = json.loads(line)
                document["text"] = _without_repeats(document["text"], seen, short)
                if document["text"]:
                    writers["dev" if sources.is_dev_document(name, document["doc"]) else "train"].add(document)
                    entry["documents"] += 1
                    entry["chars"] += len(document["text"])
        manifest.append(entry)
    for writer in writers.values():
        writer.close()
    (out / "manifest.json").write_text(json.dumps([e for e in manifest if e["chars"]], indent=1))
    print(f"{sum(e['chars'] for e in manifest) / 1e6:.1f} MB from {len(manifest)} packages", file=sys.stderr)


def _without_repeats(text: str, seen: set[bytes], short: Counter[str]) -> str:
    """The text without paragraphs seen before (short ones: seen 20 times); "" if less than half of it, or fewer than
    350 characters, are left."""
    kept = []
    for paragraph in text.split("\n\n"):
        norm = re.sub(r"[\W\d]+", "", paragraph.lower())
        if len(norm) < 50:
            short[norm] += 1
            if short[norm] <= 20:
                kept.append(paragraph)
            continue
        digest = hashlib.blake2b(norm.encode(), digest_size=8).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(paragraph)
    cleaned = "\n\n".join(kept)
    return cleaned if len(cleaned) >= max(350, 0.5 * len(text)) else ""


class _ShardWriter:
    """Writes documents to xz files of about `limit` characters; texts over 60,000 are split at paragraphs."""

    def __init__(self, folder: Path, pattern: str, limit: int = 1 << 60) -> None:
        self._folder, self._pattern, self._limit = folder, pattern, limit
        self._count, self._used = 0, 0
        for old in folder.glob(re.sub(r"\{.*?\}", "*", pattern)):
            old.unlink()
        self._file = self._open()

    def _open(self) -> lzma.LZMAFile:
        return lzma.open(self._folder / (self._pattern.format(self._count) + ".tmp"), "wb", preset=6)

    def add(self, document: dict[str, str]) -> None:
        for piece in _pieces(document["text"], 60_000):
            self._file.write((json.dumps(document | {"text": piece}, ensure_ascii=False) + "\n").encode())
            self._used += len(piece)
        if self._used >= self._limit:
            self.close()
            self._count, self._used = self._count + 1, 0
            self._file = self._open()

    def close(self) -> None:
        self._file.close()
        name = self._pattern.format(self._count)
        shutil.move(self._folder / (name + ".tmp"), self._folder / name)


def _pieces(text: str, limit: int) -> Iterator[str]:
    piece: list[str] = []
    used = 0
    for paragraph in text.split("\n\n"):
        if used > limit:
            yield "\n\n".join(piece)
            piece, used = [], 0
        piece.append(paragraph)
        used += len(paragraph)
    yield "\n\n".join(piece)


if __name__ == "__main__":
    main()
