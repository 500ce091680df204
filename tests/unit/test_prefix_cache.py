"""The oracle of every test here: the same answer, to the last bit, as without any cache."""

import random
from dataclasses import replace

import pytest
import torch
from engine_kit import (
    DOCUMENTS,
    QUESTIONS,
    SMALL,
    TOKENIZER,
    assert_same_bits,
    doc_prompt,
    doc_request,
    run_all,
    run_one,
)
from state_kit import open_store, pinned_store, running_server

from model import Jamba, load_model
from model.device_store import DeviceStateStore
from model.engine import JambaEngine
from model.prefix_cache import PrefixCache
from model.state_codec import DamagedValue, decode_value, encode_value
from model.state_store import MemoryStateStore, StateItem


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def model(tiny_jamba_dir, request) -> Jamba:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return load_model(tiny_jamba_dir, torch.device(request.param))


@pytest.fixture
def device(model) -> torch.device:
    return model.embed_tokens.weight.device


@pytest.fixture(scope="module")
def server():
    with running_server() as server:
        yield server


@pytest.fixture(autouse=True)
def _empty_server(server):
    with server.client() as client:
        client.flushall()


@pytest.fixture
def memory(device):
    return DeviceStateStore(1 << 26, device)


@pytest.fixture
def redis_store(server):
    store = open_store(server, part_bytes=4096)
    yield store
    store.close()


def random_request(rng: random.Random, **sampling: object):
    chosen = sorted(rng.sample(range(len(DOCUMENTS)), rng.randint(0, 4)))
    return doc_request(TOKENIZER, [DOCUMENTS[i] for i in chosen], rng.choice(QUESTIONS), **sampling)


def run_and_flush(engine: JambaEngine, one):
    """As `run_one`, and wait until all stores have what was to be kept."""
    answer = run_one(engine, one)
    assert engine.prefix_cache.flush(timeout_s=20)
    return answer


@pytest.fixture(scope="module")
def cold_answers() -> dict:
    """Of `test_warm_answers_equal_cold_ones`, which asks the same whatever is below the device."""
    return {}


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("distance", [0, 60])
@pytest.mark.parametrize("device_bytes", [0, 60_000, 1 << 26])
@pytest.mark.parametrize("below", ["nothing", "memory", "redis", "memory and redis"])
def test_warm_answers_equal_cold_ones(
    make_engine, device, redis_store, cold_answers, below, device_bytes, distance, int8
):
    rng = random.Random(f"nothing {device_bytes} {distance}")  # these repeat enough for a small device, too
    settings = replace(SMALL, min_snapshot_distance=distance, int8_snapshots=int8)
    stores: list = [DeviceStateStore(device_bytes, device)] if device_bytes else []
    if stores and below != "nothing":
        stores[0].tier = "gpu"  # as it is called where main memory is below it
    stores += [pinned_store(150_000)] * ("memory" in below) + [redis_store] * ("redis" in below)
    warm, cold = make_engine(*stores, plan=settings), make_engine(plan=settings)
    cached, tiers = 0, set()
    for i in range(14):
        sampling = {"temperature": 1.0, "seed": i} if i % 3 == 0 else {}
        one = random_request(rng, **sampling)
        answer, key = run_and_flush(warm, one), (str(device), device_bytes, distance, int8, i)
        if key not in cold_answers:
            cold_answers[key] = one, run_one(cold, one)
        assert cold_answers[key][0] == one
        assert_same_bits(answer, cold_answers[key][1])
        assert answer.end.cached_tokens in {0, *one.boundaries, *range(0, 2000, 64)}
        assert answer.end.cached_tokens < len(one.token_ids)
        assert (answer.end.tier == "none") == (answer.end.cached_tokens == 0)
        assert not device_bytes or stores[0].stats()["bytes"] <= device_bytes
        cached += answer.end.cached_tokens
        tiers.add(answer.end.tier)
    assert cached > 100 or stores == []
    assert not device_bytes or stores[0].tier in tiers
    assert "redis" in tiers or device_bytes == 1 << 26 or below != "redis"


@pytest.mark.parametrize("loading", [{"dtype": torch.bfloat16}, {"quantize": "int8"}], ids=str)
def test_warm_answers_equal_cold_ones_in_other_dtypes(tiny_jamba_dir, redis_store, loading):
    model, rng = load_model(tiny_jamba_dir, **loading), random.Random(3)
    caches = [PrefixCache(stores, b"model", SMALL) for stores in ([redis_store], ())]
    warm, cold = (JambaEngine(model, TOKENIZER, cache, max_context_tokens=2000) for cache in caches)
    for _ in range(6):
        one = random_request(rng)
        assert_same_bits(run_and_flush(warm, one), run_one(cold, one))
    assert caches[0].stats()[0].cached_tokens > 0
    warm.close()
    cold.close()
    caches[0].close()


def test_answers_in_a_batch_with_a_cache_are_the_same_text(make_engine, memory):
    rng = random.Random(1)
    warm, cold = make_engine(memory), make_engine()
    for _ in range(4):
        requests = [random_request(rng, temperature=0.7, seed=rng.randint(0, 99)) for _ in range(6)]
        answers = run_all(warm, requests)
        assert [a.token_ids for a in answers] == [run_one(cold, one).token_ids for one in requests]


def test_the_second_question_costs_only_itself(make_engine, memory):
    engine = make_engine(memory)
    first = run_one(engine, doc_request(TOKENIZER, DOCUMENTS[:3], "why?"))
    again = doc_request(TOKENIZER, DOCUMENTS[:3], "where?")
    second = run_one(engine, again)
    assert (first.end.cached_tokens, first.end.tier) == (0, "none")
    assert (second.end.cached_tokens, second.end.tier) == (again.boundaries[-1], engine.prefix_cache._stores[0].tier)
    longer = doc_request(TOKENIZER, DOCUMENTS[:5], "where?")
    assert run_one(engine, longer).end.cached_tokens == again.boundaries[-1]
    other = doc_request(TOKENIZER, [*DOCUMENTS[:2], DOCUMENTS[4]], "where?")
    assert run_one(engine, other).end.cached_tokens == again.boundaries[-2]


def test_an_exact_repeat_leaves_one_token_to_compute(make_engine, memory):
    engine = make_engine(memory)
    one = doc_request(TOKENIZER, DOCUMENTS[:2], "why?")
    whole = replace(one, boundaries=(*one.boundaries, len(one.token_ids) - 1, len(one.token_ids)))
    first, second = run_one(engine, whole), run_one(engine, whole)
    assert second.end.cached_tokens == len(one.token_ids) - 1
    assert_same_bits(second, first)
    longer = replace(whole, token_ids=(*whole.token_ids, *TOKENIZER.encode(" and then?")))
    assert run_one(engine, longer).end.cached_tokens == len(one.token_ids)


def test_nothing_crosses_tenants_or_models(make_engine, memory):
    one = doc_request(TOKENIZER, DOCUMENTS[:3], "why?")
    run_one(make_engine(memory), replace(one, salt=b"tenant a"))
    assert run_one(make_engine(memory), replace(one, salt=b"tenant b")).end.cached_tokens == 0
    assert (
        run_one(make_engine(memory, fingerprint=b"new weights"), replace(one, salt=b"tenant a")).end.cached_tokens == 0
    )
    assert run_one(make_engine(memory), replace(one, salt=b"tenant a")).end.cached_tokens == one.boundaries[-1]


def test_int8_snapshots_and_others_do_not_see_each_other(make_engine, redis_store):
    one = doc_request(TOKENIZER, DOCUMENTS[:3], "why?")
    engines = [make_engine(redis_store, plan=replace(SMALL, int8_snapshots=int8)) for int8 in (False, True)]
    cached = [run_and_flush(engine, one).end.cached_tokens for engine in (*engines, *engines)]
    assert cached == [0, 0, one.boundaries[-1], one.boundaries[-1]]
    plans = [engine.prefix_cache.plan(one.token_ids, one.boundaries) for engine in engines]
    ours, theirs = (plan.snapshot_keys[one.boundaries[-1]] for plan in plans)
    value = bytes(redis_store.get_many([ours])[0])
    redis_store.put_many([StateItem(theirs, value, one.tags)])  # as if the keys had been the same
    run_one(engines[1], one)
    assert engines[1].prefix_cache.stats()[0].damaged == 1


def test_an_int8_snapshot_changes_the_answer_a_little_and_once(make_engine, memory, device):
    """What is stored is smaller; an answer from it is that of the rounded state, not of the exact one."""
    one = doc_request(TOKENIZER, DOCUMENTS[:3], "why?")
    settings = replace(SMALL, int8_snapshots=True)
    exact, small = make_engine(DeviceStateStore(1 << 26, device)), make_engine(memory, plan=settings)
    answers = [run_one(small, one) for _ in range(3)]
    for answer in answers:
        assert_same_bits(answer, answers[0])
    expected = run_one(exact, one)
    assert expected.logprobs != answers[0].logprobs
    assert answers[0].logprobs[0] == pytest.approx(expected.logprobs[0], abs=0.02)
    sizes = []
    for engine in (small, exact):
        cache = engine.prefix_cache
        key = cache.plan(one.token_ids, one.boundaries).snapshot_keys[one.boundaries[-1]]
        (value,) = cache._stores[0].get_many([key])
        sizes.append(len(value))
    assert sizes[0] < 0.75 * sizes[1]  # a third of them is conv and tail here


def test_a_restart_finds_the_states_below_and_brings_them_up(make_engine, device, memory, redis_store):
    one = doc_request(TOKENIZER, DOCUMENTS[:3], "why?")
    first = run_and_flush(make_engine(memory, redis_store), one)
    nearest, middle = DeviceStateStore(1 << 26, device), pinned_store(1 << 26)
    nearest.tier = "gpu"
    restarted = make_engine(nearest, middle, redis_store)
    answers = [run_and_flush(restarted, one) for _ in range(2)]
    assert [answer.end.tier for answer in answers] == ["redis", "gpu"]
    assert middle.stats()["items"] == nearest.stats()["items"]
    nearest.close()
    answers.append(run_one(restarted, one))
    assert answers[-1].end.tier == "host"
    for answer in answers:
        assert answer.end.cached_tokens == one.boundaries[-1]
        assert_same_bits(answer, first)


def damage(value: bytearray, how: str, rng: random.Random) -> bytes:
    if how == "truncated":
        return bytes(value[: rng.randrange(len(value))])
    if how == "longer":
        return bytes(value) + b"\0"
    flipped = bytearray(value)
    flipped[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


@pytest.mark.parametrize("how", ["flipped", "truncated", "longer", "swapped"])
def test_damaged_values_are_counted_misses(make_engine, redis_store, how):
    rng = random.Random(how)
    one = doc_request(TOKENIZER, DOCUMENTS[2:5], "why?")
    expected = run_one(make_engine(), one)
    engine = make_engine(redis_store)
    run_and_flush(engine, one)
    keys = list(engine.prefix_cache.plan(one.token_ids, one.boundaries).keys_deepest_first(one.boundaries[-1]))
    for _ in range(12):
        key, other = rng.sample(keys, 2)
        value, other_value = map(bytes, redis_store.get_many([key, other]))
        wrong = other_value if how == "swapped" else damage(value, how, rng)
        redis_store.put_many([StateItem(key, wrong, one.tags)])
        assert_same_bits(run_and_flush(engine, one), expected)
    stats, _ = engine.prefix_cache.stats()
    assert 0 < stats.damaged <= 12
    assert run_one(engine, one).end.cached_tokens == one.boundaries[-1]  # the damaged ones have been replaced


def test_a_damaged_value_in_redis_falls_back_to_a_shallower_state(make_engine, redis_store, server):
    one = doc_request(TOKENIZER, DOCUMENTS[2:5], "why?")
    first = run_and_flush(make_engine(redis_store), one)
    plan = PrefixCache((), b"model", SMALL).plan(one.token_ids, one.boundaries)
    with server.client() as client:
        client.setrange(f"jamba-rag:{plan.snapshot_keys[one.boundaries[-1]]}#1", 100, b"other bytes")
    answer = run_one(make_engine(redis_store), one)
    assert_same_bits(answer, first)
    assert answer.end.cached_tokens == max(end for end in plan.snapshot_keys if end < one.boundaries[-1])


def test_a_foreign_value_that_looks_right_is_a_miss():
    tensor = torch.arange(6.0).view(2, 3)
    value = encode_value("kv:1", "layout", [tensor, tensor[:0]])
    one, empty = decode_value("kv:1", "layout", value, count=2)
    assert torch.equal(one, tensor) and empty.shape == (0, 3)
    for key, layout, count in (("kv:2", "layout", 2), ("kv:1", "other", 2), ("kv:1", "layout", 1)):
        with pytest.raises(DamagedValue):
            decode_value(key, layout, value, count)


def test_invalidation_leaves_nothing_that_saw_the_document(make_engine, memory, redis_store):
    engine = make_engine(memory, pinned_store(1 << 26), redis_store)
    both = doc_request(TOKENIZER, DOCUMENTS[1:4], "why?")
    other = doc_request(TOKENIZER, DOCUMENTS[4:], "why?")
    for one in (both, other):
        run_one(engine, one)
    engine.prefix_cache.invalidate({DOCUMENTS[2]})  # while some may still wait to be written
    assert engine.prefix_cache.flush(timeout_s=20)
    plan = PrefixCache((), b"model", SMALL).plan(both.token_ids, both.boundaries)
    start = both.tag_starts[DOCUMENTS[2]]
    saw_it = [key for key in plan.keys_deepest_first(both.boundaries[-1]) if key not in plan.keys_deepest_first(start)]
    assert saw_it
    for store in engine.prefix_cache._stores:
        assert not any(store.contains_many(saw_it))
        assert store.contains_many([plan.snapshot_keys[both.boundaries[1]]]) == [True]
    assert run_one(engine, both).end.cached_tokens == start  # what came before it is still good
    assert run_one(engine, other).end.cached_tokens == other.boundaries[-1]


def test_invalidation_after_a_restart_and_of_everything(make_engine, redis_store, server):
    for question in QUESTIONS:
        run_and_flush(make_engine(redis_store), doc_request(TOKENIZER, DOCUMENTS[:3], question))
    cache = PrefixCache([redis_store], b"model", SMALL)
    cache.invalidate(DOCUMENTS[:3])
    system_end = doc_prompt(TOKENIZER, [], "")[1][0]
    plan = cache.plan(doc_prompt(TOKENIZER, DOCUMENTS[:3], "")[0], [system_end])
    kept = {*plan.keys_deepest_first(system_end)}
    with server.client() as client:
        left = {key.decode().removeprefix("jamba-rag:").split("#")[0] for key in client.keys("*")}
    assert left <= kept
    cache.close()


def test_who_lends_memory_hears_of_an_invalidation_before_a_slow_store_does(memory, monkeypatch):
    cache, heard = PrefixCache([memory, MemoryStateStore(1)]), []
    cache.on_invalidated.append(lambda tags: heard.append(("lenders", cache.epoch)))
    monkeypatch.setattr(cache._behind, "forget", lambda tags: heard.append(("what waits", cache.epoch)))
    monkeypatch.setattr(memory, "delete", lambda tags: heard.append(("stores", cache.epoch)))
    cache.invalidate({"a"})
    assert heard == [("lenders", 1), ("what waits", 1), ("stores", 1)]
    cache.close()


def test_states_of_a_running_request_are_not_kept_after_an_invalidation(make_engine, memory):
    engine = make_engine(memory)
    one = doc_request(TOKENIZER, DOCUMENTS[3:6], "why?")
    engine.add(one)
    while memory.stats()["items"] < 4:  # somewhere in the middle of the prefill
        engine.step()
    engine.prefix_cache.invalidate({DOCUMENTS[3]})
    while engine.has_work():
        engine.step()
    saw_none = doc_request(TOKENIZER, [], "why?").boundaries[0]
    assert run_one(engine, replace(one, tags=frozenset())).end.cached_tokens <= saw_none
    assert engine.prefix_cache.stats()[0].refused > 0


@pytest.mark.parametrize("later", [0, 10])  # documents invalidated after it, of which 4 are remembered
def test_a_prompt_made_before_an_invalidation_keeps_nothing(make_engine, memory, monkeypatch, later):
    monkeypatch.setattr("model.prefix_cache._MAX_INVALIDATED", 4)
    engine = make_engine(memory)
    one = replace(doc_request(TOKENIZER, DOCUMENTS[:2], "why?"), epoch=engine.prefix_cache.epoch)
    for document in (DOCUMENTS[0], *map(str, range(later))):
        engine.prefix_cache.invalidate({document})
    assert len(engine.prefix_cache._invalidated) <= 4
    run_one(engine, one)
    assert run_one(engine, one).end.cached_tokens == one.boundaries[0]
    later = replace(one, epoch=None)  # chosen again after the document came back
    run_one(engine, later)
    assert run_one(engine, later).end.cached_tokens == one.boundaries[-1]


def test_answers_go_on_when_the_server_dies(make_engine, device):
    rng = random.Random(5)
    cold = make_engine()
    with running_server() as server:
        store = open_store(server)
        warm = make_engine(DeviceStateStore(60_000, device), store)
        tiers = []
        for i in range(15):
            if i == 6:
                server.terminate()
            one = random_request(rng)
            answer = run_and_flush(warm, one)
            assert_same_bits(answer, run_one(cold, one))
            tiers.append(answer.end.tier)
        assert "redis" in tiers[:6] and "redis" not in tiers[6:]
        stats = store.stats()
        assert stats["errors"] > 0 and stats["dropped"] > 0
        warm.prefix_cache.close()
        store.close()


def test_memory_pressure_evicts_the_end_of_a_prefix_first(make_engine, device):
    long = doc_request(TOKENIZER, [f"document {i:02d} of equal length" for i in range(12)], "why?")
    roomy = DeviceStateStore(1 << 26, device)
    run_one(make_engine(roomy), long)
    tight = DeviceStateStore(roomy.stats()["bytes"] // 2, device)
    engine = make_engine(tight)
    run_one(engine, long)
    assert tight.stats()["evicted"] > 0
    assert len(long.token_ids) // 4 < run_one(engine, long).end.cached_tokens


def test_stats_count_tokens(make_engine, memory):
    engine = make_engine(memory)
    one = doc_request(TOKENIZER, DOCUMENTS[:3], "why?")
    for _ in range(3):
        run_one(engine, one)
    stats, tiers = engine.prefix_cache.stats()
    assert (stats.lookups, stats.hits, stats.damaged) == (3, 2, 0)
    assert (stats.prompt_tokens, stats.cached_tokens) == (3 * len(one.token_ids), 2 * one.boundaries[-1])
    assert tiers[memory.tier]["bytes"] == memory.stats()["bytes"] > 0
