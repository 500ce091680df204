"""Plots docs/images/gpu.png from rows of gpu.py: prefill, decode and first token compared with vLLM 0.24.

    python -m bench.gpu_plot --int8 gpu-prefill-A.json --w8a8 gpu-prefill-B.json --batch gpu-batch-C.json \
        --decode gpu-decode-D.json --first-token gpu-first-token-E.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.gpu import VLLM_DECODE, VLLM_PREFILL
from bench.gpu_first_token import VLLM_FIRST_TOKEN

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "gpu.png"
PEER, INT8, W8A8 = "#999999", "#3b6ea5", "#d1793b"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--int8", "--w8a8", "--batch", "--decode", "--first-token"):
        parser.add_argument(name, required=True)
    names = vars(parser.parse_args())
    draw({name: json.loads((RESULTS / file).read_text())["rows"] for name, file in names.items()}, PICTURE)


def draw(rows: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (prefill, decode, first) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    lengths = sorted(VLLM_PREFILL)
    rates = {
        "vLLM 0.24": (PEER, [VLLM_PREFILL[n] for n in lengths]),
        "int8": (INT8, [find(rows["int8"], tokens=n)["tok_per_s"] for n in lengths]),
        "w8a8": (W8A8, [find(rows["w8a8"], tokens=n)["tok_per_s"] for n in lengths]),
    }
    for i, (name, (color, values)) in enumerate(rates.items()):
        prefill.bar([x + 0.27 * (i - 1) for x in range(4)], [v / 1e3 for v in values], 0.25, color=color, label=name)
    prefill.set(
        title="Cold prefill, thousand tokens/s", xticks=range(4), xticklabels=[f"{n // 1024}K" for n in lengths]
    )
    prefill.set_ylim(0, 42)
    prefill.legend(frameon=False, fontsize=8)
    cases = [*VLLM_DECODE]
    ours = [find([*rows["decode"], *rows["batch"]], context=c, batch=b)["tok_per_s"] for c, b in cases]
    bars = decode.bar(range(len(cases)), [rate / VLLM_DECODE[case] for rate, case in zip(ours, cases, strict=True)])
    decode.bar_label(bars, [f"{rate:,.0f}" for rate in ours], fontsize=8)
    decode.axhline(1, color=PEER)
    labels = [f"{round(c / 1024)}K" + (f"\n×{b}" if b > 1 else "") for c, b in cases]
    decode.set(title="Decode, times vLLM (and tokens/s)", xticks=range(len(cases)), xticklabels=labels)
    contexts = sorted(VLLM_FIRST_TOKEN)
    cold = [find(rows["w8a8"], tokens=n)["median_s"] * 1e3 for n in (32_768, 131_072, 262_144)]
    warm = [find(rows["first_token"], context=n, by="engine")["ttft_ms"] for n in contexts]
    first.plot(contexts, cold, color=W8A8, marker="o", linestyle="--", label="cold, w8a8")
    first.plot(contexts, [VLLM_FIRST_TOKEN[n] for n in contexts], color=PEER, marker="o", label="cached, vLLM 0.24")
    first.plot(contexts, warm, color=INT8, marker="o", label="cached, this engine")
    first.set(title="First token, ms", yscale="log", xticks=contexts, ylim=(10, 40_000))
    first.set_xticklabels([f"{round(n / 1024)}K" for n in contexts])
    first.legend(frameon=False, fontsize=8)
    for axis in (prefill, decode, first):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_xlabel("tokens of context")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def find(rows: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    return next(row for row in rows if all(row.get(name) == value for name, value in wanted.items()))


if __name__ == "__main__":
    main()
