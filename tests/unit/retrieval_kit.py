"""What the retrieval tests share: a deterministic embedder, a paragraph chunker, and a shortcut through ingestion."""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from retrieval.lexical import query_terms
from retrieval.store import DocumentStore
from retrieval.types import Chunk, Document, Heading, IndexChange, Page, ParsedDocument
from retrieval.words import WordIndex


class HashEmbedder:
    """Bag of hashed words: texts that share words are near. Fulfils `retrieval.embedder.Embedder`."""

    name = "hashed-words"
    max_tokens = 256

    def __init__(self, dim: int = 64) -> None:
        self.dim = dim

    def embed_passages(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.embed_query(text) for text in texts]) if texts else np.empty((0, self.dim), np.float32)

    def embed_query(self, text: str) -> np.ndarray:
        vector = np.full(self.dim, 1e-3, dtype=np.float32)
        for word in re.findall(r"\w+", text.lower()):
            vector[int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "little") % self.dim] += 1
        return vector / np.linalg.norm(vector)


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def chunk_paragraphs(parsed: ParsedDocument, document_id: str) -> list[Chunk]:
    """A chunk a paragraph, where paragraphs are parted by blank lines."""
    return [
        Chunk(f"{document_id}:{i}", document_id, i, m.start(), m.end(), m[0], tokens=len(m[0].split()))
        for i, m in enumerate(re.finditer(r"(?:[^\n]+\n?)+(?<!\n)", parsed.text))
    ]


def queue(
    store: DocumentStore, text: str, collection: str = "default", name: str = "a.txt", **metadata: object
) -> Document:
    document, _ = store.create_document(collection, name, "text/plain", len(text.encode()), sha(text), metadata)
    return document


def ingest(
    store: DocumentStore,
    document: Document,
    text: str,
    embedder: HashEmbedder | None = None,
    headings: tuple[Heading, ...] = (),
    pages: tuple[Page, ...] = (),
    worker_id: str | None = None,
) -> IndexChange:
    embedder = embedder or HashEmbedder()
    parsed = ParsedDocument(text, pages, headings)
    chunks = chunk_paragraphs(parsed, document.id)
    vectors = embedder.embed_passages([chunk.text for chunk in chunks])
    return store.replace_chunks(
        document.id, parsed, chunks, vectors, embedder.name, version=document.version, worker_id=worker_id
    )


def add(
    store: DocumentStore, text: str, collection: str = "default", name: str = "a.txt", **metadata: object
) -> Document:
    """Upload and ingest; returns the ready document."""
    document = queue(store, text, collection, name, **metadata)
    ingest(store, document, text)
    return store.get_document(document.id)


def find_words(
    store: DocumentStore, text: str, collections: Sequence[str] = ("default",), limit: int = 50
) -> list[str]:
    """Texts of the chunks that a word index made for this call finds, best first."""
    words = WordIndex()
    with store.snapshot():
        words.catch_up(store)
        found = words.search(query_terms(text), limit, store.select_chunks(collections).collection_rows)
        hits = store.load_hits([row for row, _ in found])
    return [hits[row].chunk.text for row, _ in found]
