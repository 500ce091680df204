"""Chooses the likeliest of several candidate quotes, instead of the one that a greedy first token leads to.

A small model errs most in the first token of a quote, which greedy decoding chooses before the rest of the quote can
count. So one quote is generated from each of the likeliest few first tokens, all in one batch and from the state of one
prompt, and the answer that is likeliest as a whole is used; among nearly equally likely ones, the one whose quote also
makes the question likely. Start at `generate_likeliest`.
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

_LONG_QUESTION_TOKENS = 128  # from this length on the state after it is saved, for the other candidates
_MAX_GAP = 5.0  # nats below the likeliest first token: candidates further below hardly ever win
_REPEATING_NATS = 3.0
_MISSING_NATS = 12.0  # penalty for a value from another row than the one asked about


class GeneratesTokens(Protocol):
    def generate(self, request: EngineRequest) -> TokenStream: ...


class AsksBack(Protocol):
    def ask_back(self, quote: Sequence[int], question: str) -> tuple[Sequence[int], Sequence[int]]: ...


class AskedBack(NamedTuple):
    """Asking back scores quotes by log P(question | quote), with `weight`, and by log P(the quote answers the
    question), with weight `verdict`. `pieces`: quote -> (tokens after the documents that state the quote, the first of
    them the same for all; tokens of the question after that, the last of which says that the quote answers it)."""

    weight: float
    verdict: float
    pieces: Callable[[Sequence[int]], tuple[Sequence[int], Sequence[int]]]


def ask_back_by(form: AsksBack, question: str, weight: float, verdict: float = 0.0) -> AskedBack | None:
    """`AskedBack` for a format; None if both weights are 0."""
    return AskedBack(weight, verdict, lambda quote: form.ask_back(quote, question)) if weight or verdict else None


@dataclass(frozen=True)
class QuoteSearch:
    """Which candidates are tried, and how they are scored.

    At most `width` first tokens after the token `quote_id`, and one of the quotes in `named`. A quote that only repeats
    words of `question`, or that `misses` what it asks about, is penalized. `back` decides among nearly equally likely
    quotes.
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

    The first output comes at once, the others when all candidates have ended. If the quote was asked back, the first of
    these has in `branch_logprobs` the log-probabilities of the question and, last, of the verdict. Requests that are
    not greedy, or without a `QuoteConstraint`, are generated unchanged. Raises what `engine.generate` raises for
    `request`; candidates for which the engine has no room are left out.
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
    """`generate_likeliest` for a request for which several candidates are tried."""
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
    """log P(the quote answers the question) of an answer by `generate_likeliest`; 0 if it was not asked back."""
    return next((output.branch_logprobs[0][-1] for output in outputs if output.branch_logprobs), 0.0)


class _Judged(NamedTuple):
    """An answer from its first token on, its quote's tokens and text, and its log-probability with penalties."""

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
    """The best by all scores of the quotes nearly as likely as the likeliest; None if none is asked back."""
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
    """Log-probabilities of the question and verdict, one list per quote; empty if the engine has no room."""
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
    """The request, with a snapshot after its question if that is long enough."""
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
    """Candidates besides the greedy answer: the output that each begins with, if known, and the request for the rest.
    `logprobs`: those of the constraint's `first_ids`, where the greedy answer continued with `greedy`."""
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
    """The likeliest ids besides the chosen one that have a chance."""
    known = dict(zip(ids, logprobs, strict=True))
    best = max(known.values(), default=0.0)
    rivals = ((i, logprob) for i, logprob in known.items() if i != chosen and logprob > best - _MAX_GAP)
    return heapq.nlargest(count, rivals, key=lambda rival: rival[1])


def _continued(request: EngineRequest, constraint: QuoteConstraint, begun: tuple[int, ...]) -> EngineRequest:
    """The request for what follows `begun`."""
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
    """An answer from its first token on; empty if the engine has no room for it."""
    outputs = [begun] if begun else []
    try:
        async for output in stream:
            outputs.append(output)
    except EngineOverloaded:
        return []
    return outputs
