"""Draws a training run's logs as one picture. Run: `python -m model.train.curves ALIGN.jsonl DISTILL.jsonl OUT.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt


def read_log(path: Path, stage: str) -> list[dict]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["stage"] == stage]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("align", "distill", "out"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    align, steps, scores = (
        read_log(args.align, "align"),
        read_log(args.distill, "distill"),
        read_log(args.distill, "eval"),
    )
    tokens_at = {row["step"]: row["tokens"] / 1e6 for row in steps}
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    axes[0].plot([r["tokens"] / 1e6 for r in align], [r["nmse"] for r in align], label="mean of 26 mixers")
    axes[0].plot([r["tokens"] / 1e6 for r in align], [r["worst"] for r in align], label="worst")
    axes[0].set(title="Aligning Mamba to attention", ylabel="NMSE of the output", ylim=(0, 1))
    for name, label in (("answer", "answers"), ("kl", "KL to the teacher, text")):
        axes[1].plot([r["tokens"] / 1e6 for r in steps], [r[name] for r in steps], label=label)
    axes[1].set(title="End to end", ylabel="nats a token", ylim=(0, 3))
    for name in ("pairs1/exact", "pairs3/exact", "pairs8/exact", "templated4/exact", "none3/refused"):
        places = [min(tokens_at, key=lambda step, at=row["step"]: abs(step - at)) for row in scores]
        axes[2].plot([tokens_at[step] for step in places], [100 * row[name] for row in scores], marker="o", label=name)
    axes[2].set(title="Held-out questions", ylabel="%", ylim=(0, 100))
    for axis in axes:
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
