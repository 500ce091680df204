"""A service that is ready has its search loaded: the first question waits for nothing that a later one does not."""

import threading

import pytest
from app_kit import make_settings, running_service

from app import main
from app.main import create_app
from app.settings import SettingsError
from retrieval.embedder import MiniLMEmbedder
from retrieval.rerank import MiniLMReranker

pytestmark = pytest.mark.anyio

AT_MOST_S = 60  # a hang becomes a failure


class Loads:
    """Whose `load` ends only once the model was asked for."""

    def __init__(self) -> None:
        self.model_asked_for = threading.Event()
        self.loaded: list[str] = []

    def watch(self, part, name: str):
        load = part.load

        def wait_and_load() -> None:
            assert self.model_asked_for.wait(AT_MOST_S), "the model does not wait for the search"
            load()
            self.loaded.append(name)

        part.load = wait_and_load
        return part

    def build_model(self, *arguments):
        self.model_asked_for.set()
        return build_model(*arguments)


build_model = main.build_model


@pytest.fixture
def loads(monkeypatch) -> Loads:
    loads = Loads()
    monkeypatch.setattr(main, "open_embedder", lambda *_: loads.watch(MiniLMEmbedder(), "embedder"))
    monkeypatch.setattr(main, "open_reranker", lambda *_: loads.watch(MiniLMReranker(), "reranker"))
    monkeypatch.setattr(main, "build_model", loads.build_model)
    return loads


async def test_the_search_is_loaded_beside_the_model_and_before_the_service_is_there(loads, tiny_checkpoint, tmp_path):
    async with running_service(make_settings(tiny_checkpoint, tmp_path / "data")) as client:
        assert sorted(loads.loaded) == ["embedder", "reranker"]
        assert (await client.get("/readyz")).status_code == 200


async def test_commands_that_ask_nothing_load_nothing(loads, tiny_checkpoint, tmp_path):
    app = create_app(make_settings(tiny_checkpoint, tmp_path / "data"), answering=False)
    async with app.router.lifespan_context(app):
        assert loads.model_asked_for.is_set() and loads.loaded == []


@pytest.mark.parametrize("name", ["embedder", "reranker"])
def test_a_search_that_cannot_be_loaded_stops_the_start(loads, tiny_checkpoint, tmp_path, monkeypatch, name):
    def fail(_: object) -> None:
        raise RuntimeError("half a file")

    monkeypatch.setattr({"embedder": MiniLMEmbedder, "reranker": MiniLMReranker}[name], "load", fail)
    with pytest.raises(SettingsError, match=f"the {name} cannot be loaded.*{name.upper()}_PATH: half a file"):
        create_app(make_settings(tiny_checkpoint, tmp_path / "data"))
