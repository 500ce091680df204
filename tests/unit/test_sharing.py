"""Which states share one read of a prefix: what is known of their bits, who is grouped, that answers are the same."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_kit import SMALL, TOKENIZER, Answer, assert_same_bits, prompt, run_all, step

from model import Jamba, load_model
from model.admission import StateBudget
from model.device_store import DeviceStateStore
from model.engine import JambaEngine
from model.engine_request import EngineRequest
from model.gpu_decode import GpuDecoder
from model.prefix_cache import PrefixCache
from model.sampling import SamplingParams
from model.sharing import share
from model.state import HybridState, Origin
from tests.conftest import WriteJamba

PREFIX = prompt(160, 1)
PLAN = replace(SMALL, sparse_snapshot_tokens=0)
BLOCKS = 160 // SMALL.block_tokens


def origin(keys: str, block_tokens: int = 64) -> Origin:
    """Of the blocks named by these letters, each key with all letters before it."""
    return Origin(tuple(keys[: i + 1] for i in range(len(keys))), block_tokens)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["abc"], [(0, 0)]),
        (["abc", ""], [(0, 0), (1, 0)]),
        (["abc", "abc"], [(0, 192), (0, 192)]),
        (["abc", "xbc"], [(0, 0), (1, 0)]),
        (["abd", "x", "abc"], [(2, 128), (1, 0), (2, 128)]),
        (["ab", "ab", "ab", "ab", "ab"], [(0, 0)] + [(1, 128)] * 4),
        (["abcd", "xy", "abcd", "ax", "xyz"], [(0, 256), (1, 128), (0, 256), (3, 0), (1, 128)]),
        (["abcdef", "abcdef", "a"], [(0, 384), (0, 384), (2, 0)]),  # and not all of them one block
    ],
)
def test_who_reads_whose_copy(keys: list[str], expected: list[tuple[int, int]]) -> None:
    assert share([origin(own) for own in keys], 4, 64, 64) == expected


def test_what_is_shared_is_a_multiple_of_the_unit_and_worth_it() -> None:
    states = [origin("abcde", 50), origin("abcdef", 50)]
    assert share(states, 4, 64, 64) == [(0, 192), (0, 192)]
    assert share(states, 4, 193, 64) == [(0, 0), (1, 0)]


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_what_the_kernels_are_made_for(seed: int) -> None:
    rng = random.Random(seed)
    states = [origin("".join(rng.choices("ab", k=rng.randint(0, 5)))) for _ in range(rng.randint(1, 12))]
    shared = share(states, 3, 64, 64)
    for i, (owner, until) in enumerate(shared):
        members = [j for j, own in enumerate(shared) if own[0] == owner]
        assert owner in members and i in members and (len(members) > 1) == (until > 0)
        assert len(members) <= 3 and {shared[j][1] for j in members} == {until}
        for j in members:
            assert states[j].keys[: until // 64] == states[owner].keys[: until // 64]
            assert len(states[j].keys) >= until // 64


def test_going_back_forgets_what_may_be_written_over(model: Jamba) -> None:
    state = model.new_state()
    state.num_tokens = 200
    state.origin = origin("abc")
    state.num_tokens = 201
    assert state.origin == origin("abc")
    state.num_tokens = 128
    assert state.origin == origin("ab")
    state.num_tokens = 127
    state.num_tokens = 300
    assert state.origin == origin("a")


def ask(question: int, begin: Sequence[int] = PREFIX, new: int = 12, **fields: object) -> EngineRequest:
    token_ids = (*begin, *prompt(20 + question, 10 + question))
    fields = {"boundaries": (len(begin),)} | fields
    return EngineRequest(token_ids, sampling=SamplingParams(max_new_tokens=new, ignore_eos=True), **fields)


def origins_while_decoding(engine: JambaEngine, requests: list[EngineRequest]) -> list[Origin]:
    """Of each request's state when it decodes: not all do at once where one ends before another's prefix is there."""
    ids, origins = [engine.add(request) for request in requests], dict[str, Origin]()
    answers = {request_id: Answer() for request_id in ids}
    while engine.has_work():
        step(engine, answers)
        origins |= {one.request_id: one.state.origin for one in engine._decoding}
    return [origins[request_id] for request_id in ids]


def test_one_stored_prefix_is_known_to_be_the_same(make_engine) -> None:
    """Who computed and stored it, who waited for that and who comes later all have its blocks."""
    engine = make_engine(DeviceStateStore(1 << 26), plan=PLAN)
    first = origins_while_decoding(engine, [ask(i) for i in range(3)])
    later = origins_while_decoding(engine, [ask(3)])
    assert len(set(first + later)) == 1
    assert len(first[0].keys) == BLOCKS and first[0].block_tokens == SMALL.block_tokens


def test_what_parts_in_the_middle_is_the_same_up_to_there(make_engine) -> None:
    engine = make_engine(DeviceStateStore(1 << 26), plan=PLAN)
    long = PREFIX + prompt(64, 2)
    longer, shorter = origins_while_decoding(engine, [ask(0, long, boundaries=(160, 224)), ask(1)])
    assert longer.keys[:BLOCKS] == shorter.keys and len(longer.keys) == BLOCKS + 4


def test_equal_tokens_are_not_known_to_be_the_same(make_engine) -> None:
    """Of another tenant, cut elsewhere, kept by nobody, or of documents that were deleted meanwhile."""
    engine = make_engine(DeviceStateStore(1 << 26), plan=PLAN)
    own, other = origins_while_decoding(engine, [ask(0), ask(1, salt=b"another")])
    assert own.keys and other.keys and not set(own.keys) & set(other.keys)
    (elsewhere,) = origins_while_decoding(engine, [ask(0, boundaries=(10, 160))])
    assert elsewhere.keys and not set(own.keys) & set(elsewhere.keys)
    assert origins_while_decoding(make_engine(plan=PLAN), [ask(0), ask(1)]) == [Origin()] * 2
    epoch = engine.prefix_cache.epoch
    engine.prefix_cache.invalidate(["document"])
    (refused,) = origins_while_decoding(engine, [ask(0, salt=b"x", tags=frozenset({"document"}), epoch=epoch)])
    assert refused == Origin()


@pytest.fixture
def engine_of_kernels(
    tmp_path: Path, write_jamba: WriteJamba, device: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[JambaEngine]:
    """An engine whose decoding runs the CUDA kernels and shares even short prefixes; four query heads a KV head."""
    sizes = {"hidden_size": 256, "intermediate_size": 96, "vocab_size": 267, "mamba_expand": 1, "num_hidden_layers": 4}
    write_jamba(tmp_path, **sizes, num_key_value_heads=1)
    model = load_model(tmp_path, device, torch.bfloat16, "int8")
    monkeypatch.setattr(Jamba, "can_try", False)  # in C, where the emulator's host is the device
    monkeypatch.setattr("model.gpu_decode._MIN_SHARED_TOKENS", 64)
    cache = PrefixCache([DeviceStateStore(1 << 26, device)], b"model", PLAN)
    engine = JambaEngine(model, TOKENIZER, cache, max_context_tokens=2000)
    yield engine
    engine.close()


def run_together(engine: JambaEngine, requests: list[EngineRequest]) -> list[Answer]:
    """As `run_all`, in batches that do not depend on how long states take to load."""
    answers = {engine.add(request): Answer() for request in requests}
    while engine.has_work():
        wait(engine._loading.values())
        step(engine, answers)
    return list(answers.values())


def test_texts_are_the_same_with_and_without_sharing(engine_of_kernels, monkeypatch) -> None:
    """Of four that share one prefix and two that share another; parts have 64 keys either way: equal bits."""
    engine, steps = engine_of_kernels, []
    upload = GpuDecoder._upload

    def watch(self: GpuDecoder, token_ids: object, states: object, shared: list[tuple[int, int]]) -> None:
        steps.append(shared)
        upload(self, token_ids, states, shared)

    monkeypatch.setattr(GpuDecoder, "_upload", watch)
    asked = [ask(i, new=8) for i in range(4)] + [ask(i, prompt(96, 7), new=8) for i in range(4, 6)]
    run_all(engine, [ask(9, new=1), ask(9, prompt(96, 7), new=1)])  # stored: after this all can start at once
    steps.clear()
    shared = run_together(engine, asked)
    assert max(sum(until == 128 for _, until in step) for step in steps) == 4
    assert max(sum(until == 64 for _, until in step) for step in steps) == 2
    monkeypatch.setattr("model.gpu_decode._MIN_SHARED_TOKENS", 1 << 30)
    steps.clear()
    alone = run_together(engine, asked)
    assert not any(until for step in steps for _, until in step)
    for one, other in zip(shared, alone, strict=True):
        assert_same_bits(one, other)


@pytest.fixture
def lending(engine_of_kernels, monkeypatch: pytest.MonkeyPatch) -> JambaEngine:
    """It lends even short prefixes."""
    monkeypatch.setattr("model.state.LENT_UNIT", 64)
    monkeypatch.setattr("model.state._MIN_LENT_TOKENS", 64)
    assert engine_of_kernels._room._lends
    return engine_of_kernels


def start(engine: JambaEngine, request: EngineRequest) -> tuple[str, dict[str, Answer]]:
    """Ask, and step until the first token is there."""
    request_id = engine.add(request)
    answers = {request_id: Answer()}
    while not answers[request_id].outputs:
        step(engine, answers)
    return request_id, answers


def test_a_question_behind_a_prefix_under_way_reads_it_where_it_is(lending) -> None:
    """The same answers as one after the other, also when the lender ends first, and by what is left of its memory."""
    expected = [run_all(lending, [ask(i, new=new)])[0] for i, new in enumerate((6, 12, 9))]
    first, answers = start(lending, ask(0, new=6))
    later = [lending.add(ask(i, new=new)) for i, new in ((1, 12), (2, 9))]
    answers |= {request_id: Answer() for request_id in later}
    lenders = set()
    while lending.has_work():
        step(lending, answers)
        for one in lending._sequences.values():
            if one.request_id in later and one.state is not None:
                assert one.state.lent_tokens == 128 and one.cached_tokens in (0, 160)
                lenders.add(one.state.lender_address())
                assert one.state.nbytes < lending._model.new_state().nbytes + 2 * 267 * 64 * 2 * 2
    assert len(lenders) == 1
    for request_id, own in zip((first, *later), expected, strict=True):
        assert answers[request_id].token_ids == own.token_ids
    assert answers[first].end.finish_reason == "length"


def test_what_is_lent_is_counted_once(lending) -> None:
    start(lending, ask(0, new=6))
    (lender,) = (one.state for one in lending._sequences.values())
    layout, lent = lending._model.state_layout, lender.lend(160)
    borrower, other = (lending._model.new_state(lent) for _ in range(2))
    borrower.reserve(200)
    own, third = borrower.nbytes, HybridState(layout, "meta")
    third.reserve(300)
    for states, held in (
        ([lender, borrower], lender.nbytes + own),
        ([borrower], own + lender._kv.nbytes),  # when the lender has ended
        ([borrower, other], own + other.nbytes + lender._kv.nbytes),
    ):
        assert StateBudget(layout, held + third.nbytes).has_room(300, states)
        assert not StateBudget(layout, held + third.nbytes - 1).has_room(300, states)


def test_who_finds_its_prefix_given_up_goes_without_a_loan(lending, monkeypatch) -> None:
    (expected,) = run_all(lending, [ask(1)])
    _, answers = start(lending, ask(0, new=40))
    find, lost = lending.prefix_cache.longest_prefix, []

    def lose_once(plan: object, counted: bool, lent_tokens: int) -> object:
        return find(plan, counted, lent_tokens) if lost else lost.append(lent_tokens)

    monkeypatch.setattr(lending.prefix_cache, "longest_prefix", lose_once)
    second = lending.add(ask(1))
    answers[second] = Answer()
    while lending.has_work():
        step(lending, answers)
    assert lost == [128] and answers[second].token_ids == expected.token_ids
    assert answers[second].end.cached_tokens == 160


def test_what_an_ended_sequence_read_is_there_for_the_next_one(lending) -> None:
    """Until its documents go, or somebody needs the memory."""
    tagged = {"tags": frozenset({"document"})}
    (expected,) = run_all(lending, [ask(0, **tagged)])
    held = dict(lending._room._lenders.memory)
    assert len(held) == 1 and lending._room._lenders.memory.keys() == held.keys()
    (again,) = run_all(lending, [ask(0, **tagged)])
    assert_same_bits(again, expected)
    assert dict(lending._room._lenders.memory) == held  # read where it is, by both
    lending.prefix_cache.invalidate(["another"])
    assert lending._room._lenders.memory
    lending.prefix_cache.invalidate(["document"])
    assert not lending._room._lenders.memory
    request_id, answers = start(lending, ask(0, epoch=lending.prefix_cache.epoch, **tagged))
    lending.prefix_cache.invalidate(["document"])  # under way: kept by nobody when it ends
    while lending.has_work():
        step(lending, answers)
    assert answers[request_id].token_ids == expected.token_ids and not lending._room._lenders.memory


def test_a_lone_answer_has_the_same_bits_where_its_prefix_is_lent(lending, monkeypatch) -> None:
    """Also where a step that shares would cut the keys into other parts."""
    monkeypatch.setattr("model.kernels.gpu.sm_count", lambda device: 2)
    long = prompt(420, 4)
    expected, again = (run_all(lending, [ask(0, long, new=5)])[0] for _ in range(2))
    assert (expected.end.cached_tokens, again.end.cached_tokens) == (0, 420)
    assert len(lending._room._lenders.memory) == 1
    assert_same_bits(again, expected)


def test_what_is_lent_goes_with_any_document_of_its_memory(lending) -> None:
    """One that began like it and ended does not make it less."""
    whole = {"boundaries": (128, 224), "tags": frozenset({"a", "b"}), "tag_starts": {"a": 0, "b": 128}}
    run_all(lending, [ask(0, prompt(224, 5), **whole)])
    (address,) = lending._room._lenders.memory
    other = {"boundaries": (128, 192), "tags": frozenset({"a", "c"}), "tag_starts": {"a": 0, "c": 128}}
    run_all(lending, [ask(1, prompt(224, 5)[:128] + prompt(64, 6), **other)])
    assert list(lending._room._lenders.memory) == [address]
    _, answers = start(lending, ask(2, prompt(224, 5), **whole))
    assert [one.state.lent_tokens for one in lending._sequences.values()] == [192]
    while lending.has_work():
        step(lending, answers)
    lending.prefix_cache.invalidate(["b"])
    assert not lending._room._lenders.memory


def test_memory_of_a_document_that_went_while_it_was_lent_is_kept_by_nobody(lending) -> None:
    """Though who was lent it asked after that, and of what is still there."""
    whole = {"boundaries": (128, 224), "tags": frozenset({"a", "b"}), "tag_starts": {"a": 0, "b": 128}}
    _, answers = start(lending, ask(0, prompt(224, 5), new=6, **whole))
    lending.prefix_cache.invalidate(["b"])
    rest = {"boundaries": (128,), "tags": frozenset({"a"}), "epoch": lending.prefix_cache.epoch}
    second = lending.add(ask(1, prompt(224, 5)[:128], **rest))
    answers[second], lent = Answer(), set[int]()
    while lending.has_work():
        step(lending, answers)
        lent |= {one.state.lent_tokens for one in lending._sequences.values() if one.state is not None}
    assert lent == {0, 128} and not lending._room._lenders.memory


def test_who_gives_up_while_loading_leaves_no_memory_behind(lending, monkeypatch) -> None:
    run_all(lending, [ask(0, new=1)])
    lending._room.give_back()
    gate, states = threading.Event(), []
    blocked = lending._loader.submit(gate.wait)  # as by a slow store
    for question in range(3):
        request_id = lending.add(ask(question, prompt(96, 20 + question)))
        lending.step()
        states.append(weakref.ref(lending._sequences[request_id].state))
        lending.abort(request_id)
        lending.step()
    gc.collect()
    assert [state() for state in states] == [None] * 3
    gate.set()
    blocked.result()


def test_memory_of_ended_sequences_gives_way(lending, monkeypatch) -> None:
    (expected,) = run_all(lending, [ask(0)])
    run_all(lending, [ask(0, prompt(96, 7))])
    assert len(lending._room._lenders.memory) == 2
    state = lending._model.new_state()
    state.reserve(300)
    monkeypatch.setattr(lending._room, "_budget", StateBudget(lending._model.state_layout, state.nbytes))
    (again,) = run_all(lending, [ask(0)])
    assert again.token_ids == expected.token_ids
    (new,) = run_all(lending, [ask(0, prompt(250, 9))])
    assert len(new.token_ids) == 12 and len(lending._room._lenders.memory) == 1


def test_what_could_be_lent_gives_way_too_where_a_device_has_no_memory_beside_it(lending, monkeypatch) -> None:
    """Else the request would wait for ever: nobody else is there to end."""
    (expected,) = run_all(lending, [ask(0)])
    reserve, lenders = HybridState.reserve, lending._room._lenders

    def reserve_if_free(self: HybridState, num_tokens: int) -> None:
        if lenders.memory and self.conv.device.type != "meta":
            raise torch.OutOfMemoryError
        reserve(self, num_tokens)

    monkeypatch.setattr(HybridState, "reserve", reserve_if_free)
    request_id = lending.add(ask(0))
    answers = {request_id: Answer()}
    step(lending, answers)
    assert lending._sequences[request_id].state is not None
    while lending.has_work():
        step(lending, answers)
    assert answers[request_id].token_ids == expected.token_ids


def test_a_tenant_is_lent_nothing_of_another(lending) -> None:
    _, answers = start(lending, ask(0, new=20))
    second = lending.add(ask(1, salt=b"another"))
    answers[second] = Answer()
    while lending.has_work():
        step(lending, answers)
        own = lending._sequences.get(second)
        assert own is None or own.state is None or own.state.lent is None


def test_a_copy_of_a_state_reads_what_its_source_has_seen(lending) -> None:
    model = lending._model
    device = model.embed_tokens.weight.device
    state = model.new_state()
    model.forward_packed(torch.tensor(PREFIX, device=device), [len(PREFIX)], [state])
    copy = model.new_state(state.lend(160))
    state.copy_to(copy)
    again = model.new_state(copy.lend(copy.num_tokens))  # of a copy: from the first in line
    copy.copy_to(again)
    assert copy.lent_tokens == again.lent_tokens == 128 and copy.lender_address() == again.lender_address()
    for start, end in ((0, 160), (100, 160), (0, 64), (130, 140), (128, 128)):
        assert torch.equal(again.read_kv(start, end), state.read_kv(start, end))
    with pytest.raises(ValueError, match="KV of 192 tokens does not cover the snapshot's 64"):
        model.new_state(state.lend(160)).restore(replace(state.snapshot(), num_tokens=64), [state.read_kv(0, 64)])
    for _ in range(2):
        logits = [model.forward_packed(torch.tensor([7]), [1], [own]) for own in (state, copy, again)]
        assert torch.equal(logits[1], logits[2])
