"""The word index: BM25 over the words of chunks, on tantivy; derived from the store, never the other way round.

A commit holds changed chunks together with the store's generation that they are of, so whatever a crash leaves is one
generation, whole, and `WordIndex.catch_up` goes on from there. What a word is: lexical.py. Start at `open_words`.
"""

import json
import logging
import math
import shutil
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tantivy

from .index import IndexDamaged
from .lexical import index_text

_LOG = logging.getLogger(__name__)
_ANALYZER = "words-1"  # part of the schema: with another number, indexes made before are rebuilt
_HEAP_BYTES = 64_000_000  # so much of new chunks is in memory before it becomes a segment
_MARKER = 0  # row of the one entry that says the generation; rows of chunks begin at 1
_LEAST_IDF = 1e-6
_RETRY_S = 30.0  # after an index could not be written, as on a full disk


class WordSource(Protocol):
    """What the index needs of the store; see DocumentStore."""

    def generation(self) -> int: ...
    def knows_generation(self, generation: int) -> bool: ...
    def removed_chunks(self, after: int, upto: int) -> np.ndarray: ...
    def chunk_texts(self, after: int, upto: int) -> Iterator[tuple[int, int, str, str]]: ...


class WordIndex:
    """Finds chunk rows by their words. Thread safe; one process at a time may write to a directory."""

    def __init__(self, directory: Path | None = None) -> None:
        """Open or create; None = in memory. Raises IndexDamaged when what is there cannot be opened."""
        self._analyzer = _make_analyzer()
        self._schema = _make_schema()
        try:
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)
            self._index = tantivy.Index(self._schema, path=None if directory is None else str(directory))
        except (ValueError, OSError) as error:
            raise IndexDamaged(f"{directory}: {error}") from error
        self._index.register_tokenizer(_ANALYZER, self._analyzer)
        self._index.config_reader("manual")
        self._lock = threading.Lock()  # one catch-up at a time
        self._writer: tantivy.IndexWriter | None = None
        self._caught_up_at = self._failed_at = -math.inf
        self._generation = self._read_generation()

    @property
    def count(self) -> int:
        """Chunks that it holds."""
        return self._index.searcher().num_docs - (self._generation != 0)

    @property
    def generation(self) -> int:
        """The store's generation that it holds; 0 = nothing."""
        return self._generation

    def catch_up(self, source: WordSource, min_interval_s: float = 0.0) -> bool:
        """Take over what the store changed since; returns whether there was anything. Cheap if not.

        Does nothing within `min_interval_s` of the last time: a commit takes tens of milliseconds. When the index
        cannot be written, that is logged, searches go on with what it holds, and it is tried again 30 s later.
        """
        if source.generation() == self._generation:
            return False
        with self._lock:
            upto, after, now = source.generation(), self._generation, time.monotonic()
            if upto == after or now < max(self._caught_up_at + min_interval_s, self._failed_at + _RETRY_S):
                return False
            if after > upto or not source.knows_generation(after):
                _LOG.warning("word index at generation %d is not of this database's history: rebuilding it", after)
                after = 0
            try:
                self._advance(source, after, upto)
            except (ValueError, OSError):  # tantivy's
                self._failed_at = now
                _LOG.exception("cannot write the word index; searches go on with what it holds")
                return False
            self._caught_up_at = time.monotonic()
            return True

    def _advance(self, source: WordSource, after: int, upto: int) -> None:
        writer, self._writer = self._writer, None  # dropped unless all goes well, and what it was given with it
        writer = writer or self._index.writer(_HEAP_BYTES, num_threads=1)
        if after == 0:
            writer.delete_all_documents()
        for row in (_MARKER, *source.removed_chunks(after, upto).tolist()):
            writer.delete_documents_by_term("row", row)
        for row, document_row, text, context in source.chunk_texts(after, upto):
            chunk = tantivy.Document(row=row, document=document_row)
            chunk.add_text("text", index_text(text))
            chunk.add_text("text", index_text(context))
            writer.add_document(chunk)
        writer.add_document(tantivy.Document(row=_MARKER, generation=upto))
        writer.commit()
        self._index.reload()
        self._writer, self._generation = writer, upto

    def close(self, source: WordSource) -> None:
        """Take over what is left of the store's changes, and let others write to the directory."""
        self.catch_up(source)
        with self._lock:
            self._writer = None

    def search(
        self, terms: Sequence[str], limit: int, document_rows: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Best (chunk row, BM25 score, higher is better) of the chunks that have any of `lexical.query_terms`.

        `document_rows`: only in these documents; None = all. k1 1.2, b 0.75; lengths are rounded to a byte.
        """
        searcher = self._index.searcher()
        wanted = [self._term_query(searcher, tokens) for tokens in self._analyze(terms)]
        if not wanted or limit < 1:
            return []
        query = tantivy.Query.boolean_query([(tantivy.Occur.Should, one) for one in wanted])
        if document_rows is not None:
            allowed = tantivy.Query.term_set_query(self._schema, "document", list(document_rows))
            parts = [(tantivy.Occur.Must, tantivy.Query.const_score_query(allowed, 0.0)), (tantivy.Occur.Must, query)]
            query = tantivy.Query.boolean_query(parts)
        hits = searcher.search(query, limit, count=False).hits  # counting would visit every match
        rows = searcher.fast_field_values("row", [address for _, address in hits])
        found = [(int(row), score) for row, (score, _) in zip(rows, hits, strict=True)]
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))

    def expected_score(self, terms: Sequence[str]) -> float:
        """BM25 of an average chunk that has each of `lexical.query_terms` once: the sum of their idf; 0 without."""
        searcher = self._index.searcher()
        return sum(_idf(self._frequency(searcher, tokens), searcher.num_docs) for tokens in self._analyze(terms))

    def _analyze(self, terms: Sequence[str]) -> list[list[str]]:
        return [tokens for term in terms if (tokens := self._analyzer.analyze(index_text(term)))]

    def _term_query(self, searcher: tantivy.Searcher, tokens: list[str]) -> tantivy.Query:
        """Tantivy weighs a term by its `_own_idf`, a phrase by the sum of its words'; this weighs it by `_idf`."""
        chunks = searcher.num_docs
        own = sum(_own_idf(searcher.doc_freq("text", token), chunks) for token in tokens)
        if len(tokens) == 1:
            query = tantivy.Query.term_query(self._schema, "text", tokens[0])
        else:
            query = tantivy.Query.phrase_query(self._schema, "text", tokens)
        return tantivy.Query.boost_query(query, _idf(self._frequency(searcher, tokens), chunks) / own)

    def _frequency(self, searcher: tantivy.Searcher, tokens: list[str]) -> int:
        if len(tokens) == 1:
            return searcher.doc_freq("text", tokens[0])
        phrase = tantivy.Query.phrase_query(self._schema, "text", tokens)
        return searcher.search(phrase, 1, count=True).count

    def _read_generation(self) -> int:
        searcher = self._index.searcher()
        hits = searcher.search(tantivy.Query.term_query(self._schema, "row", _MARKER), 1, count=False).hits
        values = searcher.fast_field_values("generation", [address for _, address in hits])
        return int(values[0]) if values else 0


def open_words(source: WordSource, directory: Path) -> WordIndex:
    """Return an index that holds all the store does: the one there if it is sound, brought up to date, else rebuilt."""
    try:
        if directory.exists():
            check_files(directory)
        words = WordIndex(directory)
    except IndexDamaged as error:
        _LOG.warning("word index: %s: rebuilding it", error)
        shutil.rmtree(directory)
        words = WordIndex(directory)
    words.catch_up(source)
    return words


def check_files(directory: Path) -> None:
    """Raise IndexDamaged unless the files of all segments are what was written; those of no segment do not count.

    Source: tantivy, src/directory/footer.rs: content, JSON with its CRC-32, length of that, a fixed number.
    """
    try:
        for segment in json.loads((directory / "meta.json").read_bytes())["segments"]:
            name, deletes = segment["segment_id"].replace("-", ""), segment["deletes"] or {}
            paths = [path for path in directory.glob(f"{name}.*") if path.suffix != ".del"]
            paths += [directory / f"{name}.{deletes['opstamp']}.del"] if deletes else []
            for path in paths:
                content = memoryview(np.memmap(path, dtype=np.uint8, mode="r"))
                (length,) = struct.unpack("<I", content[-8:-4])
                end = len(content) - 8 - length
                if zlib.crc32(content[:end]) != json.loads(bytes(content[end:-8]))["crc"]:
                    raise IndexDamaged(f"{path} is not what was written (checksum)")
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise IndexDamaged(f"{directory}: {error}") from error


def _make_schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("row", indexed=True, fast=True)
    builder.add_integer_field("document", indexed=True)
    builder.add_integer_field("generation", fast=True)
    builder.add_text_field("text", tokenizer_name=_ANALYZER)
    return builder.build()


def _make_analyzer() -> tantivy.TextAnalyzer:
    """Runs of letters and digits, as Python's `[^\\W_]+`; English stems, of which other words have few."""
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.regex(r"[\p{L}\p{N}]+"))
    for step in (tantivy.Filter.lowercase(), tantivy.Filter.ascii_fold(), tantivy.Filter.stemmer("english")):
        builder = builder.filter(step)
    return builder.build()


def _idf(holding: int, chunks: int) -> float:
    """Of Robertson and Spärck Jones; next to nothing for what half of all chunks hold. Measured: docs/log.md."""
    return max(_LEAST_IDF, math.log((max(0, chunks - holding) + 0.5) / (holding + 0.5)))


def _own_idf(holding: int, chunks: int) -> float:
    """Source: tantivy, src/query/bm25.rs."""
    return math.log1p((max(0, chunks - holding) + 0.5) / (holding + 0.5))
