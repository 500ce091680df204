"""The plot of bench/retrieval.py: nDCG@10 by chunk size and by kind of question. Needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RANKINGS = {
    "dense": "#9aa7b1",
    "lexical": "#5b7a99",
    "rrf, halves equal": "#c9b27c",
    "minmax, halves equal": "#d98c5f",
    "minmax": "#b3402a",
}


def plot_rows(rows: Sequence[Mapping[str, Any]], path: Path, source: str) -> None:
    """Write a PNG; `source` is the JSON that holds the rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(row["chunk_tokens"] for row in rows))
    shown = 256 if 256 in sizes else sizes[0]
    kinds = [name.removeprefix("ndcg_10_") for name in rows[0] if name.startswith("ndcg_10_")]
    kinds = [kind for kind in kinds if kind not in ("low", "high")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for place, (ranking, colour) in enumerate(RANKINGS.items()):
        chosen = [row for row in rows if row["ranking"] == ranking]
        heights = [row["ndcg_10"] for row in chosen]
        spans = [[r["ndcg_10"] - r["ndcg_10_low"] for r in chosen], [r["ndcg_10_high"] - r["ndcg_10"] for r in chosen]]
        offsets = [at + (place - 2) * 0.16 for at in range(len(sizes))]
        left.bar(offsets, heights, 0.15, yerr=spans, color=colour, label=ranking, error_kw={"lw": 0.8})
        (row,) = [row for row in chosen if row["chunk_tokens"] == shown]
        offsets = [at + (place - 2) * 0.16 for at in range(len(kinds))]
        right.bar(offsets, [row[f"ndcg_10_{kind}"] for kind in kinds], 0.15, color=colour)
    left.set(xticks=range(len(sizes)), xticklabels=sizes, xlabel="chunk, tokens", ylabel="nDCG@10")
    right.set(xticks=range(len(kinds)), xticklabels=kinds, xlabel=f"kind of question, chunks of {shown} tokens")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(f"{rows[0]['set']}: {rows[0]['questions']} questions ({source}); bars: 95% intervals", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)
