"""Reads a checkpoint with its residual stream rotated by an orthogonal matrix R: the same function, fewer outliers.

RMSNorm commutes with a rotation once its gain g is folded into the next matrix, so R is folded into the weights and
costs nothing at run time: a matrix that reads the stream becomes W diag(g) R, with gain 1; one that writes to it
becomes R^T W. The largest value of a token is then a few times its RMS instead of up to forty times, so that int8
activations lose little (w8a8.py). Activations inside mixers and MLPs are not rotated.
Source: QuaRot (Ashkboos et al., 2024), its first step.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from model.weights import CheckpointReader, StoredTensor

_LAYER = re.compile(r"(model\.layers\.\d+\.)(.*)")
_READS = {  # norm -> the matrices that read its output
    "input_layernorm": re.compile(r"self_attn\.[qkv]_proj\.weight|mamba\.in_proj\.weight"),
    "pre_ff_layernorm": re.compile(r"feed_forward\.(router|(experts\.\d+\.)?(gate|up)_proj)\.weight"),
}
_WRITES = re.compile(
    r"self_attn\.o_proj\.weight|mamba\.out_proj\.(weight|bias)|feed_forward\.(experts\.\d+\.)?down_proj\.weight"
)
_NORMS = re.compile(r"model\.(layers\.\d+\.(input_layernorm|pre_ff_layernorm)|final_layernorm)\.weight")


class Rotation:
    """A dense orthogonal d × d matrix: random signs, then a Kronecker product of small orthogonal factors.

    The factors are Hadamard matrices of up to 64 for the power of two in d and a random orthogonal matrix for the odd
    part. Applying it costs the sum of the factor sizes per value instead of d.
    """

    def __init__(self, d: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sizes = _factors(d)
        self._signs = torch.randint(0, 2, (d,), generator=generator) * 2.0 - 1
        self._matrices = [_hadamard(n) if n & (n - 1) == 0 else _orthogonal(n, generator) for n in self.sizes]

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., d) -> xR, float32."""
        x = (x.float() * self._signs).unflatten(-1, self.sizes)
        for matrix in self._matrices:  # each is applied to the first factor dimension, which moves to the end
            x = x.movedim(-len(self.sizes), -1) @ matrix
        return x.flatten(-len(self.sizes))


def _factors(d: int) -> list[int]:
    """[odd part of d], then powers of two up to 64 of nearly equal size: 4096 gives [64, 64], 576 gives [9, 64]."""
    odd = d // (d & -d)
    bits = (d // odd).bit_length() - 1
    count = -(-bits // 6)
    powers = [1 << (bits + i) // count for i in range(count)]
    return [odd] * (odd > 1) + powers or [1]


def _hadamard(n: int) -> Tensor:
    """Hadamard matrix by Sylvester's construction, scaled to be orthogonal."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / n**0.5


def _orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Random orthogonal matrix, Haar distributed."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


class RotatedReader(CheckpointReader):
    """A CheckpointReader of the rotated checkpoint. Its head is untied, because the gain of the final norm is folded
    into it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if self.config.tie_word_embeddings:
            self._entries["lm_head.weight"] = self._entries["model.embed_tokens.weight"]
            self.config = replace(self.config, tie_word_embeddings=False)
            self.raw_config = self.raw_config | {"tie_word_embeddings": False}
        self._turn = Rotation(self.config.hidden_size)

    def __getitem__(self, name: str) -> StoredTensor:
        """Rotated matrices keep their float dtype; quantized ones become float32."""
        stored = super().__getitem__(name)
        if _NORMS.fullmatch(name):
            return StoredTensor(torch.ones_like(stored.values))
        if (turned := self._turned(name, stored)) is None:
            return stored
        return StoredTensor(turned.to(stored.values.dtype) if stored.scale is None else turned)

    def _turned(self, name: str, stored: StoredTensor) -> Tensor | None:
        if name == "model.embed_tokens.weight":
            return self._turn(stored.dense())
        if name == "lm_head.weight":
            return self._turn(stored.dense() * self._gain("model.final_layernorm"))
        if match := _LAYER.fullmatch(name):
            layer, rest = match.groups()
            for norm, reads in _READS.items():
                if reads.fullmatch(rest):
                    return self._turn(stored.dense() * self._gain(f"{layer}{norm}"))
            if _WRITES.fullmatch(rest):
                return self._turn(stored.dense().movedim(0, -1)).movedim(-1, 0).contiguous()
        return None

    def _gain(self, norm: str) -> Tensor:
        return super().__getitem__(f"{norm}.weight").dense().float()
