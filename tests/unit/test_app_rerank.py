"""A reranker in the service: where it is set, who uses it, and what is said without one or with a bad one."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from app_kit import ServiceClient, make_settings, running_service
from test_retrieval_rerank import make_checkpoint
from transformers import BertConfig, BertModel

from app import doctor
from app.main import create_app
from app.settings import SettingsError
from retrieval.rerank import CrossEncoderReranker

pytestmark = pytest.mark.anyio

QUERY = "Where does water drip from the pump?"
TEXTS = ("The water drips off the pump.", "The law gives the tenant notice of water.", "A pump needs water.")


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("reranker"))


@pytest.fixture(scope="module")
async def reranking(tiny_checkpoint, cross_encoder, tmp_path_factory) -> AsyncIterator[ServiceClient]:
    data_dir = tmp_path_factory.mktemp("reranking")
    settings = make_settings(tiny_checkpoint, data_dir, retrieval={"reranker_path": cross_encoder})
    async with running_service(settings) as client:
        for number, text in enumerate(TEXTS):
            await client.upload(f"{number}.txt", text)
        yield client


async def search(client: ServiceClient, **fields) -> list[dict]:
    reply = await client.post("/v1/search", json={"query": QUERY, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()["data"]


@pytest.mark.parametrize("asked", [{}, {"rerank": True}, {"rerank": None}])
async def test_hits_are_in_the_order_of_the_reranker(reranking, cross_encoder, asked):
    hits = await search(reranking, **asked)
    expected = CrossEncoderReranker(cross_encoder).score(QUERY, [hit["text"] for hit in hits])
    assert {hit["text"] for hit in hits} == set(TEXTS)
    assert [hit["scores"]["rerank"] for hit in hits] == pytest.approx(sorted(expected, reverse=True), abs=1e-5)
    assert all(hit["score"] == hit["scores"]["rerank"] for hit in hits)


async def test_a_search_may_do_without(reranking):
    hits = await search(reranking, rerank=False)
    assert [hit["scores"]["rerank"] for hit in hits] == [None] * 3
    assert all(hit["score"] == hit["scores"]["fused"] for hit in hits)


async def test_answers_use_it(reranking):
    sources = (await reranking.ask(QUERY, mode="rag"))["sources"]
    assert len(sources) == 3 and all(source["scores"]["rerank"] is not None for source in sources)


async def test_the_one_that_ships_reads_the_best_hits_unless_it_is_switched_off(tiny_checkpoint, tmp_path):
    for on in (True, False):
        settings = make_settings(tiny_checkpoint, tmp_path / str(on), retrieval={"rerank": on})
        async with running_service(settings) as client:
            for number in range(10):
                await client.upload(f"{number}.txt", f"{number} pumps need water.")
            scores = [hit["scores"]["rerank"] for hit in await search(client)]
            assert sum(score is not None for score in scores) == (8 if on else 0) and len(scores) == 10
            assert (await client.post("/v1/search", json={"query": QUERY, "rerank": False})).status_code == 200
            reply = await client.post("/v1/search", json={"query": QUERY, "rerank": True})
            assert reply.status_code == (200 if on else 422)
    assert reply.json()["code"] == "invalid_request" and "JAMBA_RAG_RETRIEVAL__RERANK=true" in reply.json()["detail"]


def leave_empty(folder: Path) -> None:
    folder.mkdir()


def write_classifier(folder: Path) -> None:
    make_checkpoint(folder, outputs=3)


def cut_off(folder: Path) -> None:
    weights = make_checkpoint(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lose_weights(folder: Path) -> None:
    (make_checkpoint(folder) / "model.safetensors").unlink()


def write_embedder(folder: Path) -> None:
    BertModel(BertConfig.from_pretrained(make_checkpoint(folder))).save_pretrained(folder)


@pytest.mark.parametrize("make", [leave_empty, write_classifier, cut_off, lose_weights, write_embedder])
def test_a_bad_reranker_stops_the_start_and_doctor_finds_it(tiny_checkpoint, tmp_path, make):
    make(tmp_path / "reranker")
    settings = make_settings(tiny_checkpoint, tmp_path / "data", retrieval={"reranker_path": tmp_path / "reranker"})
    with pytest.raises(SettingsError, match="JAMBA_RAG_RETRIEVAL__RERANKER_PATH"):
        create_app(settings, answering=False)
    assert [finding.name for finding in doctor.examine(settings) if not finding.ok] == ["reranker"]


async def test_what_is_read_whole_is_not_reranked(reranking):
    answer = await reranking.ask(QUERY, mode="full_context")
    assert len(answer["sources"]) == 3
    assert all(source["scores"]["rerank"] is None for source in answer["sources"])
