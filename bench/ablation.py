"""Recall of mixtures of attention and Mamba by context length: scores the models of `model.train.ablation`.

*needle*: one fact in a document of filler; *questions*: every sentence is a fact. The people in the test do not occur
in training. An answer is right if each of its tokens is the likeliest after the previous right ones, which is
equivalent to greedy decoding. Run: `python -m bench.ablation DIR --picture ablation.png`.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.runs import BenchRun
from model.jamba import Jamba
from model.train.ablation import ATTENTION, build, saved_masters
from model.train.forward import forward_hidden
from model.train.lookups import Language
from model.train.trainer import load_into

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
IDLE = {"needle": 1.0, "questions": 0.0}
SAMPLES = 200


@torch.no_grad()
def share_right(model: Jamba, language: Language, task: str, length: int, samples: int) -> float:
    """Accuracy on one question for each of `samples` documents."""
    rng, right = random.Random(f"{task} {length}"), 0
    for _ in range(samples):
        row = language.draw(rng, length, IDLE[task], questions=1, test=True)
        ((start, end),) = row.answers
        hidden, _ = forward_hidden(model, torch.tensor([row.ids[: end - 1]]))
        right += model.lm_head(hidden[start - 1 :]).argmax(-1).tolist() == row.ids[start:end]
    return right / samples


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot accuracy in % by length: one panel per task, one line per mixture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(IDLE), figsize=(10, 3.6), layout="constrained", sharey=True)
    for axis, task in zip(axes, IDLE, strict=True):
        for mixture in dict.fromkeys(row["mixture"] for row in rows):
            own = [row for row in rows if row["mixture"] == mixture and row["task"] == task]
            axis.plot([row["tokens"] for row in own], [row["right %"] for row in own], marker="o", label=mixture)
        axis.set(title=task, xlabel="tokens", ylim=(0, 102), ylabel="% right")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[-1].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="--out of model.train.ablation")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run, language = BenchRun("ablation", argv=sys.argv), Language()
    for mixture in ATTENTION:
        saved = saved_masters(args.folder, mixture)
        if not saved.exists():
            continue
        model = build(mixture, len(language.words))
        load_into(model, saved)
        for task in IDLE:
            for length in args.lengths:
                share = share_right(model, language, task, length, args.samples)
                run.add(mixture=mixture, task=task, tokens=length, samples=args.samples, **{"right %": 100 * share})
    run.finish()
    if args.picture:
        draw(run.rows, args.picture)


if __name__ == "__main__":
    main()
