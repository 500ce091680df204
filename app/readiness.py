"""The checks of /readyz: whether questions can be answered now."""

from collections.abc import Callable

from ingest.files import FileStore
from model.engine_thread import EngineThread
from retrieval.index import FaissIndex
from retrieval.store import DocumentStore, StorageFull, StorageUnwritable
from retrieval.words import WordIndex


def make_checks(
    store: DocumentStore, files: FileStore, index: FaissIndex, words: WordIndex, engine: EngineThread, workers: int
) -> dict[str, Callable[[], str]]:
    """Component -> check. A result that begins with "ok" means that questions are answered, perhaps not yet from
    everything."""

    def check_database() -> str:
        store.generation()
        return "ok"

    def check_index() -> str:
        missing = store.count_chunks() - index.count
        if index.is_filling:
            return f"ok so far, being made: {missing} chunks to come"
        return "behind the database" if missing else "ok"

    def check_storage() -> str:
        try:
            files.try_writing()
        except StorageFull:
            return "ok for questions only: the disk is full"
        except StorageUnwritable:
            return "ok for questions only: the data directory cannot be written"
        return "ok"

    return {
        "model": lambda: "ok" if engine.is_alive else "the engine has stopped",
        "database": check_database,
        "storage": check_storage,
        "ingestion": lambda: "ok" if workers else "ok for questions only: JAMBA_RAG_INGEST__WORKERS=0, documents wait",
        "index": check_index,
        "words": lambda: f"ok so far, being made: about {words.missing} chunks to come" if words.missing else "ok",
    }
