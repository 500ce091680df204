"""Speculative decoding by prompt lookup: its gain on answers, and its cost when no draft is accepted.

The questions about the sample documents are asked with the service's evidence, prompt and constraint, alternately
without and with drafts (`draft_tokens` of the engine), and with the prompt's state in memory. Times are from the first
token to the last, in wall-clock and in CPU time (`cpu`), which is less affected by other programs; the tokens must be
equal. `free text` is unconstrained and sampled at temperature 1, so it follows no document.
Run: `python -m bench.drafting [--rounds 7] [--threads 2] [--picture drafting.png]`; `--rows FILE` plots an earlier run
instead of measuring.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from app.client import connect
from app.evidence import Query
from app.ingesting import expand_paths, ingest_files
from app.main import create_app
from app.quotes import QuoteLimits
from app.service import RagService
from app.setting_groups import SHIPPED_CHECKPOINT
from app.settings import Settings, load_settings
from bench.runs import BenchRun
from model import load_model
from model.device_store import DeviceStateStore
from model.engine import JambaEngine
from model.engine_request import EngineRequest
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings
from model.sampling import SamplingParams
from model.tokenizer import Tokenizer

SAMPLES = Path(__file__).parent.parent / "samples"
FREE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Run:
    """One decoding: tokens, seconds from the first to the last token, engine steps, drafts."""

    tokens: tuple[int, ...]
    seconds: float
    cpu_seconds: float
    steps: int
    accepted: int
    rejected: int


def decode(engine: JambaEngine, request: EngineRequest) -> Run:
    engine.add(request)
    tokens: list[int] = []
    while not tokens:
        tokens += [output.token_id for output in engine.step()]
    accepted, rejected = engine.times.drafts.accepted, engine.times.drafts.rejected
    start, cpu_start, steps = time.perf_counter(), time.process_time(), 0
    while engine.has_work():
        tokens += [output.token_id for output in engine.step()]
        steps += 1
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    guesses = engine.times.drafts.accepted - accepted, engine.times.drafts.rejected - rejected
    return Run(tuple(tokens), seconds, cpu_seconds, steps, *guesses)


async def make_requests(settings: Settings, mode: str) -> list[EngineRequest]:
    """The service's requests for the questions about the sample documents."""
    app = create_app(settings, answering=False)
    questions = json.loads((SAMPLES / "questions.json").read_text())["questions"]
    async with app.router.lifespan_context(app):
        service: RagService = app.state.service
        return [make_request(service, one["question"], mode) for one in questions]


def make_request(service: RagService, question: str, mode: str) -> EngineRequest:
    form, settings = service.format, service.settings
    evidence = service.finder.find(Query(question, ["default"], None, None, mode, None, 256)).evidence
    limits = QuoteLimits(settings.max_quote_tokens, settings.max_quotes, allow_none=False)
    prompt = form.build_prompt(question, evidence)
    return EngineRequest(
        prompt.token_ids,
        prompt.boundaries,
        SamplingParams(stop=form.stop_texts, stop_token_ids=form.stop_ids),
        constraint=form.constrain(evidence, limits),
        watch_tokens=form.decision_ids,
    )


def make_free(request: EngineRequest, seed: int) -> EngineRequest:
    sampling = SamplingParams(max_new_tokens=FREE_TOKENS, temperature=1.0, seed=seed, ignore_eos=True)
    return replace(request, sampling=sampling, constraint=None)


def measure(engines: dict[str, JambaEngine], request: EngineRequest, rounds: int) -> dict[str, list[Run]]:
    """Run the engines alternately, after a warm-up round. Raises SystemExit if their tokens differ."""
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, engine in engines.items():
            run = decode(engine, request)
            if number:
                runs[name].append(run)
    if len({run.tokens for many in runs.values() for run in many}) != 1:
        raise SystemExit("guessing changed an answer")
    return runs


def summarize(name: str, measured: Sequence[dict[str, list[Run]]]) -> dict[str, Any]:
    """One row for several requests; times are sums of the requests' medians."""
    ms = {
        (kind, clock): 1000 * sum(median(getattr(run, clock) for run in runs[kind]) for runs in measured)
        for kind in ("plain", "drafts")
        for clock in ("seconds", "cpu_seconds")
    }
    firsts = [runs["drafts"][0] for runs in measured]
    decoded = sum(len(run.tokens) - 1 for run in firsts)
    row: dict[str, Any] = {"what": name, "decoded_tokens": decoded}
    for kind in ("plain", "drafts"):
        row |= {f"{kind}_ms": ms[kind, "seconds"], f"{kind}_cpu_ms": ms[kind, "cpu_seconds"]}
        row |= {f"{kind}_tokens_per_s": 1000 * decoded / ms[kind, "seconds"]}
    row |= {"speedup": ms["plain", "seconds"] / ms["drafts", "seconds"]}
    row |= {"cpu_speedup": ms["plain", "cpu_seconds"] / ms["drafts", "cpu_seconds"]}
    row |= {"tokens_per_step": decoded / sum(run.steps for run in firsts)}
    return row | {what: sum(getattr(run, what) for run in firsts) for what in ("accepted", "rejected")}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the CPU time to decode each answer, without and with drafts."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    answers = [row for row in rows if row["what"].startswith("q")]
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for shift, column, label, color in (
        (-0.2, "plain_cpu_ms", "a token a step", "#9aa5b1"),
        (0.2, "drafts_cpu_ms", "with guesses", "#2b6cb0"),
    ):
        axis.bar(
            [i + shift for i in range(len(answers))], [row[column] for row in answers], 0.4, label=label, color=color
        )
    axis.set_xticks(range(len(answers)), [row["what"] for row in answers], rotation=90)
    axis.set(ylabel="first token to last, ms of the processor")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def run_benchmark(arguments: argparse.Namespace) -> Sequence[dict[str, Any]]:
    run = BenchRun("drafting", argv=sys.argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        settings = load_settings(None, data_dir=Path(scratch), redis={"url": None}, log={"level": "warning"})
        with connect(settings, answering=False) as service:
            ingest_files(service, expand_paths([str(SAMPLES / "documents")]), {"collection": "default"})
        requests = asyncio.run(make_requests(settings, arguments.mode))
    model, tokenizer = load_model(SHIPPED_CHECKPOINT, quantize="int8"), Tokenizer.load(SHIPPED_CHECKPOINT)
    cache = PrefixCache([DeviceStateStore(1 << 30)], b"bench", PlanSettings())
    engines = {
        name: JambaEngine(model, tokenizer, cache, max_context_tokens=65_536, draft_tokens=tokens)
        for name, tokens in (("plain", 0), ("drafts", arguments.draft_tokens))
    }
    answers = [measure(engines, request, arguments.rounds) for request in requests]
    for number, one in enumerate(answers, 1):
        run.add(**summarize(f"q{number:02}", [one]))
    free = [measure(engines, make_free(request, i), arguments.rounds) for i, request in enumerate(requests[:5])]
    run.add(**summarize("all answers", answers))
    run.add(**summarize("free text", free))
    run.finish()
    for engine in engines.values():
        engine.close()
    return run.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--draft-tokens", type=int, default=3)
    parser.add_argument("--mode", choices=("auto", "rag", "full_context"), default="auto")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--rows", type=Path)
    arguments = parser.parse_args()
    rows = json.loads(arguments.rows.read_text())["rows"] if arguments.rows else run_benchmark(arguments)
    if arguments.picture:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()
