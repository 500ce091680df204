"""The model state of one sequence: KV cache of the attention layers, conv and SSM state of the Mamba layers.

Not here: who keeps which state for how long (prefix_cache.py), or how a call finds its states (batch.py).
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from model.config import JambaConfig
from model.ssm_rounding import dequantize_ssm, quantize_ssm

if TYPE_CHECKING:
    from model.prefix_plan import PrefixPlan

LENT_UNIT = 256  # KV is lent in multiples of this many tokens, a multiple of all tiles in which kernels read keys
_MIN_CAPACITY_TOKENS, _MAX_SPARE_TOKENS = 256, 16_384
_MIN_LENT_TOKENS = 1024  # less is not worth sharing


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Shapes and dtypes of a state; letters as in jamba.py. States of equal layouts can exchange their bytes."""

    n_attn: int
    n_mamba: int
    g: int
    p: int
    e: int
    n: int
    w: int
    kv_dtype: torch.dtype
    conv_dtype: torch.dtype
    version: int = 3  # raised when kernels compute other bits, so that older states are not found

    @classmethod
    @cache  # called at every step
    def of(cls, config: JambaConfig, dtype: torch.dtype) -> Self:
        """The layout of a model whose activations have `dtype`."""
        return cls(
            n_attn=config.num_attention_layers,
            n_mamba=config.num_mamba_layers,
            g=config.num_key_value_heads,
            p=config.head_dim,
            e=config.mamba_d_inner,
            n=config.mamba_d_state,
            w=config.mamba_d_conv,
            kv_dtype=dtype,
            conv_dtype=dtype,
        )

    def fingerprint(self) -> bytes:
        """16 bytes that differ if any field differs."""
        return hashlib.blake2b(repr(astuple(self)).encode(), digest_size=16).digest()

    @property
    def conv_shape(self) -> tuple[int, int, int]:
        return self.n_mamba, self.e, self.w - 1

    @property
    def ssm_shape(self) -> tuple[int, int, int]:
        return self.n_mamba, self.e, self.n

    def kv_shape(self, num_tokens: int) -> tuple[int, int, int, int, int]:
        return self.n_attn, 2, num_tokens, self.g, self.p


class Origin(NamedTuple):
    """Which stored KV blocks a state's first tokens are bit-identical to: one key per `block_tokens` tokens, which
    also covers all tokens before them (prefix_plan.py)."""

    keys: tuple[str, ...] = ()
    block_tokens: int = 1

    @property
    def num_tokens(self) -> int:
        return len(self.keys) * self.block_tokens

    def common_tokens(self, other: Origin) -> int:
        """For how many first tokens the KV has the same bits in both."""
        places = range(min(len(self.keys), len(other.keys)))
        return bisect_left(places, True, key=lambda i: self.keys[i] != other.keys[i]) * self.block_tokens

    def first(self, num_tokens: int) -> Origin:
        """The part for the first `num_tokens` tokens, in whole blocks."""
        return self._replace(keys=self.keys[: num_tokens // self.block_tokens])


class LentKv(NamedTuple):
    """The KV of a sequence's first tokens in another state's memory, with the same bits. Read, never written."""

    kv: Tensor  # (n_attn, 2, capacity, g, p), kept alive by its readers
    num_tokens: int  # a multiple of LENT_UNIT
    plan: PrefixPlan | None = None  # of the prompt in that memory, including what follows these tokens

    @property
    def memory(self) -> dict[int, int]:
        """Like `HybridState.memory`."""
        return {self.kv.data_ptr(): self.kv.nbytes}


class LayerKv(NamedTuple):
    """Keys and values of one attention layer: views of all s+t tokens, or of those after `lent_keys`."""

    keys: Tensor  # (s+t, g, p)
    values: Tensor
    lent_keys: Tensor | None = None  # of the tokens before
    lent_values: Tensor | None = None

    def first(self, num_tokens: int) -> LayerKv:
        """Keys and values of the first tokens, at least all lent ones."""
        own = num_tokens - (0 if self.lent_keys is None else len(self.lent_keys))
        return self._replace(keys=self.keys[:own], values=self.values[:own])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The recurrent part of a state after `num_tokens` tokens; usable only with the KV of exactly these tokens."""

    num_tokens: int
    conv: Tensor  # (n_mamba, e, w-1)
    ssm: Tensor  # (n_mamba, e, n) float32, or int8 with a scale
    scale: Tensor | None = None  # (n_mamba, e, 1), see ssm_rounding.py

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.conv, self.ssm) if self.scale is None else (self.conv, self.ssm, self.scale)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class HybridState:
    """Starts empty; a forward pass advances it in place.

    `origin` says which of its KV is stored in the cache; going back to fewer tokens forgets the rest. With `lent`
    memory it only holds the KV after the lent tokens, and cannot be used until it has seen these: see `restore`.
    `plan`: that of its prompt, if any.
    """

    def __init__(self, layout: StateLayout, device: torch.device | str = "cpu", lent: LentKv | None = None) -> None:
        self.layout, self._num_tokens, self.origin, self.lent = layout, 0, Origin(), lent
        self.lent_tokens = 0 if lent is None else lent.num_tokens
        self.plan: PrefixPlan | None = None
        with torch.inference_mode(False):  # inference tensors could not be modified outside inference mode
            self.conv = torch.zeros(layout.conv_shape, dtype=layout.conv_dtype, device=device)
            self.ssm = torch.zeros(layout.ssm_shape, dtype=torch.float32, device=device)
        self._kv = self._new_kv(0)  # (n_attn, 2, rows, g, p); undefined beyond num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens seen so far."""
        return self._num_tokens

    @num_tokens.setter
    def num_tokens(self, num_tokens: int) -> None:
        if num_tokens < self._num_tokens:  # other tokens may follow
            self.origin = self.origin.first(num_tokens)
        self._num_tokens = num_tokens

    @property
    def nbytes(self) -> int:
        """Bytes of its own memory, including room for future tokens."""
        return self.conv.nbytes + self.ssm.nbytes + self._kv.nbytes

    @property
    def memory(self) -> dict[int, int]:
        """Address -> bytes of all memory that it keeps alive, lent memory included."""
        own = {tensor.data_ptr(): tensor.nbytes for tensor in (self.conv, self.ssm, self._kv)}
        return own if self.lent is None else own | self.lent.memory

    @property
    def capacity(self) -> int:
        """For how many tokens' KV there is room, lent ones included."""
        return self.lent_tokens + self._kv.shape[2]

    def addresses(self) -> tuple[int, int, int, int]:
        """Addresses of conv, SSM and KV (n_attn, 2, rows, g, p), and the rows; `reserve` may move the KV."""
        return self.conv.data_ptr(), self.ssm.data_ptr(), self._kv.data_ptr(), self._kv.shape[2]

    def lender_address(self) -> tuple[int, int]:
        """Address of the KV memory whose first tokens are lent, and its rows; zeros if nothing is lent."""
        return (0, 0) if self.lent is None else (self.lent.kv.data_ptr(), self.lent.kv.shape[2])

    def lend(self, num_tokens: int, unit: int = 1) -> LentKv | None:
        """The KV of its first tokens, for another state to read here instead of holding a copy; see `cut_loan`."""
        if self.lent is not None:
            return cut_loan(self.lent, min(num_tokens, self.lent_tokens), unit)
        return cut_loan(LentKv(self._kv, self.num_tokens, self.plan), min(num_tokens, self.num_tokens), unit)

    def reserve(self, num_tokens: int) -> None:
        """Make room for the KV of `num_tokens` tokens in all. Appending one by one is cheap: the capacity doubles, or
        grows by a fixed amount once it is large. Reserve the final length if it is known: nothing is copied then."""
        if num_tokens > self.capacity:
            held, spare = self._kv.shape[2], min(self._kv.shape[2], _MAX_SPARE_TOKENS)
            grown = self._new_kv(max(num_tokens - self.lent_tokens, held + spare, _MIN_CAPACITY_TOKENS))
            seen = max(0, self.num_tokens - self.lent_tokens)
            grown[:, :, :seen] = self._kv[:, :, :seen]
            self._kv = grown

    def append_kv(self, layer: int, k: Tensor, v: Tensor) -> LayerKv:
        """Write k, v (t, g, p) after the tokens seen so far, in reserved room -> all KV of attention layer `layer`.

        Does not change `num_tokens`.
        """
        start = self.num_tokens - self.lent_tokens
        keys, values = self._kv[layer, :, : start + len(k)].unbind()
        keys[start:], values[start:] = k, v
        if self.lent is None:
            return LayerKv(keys, values)
        return LayerKv(keys, values, *self.lent.kv[layer, :, : self.lent_tokens].unbind())

    def read_kv(self, start: int, end: int) -> Tensor:
        """A contiguous copy of the KV of tokens start..end: (n_attn, 2, end-start, g, p)."""
        if not 0 <= start <= end <= self.num_tokens:
            raise ValueError(f"KV of tokens {start}..{end} asked of a state that has seen {self.num_tokens}")
        pieces = [piece for piece in self._pieces(start, end) if piece.shape[2]]
        if len(pieces) == 1:
            return pieces[0].clone(memory_format=torch.contiguous_format)
        return torch.cat(pieces, dim=2) if pieces else self._kv[:, :, :0].clone()

    def copy_to(self, empty: HybridState) -> None:
        """Make an empty state a copy of this one; lent KV is not copied."""
        empty.restore(self.snapshot(), self._pieces(empty.lent_tokens, self.num_tokens))

    def _pieces(self, start: int, end: int) -> list[Tensor]:
        """Views of the KV of tokens start..end: the lent part, then its own."""
        lent = self.lent_tokens
        own = self._kv[:, :, max(start - lent, 0) : max(end - lent, 0)]
        return [own] if self.lent is None else [self.lent.kv[:, :, start : min(end, lent)], own]

    def snapshot(self, int8: bool = False) -> Snapshot:
        """A copy of the current recurrent part. With `int8` its SSM is rounded, and so is this state's."""
        if int8:
            ssm, scale = quantize_ssm(self.ssm)
            dequantize_ssm(ssm, scale, out=self.ssm)
            return Snapshot(self.num_tokens, self.conv.clone(), ssm, scale)
        return Snapshot(self.num_tokens, self.conv.clone(), self.ssm.clone())

    def restore(self, snapshot: Snapshot, kv: Sequence[Tensor]) -> None:
        """Fill this empty state. `kv`: pieces, in order, of the KV of the snapshot's tokens, without lent ones.

        Raises ValueError, and changes nothing, if the state is not empty or anything does not fit its layout.
        """
        if self.num_tokens:
            raise ValueError(f"restore needs an empty state, this one has seen {self.num_tokens} tokens")
        covered = self.lent_tokens + sum(piece.shape[2] for piece in kv)
        if covered != snapshot.num_tokens:
            raise ValueError(f"KV of {covered} tokens does not cover the snapshot's {snapshot.num_tokens}")
        layout = self.layout
        _check_fit("conv", snapshot.conv, layout.conv_shape, layout.conv_dtype)
        _check_fit("ssm", snapshot.ssm, layout.ssm_shape, torch.float32 if snapshot.scale is None else torch.int8)
        for piece in kv:
            _check_fit("KV", piece, layout.kv_shape(piece.shape[2]), layout.kv_dtype)
        self.reserve(covered)
        self._fill_kv([piece for piece in kv if piece.shape[2]], covered - self.lent_tokens)
        self.conv.copy_(snapshot.conv)
        if snapshot.scale is None:
            self.ssm.copy_(snapshot.ssm)
        else:
            dequantize_ssm(snapshot.ssm, snapshot.scale, out=self.ssm)
        self.num_tokens = covered

    def _fill_kv(self, pieces: Sequence[Tensor], num_tokens: int) -> None:
        if pieces and all(piece.device == self._kv.device for piece in pieces):  # hundreds of pieces per launch
            filled = self._kv.flatten(0, 1)[:, :num_tokens]
            torch.cat([piece.flatten(0, 1) for piece in pieces], dim=1, out=filled)
            return
        start = 0
        for piece in pieces:
            self._kv[:, :, start : start + piece.shape[2]] = piece
            start += piece.shape[2]

    def _new_kv(self, capacity: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty(self.layout.kv_shape(capacity), dtype=self.layout.kv_dtype, device=self.conv.device)


def cut_loan(loan: LentKv, num_tokens: int, unit: int = 1) -> LentKv | None:
    """At most the first `num_tokens` tokens of a loan, in whole `unit`s; None if too few to be worth it."""
    unit = math.lcm(unit, LENT_UNIT)
    num_tokens = num_tokens // unit * unit
    return loan._replace(num_tokens=num_tokens) if num_tokens >= _MIN_LENT_TOKENS else None


def _check_fit(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, this state needs {dtype} {shape}")
