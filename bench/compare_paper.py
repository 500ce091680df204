"""The Jamba paper's comparison with Mixtral, on the same engine: KV cache at 256K, longest context, throughput.

Both shapes have random int8 weights (bench/shapes.py). Prompts are random tokens, all different; every answer has
exactly `--out` tokens, and `tok_per_s` is output tokens over the total time, including prefill. The longest context is
computed (`StateBudget.max_tokens` of the free memory) and then verified with a state of that length, by computing a
last segment at its end. Source: arXiv 2403.19887, tables 1 and 2, figures 2 and 3.
    python -m bench.compare_paper [--shapes jamba-52b,mixtral-8x7b] [--out 512] [--picture build/compare-paper.png]
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_kit import filled_state, random_tokens, synchronize, word_tokenizer
from bench.random_weights import random_model
from bench.runs import BenchRun
from bench.shapes import SHAPES, resident_bytes, state_bytes
from model.admission import StateBudget, measure_state_bytes
from model.engine import JambaEngine
from model.engine_request import EngineRequest
from model.jamba import Jamba
from model.prefix_cache import PrefixCache
from model.prefix_plan import PlanSettings
from model.sampling import SamplingParams

GIB = 2**30
LAST_PIECE_TOKENS = 64


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="jamba-52b,mixtral-8x7b", help="two of bench/shapes.py, ours first")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--segment", type=int, default=16_384)
    parser.add_argument("--loads", default="8192x16,131072x1", help="prompt tokens x sequences, comma-separated")
    parser.add_argument("--out", type=int, default=512, help="tokens of every answer")
    parser.add_argument("--state-max-bytes", type=int, help="memory for all states; default: what the GPU has left")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args(argv)
    run = BenchRun("compare-paper", argv=sys.argv if argv is None else ["compare_paper", *argv])
    names = arguments.shapes.split(",")
    for name in names:
        run.add(**measure(name, arguments))
        gc.collect()
        if arguments.device.startswith("cuda"):
            torch.cuda.empty_cache()
    ours, theirs = run.rows[0], run.rows[1]
    numbers = [key for key, value in ours.items() if isinstance(value, int | float) and theirs.get(key)]
    run.add(shape=f"{names[0]} over {names[1]}", **{key: ours[key] / theirs[key] for key in numbers})
    run.finish()
    if arguments.picture:
        draw(run.rows, arguments.picture)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    model = random_model(SHAPES[name], arguments.device)
    budget_bytes = arguments.state_max_bytes or measure_state_bytes(model, arguments.segment)
    budget = StateBudget(model.state_layout, budget_bytes)
    row: dict[str, Any] = {
        "shape": name,
        "weights_gib": resident_bytes(model) / GIB,
        "kv_at_256k_gib": (state_bytes(model.state_layout, 262_144) - state_bytes(model.state_layout, 0)) / GIB,
    }
    if budget.max_tokens:
        row |= {"fits_tokens": budget.max_tokens, "tried_tokens": try_context(model, budget.max_tokens)}
    for load in arguments.loads.split(","):
        prompt_tokens, batch = map(int, load.split("x"))
        row |= answer_all(model, budget, prompt_tokens, batch, arguments)
        print(row, flush=True)
    return row


@torch.inference_mode()
def try_context(model: Jamba, num_tokens: int) -> int:
    """Allocate a context of `num_tokens` and compute its last segment."""
    piece = random_tokens(model, min(LAST_PIECE_TOKENS, num_tokens))
    state = filled_state(model, num_tokens - len(piece), room=len(piece))
    logits = model.forward_packed(piece, [len(piece)], [state])
    if not logits.isfinite().all():
        raise RuntimeError(f"the context of {num_tokens} tokens gave logits that are not finite")
    return state.num_tokens


def answer_all(
    model: Jamba, budget: StateBudget, prompt_tokens: int, batch: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Run `batch` different prompts through the engine; those that do not fit wait, as in the service."""
    load, total = f"{prompt_tokens}x{batch}", prompt_tokens + arguments.out
    if budget.max_tokens is not None and total > budget.max_tokens:
        return {f"{load}_tok_per_s": None}
    settings = PlanSettings(256, arguments.segment, 0, 0)
    engine = JambaEngine(
        model,
        word_tokenizer(model.config.vocab_size),
        PrefixCache((), b"", settings),
        max_context_tokens=total,
        max_batch=batch,
        state_max_bytes=budget.max_bytes,
    )
    device = model.embed_tokens.weight.device
    prompts = [tuple(random_tokens(model, prompt_tokens, seed=i).tolist()) for i in range(batch)]
    sampling = SamplingParams(max_new_tokens=arguments.out, ignore_eos=True)
    synchronize(device)
    start, last_first_s = time.perf_counter(), 0.0
    answered = dict.fromkeys((engine.add(EngineRequest(prompt, sampling=sampling)) for prompt in prompts), 0)
    while engine.has_work():
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            answered[output.request_id] += 1
            last_first_s = time.perf_counter() - start if answered[output.request_id] == 1 else last_first_s
    seconds = time.perf_counter() - start
    engine.close()
    return {
        f"{load}_first_tokens_s": last_first_s,
        f"{load}_s": seconds,
        f"{load}_tok_per_s": sum(answered.values()) / seconds,
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot bars of the two shapes, with panels for memory, context and throughput."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"kv_at_256k_gib": "KV at 256K tokens, GiB", "fits_tokens": "longest context that fits, tokens"}
    panels |= {key: f"{key.removesuffix('_tok_per_s')}, tokens/s" for key in rows[0] if key.endswith("_tok_per_s")}
    panels = {key: title for key, title in panels.items() if key in rows[0]}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        values = [row.get(key) or 0 for row in rows[:2]]
        bars = axis.bar([row["shape"] for row in rows[:2]], values, color=("#4477aa", "#bbbbbb"))
        axis.bar_label(bars, [f"{value:,.4g}" if value < 1000 else f"{value:,.0f}" for value in values])
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
