"""The sequences of one call, packed end to end without padding, and the mapping from their tokens to their states.

Token-wise layers see (T, d) and do not need this. Attention loops over the sequences; Mamba loops over groups of equal
length, so that a decode step of many sequences is a single step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor

from model.state import HybridState


class Padding(NamedTuple):
    """Padding at the end of one sequence: these rows are computed, but do not change its state."""

    rows: Tensor  # (t, 1) bool: true for padding
    last: Tensor  # (w-1,) int64: the last rows that are tokens


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences of one length t: a rectangle (b, t) among the packed tokens."""

    b: int
    t: int
    rows: Tensor | None  # (b*t,) indices of these tokens among the packed T; None: all of them, in order
    states: tuple[HybridState, ...]  # b states, or none
    conv: Tensor | None  # (n_mamba, b, e, w-1): the states' own memory when b = 1, otherwise gathered
    ssm: Tensor | None  # (n_mamba, b, e, n)
    padding: Padding | None = None  # b = 1

    def cut(self, x: Tensor) -> Tensor:
        """(T, c) -> (b, t, c)"""
        return (x if self.rows is None else x[self.rows]).unflatten(0, (self.b, self.t))


@dataclass(frozen=True, slots=True)
class Batch:
    """The layout of a call, for the mixers. `states` is empty in training, where every sequence starts from zero."""

    lengths: tuple[int, ...]
    states: tuple[HybridState, ...]
    groups: tuple[Group, ...]
    device: torch.device

    @classmethod
    def fresh(cls, b: int, t: int, device: torch.device) -> Self:
        """b sequences of t tokens without states, for training."""
        return cls((t,) * b, (), (Group(b, t, None, (), None, None),), device)

    @classmethod
    def of_states(
        cls, lengths: Sequence[int], states: Sequence[HybridState], device: torch.device, grouped: bool = True
    ) -> Self:
        """One sequence per state. Reserves room for the new tokens' KV before anything is computed.

        Not `grouped`: nothing is gathered, for layers that read conv and ssm from the states themselves.
        """
        for length, state in zip(lengths, states, strict=True):
            state.reserve(state.num_tokens + length)
        groups = tuple(_group(t, lengths, states, device) for t in dict.fromkeys(lengths)) if grouped else ()
        return cls(tuple(lengths), tuple(states), groups, device)

    def positions(self) -> Tensor:
        """(T,) the position of each token in its sequence."""
        pasts = [state.num_tokens for state in self.states] or [0] * len(self.lengths)
        pieces = zip(pasts, self.lengths, strict=True)
        return torch.cat([torch.arange(s, s + t, device=self.device) for s, t in pieces])

    def last_rows(self) -> Tensor:
        """(number of sequences,) the row of the last token of each."""
        if len(self.groups) == 1:  # created on the device: a copy would wait for its queued work
            t = self.lengths[0]
            return torch.arange(t - 1, t * len(self.lengths), t, device=self.device)
        return (torch.tensor(self.lengths).cumsum(0) - 1).to(self.device)

    def map_groups(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`run(group, *inputs cut to (b, t, c))` for each group; its (b, t, e) results packed again to (T, e)."""
        if len(self.groups) == 1:
            (group,) = self.groups
            return run(group, *map(group.cut, inputs)).flatten(0, 1)
        packed = None
        for group in self.groups:
            out = run(group, *map(group.cut, inputs)).flatten(0, 1)
            packed = out.new_empty(len(inputs[0]), out.shape[-1]) if packed is None else packed
            packed[group.rows] = out
        return packed

    def commit(self) -> None:
        """Write gathered states back and count the tokens as seen; call once, after all layers have run."""
        for group in self.groups:
            if group.b > 1:
                for i, state in enumerate(group.states):
                    state.conv.copy_(group.conv[:, i])
                    state.ssm.copy_(group.ssm[:, i])
        for length, state in zip(self.lengths, self.states, strict=True):
            state.num_tokens += length


def _group(t: int, lengths: Sequence[int], states: Sequence[HybridState], device: torch.device) -> Group:
    members = [i for i, length in enumerate(lengths) if length == t]
    own = tuple(states[i] for i in members)
    starts = torch.tensor([0, *accumulate(lengths)])[members]
    rows = (starts[:, None] + torch.arange(t)).flatten().to(device) if len(members) < len(lengths) else None
    gather = (lambda xs: xs[0][:, None]) if len(own) == 1 else (lambda xs: torch.stack(xs, dim=1))
    return Group(len(own), t, rows, own, gather([s.conv for s in own]), gather([s.ssm for s in own]))
