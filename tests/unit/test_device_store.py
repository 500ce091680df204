"""States kept as tensors where the model runs. The oracle is the same answer, to the last bit, as without any cache."""

import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from engine_kit import DOCUMENTS, QUESTIONS, TOKENIZER, assert_same_bits, doc_request, run_all, run_one
from state_kit import Gate, open_store, pinned_store, running_server

from model import Jamba, load_model
from model.device_store import DeviceStateStore, PinnedStateStore, StateTensors
from model.engine import JambaEngine
from model.state import HybridState, StateLayout
from model.state_store import StateItem


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(tiny_jamba_dir, request) -> Jamba:
    torch.set_num_threads(1)
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return load_model(tiny_jamba_dir, torch.device(request.param))


@pytest.fixture
def device(model) -> torch.device:
    return model.embed_tokens.weight.device


@pytest.fixture
def nearest(device) -> DeviceStateStore:
    return named_store(1 << 26, device)


@pytest.fixture
def redis_store():
    with running_server() as server:
        store = open_store(server, part_bytes=4096)
        yield store
        store.close()


def named_store(max_bytes: int, device: torch.device) -> DeviceStateStore:
    """With the name it has on a GPU, so that a store in main memory can stand below it on a CPU too."""
    store = DeviceStateStore(max_bytes, device)
    store.tier = "gpu"
    return store


def tensors_of(store: DeviceStateStore, engine: JambaEngine, one) -> list[torch.Tensor]:
    keys = engine.prefix_cache.plan(one.token_ids, one.boundaries, one.salt).keys_deepest_first(len(one.token_ids))
    return [tensor for value in store.get_many(keys) if value is not None for tensor in value.tensors]


def item(key: str, *floats: int, tags: str = "", **hints: object) -> StateItem:
    return StateItem(key, StateTensors(tuple(torch.zeros(count) for count in floats)), frozenset(tags), **hints)


def test_the_store_gives_what_it_was_given_and_counts_bytes():
    store = DeviceStateStore(100)
    one, other = item("a", 5, 3, tags="xy"), item("b", 2, tags="y")
    store.put_many([one, other])
    assert store.tier == "host"
    assert store.get_many(["b", "c", "a"]) == [other.value, None, one.value]
    moved = {"read_bytes": 40, "written_bytes": 40}
    assert store.stats() == {"items": 2, "bytes": 40, "max_bytes": 100, "evicted": 0, "dropped": 0} | moved
    store.put_many([item("big", 26)])
    assert store.contains_many(["a", "b", "big"]) == [True, True, False]
    assert store.stats()["dropped"] == 1
    store.delete(tags=["x"])
    assert store.contains_many(["a", "b"]) == [False, True]
    store.delete(keys=["b"])
    assert store.stats()["bytes"] == store.stats()["items"] == 0


def test_room_is_made_only_where_it_helps():
    store = DeviceStateStore(100)
    store.put_many([item(key, 10, saves_tokens=100) for key in "ab"])
    assert not store.make_room(101)
    assert store.contains_many("ab", peek=True) == [True, True]
    assert store.make_room(20)
    assert store.stats()["bytes"] == 80
    assert store.make_room(60)
    assert (store.stats()["bytes"], store.stats()["evicted"]) == (40, 1)


def test_values_stay_on_the_device_and_are_not_the_memory_of_a_state(make_engine, nearest, device):
    engine = make_engine(nearest)
    one = doc_request(TOKENIZER, DOCUMENTS[:4], "why?")
    first = run_one(engine, one)
    tensors = tensors_of(nearest, engine, one)
    assert {tensor.device.type for tensor in tensors} == {device.type}
    assert sum(tensor.nbytes for tensor in tensors) == nearest.stats()["bytes"] > 0
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == nearest.stats()["bytes"]
    copies = [tensor.clone() for tensor in tensors]
    second = run_one(engine, one)
    assert (second.end.tier, second.end.cached_tokens) == ("gpu", one.boundaries[-1])
    assert_same_bits(second, first)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))


def test_eviction_while_a_prefix_is_computed(make_engine, device):
    """Each prompt alone fits; the values of the other are given up in the middle of its prefill."""
    prompts = [doc_request(TOKENIZER, [f"{name}{i:02d} of equal length" for i in range(12)], "why?") for name in "ab"]
    roomy = named_store(1 << 26, device)
    run_one(make_engine(roomy), prompts[0])
    tight = named_store(roomy.stats()["bytes"] * 5 // 4, device)
    below = pinned_store(1 << 26)
    warm, cold = make_engine(tight, below), make_engine()
    expected = [run_one(cold, one) for one in prompts]
    for answer in run_all(warm, prompts):
        assert answer.end.finish_reason == "length"
    for _ in range(3):
        for one, right in zip(prompts, expected, strict=True):
            assert_same_bits(run_one(warm, one), right)
            assert warm.prefix_cache.flush(timeout_s=20)
    assert tight.stats()["evicted"] > 0
    assert run_one(warm, prompts[0]).end.cached_tokens == prompts[0].boundaries[-1]


def test_a_state_larger_than_the_store_is_used_from_below(make_engine, device):
    one = doc_request(TOKENIZER, DOCUMENTS, "why?")
    memory = pinned_store(1 << 26)
    filling = make_engine(memory)
    first = run_one(filling, one)
    assert filling.prefix_cache.flush(timeout_s=20)
    small = named_store(1000, device)
    for _ in range(2):
        answer = run_one(make_engine(small, memory), one)
        assert (answer.end.tier, answer.end.cached_tokens) == ("host", one.boundaries[-1])
        assert_same_bits(answer, first)
    assert small.stats()["bytes"] <= 1000


def test_a_slow_store_below_holds_up_no_answer_and_no_invalidated_state_reaches_it(make_engine, nearest):
    gate = Gate()
    engine = make_engine(nearest, gate)
    one = doc_request(TOKENIZER, DOCUMENTS[:3], "why?")
    run_one(engine, one)
    assert gate.entered.wait(20)
    assert run_one(engine, one).end.tier == "gpu"
    assert engine.prefix_cache.stats()[1]["gpu"]["pending_bytes"] > 0
    forgetting = threading.Thread(target=engine.prefix_cache.invalidate, args=(set(DOCUMENTS[:3]),))
    forgetting.start()
    gate.opened.set()
    forgetting.join(20)
    assert not forgetting.is_alive()
    assert engine.prefix_cache.flush(timeout_s=20)
    plan = engine.prefix_cache.plan(one.token_ids, one.boundaries)
    seen = [key for key in plan.keys_deepest_first(10_000) if key not in plan.keys_deepest_first(one.boundaries[0])]
    for store in (nearest, gate):
        assert not any(store.contains_many(seen))


@pytest.mark.parametrize("device_bytes", [0, 1000, 1 << 26], ids=["no device", "no room there", "room there"])
@pytest.mark.parametrize("deleted", [False, True])
def test_what_is_brought_up_to_main_memory_holds_up_no_answer(make_engine, device, redis_store, device_bytes, deleted):
    """And nothing of a document that is deleted before its turn gets there."""
    one = doc_request(TOKENIZER, DOCUMENTS[:3], "why?")
    filling = make_engine(redis_store)
    first = run_one(filling, one)
    assert filling.prefix_cache.flush(timeout_s=20)
    filling.prefix_cache.close()
    gate, above = Gate(), [named_store(device_bytes, device)] if device_bytes else []
    engine = make_engine(*above, gate, redis_store)
    cache, answer = engine.prefix_cache, run_one(engine, one)
    assert (answer.end.tier, answer.end.cached_tokens) == ("redis", one.boundaries[-1])
    assert_same_bits(answer, first)
    assert gate.entered.wait(20)  # by a thread that still waits
    plan, end = cache.plan(one.token_ids, one.boundaries), one.boundaries[-1]
    needed = [*plan.block_keys[: end // plan.block_tokens], plan.snapshot_keys[end]]
    seen = [key for key in needed if key not in plan.keys_deepest_first(one.boundaries[0])]
    assert len(seen) > 3
    assert not any(gate.contains_many(needed))
    forgetting = threading.Thread(target=cache.invalidate, args=(set(DOCUMENTS[:3]) if deleted else (),))
    forgetting.start()
    while deleted and forgetting.is_alive() and any(job.item.tags for job in cache._behind._promotions):
        forgetting.join(0.01)
    gate.opened.set()
    forgetting.join(20)
    assert cache.flush(timeout_s=20)
    if deleted:
        assert not any(gate.contains_many(seen))
    else:
        assert all(gate.contains_many(needed))
    assert len(gate.puts) == len(set(gate.puts))
    engine.prefix_cache.close()


def test_what_is_too_much_to_be_brought_up_at_once_comes_with_the_questions(make_engine, redis_store):
    one = doc_request(TOKENIZER, DOCUMENTS, "why?")
    filling, above = make_engine(redis_store), pinned_store(1 << 26)
    run_one(filling, one)
    assert filling.prefix_cache.flush(timeout_s=20)
    engine = make_engine(above, redis_store)
    engine.prefix_cache._behind._max_pending_bytes = 40_000
    answers, nbytes = [], [0]
    while not answers or answers[-1].end.tier == "redis":
        answers.append(run_one(engine, one))
        assert engine.prefix_cache.flush(timeout_s=20)
        nbytes.append(above.stats()["bytes"])
        assert nbytes[-1] > nbytes[-2] or answers[-1].end.tier == "host"
    assert len(answers) > 2
    assert {answer.end.cached_tokens for answer in answers} == {one.boundaries[-1]}


def test_the_threads_that_read_a_server_stay_until_the_cache_is_closed(make_engine, redis_store, monkeypatch):
    engine, one, readers = make_engine(redis_store), doc_request(TOKENIZER, DOCUMENTS, "why?"), set[threading.Thread]()
    run_one(engine, one)
    assert engine.prefix_cache.flush(timeout_s=20)
    get_many = redis_store.get_many
    monkeypatch.setattr(redis_store, "get_many", lambda keys: readers.add(threading.current_thread()) or get_many(keys))
    for _ in range(3):
        assert run_one(engine, one).end.tier == "redis"
    readers = {thread for thread in readers if thread.name.startswith("prefix-read")}
    assert 1 < len(readers) <= 4
    engine.prefix_cache.close()
    assert not any(thread.is_alive() for thread in readers)


def test_what_is_on_its_way_is_not_saved_again(make_engine, redis_store):
    filling, gate = make_engine(redis_store), Gate()
    run_one(filling, doc_request(TOKENIZER, DOCUMENTS[:3], "why?"))
    assert filling.prefix_cache.flush(timeout_s=20)
    filling.prefix_cache.close()
    engine = make_engine(gate, redis_store)
    assert run_one(engine, doc_request(TOKENIZER, DOCUMENTS[:4], "why?")).end.tier == "redis"
    gate.opened.set()
    assert engine.prefix_cache.flush(timeout_s=20)
    assert len(gate.puts) == len(set(gate.puts)) > 3
    engine.prefix_cache.close()


@pytest.mark.parametrize("ends", [(0, 7), (0, 4, 8, 8), (0, 3, 3, 5, 300), (0, 0)])
def test_a_state_restored_from_pieces_on_its_device_is_the_same(device, ends):
    layout = StateLayout(2, 1, 2, 4, 6, 3, 4, torch.bfloat16, torch.bfloat16)
    kv = torch.randn(layout.kv_shape(ends[-1]), device=device).bfloat16()
    snapshot = replace(HybridState(layout, device).snapshot(), num_tokens=ends[-1])
    pieces = [kv[:, :, start:end].contiguous() for start, end in pairwise(ends)]
    restored = HybridState(layout, device)
    restored.reserve(ends[-1] + 10)
    address = restored.addresses()
    restored.restore(snapshot, pieces)
    assert torch.equal(restored.read_kv(0, ends[-1]), kv)
    assert restored.addresses() == address


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_main_memory_is_locked_beforehand_and_holds_no_more():
    store = PinnedStateStore(3 << 20)
    value = lambda: StateTensors((torch.ones(1 << 19, dtype=torch.bfloat16, device="cuda"), torch.zeros(3, 0)))
    store.put_many([StateItem("too soon", value())])
    assert store.contains_many(["too soon"]) == [False]
    assert store.reserve([1 << 20, 1 << 20]) and store.reserve([1 << 20, 1 << 20]) and not store.reserve([1 << 20])
    store.put_many([StateItem(key, value()) for key in "abcd"])
    assert store.stats()["bytes"] == 3 << 20
    for kept in filter(None, store.get_many("abcd")):
        assert kept.tensors[0].is_pinned() and kept.tensors[0].eq(1).all() and kept.tensors[1].shape == (3, 0)


def test_main_memory_below_a_gpu_keeps_tensors_and_redis_bytes(make_engine, device, redis_store):
    """The host tier holds tensors of its own, written behind; what it loses comes back from the bytes below it."""
    answers, host = {}, pinned_store(1 << 24)
    gpu = [DeviceStateStore(1 << 24, device)] if device.type == "cuda" else []
    for name, stores in {"none": (), "cold": (*gpu, host, redis_store), "warm": (host, redis_store)}.items():
        engine = make_engine(*stores)
        answers[name] = [run_one(engine, doc_request(TOKENIZER, DOCUMENTS[:3], q)).text for q in QUESTIONS]
        assert engine.prefix_cache.flush(10)
        engine.prefix_cache.close()
    assert answers["cold"] == answers["warm"] == answers["none"]
    keys = list(host._items)
    values = host.get_many(keys)
    assert all(isinstance(value, StateTensors) and value.device.type == "cpu" for value in values)
    if torch.cuda.is_available():
        assert all(tensor.is_pinned() for value in values for tensor in value.tensors if tensor.numel())
    assert all(redis_store.contains_many(keys))
    host.close()
    engine = make_engine(host, redis_store)
    assert run_one(engine, doc_request(TOKENIZER, DOCUMENTS[:3], QUESTIONS[0])).text == answers["none"][0]
    assert engine.prefix_cache.flush(10)
    assert host.stats()["items"] > 0  # brought up again
    engine.prefix_cache.close()
