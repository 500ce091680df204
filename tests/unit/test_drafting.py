"""Guessed tokens: tried in one step they leave the bits of single steps, and no answer depends on them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from engine_kit import TOKENIZER, Answer, run_all, run_one
from hypothesis import given, settings
from hypothesis import strategies as st

from model import Jamba, load_model
from model.cpu_decode import MAX_TOKENS
from model.device_store import DeviceStateStore
from model.drafting import DraftCounts, PromptLookup, draft_all
from model.engine_request import EngineRequest
from model.generation import Generation
from model.kernels import cpu
from model.sampling import SamplingParams
from model.state import HybridState
from tests.numeric import state_bytes

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
KINDS = {
    "float32": (torch.float32, None, {}),
    "bfloat16": (torch.bfloat16, None, {}),
    "int8": (torch.float32, "int8", {}),
    "int8 bfloat16": (torch.bfloat16, "int8", {}),
    "w8a8": (torch.bfloat16, "w8a8", {}),
    "odd": (torch.float32, "int8", {"mamba_d_state": 5, "mamba_d_conv": 3, "num_experts": 4, "num_experts_per_tok": 2}),
    "rope": (torch.float32, "int8", {"rope_theta": 10_000.0}),
}


@pytest.fixture(scope="module")
def models(write_jamba, tmp_path_factory, w8a8_anywhere) -> dict[str, Jamba]:
    made = {}
    for seed, (kind, (dtype, quantize, fields)) in enumerate(KINDS.items()):
        path = tmp_path_factory.mktemp("jamba")
        write_jamba(path, seed=seed, **fields)
        made[kind] = load_model(path, dtype=dtype, quantize=quantize)
    return made


@torch.inference_mode()
def prefilled(model: Jamba, lengths: Sequence[int], seed: int) -> list[HybridState]:
    generator = torch.Generator().manual_seed(seed)
    states = [model.new_state() for _ in lengths]
    for state, length in zip(states, lengths, strict=True):
        model.forward_packed(torch.randint(512, (length,), generator=generator), [length], [state])
    return states


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 8), st.integers(0, 8)), min_size=1, max_size=4),
    seed=st.integers(0, 2**20),
)
def test_tokens_tried_together_leave_the_bits_of_single_steps(models, kind, pieces, seed):
    """Each piece: tokens before, tokens tried, tokens kept: all, some or none of them."""
    model, room, tried, kept = models[kind], MAX_TOKENS, [], []
    for _, count, right in pieces:
        tried.append(max(1, min(count, room - len(pieces) + len(tried) + 1)))
        room -= tried[-1]
        kept.append(min(right, tried[-1]))
    states, single = (prefilled(model, [past for past, _, _ in pieces], seed) for _ in range(2))
    before = [state_bytes(state) for state in states]
    tokens = [torch.randint(512, (count,), generator=torch.Generator().manual_seed(seed + 1)) for count in tried]
    with torch.inference_mode():
        trial = model.try_tokens(torch.cat(tokens), tried, states)
        assert [state_bytes(state) for state in states] == before
        trial.keep(kept)
        logits = trial.logits.split(tried)
        for i, state in enumerate(single):
            for place in range(tried[i]):
                if place == kept[i]:
                    assert state_bytes(state) == state_bytes(states[i])
                own = model.forward_packed(tokens[i][place : place + 1], [1], [state])
                assert torch.equal(own[0], logits[i][place])
            if kept[i] == tried[i]:
                assert state_bytes(state) == state_bytes(states[i])


def test_what_cannot_be_tried_or_kept_is_refused(models):
    model = models["int8"]
    (state,) = prefilled(model, [5], 0)
    too_many = MAX_TOKENS + 1
    with pytest.raises(ValueError, match=f"{too_many} tokens"):
        model.try_tokens(torch.zeros(too_many, dtype=torch.int64), [too_many], [state])
    trial = model.try_tokens(torch.tensor([1, 2]), [2], [state])
    with pytest.raises(ValueError, match="3 of 2"):
        trial.keep([3])
    assert state.num_tokens == 5


class Oracle(PromptLookup):
    """Guesses an answer that is known, wrong in every `wrong`-th token."""

    answers: ClassVar[dict[tuple[int, ...], list[int]]] = {}
    wrong = 0

    def draft(self, limit: int) -> list[int]:
        written = len(self._generation.token_ids)
        known = self.answers[tuple(self._tokens[: self._prompt_tokens].tolist())]
        end = min(written + limit, self._generation.max_new_tokens - 1)
        places = range(written, min(end, len(known)))
        draft = [known[i] ^ 1 if self.wrong and i % self.wrong == 0 else known[i] for i in places]
        self._drafted = len(draft)
        return draft


@pytest.fixture(scope="module")
def model(models) -> Jamba:
    return models["int8"]


def make_request(which: int, **sampling: object) -> EngineRequest:
    """A prompt that repeats itself, as evidence and a quote do."""
    words = random.Random(which).choices(range(11, 267), k=12)
    params = SamplingParams(**{"max_new_tokens": 24, "ignore_eos": True} | sampling)
    return EngineRequest(tuple(words * 4), sampling=params)


class Echo:
    """Lets the answer repeat the prompt, or leave it at every fourth token."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._prompt = prompt

    def allowed(self, generated: Sequence[int]) -> Sequence[int]:
        following = self._prompt[len(generated) % len(self._prompt)]
        return [following] if len(generated) % 4 else [following, 5]


def seen(answers: Sequence[Answer]) -> list[list[tuple]]:
    """What a reader gets, without the times."""
    return [[(o.token_id, o.logprob, o.watch_logprobs, o.text, o.finish_reason) for o in a.outputs] for a in answers]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}, {"max_new_tokens": 1}])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_answers_are_the_same_bits_with_guesses(make_engine, sampling, count):
    requests = [make_request(i, **sampling) for i in range(count)]
    requests += [replace(one, constraint=Echo(one.token_ids), watch_tokens=(5,)) for one in requests]
    plain, guessing = make_engine(draft_tokens=0), make_engine(draft_tokens=3)
    assert seen(run_all(guessing, requests)) == seen(run_all(plain, requests))
    assert plain.times.drafts == DraftCounts()
    assert guessing.times.drafts.accepted > 0 or sampling.get("max_new_tokens") == 1


@pytest.mark.parametrize("wrong", [0, 1, 2, 3, 5])
def test_right_and_wrong_guesses_give_the_same_answer(make_engine, monkeypatch, wrong):
    requests = [make_request(i, max_new_tokens=10 + 3 * i) for i in range(2)]
    expected = [run_one(make_engine(draft_tokens=0), one) for one in requests]
    answers = {one.token_ids: answer.token_ids for one, answer in zip(requests, expected, strict=True)}
    monkeypatch.setattr(Oracle, "answers", answers)
    monkeypatch.setattr(Oracle, "wrong", wrong)
    monkeypatch.setattr("model.engine.PromptLookup", Oracle)
    engine = make_engine(draft_tokens=3)
    assert seen(run_all(engine, requests)) == seen(expected)
    assert (engine.times.drafts.rejected == 0) == (wrong == 0)
    assert (engine.times.drafts.accepted == 0) == (wrong == 1)


def test_guesses_save_steps_and_end_with_the_answer(make_engine):
    one = make_request(0, stop_token_ids=(9,), max_new_tokens=40)
    one = replace(one, constraint=Echo([*one.token_ids[:10], 9]))
    steps, engine = [], make_engine(draft_tokens=3)
    engine.add(one)
    while engine.has_work():
        steps.append(engine.step())
    tokens = [output.token_id for outputs in steps for output in outputs]
    assert tokens == [o.token_id for o in run_one(make_engine(draft_tokens=0), one).outputs]
    assert len([outputs for outputs in steps if outputs]) < len(tokens)


def test_an_abort_between_guessed_tokens_ends_the_answer(make_engine):
    engine, one = make_engine(draft_tokens=3), make_request(0)
    request_id = engine.add(replace(one, constraint=Echo(one.token_ids)))
    while len(outputs := engine.step()) < 2:
        pass
    engine.abort(request_id)
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    assert outputs[-1].finish_reason is None and not engine.has_work()


def test_kept_states_hold_no_guessed_token(make_engine):
    one = make_request(0)
    one = replace(one, constraint=Echo(one.token_ids), boundaries=(40,))
    longer = replace(one, token_ids=(*one.token_ids, 40, 41), constraint=None)
    stores = [DeviceStateStore(1 << 24) for _ in range(2)]
    engines = [make_engine(store, draft_tokens=tokens) for store, tokens in zip(stores, (0, 3), strict=True)]
    answers = [[run_one(engine, one), run_one(engine, longer)] for engine in engines]
    assert seen(answers[0]) == seen(answers[1])
    assert stores[0].stats()["bytes"] == stores[1].stats()["bytes"]
    assert answers[1][1].end.cached_tokens > 0


def lookup(prompt: Sequence[int], written: Sequence[int], **options: object) -> PromptLookup:
    generation = Generation(TOKENIZER, SamplingParams(**{"max_new_tokens": 64} | options))
    generation.token_ids = list(written)
    return PromptLookup(prompt, generation, DraftCounts())


def test_what_followed_the_longest_match_is_guessed():
    assert lookup([20, 21, 22, 30, 21, 23, 20], [21]).draft(2) == [22, 30]
    assert lookup([20, 21, 22], [20]).draft(4) == [21, 22, 20, 21]
    assert lookup([20, 21, 22], [50]).draft(3) == []


def test_without_a_majority_nothing_is_guessed():
    assert lookup([20, 30, 20, 31, 20, 32], [20]).draft(3) == []
    assert lookup([20, 30, 20, 31, 20, 30, 40], [20]).draft(1) == [30]


def test_a_guess_neither_ends_the_answer_nor_exceeds_it():
    prompt = [20, 21, 22, 23, 24]
    assert lookup(prompt, [20], stop_token_ids=(23,)).draft(4) == [21, 22]
    assert lookup(prompt, [20], max_new_tokens=3).draft(4) == [21]
    assert lookup(prompt, [20], max_new_tokens=1).draft(4) == []


def test_wrong_guesses_make_it_pause_longer_each_time():
    one = lookup([20, 21, 22], [20])
    drafted = []
    for _ in range(40):
        drafted.append(bool(one.draft(1)))
        if drafted[-1]:
            one.learn(0)
    assert [i for i, guessed in enumerate(drafted) if guessed] == [0, 2, 6, 14, 30]
    while not one.draft(1):
        pass
    one.learn(1)
    assert one.draft(1) == [21]


def test_a_larger_batch_guesses_less():
    assert [[len(d) for d in draft_all([lookup(range(20, 40), [20])] * b, 3)] for b in (1, 2, 3, 4, 5)] == [
        [3],
        [3, 3],
        [1, 1, 1],
        [1, 1, 1, 1],
        [0] * 5,
    ]
