"""Which embedder a deployment has, and how it takes another one. Start at `open_embedder`."""

import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from app.datadir import DataDir
from app.settings import SettingsError
from ingest.reembedding import reembed
from retrieval.embedder import BertEmbedder, EmbedderUnavailable, MiniLMEmbedder
from retrieval.store import DocumentStore

log = logging.getLogger(__name__)

_AT_START = 2000  # chunks without a vector that a start makes itself: what came since the command had ended


def open_embedder(path: Path | None) -> BertEmbedder:
    """The one at `path`, or the one that ships. Raises SettingsError when it cannot be used."""
    if path is None:
        return MiniLMEmbedder(device="cpu")
    try:
        return BertEmbedder(path)
    except EmbedderUnavailable as error:
        raise SettingsError(f"JAMBA_RAG_RETRIEVAL__EMBEDDER_PATH={path}: {error}") from error


def take_over(store: DocumentStore, embedder: BertEmbedder) -> BertEmbedder:
    """Use the vectors that `jamba-rag reembed` made, if this embedder has others than those in use; returns it.

    Raises EmbedderMismatch when they are not there.
    """
    if store.adopts(embedder.name, embedder.dim) and store.count_to_embed(embedder.name, embedder.dim) <= _AT_START:
        reembed(store, embedder)
        if store.adopt_embedder(embedder.name, embedder.dim):
            log.warning("%s has taken over; the vector index is made anew", embedder.name)
    store.require_embedder(embedder.name, embedder.dim)
    return embedder


def reembed_all(data_dir: Path, path: Path | None, report: Callable[[int, int], None]) -> str:
    """Make all vectors of the embedder at `path` beside those in use; returns its name. Needs no lock.

    Raises SettingsError when there is no database or embedder, or its vectors are those in use.
    """
    database = DataDir.database_in(data_dir)
    if not database.is_file():
        raise SettingsError(f"{data_dir} holds no {database.name}: there is nothing to embed")
    embedder = open_embedder(path)
    with closing(DocumentStore(database)) as store:
        if store.uses(embedder.name, embedder.dim):
            raise SettingsError(f"{embedder.name} is the embedder in use; name another one's directory")
        reembed(store, embedder, report)
    return embedder.name
