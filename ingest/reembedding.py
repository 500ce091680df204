"""Computes the vectors of another embedder for all stored chunks, beside those in use. Start at `reembed`."""

from collections.abc import Callable

from retrieval.embedder import Embedder, text_to_embed
from retrieval.store import DocumentStore

_BATCH = 256


def reembed(store: DocumentStore, embedder: Embedder, report: Callable[[int, int], None] | None = None) -> int:
    """Compute the missing vectors of this embedder; returns how many. Safe to interrupt and to repeat.

    A service may use the store meanwhile with its own embedder: chunks that it adds are included, until none is
    missing. `report` is called with (done, total). The vectors are used after `DocumentStore.adopt_embedder`.
    """
    done, total = 0, store.begin_embedding(embedder.name, embedder.dim)
    while chunks := store.chunks_to_embed(_BATCH):
        vectors = embedder.embed_passages([text_to_embed(title, chunk) for _, title, chunk in chunks])
        store.add_vectors(embedder.name, embedder.dim, [row for row, *_ in chunks], vectors)
        done += len(chunks)
        if report is not None:
            report(done, max(done, total))
    return done
