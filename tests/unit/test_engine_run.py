"""The engine against the plain model, and everything that may end a request."""

from dataclasses import replace

import pytest
import torch
from engine_kit import TOKENIZER, Answer, assert_same_bits, prompt, request, run_all, run_one, step

from model import Jamba
from model.device_store import DeviceStateStore
from model.engine_request import Branches, ContextTooLong, EngineOverloaded


@torch.inference_mode()
def greedy(model: Jamba, token_ids: tuple[int, ...], count: int) -> tuple[list[int], list[float]]:
    """Reference: one prefill in one piece, then single tokens, on the model itself."""
    state, inputs, ids, logprobs = model.new_state(), torch.tensor([token_ids]), [], []
    for _ in range(count):
        scores = model(inputs, state, logits="last")[0].log_softmax(-1)
        ids.append(int(scores.argmax()))
        logprobs.append(float(scores.max()))
        inputs = torch.tensor([ids[-1:]])
    return ids, logprobs


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_greedy_answer_equals_the_plain_model(model, make_engine, length):
    answer = run_one(make_engine(), request(length))
    ids, logprobs = greedy(model, prompt(length), 8)
    assert answer.token_ids == ids
    assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert answer.end.finish_reason == "length"
    assert answer.text == TOKENIZER.decode(ids)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_text_does_not_depend_on_the_batch(make_engine, temperature):
    requests = [
        request(length, seed, temperature=temperature, top_p=0.95, seed=seed, max_new_tokens=4 + 3 * seed)
        for seed, length in enumerate([50, 1, 33, 64, 7, 100])
    ]
    together = run_all(make_engine(max_batch=4), requests)
    alone = [run_one(make_engine(), one) for one in requests]
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]


def test_seeds_repeat_and_differ(make_engine):
    answers = run_all(make_engine(), [request(temperature=1.0, seed=seed) for seed in (7, 8, 7)])
    assert answers[0].token_ids == answers[2].token_ids != answers[1].token_ids


def test_a_long_prefill_does_not_hold_up_the_others(make_engine):
    engine = make_engine()
    talking = engine.add(request(10, max_new_tokens=30))
    while not engine.step():
        pass
    long = engine.add(request(320, which=1))  # ten segments
    short = engine.add(request(10, which=2))
    firsts: list[str] = []
    while long not in firsts:
        outputs = engine.step()
        engine._loader.submit(int).result()  # a thread of its own looks for prefixes: let it catch up
        assert talking in {output.request_id for output in outputs}
        firsts += [o.request_id for o in outputs if o.request_id != talking and o.request_id not in firsts]
    assert firsts == [short, long]


def test_who_asked_hears_how_much_is_read(make_engine):
    engine, heard = make_engine(DeviceStateStore(1 << 24)), ([], [], [])
    ahead, behind, again = (replace(request(150), boundaries=(140,), on_read=calls.append) for calls in heard)
    run_all(engine, [ahead, behind])
    assert heard[0] == [0, 32, 64, 96, 128, 140, 150]
    assert heard[1] == sorted(heard[1]) and heard[1][-2:] == [140, 150]
    assert set(heard[1]) > {0, 32, 96}, "nothing of what another read for it"
    run_one(engine, again)
    assert heard[2] == [140, 150]


def test_stop_token_ends_the_text_before_it(model, make_engine):
    ids, _ = greedy(model, prompt(40), 8)
    answer = run_one(make_engine(), request(stop_token_ids=(ids[3],)))
    expected = ids[: ids.index(ids[3]) + 1]
    assert answer.token_ids == expected
    assert answer.end.finish_reason == "stop"
    assert answer.text == TOKENIZER.decode(expected[:-1])


def test_end_token_stops_unless_ignored(make_engine):
    class OnlyEnd:
        def allowed(self, generated):
            return [TOKENIZER.eos_id] if len(generated) == 2 else None

    stopped = run_one(make_engine(), replace(request(ignore_eos=False), constraint=OnlyEnd()))
    assert (len(stopped.token_ids), stopped.end.finish_reason) == (3, "stop")
    ignored = run_one(make_engine(), replace(request(), constraint=OnlyEnd()))
    assert (len(ignored.token_ids), ignored.end.finish_reason) == (8, "length")


class Spell:
    """Makes the model write a given text."""

    def __init__(self, text: str) -> None:
        self.token_ids = TOKENIZER.encode(text)

    def allowed(self, generated):
        return self.token_ids[len(generated) : len(generated) + 1] or None


def test_stop_string_is_cut_and_never_shown_in_part(make_engine):
    one = replace(request(stop=("\n\nQ:", "END"), max_new_tokens=20), constraint=Spell("héé\n\nQ:no"))
    answer = run_one(make_engine(), one)
    assert answer.text == "héé"
    assert answer.end.finish_reason == "stop"
    assert all("\n" not in output.text for output in answer.outputs)


def test_what_only_looked_like_a_stop_string_comes_out(make_engine):
    one = replace(request(stop=("END",), max_new_tokens=6), constraint=Spell("aEN EN"))
    answer = run_one(make_engine(), one)
    assert (answer.text, answer.end.finish_reason) == ("aEN EN", "length")


def test_watched_tokens_come_with_the_model_s_own_logprobs(make_engine):
    watched = (9, 10, 300)
    answer = run_one(make_engine(), replace(request(temperature=0.7, seed=1), watch_tokens=watched))
    assert all(len(output.watch_logprobs) == 3 for output in answer.outputs)
    chosen = answer.outputs[0]
    again = run_one(make_engine(), replace(request(), watch_tokens=(chosen.token_id,), constraint=Spell("x")))
    assert again.outputs[0].watch_logprobs == (chosen.logprob,)


@pytest.mark.parametrize("boundaries", [(), (40,), (40, 99)])
def test_branches_are_as_likely_as_for_the_plain_model(model, make_engine, boundaries):
    one, engine = replace(request(100), boundaries=boundaries), make_engine(DeviceStateStore(1 << 24))
    branches = Branches((prompt(2, 5), prompt(40, 6), prompt(7, 7)), (1, 39, 3))
    with torch.inference_mode():
        expected = []
        for ids, scored in zip(*branches, strict=True):
            whole = [*one.token_ids, *ids]
            logprobs = model(torch.tensor([whole]))[0].log_softmax(-1)
            expected.append([float(logprobs[i - 1, whole[i]]) for i in range(len(whole) - scored, len(whole))])
    plain, first, second = (run_one(engine, replace(one, branches=given)) for given in (None, branches, branches))
    for answer in (first, second):
        for told, wanted in zip(answer.outputs[0].branch_logprobs, expected, strict=True):
            assert told == pytest.approx(wanted, abs=1e-3)
        assert [output.branch_logprobs for output in answer.outputs[1:]] == [()] * (len(answer.outputs) - 1)
        assert_same_bits(answer, plain)
    assert second.outputs[0].branch_logprobs == first.outputs[0].branch_logprobs
    assert plain.outputs[0].branch_logprobs == ()


def test_branches_without_room_end_their_own_request_alone(make_engine, monkeypatch):
    def fail(*_: object) -> tuple[tuple[float, ...], ...]:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("model.engine.score_branches", fail)
    branched = replace(request(40), branches=Branches((prompt(4, 5),), (2,)))
    answer, other = run_all(make_engine(), [branched, request(40, 1)])
    assert (answer.end.finish_reason, answer.end.branch_logprobs) == ("error", ())
    assert other.end.finish_reason == "length"


def test_abort_ends_within_one_step(make_engine):
    engine = make_engine()
    decoding = engine.add(request(10, max_new_tokens=50))
    prefilling = engine.add(request(300))
    other = engine.add(request(10, which=1, max_new_tokens=5))
    for _ in range(4):
        engine.step()
    waiting = engine.add(request(10, which=2))
    for request_id in (decoding, prefilling, waiting, "unknown"):
        engine.abort(request_id)
    outputs = engine.step()
    aborted = [output for output in outputs if output.finish_reason == "abort"]
    assert {output.request_id for output in aborted} == {decoding, prefilling, waiting}
    assert all(output.token_id is None for output in aborted)
    assert {output.request_id for output in outputs} <= {decoding, prefilling, waiting, other}
    while engine.has_work():
        assert {output.request_id for output in engine.step()} <= {other}


def test_too_long_says_by_how_much(make_engine):
    engine = make_engine(max_context_tokens=50)
    with pytest.raises(ContextTooLong, match="prompt of 48 tokens plus 8 new tokens is 6 over the limit of 50"):
        engine.add(request(48))
    assert len(run_one(engine, request(42)).token_ids) == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token_ids": ()}, "no tokens"),
        ({"token_ids": (5, 512)}, "512"),
        ({"watch_tokens": (-1,)}, "-1"),
        ({"branches": Branches(((5, 6),), (2,))}, "2 tokens, 2 of them scored"),
        ({"branches": Branches(((5, 6), (5, 6)), (1,))}, "scored tokens each"),
        ({"branches": Branches(((5, 512),), (1,))}, "outside the vocabulary"),
        ({"branches": Branches(((5,) * 5000,), (1,))}, "512 tokens at most"),
    ],
)
def test_requests_that_make_no_sense_are_refused(make_engine, wrong, message):
    engine = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.add(replace(request(), **wrong))
    assert not engine.has_work()


def test_too_many_waiting_requests_are_refused(make_engine):
    engine = make_engine(max_batch=1, max_waiting=2)
    answers = {engine.add(request(which=which)): Answer() for which in range(2)}
    with pytest.raises(EngineOverloaded, match="2 requests wait"):
        engine.add(request(which=3))
    while engine.has_work():
        step(engine, answers)
    assert {answer.end.finish_reason for answer in answers.values()} == {"length"}


class Broken:
    def allowed(self, generated):
        if len(generated) == 2:
            raise KeyError("lost my place")
        return None if not generated else []


def test_who_waits_goes_in_turn_and_else_by_age(make_engine):
    engine = make_engine(max_batch=1)
    turns = {engine.add(replace(request(which=which), turn=turn)): which for which, turn in enumerate([2, 2, 1, 3, 0])}
    ended = []
    while engine.has_work():
        ended += [turns[output.request_id] for output in engine.step() if output.finish_reason]
    assert ended == [4, 2, 0, 1, 3]


def test_an_exception_ends_only_its_own_sequence(make_engine):
    requests = [request(which=which) for which in range(3)]
    requests[1] = replace(requests[1], constraint=Broken())
    good, bad, also_good = run_all(make_engine(), requests)
    assert (bad.end.finish_reason, bad.end.token_id) == ("error", None)
    assert "allows no next token" in bad.end.error
    for answer, one in ((good, requests[0]), (also_good, requests[2])):
        assert answer.token_ids == run_one(make_engine(), one).token_ids


def test_a_batch_that_fails_as_a_whole_goes_on_one_by_one(model, make_engine):
    """As when memory runs out for several but not for one: nothing is lost and no token is applied twice."""
    requests = [request(length, seed) for seed, length in enumerate((20, 33))]
    expected = [run_one(make_engine(), one).token_ids for one in requests]

    def fail_batches(module, args):
        if args[1].lengths == (1, 1):
            raise RuntimeError("out of memory")

    hook = model.layers[4].register_forward_pre_hook(fail_batches)
    try:
        answers = run_all(make_engine(), requests)
    finally:
        hook.remove()
    assert [answer.token_ids for answer in answers] == expected


def test_equal_questions_at_once_prefill_once(make_engine):
    engine = make_engine(DeviceStateStore(1 << 24))
    same = replace(request(100), boundaries=(90,))
    answers = run_all(engine, [same] * 10)
    assert [answer.end.cached_tokens for answer in answers] == [0] + [90] * 9
    assert len({tuple(answer.token_ids) for answer in answers}) == 1


def test_timings_are_filled_in(make_engine):
    answer = run_one(make_engine(), request(100))
    timings = answer.outputs[0].timings
    assert 0 < timings.prefill_ms <= timings.ttft_ms
    assert answer.end.timings == timings
    assert answer.end.tier == "none"
