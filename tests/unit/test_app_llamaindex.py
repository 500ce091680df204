"""The LlamaIndex adapters in real engines of LlamaIndex, over a real socket."""

import httpx
import pytest
from app_kit import GARDEN, LIGHTHOUSE, make_settings, serving
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import RetrieverQueryEngine

from app.http_client import CommandFailed
from app.llamaindex import QUESTION_TEMPLATE, JambaRagLLM, JambaRagRetriever

pytestmark = pytest.mark.anyio

QUESTION = "Who is the keeper of the lighthouse?"


@pytest.fixture(scope="module")
def service(tiny_checkpoint, tmp_path_factory):
    """(url, key) of a service with two documents."""
    settings = make_settings(tiny_checkpoint, tmp_path_factory.mktemp("data"))
    with serving(settings) as url:
        key = (settings.data_dir / "admin.key").read_text().strip()
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
            for name, text in (("lighthouse.md", LIGHTHOUSE), ("garden.md", GARDEN)):
                document = http.post("/v1/documents", files={"file": (name, text.encode())}).json()["data"][0]
                http.get(f"/v1/documents/{document['id']}/events")
        yield url, key


@pytest.fixture
def retriever(service):
    retriever = JambaRagRetriever(*service, collections=["default"], max_num_results=2)
    yield retriever
    retriever.close()


@pytest.fixture
def llm(service):
    llm = JambaRagLLM(url=service[0], key=service[1], collections=["default"])
    yield llm
    llm.close()


async def test_nodes_are_chunks_with_their_place(retriever):
    nodes = retriever.retrieve("Which roses are in the garden?")
    assert nodes[0].node.metadata["file_name"] == "garden.md" and nodes[0].score >= nodes[1].score
    node = nodes[0].node
    assert node.text == GARDEN[node.start_char_idx : node.end_char_idx]
    again = await retriever.aretrieve("Which roses are in the garden?")
    assert [n.node.node_id for n in again] == [n.node.node_id for n in nodes]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_query_engine_answers_with_the_services_answer_and_the_retrievers_sources(retriever, llm, streaming):
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm, text_qa_template=QUESTION_TEMPLATE, streaming=streaming)
    response = engine.query(QUESTION)
    text = "".join(response.response_gen) if streaming else response.response
    answer = llm.complete(QUESTION)
    assert text == answer.text != ""
    assert {citation["filename"] for citation in answer.raw["citations"]} <= {"lighthouse.md", "garden.md"}
    assert "lighthouse.md" in [source.node.metadata["file_name"] for source in response.source_nodes]


async def test_a_query_engine_works_asynchronously(retriever, llm):
    engine = RetrieverQueryEngine.from_args(retriever, llm=llm, text_qa_template=QUESTION_TEMPLATE)
    assert (await engine.aquery(QUESTION)).response == llm.complete(QUESTION).text


def test_a_chat_engine_keeps_the_conversation(llm):
    engine = SimpleChatEngine.from_defaults(llm=llm, memory=ChatMemoryBuffer.from_defaults(token_limit=4000))
    first, second = engine.chat(QUESTION), engine.chat("Since when?")
    assert first.response and second.response
    assert [message.role.value for message in engine.chat_history] == ["user", "assistant"] * 2
    streamed = list(llm.stream_chat([ChatMessage(role="user", content=QUESTION)]))
    assert streamed[-1].message.content == first.response and streamed[-1].raw["citations"]


def test_what_the_service_refuses_is_raised_with_its_reason(service):
    llm = JambaRagLLM(url=service[0], key=service[1], collections=["none"])
    with pytest.raises(CommandFailed, match="no collection 'none'"):
        llm.complete(QUESTION)
    with pytest.raises(CommandFailed, match="no collection 'none'"):
        list(llm.stream_complete(QUESTION))
    llm.close()
    assert service[1] not in repr(llm)
