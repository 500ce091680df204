"""Adapters for LlamaIndex: a retriever and a language model over a running service.

The model answers questions from the service's documents, with evidence that the service retrieves itself. In a query
engine use `QUESTION_TEMPLATE`, which passes only the question, without a second copy of the passages:

    RetrieverQueryEngine.from_args(JambaRagRetriever(url, key), llm=JambaRagLLM(url=url, key=key),
                                   text_qa_template=QUESTION_TEMPLATE)

Citations are in `raw` of each response, as returned by `/v1/answers`.
"""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, ChatResponseGen, MessageRole
from llama_index.core.llms import CompletionResponse, CompletionResponseGen, CustomLLM, LLMMetadata
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pydantic import Field, PrivateAttr, SecretStr

from app.http_client import ANSWER_TIMEOUT_S, CommandFailed, Service, sign_in

QUESTION_TEMPLATE = PromptTemplate("{query_str}")


def _service(url: str, key: str | None) -> Service:
    return Service(httpx.Client(base_url=url, headers=sign_in(key), timeout=ANSWER_TIMEOUT_S))


class JambaRagRetriever(BaseRetriever):
    """`POST /v1/search` as a retriever: one node per chunk, with document and location as metadata. Raises
    CommandFailed."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        collections: Sequence[str] | None = None,
        max_num_results: int = 10,
        mode: str = "hybrid",
    ) -> None:
        super().__init__()
        self._service = _service(url, key)
        self._body = {
            "collections": None if collections is None else list(collections),
            "max_num_results": max_num_results,
            "mode": mode,
        }

    def close(self) -> None:
        self._service.close()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        body = {"query": query_bundle.query_str, **self._body}
        return [_node(hit) for hit in self._service.request("POST", "/v1/search", json=body)["data"]]

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def _node(hit: dict[str, Any]) -> NodeWithScore:
    location = hit["location"]
    metadata = {
        **hit["attributes"],
        "document_id": hit["document_id"],
        "file_name": hit["filename"],
        "heading": " > ".join(location["heading_path"]),
    }
    if "page_start" in location:
        metadata["page_label"] = str(location["page_start"])
    node = TextNode(
        id_=hit["chunk_id"],
        text=hit["text"],
        metadata=metadata,
        start_char_idx=location["char_start"],
        end_char_idx=location["char_end"],
        excluded_llm_metadata_keys=["document_id"],
    )
    return NodeWithScore(node=node, score=hit["score"])


class JambaRagLLM(CustomLLM):
    """`POST /v1/answers` as a language model: the prompt is the question. Raises CommandFailed."""

    url: str = Field(description="Where the service is, such as http://127.0.0.1:8000.")
    key: SecretStr | None = Field(None, description="API key.")
    collections: list[str] | None = Field(None, description="Collections to answer from; None: all of the key's.")
    mode: str = Field("auto", description="auto, rag or full_context.")
    context_window: int = Field(262_144, description="Tokens of a prompt and its answer.")
    max_output_tokens: int | None = Field(None, description="Most tokens of an answer; None: the service's default.")
    _service: Service = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        self._service = _service(self.url, self.key.get_secret_value() if self.key else None)

    def close(self) -> None:
        self._service.close()

    @classmethod
    def class_name(cls) -> str:
        return "JambaRagLLM"

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_output_tokens or 256,
            is_chat_model=True,
            model_name="jamba-rag",
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        answer = self._ask({"question": prompt})
        return CompletionResponse(text=answer["text"], raw=answer)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        for text, delta, answer in self._stream({"question": prompt}):
            yield CompletionResponse(text=text, delta=delta, raw=answer)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        answer = self._ask({"messages": _messages(messages)})
        return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=answer["text"]), raw=answer)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        for text, delta, answer in self._stream({"messages": _messages(messages)}):
            message = ChatMessage(role=MessageRole.ASSISTANT, content=text)
            yield ChatResponse(message=message, delta=delta, raw=answer)

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        return self._service.request("POST", "/v1/answers", json=self._body(asked))

    def _stream(self, asked: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
        """(text so far, new text, the whole answer at the end, else None)"""
        text = ""
        for kind, data in self._service.stream("/v1/answers", self._body(asked) | {"stream": True}):
            if kind == "answer.text.delta":
                text += data["text"]
                yield text, data["text"], None
            elif kind == "answer.completed":
                yield data["text"], "", data
            elif kind == "answer.error":
                raise CommandFailed(data["detail"])

    def _body(self, asked: dict[str, Any]) -> dict[str, Any]:
        chosen = {"collections": self.collections, "mode": self.mode, "max_output_tokens": self.max_output_tokens}
        return asked | {name: value for name, value in chosen.items() if value is not None}


def _messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    known = {MessageRole.SYSTEM: "system", MessageRole.USER: "user", MessageRole.ASSISTANT: "assistant"}
    return [
        {"role": known[message.role], "content": message.content}
        for message in messages
        if message.role in known and message.content
    ]
