"""Memory of states: what fits together runs together, what does not waits, what never can is refused."""

from dataclasses import replace

import pytest
import torch
from engine_kit import TOKENIZER, Answer, request, run_all, run_one, step

from model import Jamba, load_model
from model.admission import StateBudget, measure_state_bytes
from model.device_store import DeviceStateStore
from model.engine import JambaEngine
from model.engine_request import ContextTooLong, EngineRequest
from model.generation import Generation, Likeliest, score
from model.prefix_plan import PlanSettings
from model.sampling import SamplingParams


def state_bytes(model: Jamba, num_tokens: int) -> int:
    state = model.new_state()
    state.reserve(num_tokens)
    return state.nbytes


def most_at_once(engine: JambaEngine, requests: list[EngineRequest]) -> tuple[list[Answer], int]:
    """Answers, and the most memory that states had between two steps."""
    answers, most = {engine.add(one): Answer() for one in requests}, 0
    while engine.has_work():
        step(engine, answers)
        most = max(most, sum(one.state.nbytes for one in engine._sequences.values() if one.state is not None))
    return list(answers.values()), most


def test_the_budget_counts_what_a_state_takes(model):
    for num_tokens in (300, 999):
        needed = state_bytes(model, num_tokens)
        assert StateBudget(model.state_layout, needed).max_tokens == num_tokens
        assert StateBudget(model.state_layout, needed - 1).max_tokens == num_tokens - 1
        assert StateBudget(model.state_layout, needed).has_room(num_tokens, [])
        assert not StateBudget(model.state_layout, needed).has_room(num_tokens, [model.new_state()])
    assert StateBudget(model.state_layout).max_tokens is None
    assert StateBudget(model.state_layout, 100).max_tokens == 0


def test_what_does_not_fit_now_waits_and_gets_the_same_answer(model, make_engine):
    requests = [request(length, which) for which, length in enumerate([300, 290, 20, 310, 280])]
    expected = [run_one(make_engine(), one).token_ids for one in requests]
    free, taken = most_at_once(make_engine(), requests)
    limit = int(2.2 * state_bytes(model, 320))
    assert taken > limit
    bound, taken = most_at_once(make_engine(state_max_bytes=limit), requests)
    assert state_bytes(model, 320) < taken <= limit
    for answers in (free, bound):
        assert [answer.token_ids for answer in answers] == expected


def test_nobody_overtakes_who_waits_for_memory(model, make_engine):
    engine = make_engine(state_max_bytes=int(1.5 * state_bytes(model, 400)))
    first, large, small = (engine.add(request(n, n)) for n in (390, 380, 10))
    ends: list[str] = []
    while engine.has_work():
        ends += [output.request_id for output in engine.step() if output.finish_reason]
    assert ends.index(first) < ends.index(large)
    assert engine.has_work() is False and set(ends) == {first, large, small}
    started = make_engine(state_max_bytes=int(1.5 * state_bytes(model, 400)))
    for n in (390, 380, 10):
        started.add(request(n, n))
    started.step()
    assert [one.state is not None for one in started._sequences.values()] == [True, False, False]


def test_what_can_never_fit_is_refused_by_its_size(model, make_engine):
    engine = make_engine(state_max_bytes=state_bytes(model, 300))
    assert engine.max_context_tokens == 300
    with pytest.raises(ContextTooLong, match="prompt of 293 tokens plus 8 new tokens is 1 over the limit of 300"):
        engine.add(request(293))
    assert len(run_one(engine, request(292)).token_ids) == 8


def test_room_is_made_once_for_prompt_and_answer(model, make_engine):
    engine = make_engine()
    engine.add(request(300))
    seen = set()
    while engine.has_work():
        engine.step()
        seen |= {one.state._kv.data_ptr() for one in engine._sequences.values()}
    assert len(seen) == 1


def test_a_cached_prefix_goes_into_the_reserved_room(model, make_engine):
    engine = make_engine(DeviceStateStore(1 << 24), state_max_bytes=state_bytes(model, 310))
    one = replace(request(300), boundaries=(290,))
    first, second = run_all(engine, [one, one])
    assert (first.token_ids, second.end.cached_tokens) == (second.token_ids, 290)


def test_memory_that_runs_out_all_the_same_fails_one_request(model, make_engine):
    def run_out(module, args):
        if args[1].lengths == (31,):
            raise torch.OutOfMemoryError("out of memory")

    hook = model.layers[2].register_forward_pre_hook(run_out)
    try:
        good, bad, also_good = run_all(make_engine(), [request(20), request(31, 1), request(25, 2)])
    finally:
        hook.remove()
    assert bad.end.finish_reason == "error" and "out of memory" in bad.end.error
    assert good.token_ids == run_one(make_engine(), request(20)).token_ids
    assert also_good.token_ids == run_one(make_engine(), request(25, 2)).token_ids


def test_a_state_that_cannot_be_allocated_waits_for_the_others(model, make_engine, monkeypatch):
    """As when the memory is there but in pieces."""
    new_state, under_way = model.new_state, []

    def only_alone(lent=None):
        under_way[:] = [one for one in engine._sequences.values() if one.state is not None]
        if under_way:
            raise torch.OutOfMemoryError("no memory in one piece")
        return new_state()

    monkeypatch.setattr(model, "new_state", only_alone)
    engine = make_engine()
    answers = run_all(engine, [request(20), request(31, 1)])
    assert {answer.end.finish_reason for answer in answers} == {"length"}


def test_a_state_that_cannot_be_allocated_alone_fails(model, make_engine, monkeypatch):
    def never(lent=None):
        raise torch.OutOfMemoryError("no memory at all")

    monkeypatch.setattr(model, "new_state", never)
    engine = make_engine()
    answer = run_one(engine, request(20))
    assert (answer.end.finish_reason, answer.end.error) == ("error", "OutOfMemoryError: no memory at all")


def test_a_cpu_has_no_bound_of_its_own(model):
    assert measure_state_bytes(model, 32) is None


@pytest.mark.gpu
def test_a_gpu_is_measured(tiny_jamba_dir):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    free, _ = torch.cuda.mem_get_info()
    assert 0 < measure_state_bytes(load_model(tiny_jamba_dir, "cuda"), 512) < free


def generation(**params: object) -> Generation:
    watch = params.pop("watch_tokens", ())
    return Generation(TOKENIZER, SamplingParams(**params), None, watch)


def test_greedy_rows_are_scored_without_their_distribution():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = logits.float().log_softmax(-1)
    kinds = [generation(), generation(temperature=1.0), generation(watch_tokens=(5,)), generation()]
    scores = score(logits, kinds)
    assert [isinstance(one, Likeliest) for one in scores] == [True, False, False, True]
    for row in (0, 3):
        assert scores[row].token_id == int(expected[row].argmax())
        assert scores[row].logprob == pytest.approx(float(expected[row].max()), abs=1e-5)
    for row in (1, 2):
        assert torch.equal(scores[row], expected[row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error_on_both_ways(bad):
    logits = torch.zeros(1, 300)
    logits[0, 7] = bad
    for one in (generation(), generation(watch_tokens=(5,))):
        (scores,) = score(logits, [one])
        with pytest.raises(ValueError, match="not finite"):
            one.advance(scores)


LONG = PlanSettings(block_tokens=16, segment_tokens=800, min_snapshot_distance=0, sparse_snapshot_tokens=0)


@pytest.fixture
def one_layer_a_step(monkeypatch):
    monkeypatch.setattr("model.engine._PREFILL_PER_DECODE", 0.0)


def test_a_long_segment_lets_decode_steps_in_between_its_layers(model, make_engine, one_layer_a_step):
    long = replace(request(900, 3), boundaries=(850,))
    expected = run_one(make_engine(plan=LONG), long)
    talk = request(10, max_new_tokens=40)
    alone = run_one(make_engine(), talk)
    engine = make_engine(plan=LONG)
    answers = {engine.add(talk): Answer()}
    while not answers[next(iter(answers))].outputs:
        step(engine, answers)
    answers[engine.add(long)] = Answer()
    talking, prefilled = answers.values()
    while not prefilled.outputs:
        before = len(talking.outputs)
        step(engine, answers)
        assert len(talking.outputs) == before + 1
    assert len(talking.outputs) >= len(model.layers) + 3  # 800 tokens layer by layer, then two short pieces
    while engine.has_work():
        step(engine, answers)
    assert prefilled.token_ids == expected.token_ids
    assert prefilled.logprobs[0] == expected.logprobs[0]  # to the bit; behind it others are in the batch
    assert talking.token_ids == alone.token_ids
    assert prefilled.end.timings.prefill_ms > 0


@pytest.mark.parametrize("steps", [2, 4])
def test_a_long_segment_can_be_aborted_between_its_layers(make_engine, one_layer_a_step, steps):
    engine = make_engine(DeviceStateStore(1 << 24), plan=LONG)
    talk = engine.add(request(10, max_new_tokens=60))
    answers = {talk: Answer()}
    while not answers[talk].outputs:
        step(engine, answers)
    stopped, other = engine.add(request(800, 3)), engine.add(request(700, 4))
    while engine._sequences[stopped].segment is None:
        step(engine, answers)
    for _ in range(steps):
        engine.step()
    engine.abort(stopped)
    assert stopped in {output.request_id for output in engine.step() if output.finish_reason == "abort"}
    ids: list[int] = []
    while engine.has_work():
        outputs = engine.step()
        assert {output.request_id for output in outputs} <= {talk, other}
        ids += [output.token_id for output in outputs if output.request_id == other]
    assert ids == run_one(make_engine(), request(700, 4)).token_ids


def test_an_error_between_the_layers_of_a_segment_ends_only_its_request(model, make_engine, one_layer_a_step):
    def run_out(module, args):
        if args[1].lengths == (700,):
            raise torch.OutOfMemoryError("out of memory")

    engine = make_engine(plan=LONG)
    answers = {engine.add(request(10, max_new_tokens=20)): Answer(), engine.add(request(700, 4)): Answer()}
    hook = model.layers[3].mamba.register_forward_pre_hook(run_out)
    try:
        while engine.has_work():
            for output in engine.step():
                answers[output.request_id].outputs.append(output)
    finally:
        hook.remove()
    assert [answer.end.finish_reason for answer in answers.values()] == ["length", "error"]


def test_a_token_is_never_run_twice(make_engine, monkeypatch):
    """Memory that runs out behind a batch's forward pass, when its states have advanced already."""

    def run_out(logits, generations):
        if len(generations) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return score(logits, generations)

    monkeypatch.setattr("model.engine.score", run_out)
    answers = run_all(make_engine(), [request(20), request(31, 1)])
    assert [answer.end.finish_reason for answer in answers] == ["error", "error"]


def test_a_lost_device_ends_the_engine(model, make_engine):
    def lose(module, args):
        raise torch.AcceleratorError("an illegal memory access was encountered")

    engine = make_engine()
    engine.add(request(20))
    hook = model.layers[1].register_forward_pre_hook(lose)
    try:
        with pytest.raises(torch.AcceleratorError):
            while True:
                engine.step()
    finally:
        hook.remove()
