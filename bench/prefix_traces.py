"""Compares policies for keeping prefix states on three synthetic traces of questions, without a model.

Token positions and sizes are those of the 52B model; policies: bench/prefix_policies.py. `zipf`: 1 to 4 of 400
documents per question, 3% of which get about 60% of the picks. `sessions`: interleaved conversations about 2 to 5 of
the same documents. `collections`: each question reads one of 8 whole collections, to which documents are added. Every
prompt begins with the system text, then documents in the order of their collection. Rates are means over the seeds;
`bound` rows are upper bounds for all policies. Seeds 0 to 2 were used to tune the policy, others were not.
    python -m bench.prefix_traces [--seeds 10 11 12] [--no-plot]
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.prefix_policies import (
    NEAR,
    BlockGrid,
    CachePolicy,
    LeastRecentlyUsed,
    Marconi,
    OurCache,
    Prompt,
    bound_hit_rate,
)
from bench.runs import BenchRun
from model.state_eviction import LeastValuable

GB = 10**9
BUDGETS_GB = (2, 4, 8, 16, 32)
PLOT = Path(__file__).parent.parent / "docs" / "images" / "prefix-traces.png"
FAR = replace(NEAR, min_snapshot_distance=2048)
_GRIDS = (1, 4, 32)  # blocks of 256 tokens between snapshots
_ALPHAS = (0.0, 0.5, 1.0, 2.0)


class Writer:
    """Makes distinct random texts of token ids."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self._system = self.text(300)

    def text(self, num_tokens: int) -> np.ndarray:
        return self.rng.integers(0, 65_536, num_tokens, dtype=np.int32)

    def documents(self, count: int, median_tokens: int) -> list[np.ndarray]:
        lengths = np.clip(self.rng.lognormal(np.log(median_tokens), 0.8, count), 400, 16_000).astype(int)
        return [self.text(length) for length in lengths]

    def prompt(self, parts: Sequence[np.ndarray]) -> Prompt:
        """`system | parts | question`, with a boundary after each part."""
        pieces = [self._system, *parts]
        ends = np.cumsum([len(piece) for piece in pieces])
        token_ids = np.concatenate([*pieces, self.text(60)])
        return Prompt(token_ids, tuple(map(int, ends)), self.text(80))


def zipf_weights(count: int, exponent: float) -> np.ndarray:
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def zipf_trace(seed: int, questions: int = 800) -> list[Prompt]:
    writer = Writer(seed)
    documents = writer.documents(400, 3000)
    weights = writer.rng.permutation(zipf_weights(len(documents), 1.15))
    trace = []
    for _ in range(questions):
        chosen = writer.rng.choice(len(documents), writer.rng.integers(1, 5), replace=False, p=weights)
        trace.append(writer.prompt([documents[i] for i in sorted(chosen)]))
    return trace


def session_trace(seed: int, questions: int = 800, open_sessions: int = 24) -> list[Prompt]:
    """After each question a session ends with probability 1/5 and a new one begins."""
    writer = Writer(seed)
    documents = writer.documents(400, 3000)
    weights = writer.rng.permutation(zipf_weights(len(documents), 1.15))

    def begin() -> list[np.ndarray]:
        chosen = writer.rng.choice(len(documents), writer.rng.integers(2, 6), replace=False, p=weights)
        return [documents[i] for i in sorted(chosen)]

    sessions = [begin() for _ in range(open_sessions)]
    trace = []
    for _ in range(questions):
        i = writer.rng.integers(open_sessions)
        prompt = writer.prompt(sessions[i])
        trace.append(prompt)
        sessions[i].append(np.concatenate([prompt.token_ids[prompt.boundaries[-1] :], prompt.answer]))
        if writer.rng.random() < 0.2:
            sessions[i] = begin()
    return trace


def collection_trace(seed: int, questions: int = 300) -> list[Prompt]:
    """Before one question in ten a document is added to its collection, up to about 120K tokens."""
    writer = Writer(seed)
    collections = [writer.documents(int(writer.rng.integers(4, 16)), 5000) for _ in range(8)]
    trace = []
    for _ in range(questions):
        collection = collections[writer.rng.choice(len(collections), p=zipf_weights(len(collections), 1.0))]
        if writer.rng.random() < 0.1 and sum(map(len, collection)) < 120_000:
            collection += writer.documents(1, 5000)
        trace.append(writer.prompt(collection))
    return trace


TRACES: dict[str, Callable[[int], list[Prompt]]] = {
    "zipf": zipf_trace,
    "sessions": session_trace,
    "collections": collection_trace,
}
POLICIES: dict[str, list[tuple[str, Callable[[int], CachePolicy]]]] = {
    "ours": [("", lambda size: OurCache(size, LeastValuable()))],
    "ours, turns prefetched": [("", lambda size: OurCache(size, LeastValuable(), prefetch_turns=True))],
    "ours, boundaries 2048 apart": [("", lambda size: OurCache(size, LeastValuable(), FAR))],
    "ours, LRU": [("", lambda size: OurCache(size, LeastRecentlyUsed()))],
    **{f"grid {blocks * 256}": [("", lambda size, blocks=blocks: BlockGrid(size, blocks))] for blocks in _GRIDS},
    "Marconi": [(f"alpha {alpha}", lambda size, alpha=alpha: Marconi(size, alpha)) for alpha in _ALPHAS],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--no-plot", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run = BenchRun("prefix-traces", argv=sys.argv)
    for name, make in TRACES.items():
        traces = [make(seed) for seed in arguments.seeds]
        for budget_gb in BUDGETS_GB:
            for policy, variants in POLICIES.items():
                results = [
                    replay_all(traces, build, budget_gb * GB) | {"setting": setting} for setting, build in variants
                ]
                best = max(results, key=lambda result: result["token_hit_rate"])
                run.add(trace=name, budget_gb=budget_gb, policy=policy, **best)
            bounds = [bound_hit_rate([places(prompt) for prompt in trace], budget_gb * GB) for trace in traces]
            run.add(trace=name, budget_gb=budget_gb, policy="bound", token_hit_rate=float(np.mean(bounds)))
    run.finish()
    if not arguments.no_plot:
        plot(run.rows)


def replay_all(
    traces: Sequence[Sequence[Prompt]], build: Callable[[int], CachePolicy], max_bytes: int
) -> dict[str, Any]:
    """Means over the traces, and the minimum and maximum hit rate."""
    results = [replay(trace, build(max_bytes)) for trace in traces]
    rates = [result["token_hit_rate"] for result in results]
    means = {name: float(np.mean([result[name] for result in results])) for name in results[0]}
    return means | {"lowest": min(rates), "highest": max(rates)}


def replay(trace: Sequence[Prompt], policy: CachePolicy) -> dict[str, float]:
    """Token hit rate over the whole trace, the first sight of everything included, and the bytes at the end.

    `prefetched` are tokens computed between questions, as a share of the tokens of the prompts.
    """
    cached = [policy.ask(prompt) for prompt in trace]
    tokens = sum(len(prompt.token_ids) for prompt in trace)
    return {
        "token_hit_rate": sum(cached) / tokens,
        "questions_hit": float(np.count_nonzero(cached)) / len(trace),
        "prefetched": getattr(policy, "prefetched_tokens", 0) / tokens,
        "used_gb": policy.used_bytes() / GB,
        "snapshots_a_question": getattr(policy, "snapshots_saved", 0) / len(trace),
    }


def places(prompt: Prompt) -> tuple[list[tuple[int, bytes]], int]:
    """Positions where prompts of these traces diverge, for `bound_hit_rate`: boundaries and the end of the answer."""
    sequence, start, digest, found = np.concatenate([prompt.token_ids, prompt.answer]), 0, b"", []
    for end in (*prompt.boundaries, len(sequence)):
        digest = hashlib.blake2b(sequence[start:end], key=digest, digest_size=16).digest()
        found.append((end, digest))
        start = end
    return found, len(prompt.token_ids)


def plot(rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot the token hit rate by memory budget, one panel per trace."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(TRACES), figsize=(12, 3.6), sharey=True, layout="constrained")
    for panel, trace in zip(panels, TRACES, strict=True):
        for policy in (*POLICIES, "bound"):
            points = [row for row in rows if row["trace"] == trace and row["policy"] == policy]
            style = {"color": "black", "ls": ":"} if policy == "bound" else {"marker": "o", "ms": 4}
            width = 2.5 if policy == "ours" else 1.2
            rates = [100 * row["token_hit_rate"] for row in points]
            panel.plot([row["budget_gb"] for row in points], rates, lw=width, label=policy, **style)
        panel.set(title=trace, xlabel="bytes for states, GB (52B sizes)", xscale="log", ylim=(0, 100))
        panel.set_xticks(BUDGETS_GB, [str(budget) for budget in BUDGETS_GB], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("prompt tokens from the cache, %")
    panels[-1].legend(loc="lower right", fontsize=8)
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main()
