"""The word index: BM25 over the words of chunks, using tantivy; derived from the store.

Each commit includes the store's generation, so that after a crash `WordIndex.catch_up` continues from a consistent
state. An index over many chunks is rebuilt in the background while searches find the chunks already added; its commits
also record the position of the rebuild. Tokenization is in lexical.py. Start at `open_words`.
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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import tantivy

from .index import IndexDamaged
from .lexical import index_text
from .types import ChunkText, Position

_LOG = logging.getLogger(__name__)
_ANALYZER = "words-1"  # part of the schema; increment to rebuild existing indexes
_HEAP_BYTES = 64_000_000  # memory for new chunks before they are written as a segment
_MARKER = 0  # row of the entry that stores the generation; rows of chunks begin at 1
_LEAST_IDF = 1e-6
_RETRY_S = 30.0  # after the index could not be written, as on a full disk
_AT_ONCE = 10_000  # chunks added synchronously, which takes about a second; a thread adds more
_PIECE = 500  # chunks that the thread adds while it holds the lock,
_BREATH_S = 0.002  # and the pause in which it releases the lock: locks are not fair
_TELL_S = 10.0
_COMMIT_CHUNKS = 20_000  # chunks between commits of the thread, after which searches find them


class WordSource(Protocol):
    """The part of DocumentStore that the index needs."""

    def generation(self) -> int: ...
    def knows_generation(self, generation: int) -> bool: ...
    def removed_chunks(self, after: int, upto: int) -> np.ndarray: ...
    def count_chunks(self) -> int: ...
    def chunk_texts(
        self, after: Position, upto: int, batch: int = ...
    ) -> Iterator[tuple[Position, list[ChunkText]]]: ...


@dataclass(frozen=True, slots=True)
class _Held:
    """The metadata of a commit: it has all changes up to `generation`.

    Except during a rebuild (`missing_upto` not 0): of the chunks added up to that generation, it has only those up to
    (filled_generation, filled_row) in the store's order.
    """

    generation: int = 0
    filled_generation: int = 0
    filled_row: int = 0
    missing_upto: int = 0


class WordIndex:
    """Finds chunk rows by their words. Thread safe; one process at a time may write to a directory."""

    def __init__(self, directory: Path | None = None) -> None:
        """Open or create; None: in memory. Raises IndexDamaged if an existing index cannot be opened."""
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
        self._lock = threading.Lock()  # one writer at a time
        self._writer: tantivy.IndexWriter | None = None
        self._caught_up_at = self._failed_at = -math.inf
        self._committed = self._held = self._read_held()  # the latter includes uncommitted changes
        self._missing = 0
        self._uncommitted = 0  # chunks added by the thread
        self._filler: threading.Thread | None = None
        self._closing = threading.Event()

    @property
    def count(self) -> int:
        """Number of committed chunks."""
        return self._index.searcher().num_docs - (self._committed.generation != 0)

    @property
    def generation(self) -> int:
        """The store's generation that the index is at, except for `missing` chunks; 0: empty."""
        return self._committed.generation

    @property
    def missing(self) -> int:
        """About how many chunks the background thread still has to add; 0: none."""
        return max(1, self._missing) if self._committed.missing_upto else 0

    @property
    def share(self) -> float:
        """Share of the store's chunks that are in the index, 0 to 1."""
        missing = self.missing
        return self.count / (self.count + missing) if missing else 1.0

    def catch_up(self, source: WordSource, min_interval_s: float = 0.0) -> bool:
        """Apply the changes of the store; returns whether there were any. Cheap if not.

        Does nothing within `min_interval_s` of the last time, because a commit takes tens of milliseconds. More than
        10,000 chunks are left to a thread. If the index cannot be written, that is logged, searches use what it has,
        and the write is retried after 30 s.
        """
        if source.generation() == self.generation and (self._filler is not None or not self.missing):
            return False
        with self._lock:
            upto, after, now = source.generation(), self.generation, time.monotonic()
            if after > upto or not source.knows_generation(after):
                _LOG.warning("word index at generation %d is not of this database's history: rebuilding it", after)
                after = 0
            elif self._held.missing_upto:
                self._consider_filling(source)
            if upto == after or now < max(self._caught_up_at + min_interval_s, self._failed_at + _RETRY_S):
                return False
            try:
                self._advance(source, after, upto)
            except (ValueError, OSError):  # tantivy's
                self._failed_at = now
                _LOG.exception("cannot write the word index; searches go on with what it holds")
                return False
            self._caught_up_at = time.monotonic()
            return True

    def settle(self) -> None:
        """Wait until no thread is filling the index."""
        if (filler := self._filler) is not None:
            filler.join()

    def close(self, source: WordSource) -> None:
        """Apply the remaining changes of the store, and release the write lock of the directory.

        A running rebuild is interrupted; the next process to open the directory continues it.
        """
        self._closing.set()
        self.settle()
        self.catch_up(source)
        with self._lock:
            if self._uncommitted:
                with self._writing() as writer:
                    self._commit(writer, self._held)
            self._writer = None

    def _advance(self, source: WordSource, after: int, upto: int) -> None:
        with self._writing() as writer:
            held = replace(self._held, generation=upto)
            if after == 0:
                writer.delete_all_documents()
                held = _Held(upto)
            else:
                for row in source.removed_chunks(after, upto).tolist():
                    writer.delete_documents_by_term("row", row)
            added = 0
            for position, chunks in source.chunk_texts((after + 1, 0), upto):
                _add_chunks(writer, chunks)
                added += len(chunks)
                if added >= _AT_ONCE and not held.missing_upto:
                    held = _Held(upto, *position, missing_upto=upto)
                    break
            self._commit(writer, held)
        if held.missing_upto:
            self._consider_filling(source)

    @contextmanager
    def _writing(self) -> Iterator[tantivy.IndexWriter]:
        """A writer; if the block raises, it is dropped together with its uncommitted changes."""
        writer, self._writer = self._writer, None
        try:
            if writer is None:
                writer = self._index.writer(_HEAP_BYTES, num_threads=1)
                writer.garbage_collect_files()  # a file left by a crash could be in the way of a commit
            yield writer
            self._writer = writer
        finally:
            if self._writer is None:
                self._held, self._uncommitted = self._committed, 0

    def _commit(self, writer: tantivy.IndexWriter, held: _Held) -> None:
        writer.delete_documents_by_term("row", _MARKER)
        writer.add_document(tantivy.Document(row=_MARKER, **asdict(held)))
        writer.commit()
        self._index.reload()
        self._committed = self._held = held
        self._uncommitted = 0

    def _consider_filling(self, source: WordSource) -> None:
        """Start a thread that adds missing chunks, unless one is running; the caller holds `_lock`."""
        self._missing = max(0, source.count_chunks() - self.count)
        if self._filler is None and not self._closing.is_set():
            self._filler = threading.Thread(target=self._fill, args=(source,), name="words-filling", daemon=True)
            self._filler.start()

    def _fill(self, source: WordSource) -> None:
        """Add missing chunks in pieces, so that updates and searches are not blocked for long."""
        _LOG.warning("word index: about %d chunks to come, the others are found", self._missing)
        began = told = time.monotonic()
        while not self._closing.wait(_BREATH_S):
            try:
                with self._lock:
                    if not self._fill_piece(source):
                        self._filler = None
                        break
            except Exception:
                if not self._closing.is_set():
                    _LOG.exception("cannot go on filling the word index; trying again")
                    self._closing.wait(_RETRY_S)
            if time.monotonic() > told + _TELL_S:
                told = time.monotonic()
                _LOG.info("word index: %.0f%% of the chunks, %d missing", 100 * self.share, self._missing)
        if not self.missing:
            _LOG.info("word index: complete after %.0f s", time.monotonic() - began)

    def _fill_piece(self, source: WordSource) -> bool:
        """Add one piece; returns whether anything was missing. The caller holds `_lock`."""
        held = self._held
        if not held.missing_upto:
            return False
        with self._writing() as writer:
            filled = (held.filled_generation, held.filled_row)
            position, chunks = next(source.chunk_texts(filled, held.missing_upto, _PIECE), (filled, []))
            _add_chunks(writer, chunks)
            self._uncommitted += len(chunks)
            self._held = replace(held, filled_generation=position[0], filled_row=position[1])
            if not chunks:
                self._commit(writer, _Held(held.generation))
            elif self._uncommitted >= _COMMIT_CHUNKS:
                self._commit(writer, self._held)
                self._missing = max(0, source.count_chunks() - self.count)
        return bool(chunks)

    def search(
        self,
        terms: Sequence[str],
        limit: int,
        collection_rows: Sequence[int] | None = None,
        document_rows: Sequence[int] | None = None,
    ) -> list[tuple[int, float]]:
        """The best (chunk row, BM25 score) of the chunks that have any of `lexical.query_terms`.

        `collection_rows`: search only these collections, and use their document frequencies, so that scores reveal
        nothing about others. `document_rows`: search only these documents. None: all. k1 1.2, b 0.75; lengths are
        rounded to a byte.
        """
        searcher, among = self._index.searcher(), self._within("collection", collection_rows)
        chunks = self._count(searcher, among)
        wanted = [self._term_query(searcher, tokens, among, chunks) for tokens in self._analyze(terms)]
        if not wanted or limit < 1:
            return []
        query = tantivy.Query.boolean_query([(tantivy.Occur.Should, one) for one in wanted])
        query = _all_of(query, among, self._within("document", document_rows))
        hits = searcher.search(query, limit, count=False).hits  # counting would visit every match
        rows = searcher.fast_field_values("row", [address for _, address in hits])
        found = [(int(row), score) for row, (score, _) in zip(rows, hits, strict=True)]
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))

    def expected_score(self, terms: Sequence[str], collection_rows: Sequence[int] | None = None) -> float:
        """BM25 score of an average-length chunk with each of `lexical.query_terms` once: the sum of their IDFs."""
        searcher, among = self._index.searcher(), self._within("collection", collection_rows)
        chunks = self._count(searcher, among)
        return sum(_idf(self._holding(searcher, tokens, among), chunks) for tokens in self._analyze(terms))

    def has_rare(self, terms: Sequence[str], most: int, collection_rows: Sequence[int] | None = None) -> bool:
        """Whether one of the terms occurs in at least one and at most `most` chunks."""
        searcher, among = self._index.searcher(), self._within("collection", collection_rows)
        return any(0 < self._holding(searcher, tokens, among) <= most for tokens in self._analyze(terms))

    def _analyze(self, terms: Sequence[str]) -> list[list[str]]:
        return [tokens for term in terms if (tokens := self._analyzer.analyze(index_text(term)))]

    def _term_query(
        self, searcher: tantivy.Searcher, tokens: list[str], among: tantivy.Query | None, chunks: int
    ) -> tantivy.Query:
        """The query weighted by `_idf`; tantivy would use `_own_idf` of a term, or the sum of those of a phrase."""
        own = sum(_own_idf(searcher.doc_freq("text", token), searcher.num_docs) for token in tokens)
        weight = _idf(self._holding(searcher, tokens, among), chunks)
        return tantivy.Query.boost_query(self._having(tokens), weight / own)

    def _having(self, tokens: list[str]) -> tantivy.Query:
        if len(tokens) == 1:
            return tantivy.Query.term_query(self._schema, "text", tokens[0])
        return tantivy.Query.phrase_query(self._schema, "text", tokens)

    def _within(self, field: str, rows: Sequence[int] | None) -> tantivy.Query | None:
        if rows is None:
            return None
        return tantivy.Query.const_score_query(tantivy.Query.term_set_query(self._schema, field, list(rows)), 0.0)

    def _holding(self, searcher: tantivy.Searcher, tokens: list[str], among: tantivy.Query | None) -> int:
        """Document frequency of the term."""
        if len(tokens) == 1 and among is None:
            return searcher.doc_freq("text", tokens[0])
        return self._count(searcher, _all_of(self._having(tokens), among))

    def _count(self, searcher: tantivy.Searcher, query: tantivy.Query | None) -> int:
        return searcher.num_docs if query is None else searcher.search(query, 1, count=True).count

    def _read_held(self) -> _Held:
        searcher = self._index.searcher()
        hits = searcher.search(tantivy.Query.term_query(self._schema, "row", _MARKER), 1, count=False).hits
        if not hits:
            return _Held()
        address = [hits[0][1]]
        return _Held(*(int(searcher.fast_field_values(field.name, address)[0]) for field in fields(_Held)))


def open_words(source: WordSource, directory: Path) -> WordIndex:
    """The saved index, updated, or a new one if that is damaged; many missing chunks are added in the background."""
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
    """Raise IndexDamaged unless the checksums of all segment files are right; other files are ignored.

    Source: tantivy, src/directory/footer.rs: content, JSON with its CRC-32, length of the JSON, a magic number.
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


def _add_chunks(writer: tantivy.IndexWriter, chunks: Sequence[ChunkText]) -> None:
    for row, collection_row, document_row, text, context in chunks:
        chunk = tantivy.Document(row=row, collection=collection_row, document=document_row)
        chunk.add_text("text", index_text(text))
        chunk.add_text("text", index_text(context))
        writer.add_document(chunk)


def _all_of(query: tantivy.Query, *others: tantivy.Query | None) -> tantivy.Query:
    """Matches of the query, with its score, that also match the other queries that are not None."""
    parts = [other for other in others if other is not None]
    return tantivy.Query.boolean_query([(tantivy.Occur.Must, one) for one in (*parts, query)]) if parts else query


def _make_schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("row", indexed=True, fast=True)
    builder.add_integer_field("collection", indexed=True)
    builder.add_integer_field("document", indexed=True)
    for field in fields(_Held):
        builder.add_integer_field(field.name, fast=True)
    builder.add_text_field("text", tokenizer_name=_ANALYZER)
    return builder.build()


def _make_analyzer() -> tantivy.TextAnalyzer:
    """Runs of letters and digits, like Python's `[^\\W_]+`, with English stemming, which affects few other words."""
    builder = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.regex(r"[\p{L}\p{N}]+"))
    for step in (tantivy.Filter.lowercase(), tantivy.Filter.ascii_fold(), tantivy.Filter.stemmer("english")):
        builder = builder.filter(step)
    return builder.build()


def _idf(holding: int, chunks: int) -> float:
    """IDF of Robertson and Spärck Jones; almost 0 for terms in at least half of all chunks. Measured: docs/log.md."""
    return max(_LEAST_IDF, math.log((max(0, chunks - holding) + 0.5) / (holding + 0.5)))


def _own_idf(holding: int, chunks: int) -> float:
    """Tantivy's IDF. Source: tantivy, src/query/bm25.rs."""
    return math.log1p((max(0, chunks - holding) + 0.5) / (holding + 0.5))
