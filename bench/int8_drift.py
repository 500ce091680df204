"""Drift of the shipped checkpoint caused by int8 weights, for each kind of matrix and for all linear layers.

Compared with the same checkpoint in float32, on the sample documents as in a prompt: KL per token in nats, agreement of
the likeliest token, relative RMS of the hidden states before the head and of the final recurrent states. The matrices
are stored as int4 or int8, so quantizing them to the same int8 grid would not change some of them at all. Instead they
are rounded to 121 steps per side instead of 127, with an error 5% larger than that of int8 on unquantized weights.
`share`: share of all parameters that are of this kind.
    python -m bench.int8_drift [--tokens 384] [--threads 2]
"""

from __future__ import annotations

import argparse
import re
import sys

import torch
from torch import Tensor

from bench.hf_parity import SHIPPED
from bench.runs import BenchRun
from bench.w8a8_drift import drift, read, sample_documents
from model import Jamba, load_model
from model.weights import Slot, find_slots

STEPS = 121  # instead of 127
KINDS = {
    "attention q, k, v": r"self_attn\.[qkv]_proj",
    "attention out": r"self_attn\.o_proj",
    "Mamba in": r"mamba\.in_proj",
    "Mamba x": r"mamba\.x_proj",
    "Mamba dt": r"mamba\.dt_proj\.weight",
    "Mamba out": r"mamba\.out_proj",
    "dense gate, up": r"feed_forward\.(gate|up)_proj",
    "dense down": r"feed_forward\.down_proj",
    "experts' gate, up": r"experts\.\d+\.(gate|up)_proj",
    "experts' down": r"experts\.\d+\.down_proj",
    "router": r"router",
    "embedding and head": r"embed_tokens",
}
LEFT_IN_FLOAT = ("Mamba dt", "router", "embedding and head")  # by load_model(..., quantize="int8")
CHOICES = {
    **{kind: (kind,) for kind in KINDS},
    "all of Mamba": tuple(kind for kind in KINDS if kind.startswith("Mamba")),
    "all linear": tuple(kind for kind in KINDS if kind not in LEFT_IN_FLOAT),
    "all linear but Mamba's": tuple(kind for kind in KINDS if kind not in LEFT_IN_FLOAT and "Mamba" not in kind),
    "everything": tuple(KINDS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=384, help="of each document")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    documents, run = sample_documents(arguments.tokens), BenchRun("int8-drift", argv=sys.argv)
    expected = read(load_model(SHIPPED), documents)
    for choice, kinds in CHOICES.items():
        model = load_model(SHIPPED)
        slots = {name: slot for kind in kinds for name, slot in slots_of(model, kind).items()}
        for slot in slots.values():
            slot.values.copy_(rounded(slot.values))
        matrices = sum(slot.values.numel() for slot in slots.values())
        every = sum(slot.values.numel() for slot in find_slots(model).values())
        outputs = read(model, documents)
        run.add(rounded=choice, share=matrices / every, positions=len(outputs.hidden), **drift(outputs, expected))
        print(run.rows[-1], flush=True)
    run.finish()


def slots_of(model: Jamba, kind: str) -> dict[str, Slot]:
    found = {name: slot for name, slot in find_slots(model).items() if re.search(KINDS[kind], name)}
    if not found:
        raise ValueError(f"no tensor is called {KINDS[kind]!r}")
    return found


def rounded(weight: Tensor) -> Tensor:
    """(out, in) -> the same, a scale a row, as quantize_rows does with STEPS for 127."""
    scale = (weight.abs().amax(-1, keepdim=True) / STEPS).clamp_min(torch.finfo(torch.float32).tiny)
    return (weight / scale).round() * scale


if __name__ == "__main__":
    main()
