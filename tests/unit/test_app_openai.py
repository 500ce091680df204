"""The OpenAI-shaped calls, through the real `openai` package and a real socket."""

import httpx
import openai
import pytest
from app_kit import LIGHTHOUSE, make_settings, serving

from app.settings import Settings


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory) -> Settings:
    return make_settings(tiny_checkpoint, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def url(settings):
    with serving(settings) as url:
        headers = {"Authorization": f"Bearer {key_of(settings)}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as http:
            document = http.post("/v1/documents", files={"file": ("a.md", LIGHTHOUSE.encode())}).json()["data"][0]
            http.get(f"/v1/documents/{document['id']}/events")
        yield url


def key_of(settings: Settings) -> str:
    return (settings.data_dir / "admin.key").read_text().strip()


@pytest.fixture
def chat(url, settings):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key_of(settings), max_retries=0) as client:
        yield client


QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is the keeper?"}]


def test_models_are_collections(chat):
    assert [model.id for model in chat.models.list()] == ["jamba-rag/default"]
    assert chat.models.retrieve("jamba-rag/default").object == "model"


def test_a_completion_carries_text_usage_and_citations(chat):
    completion = chat.chat.completions.create(model="jamba-rag/default", messages=QUESTION)
    (choice,) = completion.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    citation = choice.message.citations[0]
    assert choice.message.content[citation["start"] : citation["end"]] == citation["cited_text"]


def test_a_stream_gives_the_same_text_and_the_citations_last(chat):
    whole = chat.chat.completions.create(model="jamba-rag/default", messages=QUESTION)
    options = {"include_usage": True}
    chunks = list(
        chat.chat.completions.create(model="jamba-rag/default", messages=QUESTION, stream=True, stream_options=options)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    *_, last, usage = chunks
    assert last.choices[0].finish_reason == "stop"
    assert last.choices[0].delta.citations == whole.choices[0].message.citations
    assert usage.usage.prompt_tokens > 0 and len({chunk.id for chunk in chunks}) == 1


def test_content_may_come_in_parts_and_unknown_options_do_no_harm(chat):
    parts = [{"type": "text", "text": "Who is"}, {"type": "text", "text": "the keeper?"}]
    completion = chat.chat.completions.create(
        model="jamba-rag/default",
        messages=[{"role": "user", "content": parts}],
        max_tokens=3,
        temperature=0,
        top_p=0.5,
        presence_penalty=0.1,
        seed=-1,
        user="me",
    )
    assert completion.choices[0].finish_reason == "length" and completion.usage.completion_tokens == 3


@pytest.mark.anyio
async def test_the_asynchronous_client_works_too(url, settings):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key_of(settings), max_retries=0) as chat:
        completion = await chat.chat.completions.create(model="jamba-rag/default", messages=QUESTION)
        assert completion.choices[0].message.content


def test_errors_are_those_the_package_knows(url, chat, settings):
    with pytest.raises(openai.NotFoundError, match="jamba-rag/none"):
        chat.chat.completions.create(model="jamba-rag/none", messages=QUESTION)
    with pytest.raises(openai.UnprocessableEntityError):
        chat.chat.completions.create(model="jamba-rag/default", messages=[{"role": "assistant", "content": "Hi"}])
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="jrk_wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()


def test_calls_that_are_not_there_say_which(chat):
    with pytest.raises(openai.NotFoundError, match="POST /v1/embeddings"):
        chat.embeddings.create(model="jamba-rag/default", input="text")
    with pytest.raises(openai.NotFoundError, match="GET /v1/files: there is no such path"):
        chat.files.list()


@pytest.mark.anyio
async def test_the_asynchronous_client_streams(url, chat, settings):
    whole = chat.chat.completions.create(model="jamba-rag/default", messages=QUESTION)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key_of(settings), max_retries=0) as client:
        stream = await client.chat.completions.create(model="jamba-rag/default", messages=QUESTION, stream=True)
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(pieces) == whole.choices[0].message.content
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="jamba-rag/none", messages=QUESTION, stream=True)


def test_a_key_over_its_limit_gets_the_packages_rate_limit_error_and_its_retries_wait_for_more(url, settings):
    headers = {"Authorization": f"Bearer {key_of(settings)}"}
    body = {"name": "slow", "limits": {"requests_per_minute": 40}}
    slow = httpx.post(f"{url}/v1/keys", json=body, headers=headers).json()["key"]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=slow, max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(100):
                client.models.list()
        assert caught.value.code == "rate_limited" and int(caught.value.response.headers["retry-after"]) >= 1
        assert client.with_options(max_retries=3).models.list().data
