"""Vectors of another embedder for all that is stored, made beside those in use. Start at `reembed`."""

from collections.abc import Callable

from retrieval.embedder import Embedder, text_to_embed
from retrieval.store import DocumentStore

_BATCH = 256


def reembed(store: DocumentStore, embedder: Embedder, report: Callable[[int, int], None] | None = None) -> int:
    """Make what is missing of this embedder's vectors; returns how many. Safe to interrupt and to repeat.

    A service may use the store meanwhile, with its own embedder: what it ingests is made too, until nothing is missing.
    `report` is called with (done, in all). The vectors are used once `DocumentStore.adopt_embedder` was called.
    """
    done, total = 0, store.begin_embedding(embedder.name, embedder.dim)
    while chunks := store.chunks_to_embed(_BATCH):
        vectors = embedder.embed_passages([text_to_embed(title, chunk) for _, title, chunk in chunks])
        store.add_vectors(embedder.name, embedder.dim, [row for row, *_ in chunks], vectors)
        done += len(chunks)
        if report is not None:
            report(done, max(done, total))
    return done
