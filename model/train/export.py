"""Last stage: trained masters -> a Hugging Face checkpoint; and fake quantization to the shipped format.

The shipped format stores MLPs, experts and the Mamba in_proj in int4 (groups of 64), every other matrix product and the
embedding in int8 with a scale per row, the rest in float. Run: `python -m model.train.export --help`.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.int4 import pack_int4, unpack_int4
from model.int8 import quantize_rows
from model.train.surgery import STUDENT
from model.train.tokenizer_cut import cut_tokenizer, write_tokenizer

INT4_PARTS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "mamba.in_proj")
INT8_PARTS = ("mamba.out_proj", "mamba.x_proj", "q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens")


def storage_of(name: str) -> str:
    """ "int4", "int8" or "float" for a parameter's name."""
    stem = name.removesuffix(".weight")
    if stem.endswith(INT4_PARTS):
        return "int4"
    return "int8" if stem.endswith(INT8_PARTS) else "float"


def fake_quantize(names: Sequence[str], weights: Sequence[Tensor]) -> list[Tensor]:
    """Quantize `weights` to the shipped format and back to float32; rows of equal length are batched."""
    given, rows = list(weights), defaultdict(list)
    for i, (name, weight) in enumerate(zip(names, weights, strict=True)):
        if (kind := storage_of(name)) != "float":
            rows[kind, weight.shape[-1]].append(i)
    for (kind, _), members in rows.items():
        together = torch.cat([weights[i].flatten(0, -2) for i in members])
        if kind == "int4":
            rounded = unpack_int4(*pack_int4(together))
        else:
            q, scale = quantize_rows(together)
            rounded = q * scale[:, None]
        parts = rounded.split([weights[i].shape[:-1].numel() for i in members])
        for i, part in zip(members, parts, strict=True):
            given[i] = part.view_as(weights[i])
    return given


def export_checkpoint(masters: dict[str, Tensor], folder: Path) -> None:
    """Write config.json and float32 model.safetensors under the names of `JambaForCausalLM`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = replace(STUDENT, rope_theta=None).to_dict()
    config |= {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 262_144,
               "torch_dtype": "bfloat16", "router_aux_loss_coef": 0.01}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {f"model.{name}": tensor.float().contiguous() for name, tensor in masters.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masters", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True, help="for the tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="folder for the float32 checkpoint")
    args = parser.parse_args()
    export_checkpoint(load_file(args.masters), args.out)
    write_tokenizer(cut_tokenizer(args.gguf), args.out)
    print(f"{args.out}: convert it with `jamba-rag convert {args.out} DST --to int4`")


if __name__ == "__main__":
    main()
