"""Of the quotes that begin with the likeliest tokens, the likeliest is given out: an engine against whole forwards."""

import asyncio
from dataclasses import replace

import pytest
import torch
from app_kit import GARDEN, LIGHTHOUSE

from app.likeliest import QuoteSearch, ask_back_by, generate_likeliest
from app.prompting import QuoteFormat
from app.quotes import QuoteLimits, TokenBytes
from model import load_model
from model.device_store import DeviceStateStore
from model.engine import JambaEngine
from model.engine_request import MAX_BRANCH_TOKENS, EngineOverloaded, EngineRequest
from model.engine_thread import EngineThread
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer
from retrieval.types import Evidence, Passage

EVIDENCE = Evidence(
    tuple(
        Passage(f"d{i}", 1, "c", i, f"{i}.md", None, text, 0, len(text)) for i, text in ((1, LIGHTHOUSE), (2, GARDEN))
    ),
    "rag",
    0,
)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_model(tiny_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return Tokenizer.load(tiny_checkpoint)


@pytest.fixture(scope="module")
def form(tiny_checkpoint, tokenizer):
    return QuoteFormat(tokenizer, TokenBytes.read(tiny_checkpoint), max_context_tokens=2048)


@pytest.fixture
def make_engine(model, tokenizer):
    def make(**limits: int) -> JambaEngine:
        cache = PrefixCache([DeviceStateStore(1 << 26)], b"test", PlanSettings())
        return JambaEngine(model, tokenizer, cache, max_context_tokens=2048, **limits)

    return make


def make_request(form, question: str, **sampling) -> EngineRequest:
    prompt = form.build_prompt(question, EVIDENCE)
    params = {"max_new_tokens": 64, "stop_token_ids": form.stop_ids} | sampling
    limits = QuoteLimits(max_quote_tokens=12, max_quotes=1, allow_none=False)
    constraint = form.constrain(EVIDENCE, limits)
    return EngineRequest(prompt.token_ids, prompt.boundaries, SamplingParams(**params), constraint=constraint)


def answer(
    engine: JambaEngine,
    request: EngineRequest,
    quote_id: int,
    width: int,
    question: str = "",
    **judged: object,
) -> list:
    async def read() -> list:
        thread = EngineThread(engine)
        try:
            made = generate_likeliest(thread, request, QuoteSearch(quote_id, width, question, **judged))
            return [output async for output in made]
        finally:
            await thread.close()

    return asyncio.run(read())


def total_after(model, form, request: EngineRequest, begun: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Log-probability of the greedy answer that begins so, from its second token on, by whole forwards."""
    generated, constraint = list(begun), form.constrain(EVIDENCE, QuoteLimits(12, 1, False))
    while generated[-1] not in form.stop_ids:
        logprobs = model(torch.tensor([[*request.token_ids, *generated]]))[0, -1].log_softmax(-1)
        generated.append(max(constraint.allowed(generated), key=lambda token_id: logprobs[token_id].item()))
    logprobs = model(torch.tensor([[*request.token_ids, *generated]]))[0].log_softmax(-1)
    start = len(request.token_ids)
    return sum(logprobs[start + i - 1, generated[i]].item() for i in range(1, len(generated))), tuple(generated)


@pytest.mark.parametrize("question", ["How high is it?", "Who keeps the lighthouse?", "What do roses cost?"])
def test_gives_the_likeliest_of_the_quotes_that_begin_most_likely(make_engine, model, form, question):
    request, quote_id = make_request(form, question), form.decision_ids[0]
    with torch.inference_mode():
        logprobs = model(torch.tensor([[*request.token_ids, quote_id]]))[0, -1].log_softmax(-1)
        first_ids = sorted(request.constraint.first_ids, key=lambda token_id: -logprobs[token_id].item())
        answers = [total_after(model, form, request, (quote_id, first)) for first in first_ids[:5]]
    outputs = answer(make_engine(), request, quote_id, width=5)
    best = max(answers)
    assert tuple(output.token_id for output in outputs) == best[1]
    assert sum(output.logprob for output in outputs[1:]) == pytest.approx(best[0], abs=1e-3)
    assert [output.watch_logprobs for output in outputs] == [()] * len(outputs)
    greedy = answer(make_engine(), request, quote_id, width=1)
    assert tuple(output.token_id for output in greedy) == answers[0][1]


def test_some_question_has_a_likelier_quote_than_the_greedy_one(make_engine, form):
    quote_id = form.decision_ids[0]
    changed = 0
    for number in range(8):
        request = make_request(form, f"Question number {number}?")
        one, five = (answer(make_engine(), request, quote_id, width) for width in (1, 5))
        changed += [o.token_id for o in one] != [o.token_id for o in five]
    assert changed


def test_drawn_answers_and_refusals_are_left_alone(make_engine, form):
    quote_id, none_id = form.decision_ids
    drawn = make_request(form, "How high is it?", temperature=1.0, seed=3)
    one, five = (answer(make_engine(), drawn, quote_id, width) for width in (1, 5))
    assert [o.token_id for o in one] == [o.token_id for o in five]

    class Refuses:
        first_ids = ()

        def allowed(self, generated):
            return (none_id,) if not generated else form.stop_ids

    refusing = replace(make_request(form, "How high is it?"), constraint=Refuses())
    assert answer(make_engine(), refusing, quote_id, 5)[0].token_id == none_id


def test_the_cache_counts_the_question_and_not_its_other_beginnings(make_engine, form):
    engine, request, added = make_engine(), make_request(form, "How high is it?"), []
    add = engine.add
    engine.add = lambda request: added.append(request) or add(request)
    answer(engine, request, form.decision_ids[0], width=5)
    stats, _ = engine.prefix_cache.stats()
    assert len(added) > 1
    assert (stats.lookups, stats.prompt_tokens, stats.hits) == (1, len(request.token_ids), 0)


def test_a_long_question_is_read_once_for_all_beginnings(make_engine, form):
    engine, request = make_engine(), make_request(form, "How high is it? " * 60)
    cached, step = {}, engine.step

    def watched() -> list:
        outputs = step()
        cached.update({output.request_id: output.cached_tokens for output in outputs})
        return outputs

    engine.step = watched
    answer(engine, request, form.decision_ids[0], width=5)
    first, *others = cached.values()
    assert first == 0 and others and set(others) == {len(request.token_ids)}


def test_quotes_that_the_engine_has_no_room_for_are_left_out(make_engine, form):
    request, quote_id = make_request(form, "How high is it?"), form.decision_ids[0]
    full = make_engine(max_batch=1, max_waiting=1)
    outputs = answer(full, request, quote_id, width=5)
    assert outputs[-1].finish_reason == "stop" and outputs[0].token_id == quote_id


def test_an_answer_cut_short_is_the_greedy_one(make_engine, form):
    request, quote_id = make_request(form, "How high is it?", max_new_tokens=3), form.decision_ids[0]
    one, five = (answer(make_engine(), request, quote_id, width) for width in (1, 5))
    assert [o.token_id for o in one] == [o.token_id for o in five]
    assert five[-1].finish_reason == "length"


def test_evidence_without_anything_to_quote_ends_the_answer(make_engine, form):
    blank = Evidence((Passage("d1", 1, "c", 1, "1.md", None, " \n", 0, 2),), "rag", 0)
    constraint = form.constrain(blank, QuoteLimits(allow_none=False))
    assert not constraint.first_ids
    request = replace(make_request(form, "How high is it?"), constraint=constraint)
    outputs = answer(make_engine(), request, form.decision_ids[0], width=5)
    assert outputs[-1].finish_reason == "stop"


def test_a_quote_that_only_repeats_the_question_gives_way(make_engine, form, monkeypatch):
    monkeypatch.setattr("app.likeliest._REPEATING_NATS", 100.0)
    request, quote_id = make_request(form, "How high is it?"), form.decision_ids[0]
    for width, is_other in ((1, False), (5, True)):
        ids = [output.token_id for output in answer(make_engine(), request, quote_id, width)]
        asked = request.constraint.spell(ids[1:-1])
        again = [output.token_id for output in answer(make_engine(), request, quote_id, width, question=asked)]
        assert (again != ids) == is_other


def test_of_quotes_nearly_as_likely_the_one_whose_question_is_likelier_is_given(make_engine, model, form, monkeypatch):
    monkeypatch.setattr("app.likeliest._MAX_GAP", 1000.0)
    question = "Who keeps the lighthouse?"
    request, quote_id = make_request(form, question), form.decision_ids[0]
    documents = request.token_ids[: max(request.boundaries)]

    def nats_back(quote: tuple[int, ...]) -> tuple[float, float]:
        given, said = form.ask_back(quote, question)
        ids = [*documents, *given, *said]
        logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)
        *told, verdict = (logprobs[at - 1, ids[at]].item() for at in range(len(documents) + len(given), len(ids)))
        return sum(told), verdict

    with torch.inference_mode():
        logprobs = model(torch.tensor([[*request.token_ids, quote_id]]))[0, -1].log_softmax(-1)
        first_ids = sorted(request.constraint.first_ids, key=lambda token_id: -logprobs[token_id].item())
        answers = [total_after(model, form, request, (quote_id, first)) for first in first_ids[:5]]
        answers = list(
            {request.constraint.spell(ids[1:]).strip(): (nats, ids) for nats, ids in sorted(answers)}.values()
        )
        backs = [nats_back(request.constraint.quote_of(ids[1:])) for _, ids in answers]
    chosen = set()
    for weight, verdict in ((0.05, 0.0), (1.0, 2.0), (0.0, 1000.0), (1000.0, 0.0)):
        back = ask_back_by(form, question, weight, verdict)
        outputs = answer(make_engine(), request, quote_id, 5, back=back)
        totals = [nats + weight * told + verdict * said for (nats, _), (told, said) in zip(answers, backs, strict=True)]
        assert tuple(output.token_id for output in outputs) == answers[totals.index(max(totals))][1]
        chosen.add(tuple(output.token_id for output in outputs))
    assert len(chosen) > 1


@pytest.mark.parametrize(("words", "is_asked"), [(1, True), (8, True), (90, False)])
def test_a_long_question_is_asked_back_of_fewer_quotes_or_of_none(make_engine, form, monkeypatch, words, is_asked):
    monkeypatch.setattr("app.likeliest._MAX_GAP", 1000.0)
    question = "Who keeps the lighthouse? " * words
    request, quote_id = make_request(form, question), form.decision_ids[0]
    engine, branched = make_engine(), []
    add = engine.add
    engine.add = lambda one: branched.extend([one.branches] if one.branches else []) or add(one)
    back = ask_back_by(form, question, 0.5)
    outputs = answer(engine, request, quote_id, 5, back=back)
    assert outputs[-1].finish_reason == "stop" and len(branched) == is_asked
    for ids, scored in branched:
        assert 2 <= len(ids) <= 5 and sum(map(len, ids)) <= MAX_BRANCH_TOKENS and len(set(scored)) == 1


@pytest.mark.parametrize(("weights", "told"), [((0.5, 0.0), False), ((0.0, 1.0), True)])
def test_a_quote_without_rivals_is_asked_back_for_its_verdict_alone(make_engine, form, monkeypatch, weights, told):
    monkeypatch.setattr("app.likeliest._MAX_GAP", 1e-6)  # nothing is as near
    question = "Who keeps the lighthouse?"
    request, quote_id = make_request(form, question), form.decision_ids[0]
    first, begun, *rest = answer(make_engine(), request, quote_id, 5, back=ask_back_by(form, question, *weights))
    assert first.branch_logprobs == () and all(output.branch_logprobs == () for output in rest)
    assert len(begun.branch_logprobs) == told
    if told:
        assert len(begun.branch_logprobs[0]) == len(form.ask_back((), question)[1])


def test_where_nothing_can_be_asked_back_the_likeliest_quote_stays(make_engine, form):
    request, quote_id = make_request(form, "Who keeps the lighthouse?"), form.decision_ids[0]
    engine = make_engine()
    plain = answer(engine, request, quote_id, 5)
    add = engine.add

    def crowded(one: EngineRequest) -> str:
        if one.branches:
            raise EngineOverloaded("full")
        return add(one)

    engine.add = crowded
    back = ask_back_by(form, "Who keeps the lighthouse?", 1000.0)
    full = answer(engine, request, quote_id, 5, back=back)
    assert [output.token_id for output in full] == [output.token_id for output in plain]
