"""Random walks over all that may happen to prefix states; the oracle is the same answer without any cache.

Two checkpoints, two dtypes, two forms of snapshots, each order of tiers that a service has, tenants, documents that
come, change and go while they are read, restarts, eviction, damaged bytes, and a real server behind a proxy that
is killed or cut off in the middle of a value, loses the end of its log, is filled up, slow and stalled.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from clock_kit import Clock
from engine_kit import SMALL, TOKENIZER, Answer, doc_prompt, run_all
from state_kit import FaultyProxy, pinned_store, running_server

from model import Jamba, load_model, redis_bulk
from model.device_store import DeviceStateStore
from model.engine import JambaEngine
from model.engine_request import EngineRequest
from model.prefix_cache import PrefixCache
from model.prefix_plan import state_fingerprint
from model.redis_store import RedisStateStore
from model.sampling import SamplingParams
from model.state_store import MemoryStateStore

PREFIX = b"jamba-rag:"
PLANS = [SMALL, replace(SMALL, int8_snapshots=True)]


TIERS = ("device", "main memory", "device and main memory", "none")  # in front of Redis


@pytest.fixture(scope="module")
def models(tiny_jamba_dir: Path, tmp_path_factory, write_jamba) -> dict[bytes, Jamba]:
    """By fingerprint: two dtypes of one checkpoint, and another one of the same shape."""
    write_jamba(other := tmp_path_factory.mktemp("other"), seed=1)
    found = {}
    for path, dtype in ((tiny_jamba_dir, torch.float32), (tiny_jamba_dir, torch.bfloat16), (other, torch.float32)):
        model = load_model(path, dtype=dtype)
        found[state_fingerprint(path, None, model.state_layout.fingerprint())] = model
    assert len(found) == 3
    return found


class World:
    """A service's states, its documents, and everything that can happen to them, one method an event."""

    def __init__(self, seed: int, models: dict[bytes, Jamba], server) -> None:
        torch.set_num_threads(1)
        self.rng, self.server, self.clock = random.Random(seed), server, Clock()
        self.proxy, self.killing = FaultyProxy(server.port), threading.Lock()
        self.models, self.fingerprint, self.plan = models, next(iter(models)), PLANS[seed % 2]
        self.cold = {
            (name, plan): JambaEngine(model, TOKENIZER, PrefixCache((), name, plan), max_context_tokens=2000)
            for name, model in models.items()
            for plan in PLANS
        }
        self.numbers = itertools.count()
        self.texts: dict[str, str] = {}
        self.gone: dict[str, list[EngineRequest]] = {}  # document -> prompts from before it changed or went
        self.asked: list[EngineRequest] = []
        self.seen: Counter[str] = Counter()
        self.owed_file = server.data_dir / "owed.json"
        self.forgotten: set[str] = set()  # keys of states that must be nowhere, once the server is back
        self.start()
        for _ in range(4):
            self.upload()

    def start(self) -> None:
        part_bytes = self.rng.choice([3000, 1 << 20])
        self.redis = RedisStateStore(
            self.proxy.url, timeout_s=0.2, part_bytes=part_bytes, owed_file=self.owed_file, clock=self.clock
        )
        tiers, sizes = self.rng.choice(TIERS), [60_000, 200_000, 1 << 26]
        self.near: list[MemoryStateStore] = []
        if "device" in tiers:
            self.near.append(DeviceStateStore(self.rng.choice(sizes)))
        if "main memory" in tiers:
            self.near.append(pinned_store(self.rng.choice(sizes)))
        if len(self.near) == 2:
            self.near[0].tier = "gpu"
        self.cache = PrefixCache([*self.near, self.redis], self.fingerprint, self.plan)
        self.seen[tiers] += 1
        model = self.models[self.fingerprint]
        self.warm = JambaEngine(model, TOKENIZER, self.cache, max_context_tokens=2000)

    def stop(self) -> None:
        self.warm.close()
        stats, tiers = self.cache.stats()
        self.seen.update(
            damaged=stats.damaged, **{f"redis {name}": tiers["redis"][name] for name in ("errors", "dropped")}
        )
        self.cache.close()
        self.redis.close()

    def close(self) -> None:
        self.stop()
        self.proxy.close()
        for engine in self.cold.values():
            engine.close()

    def ask(self) -> None:
        """One to three questions at once, about what there is now."""
        requests = [self.request() for _ in range(self.rng.choice([1, 1, 1, 3]))]
        for answer, request in zip(run_all(self.warm, requests), requests, strict=True):
            self.seen[answer.end.tier] += 1
            self.compare(answer, request, alone=len(requests) == 1)
        self.asked = (self.asked + requests)[-8:]
        if self.rng.random() < 0.7:
            self.flush()

    def compare(self, answer: Answer, request: EngineRequest, alone: bool) -> None:
        (expected,) = run_all(self.cold[self.fingerprint, self.plan], [request])
        if alone:
            assert answer.logprobs == expected.logprobs
        assert (answer.token_ids, answer.text) == (expected.token_ids, expected.text)

    def ask_as_stranger(self) -> None:
        """The same words from a tenant who never asked anything: nobody's state is theirs."""
        self.seen["strangers"] += 1
        request = replace(self.request(), salt=b"tenant %d" % self.seen["strangers"])
        (answer,) = run_all(self.warm, [request])
        assert (answer.end.cached_tokens, answer.end.tier) == (0, "none")
        self.compare(answer, request, alone=True)
        self.asked = [*self.asked, request][-8:]

    def change_while_asked(self) -> None:
        """A document goes while prompts with it are computed or about to be: none of them leaves anything of it."""
        requests = [self.request() for _ in range(3)]
        names = sorted({name for request in requests for name in request.tags if name in self.texts})
        if not names or len(self.texts) < 3:
            return
        *now, later = requests
        answers = {self.warm.add(request): (Answer(), request) for request in now}
        name, steps = self.rng.choice(names), self.rng.randint(0, 6)
        while self.warm.has_work():
            if steps == 0:
                self.asked = (self.asked + requests)[-8:]
                self.forget(name)
                del self.texts[name]
                self.gone[name] = requests
                for request_id, (_, request) in answers.items():
                    if name in request.tags and self.rng.random() < 0.5:
                        self.warm.abort(request_id)
                answers[self.warm.add(later)] = (Answer(), later)
            steps -= 1
            for output in self.warm.step():
                answers[output.request_id][0].outputs.append(output)
        for answer, request in answers.values():
            if answer.end.finish_reason != "abort":
                self.compare(answer, request, alone=False)
        if name not in self.texts:
            self.flush()
            for request in requests:
                self.check_forgotten(name, request)

    def flush(self) -> None:
        assert self.cache.flush(20)

    def request(self) -> EngineRequest:
        if self.asked and self.rng.random() < 0.4:
            return replace(self.rng.choice(self.asked), epoch=self.cache.epoch)  # a restart counts from 0 again
        names = sorted(self.rng.sample(sorted(self.texts), min(len(self.texts), self.rng.randint(0, 4))))
        ids, boundaries, starts = doc_prompt(TOKENIZER, [self.texts[name] for name in names], self.rng.choice("abcde"))
        starts = {name: starts[self.texts[name]] for name in names}
        params = SamplingParams(max_new_tokens=4, ignore_eos=True)
        return EngineRequest(
            tuple(ids), tuple(boundaries), params, tags=frozenset(names), tag_starts=starts, epoch=self.cache.epoch
        )

    def upload(self) -> None:
        name = f"d{len(self.texts) + len(self.gone)}"
        self.texts[name] = self.write("abc déf")

    def replace(self) -> None:
        if self.texts:
            name = self.rng.choice(sorted(self.texts))
            self.forget(name)
            self.texts[name] = self.write("xyz")

    def write(self, letters: str) -> str:
        """A text that no other begins like, but for the first letter."""
        number = next(self.numbers)
        return f"d{number:04}: " + "".join(self.rng.choices(letters, k=self.rng.randint(5, 90)))

    def delete(self) -> None:
        if len(self.texts) > 2:
            name = self.rng.choice(sorted(self.texts))
            self.forget(name)
            del self.texts[name]
            self.gone.setdefault(name, [])

    def forget(self, name: str) -> None:
        """When an invalidation returns, no tier that can be reached holds a state that saw the document."""
        self.cache.invalidate({name})
        for _ in range(2):  # nor does anything arrive that was on its way
            for request in self.asked:
                self.check_forgotten(name, request)
            self.flush()
        self.asked = [request for request in self.asked if name not in request.tags]

    def check_forgotten(self, name: str, request: EngineRequest) -> None:
        if name not in request.tags:
            return
        plan = self.cache.plan(request.token_ids, request.boundaries, request.salt, request.tag_starts)
        start, end = request.tag_starts[name] + 6, len(request.token_ids)  # behind <|doc|> d and four digits
        keys = [key for key in plan.keys_deepest_first(end) if key not in set(plan.keys_deepest_first(start))]
        for store in (*self.near, self.redis):
            assert not any(store.contains_many(keys, peek=True))
        self.forgotten.update(keys)
        self.seen["forgotten"] += bool(keys)

    def restart(self) -> None:
        self.stop()
        self.start()

    def change_model(self) -> None:
        """Its weights, its dtype or the form of its snapshots: the states of before are still in Redis."""
        if self.rng.random() < 0.5:
            self.plan = PLANS[1 - PLANS.index(self.plan)]
        else:
            self.fingerprint = self.rng.choice([name for name in self.models if name != self.fingerprint])
        self.restart()

    def evict(self) -> None:
        for store in self.near:
            keys = sorted(store._items)
            store.delete(keys=self.rng.sample(keys, len(keys) // 2))

    def damage_redis(self) -> None:
        self.evict()
        with self.running_client() as client:
            if client is None:
                return
            limit = client.config_get("maxmemory")["maxmemory"]
            client.config_set("maxmemory", 0)
            names = sorted(name for name in client.keys(PREFIX + b"*") if not name.startswith(PREFIX + b"tag:"))
            for name in self.rng.sample(names, min(12, len(names))):
                value, other = client.get(name), client.get(self.rng.choice(names))
                client.set(name, self.damaged(value or b"", other or b""))
            client.config_set("maxmemory", limit)

    def damaged(self, value: bytes, other: bytes) -> bytes:
        match self.rng.randrange(3):
            case 0 if value:
                flipped = bytearray(value)
                flipped[self.rng.randrange(len(value))] ^= 1 << self.rng.randrange(8)
                return bytes(flipped)
            case 1:
                return value[: self.rng.randrange(len(value) + 1)]
            case _:
                return other

    def cut_off(self) -> None:
        """The connection breaks in the middle of what is written or read next, often in the middle of a value."""
        self.evict()
        setattr(self.proxy, self.rng.choice(["cut_down", "cut_up"]), self.rng.randrange(20_000))

    def kill(self) -> None:
        """The server dies in the middle of what is written or read next."""
        self.proxy.on_cut = self.end_server
        self.cut_off()

    def end_server(self) -> None:
        with self.killing:
            if self.server.is_running():
                self.server.terminate()
                self.seen["killed"] += 1

    @contextmanager
    def running_client(self) -> Iterator[Any]:
        """Of the server, which nothing kills meanwhile; None if it is dead."""
        with self.killing:
            if not self.server.is_running():
                yield None
                return
            with self.server.client() as client:
                yield client

    def stall(self) -> None:
        self.proxy.hold = True

    def slow_down(self) -> None:
        self.proxy.delay_s = self.rng.choice([0.001, 0.01])

    def fill(self) -> None:
        with self.running_client() as client:
            if client is not None:
                client.config_set("maxmemory", self.rng.choice([1, 2_000_000]))

    def lose_everything(self) -> None:
        with self.running_client() as client:
            if client is not None:
                client.flushall()

    def mend(self) -> None:
        """All is well again, and some time passes: the server must be noticed, owed deletes included.

        A server that was killed comes back with what stands in its log, or with less.
        """
        self.proxy.heal()
        with self.killing:
            if not self.server.is_running():
                if self.rng.random() < 0.5:
                    self.forgotten.clear()  # the server may have lost deletes that it had carried out
                    for log in self.server.data_dir.glob("appendonlydir/*.incr.aof"):
                        os.truncate(log, max(0, log.stat().st_size - self.rng.randrange(50_000)))
                self.server.start()
                self.proxy.port = self.server.port
        with self.server.client() as client:
            client.config_set("maxmemory", 0)
        self.clock.now += 60
        self.flush()
        self.redis.contains_many(["any"])
        stats = self.redis.stats()
        assert (stats["open"], stats["owed_deletes"]) == (0, 0)
        assert not any(self.redis.contains_many(sorted(self.forgotten), peek=True))
        self.clock.now += 60

    def wait(self) -> None:
        self.clock.now += self.rng.choice([1, 10])


EVENTS = {
    "ask": 30, "upload": 2, "replace": 2, "delete": 2, "restart": 2, "change_model": 1, "evict": 2,
    "damage_redis": 4, "cut_off": 2, "stall": 1, "fill": 1, "lose_everything": 0.3, "mend": 4, "wait": 2, "kill": 2,
    "slow_down": 1, "ask_as_stranger": 2, "change_while_asked": 2,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_answers_are_those_without_a_cache(models, seed, monkeypatch):
    monkeypatch.setattr(redis_bulk, "_BULK", 1 << 11)  # states go the way of large values, as those of real models do
    with running_server(maxmemory_policy="noeviction", appendonly="yes", appendfsync="no") as server:
        world = World(seed, models, server)
        try:
            for event in world.rng.choices(list(EVENTS), list(EVENTS.values()), k=130):
                getattr(world, event)()
            world.mend()
            world.ask()
        finally:
            world.close()
    happened = ("none", "host", "redis", "damaged", "redis errors", "forgotten", "strangers")
    assert [name for name in happened if not world.seen[name]] == []


def test_a_broken_server_is_left_alone_until_its_time_and_its_return_is_noticed(models):
    with running_server() as server:
        world = World(0, models, server)
        try:

            def ask_anew(salt: bytes) -> None:
                run_all(world.warm, [replace(world.request(), salt=salt)])
                world.cache.flush()

            ask_anew(b"before")
            world.proxy.hold = True
            ask_anew(b"first to fail")
            before, counted = world.redis.stats(), world.proxy.connections
            assert before["open"] == 1
            for i in range(5):
                ask_anew(b"%d" % i)
            after = world.redis.stats()
            assert world.proxy.connections == counted  # not even asked
            assert after["errors"] == before["errors"] and after["skipped"] > before["skipped"]
            world.mend()
            request = replace(world.request(), salt=b"new")
            run_all(world.warm, [request])
            assert world.cache.flush(10)
            world.restart()
            answer: Answer = run_all(world.warm, [request])[0]
            assert answer.end.tier == "redis"
        finally:
            world.close()
