"""What the engine and prefix-state tests share: a byte-level tokenizer, prompts of documents, running to the end."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass, field

import tokenizers
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE

from model.engine import JambaEngine
from model.engine_request import EngineRequest, StepOutput
from model.prefix_plan import PlanSettings
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer

SPECIALS = [
    f"<|{name}|>"
    for name in (
        "endoftext",
        "im_start",
        "im_end",
        "doc",
        "/doc",
        "gap",
        "question",
        "answer",
        "quote",
        "/quote",
        "none",
    )
]
SMALL = PlanSettings(block_tokens=16, segment_tokens=32, min_snapshot_distance=0, sparse_snapshot_tokens=64)


def byte_backend(merges: Sequence[tuple[str, str]] = ()) -> tokenizers.Tokenizer:
    """A byte-level BPE: the special tokens of the shipped one as ids 0-10, then a token a byte, then the merges."""
    pieces = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    vocab = {piece: token_id for token_id, piece in reversed(list(enumerate(pieces)))}
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return backend


TOKENIZER = Tokenizer(byte_backend(), eos_id=SPECIALS.index("<|im_end|>"))
DOCUMENTS = [f"{i}: " + "".join(random.Random(i).choices("abc déf", k=15 * i + 9)) for i in range(6)]
QUESTIONS = ["why?", "what is in it, and where?", "x" * 40]


def doc_prompt(tokenizer: Tokenizer, documents: Iterable[str], question: str) -> tuple[list[int], list[int], dict]:
    """(token ids, boundaries, document -> first position) of `system | documents | question`."""
    token_ids = [tokenizer.special("<|im_start|>"), *tokenizer.encode("Answer from the documents.\n")]
    boundaries, starts = [len(token_ids)], {}
    for document in documents:
        starts[document] = len(token_ids)
        token_ids += [tokenizer.special("<|doc|>"), *tokenizer.encode(document), tokenizer.special("<|/doc|>")]
        boundaries.append(len(token_ids))
    token_ids += [tokenizer.special("<|question|>"), *tokenizer.encode(question), tokenizer.special("<|answer|>")]
    return token_ids, boundaries, starts


def doc_request(tokenizer: Tokenizer, documents: Sequence[str], question: str, **sampling: object) -> EngineRequest:
    token_ids, boundaries, starts = doc_prompt(tokenizer, documents, question)
    params = SamplingParams(**{"max_new_tokens": 6, "ignore_eos": True} | sampling)
    return EngineRequest(tuple(token_ids), tuple(boundaries), params, tags=frozenset(documents), tag_starts=starts)


@dataclass
class Answer:
    """All outputs of one request, and what they come to."""

    outputs: list[StepOutput] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        return [output.token_id for output in self.outputs if output.token_id is not None]

    @property
    def logprobs(self) -> list[float]:
        return [output.logprob for output in self.outputs if output.logprob is not None]

    @property
    def text(self) -> str:
        return "".join(output.text for output in self.outputs)

    @property
    def end(self) -> StepOutput:
        return self.outputs[-1]


def prompt(length: int, which: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(which).choices(range(11, 267), k=length))


def request(length: int = 40, which: int = 0, **sampling: object) -> EngineRequest:
    params = SamplingParams(**{"max_new_tokens": 8, "ignore_eos": True} | sampling)
    return EngineRequest(prompt(length, which), sampling=params)


def step(engine: JambaEngine, answers: dict[str, Answer]) -> None:
    """Once what the loading thread was given is there: on a busy machine decoding would get far ahead of it."""
    wait(engine._loading.values())
    for output in engine.step():
        answers[output.request_id].outputs.append(output)


def run_all(engine: JambaEngine, requests: Iterable[EngineRequest]) -> list[Answer]:
    """Add all requests at once and step until each has ended; every output is of one of them."""
    answers = {engine.add(request): Answer() for request in requests}
    while engine.has_work():
        step(engine, answers)
    assert all(answer.end.finish_reason is not None for answer in answers.values())
    return list(answers.values())


def run_one(engine: JambaEngine, request: EngineRequest) -> Answer:
    return run_all(engine, [request])[0]


def assert_same_bits(answer: Answer, expected: Answer) -> None:
    assert (answer.token_ids, answer.logprobs, answer.text) == (expected.token_ids, expected.logprobs, expected.text)
