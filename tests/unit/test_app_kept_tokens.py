"""Tokens that are kept are those that the tokenizer gives, until a document goes."""

from dataclasses import replace

import anyio.from_thread
import numpy as np
import pytest
from app_kit import GARDEN, LIGHTHOUSE, make_settings, running_service
from text_kit import PASSAGES, TOKENIZER, passage

from app.kept_tokens import KeptTokens, TokenRow
from app.service import RagService


@pytest.fixture
def cut(monkeypatch):
    """Texts that were cut, in the order of cutting."""
    texts, encode_many = [], TOKENIZER.encode_many
    monkeypatch.setattr(TOKENIZER, "encode_many", lambda many: texts.extend(many) or encode_many(many))
    return texts


def test_a_passage_is_cut_once(cut):
    kept = KeptTokens(TOKENIZER, str.upper)
    kept.of_passage(PASSAGES[0])
    kept.cut_ahead([*PASSAGES, *PASSAGES])
    for one in (*PASSAGES, *PASSAGES):
        assert kept.of_passage(one).tolist() == TOKENIZER.encode(one.text.upper())
    assert cut == [one.text.upper() for one in PASSAGES]
    kept.forget({"doc_5"})
    kept.cut_ahead(PASSAGES)
    assert cut[len(PASSAGES) :] == [one.text.upper() for one in PASSAGES if one.document_id == "doc_5"]


def test_a_new_version_is_another_text(cut):
    kept, old = KeptTokens(TOKENIZER), passage(1, "old")
    new = replace(old, document_version=2, text="new")
    assert [kept.of_passage(one).tolist() for one in (old, new)] == [TOKENIZER.encode("old"), TOKENIZER.encode("new")]


def test_pieces_are_made_once_and_stand_one_behind_the_other():
    made = []

    def head(ordinal: int, title: str) -> list[int]:
        made.append(ordinal)
        return TOKENIZER.encode(f"d{ordinal} {title}")

    kept, row = KeptTokens(TOKENIZER), TokenRow()
    assert (len(row), row.joined().tolist()) == (0, [])
    row.add(kept.of(head, 1, "a"), [7], (), kept.of(head, 1, "a"), kept.of(head, 2, "a"))
    expected = [*TOKENIZER.encode("d1 a"), 7, *TOKENIZER.encode("d1 a"), *TOKENIZER.encode("d2 a")]
    assert (row.joined().tolist(), row.joined().dtype, len(row)) == (expected, np.int64, len(expected))
    assert made == [1, 2]


@pytest.mark.anyio
async def test_a_collection_is_read_and_cut_once_for_all_questions(tiny_checkpoint, tmp_path, monkeypatch):
    async with running_service(make_settings(tiny_checkpoint, tmp_path)) as client:
        documents = [await client.upload(name, text) for name, text in (("a.md", LIGHTHOUSE), ("b.md", GARDEN))]
        service, read = client.app.state.service, []
        get_content = service.store.get_content
        monkeypatch.setattr(service.store, "get_content", lambda i: read.append(i) or get_content(i))
        answers = [
            await client.ask(question, mode="full_context") for question in ("Who is the keeper?", "What grows?")
        ]
        assert answers[1]["cache"]["prefix_tokens"] > 0
        assert read == [document["id"] for document in documents]
        assert service.finder._whole._kept and kept_of(service) == {document["id"] for document in documents}
        await client.delete(f"/v1/documents/{documents[0]['id']}")
        assert not service.finder._whole._kept and kept_of(service) == {documents[1]["id"]}
        answer = await client.ask("Who is the keeper?", mode="full_context")
        assert {source["document_id"] for source in answer["sources"]} == {documents[1]["id"]}
        assert read[2:] == [documents[1]["id"]]


@pytest.mark.anyio
@pytest.mark.parametrize("late", ["get_content", "build_prompt", "constrain", "collections"])
async def test_nothing_is_kept_of_a_document_that_goes_while_it_is_read(tiny_checkpoint, tmp_path, monkeypatch, late):
    async with running_service(make_settings(tiny_checkpoint, tmp_path)) as client:
        path = f"/v1/documents/{(await client.upload('a.md', LIGHTHOUSE))['id']}"
        service, replies = client.app.state.service, []
        place = service.format if hasattr(service.format, late) else service.store
        name = late if hasattr(place, late) else "get_content"
        method = getattr(place, name)

        def delete_meanwhile(*arguments):
            result = method(*arguments)
            if not replies and (place is service.store or any(getattr(one, "passages", ()) for one in arguments)):
                replies.append(anyio.from_thread.run(client.delete, path))
                return method(*arguments) if place is service.format else result
            return result

        monkeypatch.setattr(place, name, delete_meanwhile)
        if late == "collections":
            await client.get("/v1/collections")
        else:
            await client.post("/v1/answers", json={"question": "Who is the keeper?"})
        assert [reply.status_code for reply in replies] == [204]
        assert kept_of(service) == set() and not service.format._indexes._entries
        assert all(not evidence or not evidence.passages for evidence, *_ in service.finder._whole._kept.values())


def kept_of(service: RagService) -> set[str]:
    """Documents whose tokens are kept."""
    return {key[0] for key in service.format._kept._passages._entries}
