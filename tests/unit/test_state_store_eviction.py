"""What a full store in memory gives up: held to a plain recomputation, and on small trees by hand."""

import random

import pytest

from model.state_eviction import Entry, LeastValuable, UseRates
from model.state_store import MemoryStateStore, StateItem


def block(name: str, after: str = "", nbytes: int = 10) -> StateItem:
    return StateItem(name, bytes(nbytes), after=after)


def snapshot(name: str, after: str, position: int, nbytes: int = 10, ends_prompt: bool = False) -> StateItem:
    return StateItem(name, bytes(nbytes), after=after, saves_tokens=position, ends_prompt=ends_prompt)


def chain(name: str, blocks: int, snapshots: tuple[int, ...], tokens: int = 100) -> list[StateItem]:
    """Blocks name0, name1, ...; a snapshot `name@i` behind the i-th block."""
    items = []
    for i in range(blocks):
        items.append(block(f"{name}{i}", f"{name}{i - 1}" if i else ""))
        if i + 1 in snapshots:
            items.append(snapshot(f"{name}@{i + 1}", f"{name}{i}", (i + 1) * tokens))
    return items


def kept(store: MemoryStateStore, *keys: str) -> list[bool]:
    return store.contains_many(keys, peek=True)


def test_the_end_of_a_prefix_goes_before_its_beginning():
    store = MemoryStateStore(100)
    store.put_many(chain("a", 8, (2, 4, 8)))
    assert store.stats()["bytes"] <= 100
    assert kept(store, "a0", "a1", "a@2", "a3", "a@4") == [True] * 5
    assert kept(store, "a@8") == [False]


def test_blocks_that_nothing_stands_behind_go_first():
    store = MemoryStateStore(100)
    store.put_many(chain("a", 4, (4,)))
    store.put_many(chain("b", 3, (3,)))
    store.delete(keys=["a@4"])
    store.put_many(chain("c", 4, (4,)))
    assert kept(store, "b@3", "b2", "b0", "c@4", "c3", "c0") == [True] * 6
    assert kept(store, "a3", "a2") == [False, False]


def test_tokens_saved_per_byte_decide_among_equally_used():
    store = MemoryStateStore(60)
    store.put_many([snapshot("heavy", "", 100, nbytes=40), snapshot("light", "", 100, nbytes=10)])
    store.put_many([snapshot("new", "", 1000, nbytes=20)])
    assert kept(store, "heavy", "light", "new") == [False, True, True]


def test_what_a_prompt_could_use_outlives_what_was_peeked_at_or_got():
    store = MemoryStateStore(30)
    store.put_many([snapshot(name, "", 100) for name in "abc"])
    for _ in range(3):
        store.contains_many(["a"], peek=True)
        store.contains_many(["b"])
        store.get_many(["c"])
    store.put_many([snapshot("d", "", 100), snapshot("e", "", 100)])
    assert kept(store, "a", "b", "c", "d", "e") == [False, True, False, True, True]


def test_what_was_used_often_ages_when_it_is_used_no_more():
    store = MemoryStateStore(30)
    store.put_many([snapshot("old", "", 100), snapshot("other", "", 100)])
    for _ in range(20):
        store.contains_many(["old"])
    for _ in range(200):
        store.contains_many(["other"])
    store.put_many([snapshot("new", "", 100), snapshot("more", "", 100)])
    assert kept(store, "old", "other") == [False, True]


def test_a_snapshot_whose_readers_went_on_to_a_deeper_one_goes_before_it():
    store = MemoryStateStore(70)
    store.put_many(chain("a", 2, (1, 2)))
    store.put_many(chain("b", 2, (2,)))
    for _ in range(8):
        store.contains_many(["a@2", "a1", "a@1", "a0"])
        store.contains_many(["b@2", "b1", "b0"])
    store.put_many([snapshot("c", "", 20)])
    assert kept(store, "a@1", "a@2", "b@2", "c") == [False, True, True, True]


def test_the_fate_of_a_kind_is_learned():
    """Ends of prompts are asked for again here, what lies inside them never, though it would save more tokens."""
    store = MemoryStateStore(20 * 10)
    for i in range(200):
        store.contains_many([f"end {i}", f"inside {i}"])
        store.put_many([snapshot(f"inside {i}", "", 101), snapshot(f"end {i}", "", 100, ends_prompt=True)])
        for age in range(4):
            store.contains_many([f"end {i - age}"])
    ends, inside = (sum(kept(store, *(f"{name} {i}" for i in range(200)))) for name in ("end", "inside"))
    assert ends > 3 * inside and ends + inside == 20


def test_a_snapshot_that_comes_back_after_it_was_given_up_was_wanted():
    policy = LeastValuable()
    for key in ("wanted", "other"):
        policy.add(key, Entry(10, "", 100, False))
    policy.remove("wanted")
    for _ in range(4):
        policy.ask(["wanted"])
    policy.add("wanted", Entry(10, "", 100, False))
    assert policy.victim() == "other"


def test_what_is_remembered_of_the_gone_is_bounded():
    policy = LeastValuable()
    policy.add("stays", Entry(10, "", 100, False))
    for i in range(10_000):
        policy.ask([f"{i}"])
        policy.add(f"{i}", Entry(10, "", 100, False))
        policy.remove(f"{i}")
    assert len(policy._uses) < 5000
    assert policy.victim() == "stays"


def test_rates_follow_what_was_counted_and_fade():
    rates = UseRates()
    before = rates.rate((0, True), 5)
    for _ in range(100):
        rates.count_reached((0, True), 4)
        rates.count_reached((1, True), 4)
        rates.count_used((1, True), 5)
    assert rates.rate((0, True), 5) < before < rates.rate((1, True), 5)
    assert 0.2 < rates.rate((1, True), 7) <= 0.25  # nearly all within four lookups
    assert rates.rate((1, True), 2000) == rates.rate((0, True), 2000)  # nothing known
    high = rates.rate((1, True), 5)
    for _ in range(20):
        rates.fade()
    assert rates.rate((1, True), 5) < high / 2
    assert rates.rate((1, True), 5) == pytest.approx(before, rel=0.01)


def test_a_snapshot_without_its_blocks_goes_first():
    store = MemoryStateStore(60)
    store.put_many(chain("a", 2, (2,)))
    store.put_many([snapshot("whole", "", 100), snapshot("orphan", "gone", 5000)])
    store.put_many([snapshot("other", "", 100)])
    store.put_many([snapshot("one more", "", 100)])
    assert kept(store, "orphan", "whole", "a@2") == [False, True, True]


def test_random_use_never_exceeds_the_limit_or_loses_count():
    rng = random.Random(7)
    store = MemoryStateStore(1000)
    chains = [chain(name, 12, (3, 5, 12), tokens=rng.randint(1, 300)) for name in "abcdefghij"]
    every_key = [item.key for items in chains for item in items]
    for _ in range(3000):
        match rng.randrange(5):
            case 0 | 1:
                items = rng.choice(chains)
                store.put_many(items[: rng.randint(1, len(items))])
            case 2:
                store.get_many(rng.sample(every_key, 3))
            case 3:
                store.contains_many(rng.sample(every_key, 3))
            case 4:
                store.delete(keys=rng.sample(every_key, rng.randint(0, 2)))
        stats = store.stats()
        assert stats["bytes"] == 10 * sum(kept(store, *every_key)) == 10 * stats["items"] <= 1000
    assert stats["evicted"] > 0
    store.close()
    assert store.stats()["items"] == store.stats()["bytes"] == 0


def test_only_ends_of_the_tree_are_given_up():
    rng = random.Random(3)
    store = MemoryStateStore(500)
    chains = {name: chain(name, 9, (3, 6, 9)) for name in "abcdefgh"}
    for _ in range(400):
        name = rng.choice("abcdefgh")
        store.put_many(chains[name])
        store.contains_many([f"{name}@{rng.choice((3, 6, 9))}"])
        for items in chains.values():
            there = dict(zip((i.key for i in items), kept(store, *(i.key for i in items)), strict=True))
            assert all(there[item.after] for item in items if there[item.key] and item.after)
