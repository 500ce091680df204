"""The word index: BM25 over the words of chunks, on tantivy; derived from the store, never the other way round.

A commit holds changed chunks together with the store's generation that they are of, so whatever a crash leaves is one
generation, and `WordIndex.catch_up` goes on from there. Where an index is made anew over many chunks, a thread fills it
while searches find what is there already; a commit then also says how far the thread is. What a word is: lexical.py.
Start at `open_words`.
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
_ANALYZER = "words-1"  # part of the schema: with another number, indexes made before are rebuilt
_HEAP_BYTES = 64_000_000  # so much of new chunks is in memory before it becomes a segment
_MARKER = 0  # row of the one entry that says the generation; rows of chunks begin at 1
_LEAST_IDF = 1e-6
_RETRY_S = 30.0  # after an index could not be written, as on a full disk
_AT_ONCE = 10_000  # chunks that whoever asks waits for, about a second; more are a thread's
_PIECE = 500  # chunks that the thread adds while others wait,
_BREATH_S = 0.002  # and how long it then lets them: locks are not fair
_TELL_S = 10.0
_COMMIT_CHUNKS = 20_000  # after which searches find what the thread added


class WordSource(Protocol):
    """What the index needs of the store; see DocumentStore."""

    def generation(self) -> int: ...
    def knows_generation(self, generation: int) -> bool: ...
    def removed_chunks(self, after: int, upto: int) -> np.ndarray: ...
    def count_chunks(self) -> int: ...
    def chunk_texts(
        self, after: Position, upto: int, batch: int = ...
    ) -> Iterator[tuple[Position, list[ChunkText]]]: ...


@dataclass(frozen=True, slots=True)
class _Held:
    """What a commit says of itself: it has taken over all changes up to `generation`.

    But where `missing_upto` is not 0, of the chunks that came up to that generation only those up to
    (filled_generation, filled_row) in the store's order are in.
    """

    generation: int = 0
    filled_generation: int = 0
    filled_row: int = 0
    missing_upto: int = 0


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
        self._lock = threading.Lock()  # one writer at a time
        self._writer: tantivy.IndexWriter | None = None
        self._caught_up_at = self._failed_at = -math.inf
        self._committed = self._held = self._read_held()  # the latter with what the writer was given since
        self._missing = 0
        self._uncommitted = 0  # chunks that the thread added
        self._filler: threading.Thread | None = None
        self._closing = threading.Event()

    @property
    def count(self) -> int:
        """Chunks that it holds."""
        return self._index.searcher().num_docs - (self._committed.generation != 0)

    @property
    def generation(self) -> int:
        """The store's generation that it holds, but for what is `missing`; 0 = nothing."""
        return self._committed.generation

    @property
    def missing(self) -> int:
        """About how many chunks are still to come from the thread that fills it; 0 when it has all."""
        return max(1, self._missing) if self._committed.missing_upto else 0

    @property
    def share(self) -> float:
        """Of the chunks that it should hold, how many it does: 0 to 1."""
        missing = self.missing
        return self.count / (self.count + missing) if missing else 1.0

    def catch_up(self, source: WordSource, min_interval_s: float = 0.0) -> bool:
        """Take over what the store changed since; returns whether there was anything. Cheap if not.

        Does nothing within `min_interval_s` of the last time: a commit takes tens of milliseconds. More than 10,000
        chunks at once are left to a thread. When the index cannot be written, that is logged, searches go on with what
        it holds, and it is tried again 30 s later.
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
        """Wait until no thread fills the index."""
        if (filler := self._filler) is not None:
            filler.join()

    def close(self, source: WordSource) -> None:
        """Take over what is left of the store's changes, and let others write to the directory.

        What is missing stays so, and the next to open the directory goes on with it.
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
        """A writer that is dropped, and what it was given since the last commit with it, unless all goes well."""
        writer, self._writer = self._writer, None
        try:
            if writer is None:
                writer = self._index.writer(_HEAP_BYTES, num_threads=1)
                writer.garbage_collect_files()  # else one that a crash left may stand where a commit wants to write
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
        """Start a thread that adds what is missing, unless there is one; the caller holds `_lock`."""
        self._missing = max(0, source.count_chunks() - self.count)
        if self._filler is None and not self._closing.is_set():
            self._filler = threading.Thread(target=self._fill, args=(source,), name="words-filling", daemon=True)
            self._filler.start()

    def _fill(self, source: WordSource) -> None:
        """Add what is missing, a piece at a time, so that changes and searches come in between."""
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
        """Whether there was something to add; the caller holds `_lock`."""
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
        """Best (chunk row, BM25 score, higher is better) of the chunks that have any of `lexical.query_terms`.

        `collection_rows`: only in these collections, and words are as rare as they are there: whoever may see no others
        learns nothing of their words. `document_rows`: only in these documents. None = all. k1 1.2, b 0.75; lengths are
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
        """BM25 of an average chunk that has each of `lexical.query_terms` once: the sum of their idf; 0 without."""
        searcher, among = self._index.searcher(), self._within("collection", collection_rows)
        chunks = self._count(searcher, among)
        return sum(_idf(self._holding(searcher, tokens, among), chunks) for tokens in self._analyze(terms))

    def has_rare(self, terms: Sequence[str], most: int, collection_rows: Sequence[int] | None = None) -> bool:
        """Whether one of the terms stands in some chunks, but in no more than `most`."""
        searcher, among = self._index.searcher(), self._within("collection", collection_rows)
        return any(0 < self._holding(searcher, tokens, among) <= most for tokens in self._analyze(terms))

    def _analyze(self, terms: Sequence[str]) -> list[list[str]]:
        return [tokens for term in terms if (tokens := self._analyzer.analyze(index_text(term)))]

    def _term_query(
        self, searcher: tantivy.Searcher, tokens: list[str], among: tantivy.Query | None, chunks: int
    ) -> tantivy.Query:
        """Tantivy weighs a term by its `_own_idf`, a phrase by the sum of its words'; this weighs it by `_idf`."""
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
        """How many chunks have the term."""
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
    """Return the index there if it is sound, brought up to date, else a new one; a thread fills in what is many."""
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


def _add_chunks(writer: tantivy.IndexWriter, chunks: Sequence[ChunkText]) -> None:
    for row, collection_row, document_row, text, context in chunks:
        chunk = tantivy.Document(row=row, collection=collection_row, document=document_row)
        chunk.add_text("text", index_text(text))
        chunk.add_text("text", index_text(context))
        writer.add_document(chunk)


def _all_of(query: tantivy.Query, *others: tantivy.Query | None) -> tantivy.Query:
    """What matches the query, with its score, and those of the others that are there."""
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
