"""Plots docs/images/gpu-service.png from rows of gpu_service.py: time to first token by the tier of the cached state.

python -m bench.gpu_service_plot gpu-service-A.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.gpu_plot import RESULTS

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "gpu-service.png"
LINES = (  # what was asked, the tier, label, color, marker
    ("asked for the first time", "none", "read for the first time", "#d1793b", "o"),
    ("after SIGKILL", "redis", "state from Redis, after a kill and a new start", "#3b6ea5", "s"),
    ("no cache on the GPU, asked again", "host", "state from main memory", "#5a9367", "D"),
    ("asked again", "gpu", "state from the GPU's memory", "#333333", "^"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", help="in bench/results")
    draw(json.loads((RESULTS / parser.parse_args().file).read_text())["rows"], PICTURE)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    contexts = sorted({row["context"] for row in rows if row.get("context")})
    for what, tier, label, color, marker in LINES:
        points = [
            (row["context"], row["first_token_ms"]) for row in rows if (row["what"], row.get("tier")) == (what, tier)
        ]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)
        axes.annotate(f"{points[-1][1]:,.0f}", points[-1], textcoords="offset points", xytext=(7, -3), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="tokens of documents", ylabel="first token over HTTP, ms")
    axes.set(ylim=(20, 60_000), xlim=(6500, 400_000))
    axes.set_xticks(contexts, [f"{size // 1000}K" for size in contexts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
