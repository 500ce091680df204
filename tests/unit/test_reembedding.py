"""Another embedder takes over: its vectors are made beside those in use, whatever dies, and then used all at once."""

import json
import os
import signal
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from app_kit import make_settings, serving
from retrieval_kit import HashEmbedder, add, queue
from retrieval_kit import ingest as ingest_text
from test_retrieval_embedder import write_bert

import app.embedding
import ingest.reembedding
from app import cli
from app.client import open_service
from app.doctor import examine
from app.embedding import has_untuned, open_embedder, reembed_all, take_over
from app.ingesting import ingest_files
from app.main import create_app
from app.setting_groups import RetrievalSettings
from app.settings import SettingsError
from ingest.reembedding import reembed
from retrieval.embedder import MiniLMEmbedder, text_to_embed
from retrieval.index import open_index
from retrieval.search import Retriever
from retrieval.store import DocumentStore, EmbedderMismatch


class OtherEmbedder(HashEmbedder):
    name = "other-words"

    def __init__(self) -> None:
        super().__init__(dim=48)


OLD, NEW = HashEmbedder(), OtherEmbedder()


@pytest.fixture
def store(store):
    for i in range(30):
        add(store, f"apple {i}\n\npear {i}")
    return store


def assert_all_are(store: DocumentStore, embedder: HashEmbedder) -> None:
    """Each chunk has the vector that this embedder makes of it, and there are no others."""
    found = [pair for batch in store.vectors(0, store.generation()) for pair in zip(*batch, strict=True)]
    hits = store.load_hits([row for row, _ in found])
    assert len(found) == len(hits) == store.count_chunks() and store.check() == []
    for row, vector in found:
        expected = embedder.embed_query(text_to_embed(hits[row].title, hits[row].chunk))
        np.testing.assert_allclose(vector, expected, atol=1e-6)
    store.require_embedder(embedder.name, embedder.dim)


def test_the_old_one_answers_until_the_new_one_takes_over(store, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest.reembedding, "_BATCH", 7)
    retriever = Retriever(store, open_index(store, tmp_path / "faiss", OLD.dim, OLD.name), OLD)
    with pytest.raises(EmbedderMismatch, match=r"60 chunks have none of its yet.*jamba-rag reembed"):
        store.require_embedder(NEW.name, NEW.dim)
    steps = []

    def report(done: int, total: int) -> None:
        steps.append((done, total))
        add(store, f"plum {done}") if done == 21 else None  # as a service does meanwhile
        store.delete_document(store.list_documents()[0].id)
        assert retriever.search("apple 20", ["default"])[0].chunk.text == "apple 20"

    assert not store.adopt_embedder(NEW.name, NEW.dim)
    reembed(store, NEW, report)
    assert steps[0] == (7, 60) and steps[-1][0] == steps[-1][1]
    assert_all_are(store, OLD)
    assert store.adopt_embedder(NEW.name, NEW.dim)
    assert_all_are(store, NEW)
    assert not store.adopt_embedder(NEW.name, NEW.dim)
    retriever = Retriever(store, open_index(store, tmp_path / "faiss", NEW.dim, NEW.name), NEW)
    assert retriever.search("apple 20", ["default"])[0].chunk.text == "apple 20"
    assert reembed(store, OLD) == store.count_chunks()  # and back
    assert store.adopt_embedder(OLD.name, OLD.dim)
    assert_all_are(store, OLD)


def test_what_lacks_a_vector_keeps_the_old_one_in_use(store):
    reembed(store, NEW)
    add(store, "came later")
    assert not store.adopt_embedder(NEW.name, NEW.dim)
    assert_all_are(store, OLD)
    assert (store.count_to_embed(NEW.name, NEW.dim), reembed(store, NEW)) == (1, 1)
    assert store.adopt_embedder(NEW.name, NEW.dim)
    assert_all_are(store, NEW)


def test_another_one_begins_anew_and_ends_the_first(store):
    store.begin_embedding(NEW.name, NEW.dim)
    third = HashEmbedder(dim=32)
    third.name = "third"
    rows = [row for row, *_ in store.chunks_to_embed(3)]
    assert reembed(store, third) == 60
    with pytest.raises(EmbedderMismatch, match="has begun"):
        store.add_vectors(NEW.name, NEW.dim, rows, NEW.embed_passages(["a", "b", "c"]))
    assert not store.adopt_embedder(NEW.name, NEW.dim)
    assert store.adopt_embedder("third", 32)
    assert_all_are(store, third)


@pytest.fixture
def untuned(tmp_path):
    """Two chunks with vectors of the published weights of the embedder that ships."""
    store = DocumentStore(tmp_path / "untuned.sqlite3")
    ingest_text(store, queue(store, "apple\n\npear"), "apple\n\npear", MiniLMEmbedder(adapter=None))
    yield store
    store.close()


def test_vectors_from_before_the_tuning_stay_in_use_until_they_are_made_anew(untuned, monkeypatch, caplog):
    monkeypatch.setattr(app.embedding, "_UNASKED", 1)
    shipped = MiniLMEmbedder()
    assert take_over(untuned, shipped).name == MiniLMEmbedder.name and "jamba-rag reembed" in caplog.text
    assert has_untuned(untuned, shipped) and untuned.uses(MiniLMEmbedder.name, MiniLMEmbedder.dim)
    reembed(untuned, shipped)
    assert take_over(untuned, shipped) is shipped
    assert untuned.uses(shipped.name, shipped.dim) and not has_untuned(untuned, shipped)


def test_a_start_loads_the_embedder_that_is_used_also_where_that_is_the_one_from_before_the_tuning(
    tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(app.embedding, "_UNASKED", -1)
    settings = make_settings(tiny_checkpoint, tmp_path / "data")
    store = DocumentStore(settings.data_dir / "rag.sqlite3")
    ingest_text(store, queue(store, "apple"), "apple", MiniLMEmbedder(adapter=None))
    store.close()
    embedder = create_app(settings).state.service.finder._retriever._embedder
    assert embedder.name == MiniLMEmbedder.name and "_model" in vars(embedder)


def test_a_few_vectors_from_before_the_tuning_are_made_anew_by_the_start(untuned):
    shipped = MiniLMEmbedder()
    assert take_over(untuned, shipped) is shipped and untuned.uses(shipped.name, shipped.dim)


class SlowEmbedder(OtherEmbedder):
    def embed_passages(self, texts):
        time.sleep(0.01)
        return super().embed_passages(texts)


def reembed_in_child(path: Path, then_adopt: bool, kill_after_s: float) -> int:
    """Exit status of a process that does it, negative for a signal."""
    if (pid := os.fork()) == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, kill_after_s)
            store = DocumentStore(path)
            reembed(store, SlowEmbedder())
            status = 0 if not then_adopt or store.adopt_embedder(NEW.name, NEW.dim) else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_at_any_time_it_goes_on_and_the_old_one_answers(tmp_path, monkeypatch):
    """The parent ingests and deletes between the lives of the child; connections are not carried over a fork."""
    monkeypatch.setattr(ingest.reembedding, "_BATCH", 3)
    path, left = tmp_path / "rag.sqlite3", []
    store = DocumentStore(path)
    for i in range(30):
        add(store, f"apple {i}\n\npear {i}")
    store.close()
    for number in range(60):
        status = reembed_in_child(path, True, 0.05 + 0.01 * number)
        store = DocumentStore(path)
        if status == 0:
            break
        assert status == -signal.SIGALRM
        left.append(store.count_to_embed(NEW.name, NEW.dim))
        if store.uses(NEW.name, NEW.dim):  # killed behind the commit
            break
        assert_all_are(store, OLD)
        add(store, f"plum {number}")
        store.delete_document(store.list_documents()[number % 3].id)
        store.close()
    assert_all_are(store, NEW)
    assert len(left) > 2 and min(left) < 40  # it did not begin anew each time
    store.close()


def test_a_running_service_goes_on_and_the_next_one_takes_the_new_embedder(tiny_checkpoint, tmp_path, capsys):
    """Another name over the same files is another embedder: weights, dim or pooling would be different."""
    settings = make_settings(tiny_checkpoint, tmp_path / "data")
    other = write_bert(tmp_path / "tiny", MiniLMEmbedder(), first_token=False)
    (tmp_path / "a.txt").write_text("The keeper is called Ada.")
    later = settings.model_copy(update={"retrieval": settings.retrieval.model_copy(update={"embedder_path": other})})
    with serving(settings) as url:
        key = (settings.data_dir / "admin.key").read_text().strip()
        with open_service(url, key) as service:
            ingest_files(service, [tmp_path / "a.txt"], {"collection": "default"})
            with pytest.raises(SystemExit, match="0"):
                cli.main(["reembed", str(other), "--data-dir", str(settings.data_dir)])
            assert f"JAMBA_RAG_RETRIEVAL__EMBEDDER_PATH={other}" in capsys.readouterr().err
            (tmp_path / "b.txt").write_text("The lamp is lit at dusk.")  # came since: the next start makes its vector
            ingest_files(service, [tmp_path / "b.txt"], {"collection": "default"})
            (hit, *_) = service.request("POST", "/v1/search", json={"query": "Ada", "mode": "dense"})["data"]
            assert "Ada" in json.dumps(hit)
    with serving(later) as url, open_service(url, key) as service:
        found = service.request("POST", "/v1/search", json={"query": "lamp", "mode": "dense"})["data"]
        assert len(found) == 2
    assert [finding.detail for finding in examine(later) if finding.name == "index"] == ["2 chunks"]
    with pytest.raises(EmbedderMismatch, match="jamba-rag reembed"):
        create_app(settings)
    with pytest.raises(SettingsError, match="is the embedder in use"):
        reembed_all(settings, other, lambda done, total: None)


@pytest.mark.parametrize("device", ["cuda:7", "cuda"])
def test_a_device_that_is_not_there_is_named(device, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SettingsError, match=f"EMBEDDER_DEVICE={device}: PyTorch sees 0 GPUs"):
        open_embedder(RetrievalSettings(embedder_device=device))
    assert open_embedder(RetrievalSettings()).device.type == "cpu"
