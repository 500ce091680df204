"""The likeliest of several quotes, instead of the one that a greedy first token leads to.

What a quote begins with is where a small model errs most, and a greedy choice is made before what follows can speak for
it. So the quotes that begin with each of the likeliest few tokens are all made, together and from the state of one
prompt, and the answer that is likeliest as a whole is given out; of several nearly as likely the one whose quote makes
the question likely, too. Start at `generate_likeliest`.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np

from app.conversation import only_repeats
from app.quotes import QuoteConstraint
from model.engine_request import (
    MAX_BRANCH_TOKENS,
    Branches,
    ContextTooLong,
    EngineOverloaded,
    EngineRequest,
    StepOutput,
)
from model.engine_thread import TokenStream
from model.sampling import SamplingParams

_LONG_QUESTION_TOKENS = 128  # behind the documents: worth a state of its own, from which the other beginnings go on
_MAX_GAP = 5.0  # nats behind the likeliest beginning: what lies further back hardly ever wins
_REPEATING_NATS = 3.0
_MISSING_NATS = 12.0  # for the value of another row than the one asked about


class GeneratesTokens(Protocol):
    def generate(self, request: EngineRequest) -> TokenStream: ...


class AsksBack(Protocol):
    def ask_back(self, quote: Sequence[int], question: str) -> tuple[Sequence[int], Sequence[int]]: ...


class AskedBack(NamedTuple):
    """`weight`: of the log-probability of the question, given a quote, to that of the quote; `verdict`: of that of the
    quote answering the question. `pieces`: of a quote, the tokens that stand behind the documents, the first of them
    the same for all, and those of the question behind, of which the last says that the quote answers it."""

    weight: float
    verdict: float
    pieces: Callable[[Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def ask_back_by(form: AsksBack, question: str, weight: float, verdict: float = 0.0) -> AskedBack | None:
    """In this format; None for no weights."""
    return AskedBack(weight, verdict, lambda quote: form.ask_back(quote, question)) if weight or verdict else None


@dataclass(frozen=True)
class QuoteSearch:
    """What is tried, and how it is judged.

    At most `width` beginnings, behind the token `quote_id`, and one of the quotes of `named`. A quote that only repeats
    words of `question`, or that `misses` what it asks about, counts as less likely than it is. `back`: of quotes that
    are nearly as likely, the one that most likely is asked for by the question.
    """

    quote_id: int = -1
    width: int = 1
    question: str = ""
    misses: Callable[[str], bool] = lambda quote: False
    named: QuoteConstraint | None = None
    back: AskedBack | None = None


async def generate_likeliest(
    engine: GeneratesTokens, request: EngineRequest, search: QuoteSearch
) -> AsyncIterator[StepOutput]:
    """The outputs of `request`, or of an answer with another first quote that is likelier from there to its end.

    The first output comes at once, the others when all answers have ended; if the quote was asked back, the first of
    these says in `branch_logprobs` how likely it makes the question and, last, that it answers it. Requests that are
    not greedy, or without a `QuoteConstraint`, are generated as they are. Raises what `engine.generate` does for them;
    what the engine has no room for beside them is left out.
    """
    constraint = request.constraint
    if isinstance(constraint, QuoteConstraint) and request.sampling.temperature == 0 and search.width > 1:
        made = _generate_several(engine, request, constraint, search)
    else:
        made = engine.generate(request)
    async with aclosing(made) as outputs:
        async for output in outputs:
            yield output


async def _generate_several(
    engine: GeneratesTokens, request: EngineRequest, constraint: QuoteConstraint, search: QuoteSearch
) -> AsyncGenerator[StepOutput, None]:
    """`generate_likeliest`, of a request for which several answers are tried."""
    shared, watched = _keep_long_question(request), len(request.watch_tokens)
    plain = lambda output: replace(output, watch_logprobs=output.watch_logprobs[:watched])  # as was asked for
    async with AsyncExitStack() as streams:
        start = lambda one: streams.enter_async_context(aclosing(engine.generate(one)))
        greedy = await start(replace(shared, watch_tokens=(*request.watch_tokens, *constraint.first_ids)))
        first = await anext(greedy, None)
        if first is not None:
            yield plain(first)
        if first is None or first.token_id != search.quote_id or first.finish_reason is not None:
            async for output in greedy:
                yield plain(output)
            return
        answer: list[StepOutput] = []  # the greedy one, from its second output on
        others: list[tuple[StepOutput | None, TokenStream]] = []
        async for output in greedy:
            if not answer and output.finish_reason is None:
                for begun, rival in _rivals(shared, constraint, search, plain(output), output.watch_logprobs[watched:]):
                    others.append((begun, await start(rival)))
            answer.append(plain(output))
        answers = [answer, *await asyncio.gather(*(_read(begun, stream) for begun, stream in others))]
        ended = [outputs for outputs in answers if outputs and outputs[-1].finish_reason == "stop"]
        judged = [_judge(outputs, constraint, search) for outputs in ended]
        best = max(judged, key=lambda one: one.nats, default=None)
        if search.back is not None:
            best = await _ask_back(engine, request, search.back, judged) or best
        for output in answer if best is None else best.outputs:
            yield output


def verdict_of(outputs: Sequence[StepOutput]) -> float:
    """log P(the quote answers the question) of an answer by `generate_likeliest`; 0 where it was not asked back."""
    return next((output.branch_logprobs[0][-1] for output in outputs if output.branch_logprobs), 0.0)


class _Judged(NamedTuple):
    """An answer from its first token on, its quote's tokens and text, and how likely it counts as."""

    outputs: list[StepOutput]
    quote: tuple[int, ...]
    text: str
    nats: float


def _judge(outputs: list[StepOutput], constraint: QuoteConstraint, search: QuoteSearch) -> _Judged:
    quote = constraint.quote_of([output.token_id for output in outputs if output.token_id is not None])
    text = constraint.spell(quote)
    doubts = _REPEATING_NATS * only_repeats(search.question, text) + _MISSING_NATS * search.misses(text)
    nats = sum(output.logprob for output in outputs if output.logprob is not None) - doubts
    return _Judged(outputs, quote, text.strip(), nats)


async def _ask_back(
    engine: GeneratesTokens, request: EngineRequest, back: AskedBack, judged: Sequence[_Judged]
) -> _Judged | None:
    """Of the quotes that are nearly as likely as the likeliest, the best by all; None where none is asked back."""
    rivals, pieces, room = dict[str, _Judged](), [], MAX_BRANCH_TOKENS
    least = max((one.nats for one in judged), default=0.0) - _MAX_GAP
    for one in sorted(judged, key=lambda one: -one.nats):
        given, said = back.pieces(one.quote)
        if one.nats > least and one.text not in rivals and (room := room - len(given) - len(said)) >= 0:
            rivals[one.text] = one
            pieces.append((given, said))
    if not rivals or (len(rivals) == 1 and not back.verdict):
        return None
    asked = []
    for one, nats in zip(rivals.values(), await _nats_of_questions(engine, request, pieces), strict=False):
        *question, verdict = nats
        begun = replace(one.outputs[0], branch_logprobs=(nats,))
        total = one.nats + back.weight * sum(question) + back.verdict * verdict
        asked.append(one._replace(outputs=[begun, *one.outputs[1:]], nats=total))
    return max(asked, key=lambda one: one.nats, default=None)


async def _nats_of_questions(
    engine: GeneratesTokens, request: EngineRequest, pieces: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[tuple[float, ...], ...]:
    """Log-probabilities of each question and verdict behind the documents and what is given; empty when the engine has
    no room."""
    end = max(request.boundaries, default=0)  # of the documents
    scored = replace(
        request,
        token_ids=np.append(request.token_ids[:end], pieces[0][0][0]),
        sampling=SamplingParams(max_new_tokens=1),
        constraint=None,
        watch_tokens=(),
        branches=Branches(tuple((*given[1:], *said) for given, said in pieces), tuple(len(said) for _, said in pieces)),
        counted=False,
        on_read=None,
    )
    try:
        async with aclosing(engine.generate(scored)) as outputs:
            async for output in outputs:
                return output.branch_logprobs
    except (EngineOverloaded, ContextTooLong):
        pass
    return ()


def _keep_long_question(request: EngineRequest) -> EngineRequest:
    """With a state behind a question that is worth one."""
    end = len(request.token_ids)
    if end - max(request.boundaries, default=0) < _LONG_QUESTION_TOKENS:
        return request
    return replace(request, boundaries=(*request.boundaries, end))


def _rivals(
    request: EngineRequest,
    constraint: QuoteConstraint,
    search: QuoteSearch,
    greedy: StepOutput,
    logprobs: tuple[float, ...],
) -> list[tuple[StepOutput | None, EngineRequest]]:
    """What is tried beside the greedy answer: the output that an answer begins with, if it is known, and the request
    for the rest. `logprobs` of the constraint's `first_ids`, where the greedy answer went on with `greedy`."""
    rivals: list[tuple[StepOutput | None, EngineRequest]] = [
        (replace(greedy, token_id=i, logprob=logprob), _continued(request, constraint, (search.quote_id, i)))
        for i, logprob in _likeliest(constraint.first_ids, logprobs, greedy.token_id, search.width - 1)
    ]
    if search.named is not None:
        rivals.append((None, _continued(request, search.named, (search.quote_id,))))
    return rivals


def _likeliest(
    ids: tuple[int, ...], logprobs: tuple[float, ...], chosen: int | None, count: int
) -> list[tuple[int, float]]:
    """The likeliest of the ids beside the chosen one, as far as they are not hopeless."""
    known = dict(zip(ids, logprobs, strict=True))
    best = max(known.values(), default=0.0)
    rivals = ((i, logprob) for i, logprob in known.items() if i != chosen and logprob > best - _MAX_GAP)
    return heapq.nlargest(count, rivals, key=lambda rival: rival[1])


def _continued(request: EngineRequest, constraint: QuoteConstraint, begun: tuple[int, ...]) -> EngineRequest:
    """The request for what comes behind `begun`."""
    room = request.sampling.max_new_tokens - len(begun)
    return replace(
        request,
        token_ids=np.append(request.token_ids, begun),
        sampling=replace(request.sampling, max_new_tokens=max(1, room)),
        constraint=constraint.after(begun),
        watch_tokens=(),
        counted=False,
        on_read=None,
    )


async def _read(begun: StepOutput | None, stream: AsyncIterator[StepOutput]) -> list[StepOutput]:
    """An answer from its first token on; empty when the engine has no room for it."""
    outputs = [begun] if begun else []
    try:
        async for output in stream:
            outputs.append(output)
    except EngineOverloaded:
        return []
    return outputs
