"""Plots training logs. Run: `python -m model.train.curves OUT.png LOG.jsonl … [--align ALIGN.jsonl]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

STYLES = ("-", "--", "-.", ":")
SCORES = ("dev1/EM", "dev8/EM", "hand1/EM", "hand8/EM")
SCORES += ("pairs1/exact", "pairs3/exact", "pairs8/exact", "templated4/exact", "none3/refused")  # of older logs


def read_log(path: Path, *stages: str) -> list[dict]:
    return [row for row in map(json.loads, path.read_text().splitlines()) if row["stage"] in stages]


def draw_alignment(axis: Axes, path: Path) -> None:
    rows = read_log(path, "align")
    for name, label in (("nmse", "mean of 26 mixers"), ("worst", "worst")):
        axis.plot([row["tokens"] / 1e6 for row in rows], [row[name] for row in rows], label=label)
    axis.set(title="Aligning Mamba to attention", ylabel="NMSE of the output", ylim=(0, 1))


def draw_lines(axis: Axes, paths: list[Path], stages: tuple[str, ...], names: dict[str, str]) -> float:
    """One colour per name, one line style per log; returns the highest value after the first 5% of the rows."""
    highest = 0.0
    for path, style in zip(paths, STYLES, strict=False):
        rows = read_log(path, *stages)
        for colour, (name, label) in enumerate(names.items()):
            known = [row for row in rows if row.get(name)]
            if known:
                values = [row[name] for row in known]
                highest = max(highest, *values[len(values) // 20 :])
                axis.plot([row["tokens"] / 1e6 for row in known], values, style, color=f"C{colour}",
                          label=f"{path.stem}: {label}")  # fmt: skip
    return highest


def draw_losses(axis: Axes, paths: list[Path]) -> None:
    names = {"answer": "answers", "kl": "KL to the teacher, text", "kl_qa": "likewise, questions"}
    highest = draw_lines(axis, paths, ("tune", "distill"), names)
    axis.set(title="End to end", ylabel="nats a token", ylim=(0, min(3.0, 1.1 * highest)))


def draw_attention(axis: Axes, paths: list[Path]) -> None:
    draw_lines(axis, paths, ("distill",), {"find": "finds the sentence", "copy": "copies the token"})
    axis.set(title="Attention where it should be", ylabel="-log of the best head's share")


def draw_scores(axis: Axes, paths: list[Path]) -> None:
    for path, style, marker in zip(paths, STYLES, "osD^", strict=False):
        steps, scores = read_log(path, "tune", "distill"), read_log(path, "eval")
        at = [min(steps, key=lambda row, score=score: abs(row["seconds"] - score["seconds"])) for score in scores]
        for colour, name in enumerate(name for name in SCORES if scores and name in scores[0]):
            shares = [row[name] * (100 if "/EM" not in name else 1) for row in scores]
            axis.plot([row["tokens"] / 1e6 for row in at], shares, style, marker=marker, color=f"C{colour}",
                      label=f"{path.stem}: {name}")  # fmt: skip
    axis.set(title="Held-out questions", ylabel="%", ylim=(0, 100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("logs", type=Path, nargs="+", help="logs of model.train.tune and model.train.distill")
    parser.add_argument("--align", type=Path)
    args = parser.parse_args()
    led = [path for path in args.logs if any("find" in row for row in read_log(path, "distill"))]
    scored = [path for path in args.logs if read_log(path, "eval")]
    panels = [(draw_alignment, args.align), (draw_losses, args.logs), (draw_attention, led), (draw_scores, scored)]
    panels = [(draw, source) for draw, source in panels if source]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.7 * len(panels), 4.8), layout="constrained", squeeze=False)
    for (draw, source), axis in zip(panels, axes[0], strict=True):
        draw(axis, source)
    for axis in axes[0]:
        axis.set_xlabel("million tokens")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
