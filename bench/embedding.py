"""Throughput of an embedder in chunks per second on each device, and how much the vectors differ between devices.

Chunks have 256 tokens, as in the service. On a CPU `--threads` cores are used (default 2, for which the goals are set).
`--embedder`: a sentence-transformers directory; default: the shipped one. Times include copies to and from the device.
    python -m bench.embedding --devices cpu cuda [--chunks 4096]
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch

from bench.runs import BenchRun, time_interleaved
from retrieval.embedder import BertEmbedder, MiniLMEmbedder

TOKENS = 256  # per chunk, including special tokens
CPU_CHUNKS = 256  # per measurement on a CPU, where as many as on a GPU would take minutes
WORDS = Path(__file__).parent / "data" / "followups.json"  # source of words: English


def make_chunks(count: int) -> list[str]:
    """Distinct texts of at least `TOKENS` tokens, which are truncated there."""
    words, rng = WORDS.read_text().split(), random.Random(7)
    return [" ".join(rng.choices(words, k=TOKENS)) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", nargs="+", default=["cpu"])
    parser.add_argument("--chunks", type=int, default=4096, help="per measurement on a GPU")
    parser.add_argument("--threads", type=int, default=2, help="CPU cores to use")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--embedder", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def load(device: str, dtype: torch.dtype | None = None) -> BertEmbedder:
        if args.embedder is None:
            return MiniLMEmbedder(device=device, dtype=dtype)
        return BertEmbedder(args.embedder, device, dtype)

    embedders = {device: load(device) for device in args.devices}
    chunks = make_chunks(args.chunks)
    asked = {device: chunks[: CPU_CHUNKS if device == "cpu" else None] for device in embedders}
    cases = {name: lambda name=name: embedders[name].embed_passages(asked[name]) for name in embedders}
    times_s = time_interleaved(cases, warmup=1, repeats=args.repeats)
    exact = (
        MiniLMEmbedder(dtype=torch.float32)
        if args.embedder is None
        else BertEmbedder(args.embedder, "cpu", torch.float32)
    )
    wanted = exact.embed_passages(chunks[:64])
    run, first = BenchRun("embedding", argv=sys.argv), 0.0
    for device, embedder in embedders.items():
        rate = len(asked[device]) / median(times_s[device])
        first = first or rate
        cosines = np.einsum("ij,ij->i", embedder.embed_passages(chunks[:64]), wanted)
        run.add(
            device=device,
            dtype=str(embedder.dtype).removeprefix("torch."),
            **{"chunks/s": rate, "times the first": rate / first, "least cosine to float32": float(cosines.min())},
        )
    run.finish()


if __name__ == "__main__":
    main()
