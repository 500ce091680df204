"""Chooses embedder and reranker of a deployment, and switches to another embedder. Start at `open_embedder`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from app.datadir import DataDir
from app.setting_groups import RetrievalSettings
from app.settings import Settings, SettingsError
from ingest.reembedding import reembed
from retrieval.embedder import BertEmbedder, EmbedderUnavailable, MiniLMEmbedder
from retrieval.rerank import CrossEncoderReranker, MiniLMReranker, Reranker
from retrieval.solo_threads import solo_threads
from retrieval.store import DocumentStore

log = logging.getLogger(__name__)

_AT_START = 2000  # missing vectors that a start computes itself: those of chunks added after `jamba-rag reembed`
_UNASKED = 500  # the same, if the command was never run: half a minute


def open_embedder(settings: RetrievalSettings) -> BertEmbedder:
    """The configured embedder, or the shipped one. Raises SettingsError if it cannot be used."""
    path, device = settings.embedder_path, settings.embedder_device
    if device != "cpu" and (torch.device(device).index or 0) >= (gpus := torch.cuda.device_count()):
        raise SettingsError(f"JAMBA_RAG_RETRIEVAL__EMBEDDER_DEVICE={device}: PyTorch sees {gpus} GPUs here; set cpu")
    if path is None:
        return MiniLMEmbedder(device=device)
    try:
        return BertEmbedder(path, device)
    except EmbedderUnavailable as error:
        raise SettingsError(f"JAMBA_RAG_RETRIEVAL__EMBEDDER_PATH={path}: {error}") from error


def open_reranker(settings: RetrievalSettings) -> Reranker | None:
    """The reranker, or None if disabled. A configured one is loaded and tried: raises SettingsError if unusable."""
    path = settings.reranker_path
    if not settings.rerank:
        return None
    if path is None:
        return MiniLMReranker()
    try:
        reranker = CrossEncoderReranker(path)
        reranker.score("test", ["test"])
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        raise SettingsError(f"JAMBA_RAG_RETRIEVAL__RERANKER_PATH={path}: {error}") from error
    return reranker


@contextmanager
def loading(embedder: BertEmbedder, reranker: Reranker | None) -> Iterator[None]:
    """Load both in the background, on one core, while the block runs; at its end they are loaded.

    Raises SettingsError if one cannot be loaded.
    """
    pool = solo_threads(1, "load-search")
    loads = {"embedder": pool.submit(embedder.load)}
    if reranker is not None:
        loads["reranker"] = pool.submit(reranker.load)
    pool.shutdown(wait=False)
    yield
    for name, load in loads.items():
        try:
            load.result()
        except (RuntimeError, ValueError, OSError, SafetensorError) as error:
            where = f"its package or JAMBA_RAG_RETRIEVAL__{name.upper()}_PATH"
            raise SettingsError(f"the {name} cannot be loaded, see {where}: {error}") from error


def take_over(store: DocumentStore, embedder: BertEmbedder) -> BertEmbedder:
    """Switch to the vectors that `jamba-rag reembed` made for this embedder, if any; returns the embedder to use.

    Vectors of the shipped embedder's untuned weights are recomputed at once if they are few; otherwise they stay in
    use, and the untuned embedder is returned. Raises EmbedderMismatch if the vectors are of any other embedder.
    """
    missing = store.count_to_embed(embedder.name, embedder.dim)
    adopts = store.adopts(embedder.name, embedder.dim) and missing <= _AT_START
    if adopts or (has_untuned(store, embedder) and missing <= _UNASKED):
        reembed(store, embedder)
        if store.adopt_embedder(embedder.name, embedder.dim):
            log.warning("switched to the embedder %s; the vector index will be rebuilt", embedder.name)
    if has_untuned(store, embedder):
        log.warning(
            "the stored vectors are those of %s, with which searches find less than with %s: run `jamba-rag reembed`, "
            "which is possible while the service runs, then restart it",
            *(MiniLMEmbedder.name, embedder.name),
        )
        embedder = MiniLMEmbedder(device=str(embedder.device), adapter=None)
    store.require_embedder(embedder.name, embedder.dim)
    return embedder


def has_untuned(store: DocumentStore, embedder: BertEmbedder) -> bool:
    """Whether this is the shipped, tuned embedder but the vectors in use are those of its published weights."""
    return (
        isinstance(embedder, MiniLMEmbedder)
        and embedder.name != MiniLMEmbedder.name
        and store.uses(MiniLMEmbedder.name, MiniLMEmbedder.dim)
    )


def reembed_all(settings: Settings, path: Path | None, report: Callable[[int, int], None]) -> str:
    """Compute all vectors of the embedder at `path` beside those in use; returns its name. Needs no lock.

    Raises SettingsError if there is no database or embedder, or if its vectors are already in use.
    """
    data_dir = settings.data_dir
    database = DataDir.database_in(data_dir)
    if not database.is_file():
        raise SettingsError(f"{data_dir} holds no {database.name}: there is nothing to embed")
    embedder = open_embedder(settings.retrieval.model_copy(update={"embedder_path": path}))
    with closing(DocumentStore(database)) as store:
        if store.uses(embedder.name, embedder.dim):
            raise SettingsError(f"{embedder.name} is the embedder in use; name another one's directory")
        reembed(store, embedder, report)
    return embedder.name
