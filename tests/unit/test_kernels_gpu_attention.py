"""Attention of decoding on the GPU against its definition, on the emulator and, where there is one, a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.gpu_attention import Caches, Partials, attend, attend_ref, fits
from tests.numeric import assert_close

RATIO = 6e-3  # bfloat16 of the weights before they meet the values, and of the result
LAYERS = 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def run(
    caches: list[Tensor], lengths: list[int], qkv: tuple[Tensor, ...], layer: int, partials: Partials | None = None
) -> Tensor:
    q, k, _ = qkv
    device = q.device
    addresses = torch.tensor([cache.data_ptr() for cache in caches], device=device)
    capacities = torch.tensor([cache.shape[2] for cache in caches], device=device)
    described = Caches(addresses, capacities, torch.tensor(lengths, device=device))
    partials = partials or Partials.empty(q, k.shape[1])
    for room in partials:
        room.fill_(torch.nan)
    out = torch.full_like(q, torch.nan)
    attend(*qkv, described, layer, partials, out, overlap=False)
    return out


def check(
    lengths: list[int], h: int, g: int, p: int, device: str, parts: int | None = None, scale: float = 1.0
) -> None:
    b = len(lengths)
    caches = [normal(LAYERS, 2, length + 1 + i, g, p, seed=i).to(device) for i, length in enumerate(lengths)]
    qkv = tuple((scale * normal(b, heads, p, seed=i)).to(device) for i, heads in enumerate((h, g, g)))
    for cache, length in zip(caches, lengths, strict=True):
        cache[:, :, length:] = torch.nan  # room for tokens to come: anything
    expected_caches = [cache.double() for cache in caches]
    partials = parts and Partials(torch.empty(parts, h, p, device=device), torch.empty(parts, h, 2, device=device))
    for layer in range(LAYERS):
        out = run(caches, lengths, qkv, layer, partials)
        expected = attend_ref(*(x.double() for x in qkv), expected_caches, lengths, layer)
        assert_close("out", out, expected, RATIO)
    for cache, expected in zip(caches, expected_caches, strict=True):
        assert torch.equal(cache.double().nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 63, 64, 65, 130, 300])
def test_one_sequence_of_any_length(length: int, device: str) -> None:
    check([length], 6, 2, 64, device, parts=4)


@pytest.mark.parametrize("p", [64, 128])
@pytest.mark.parametrize(("h", "g"), [(1, 1), (4, 4), (4, 1), (9, 3), (8, 1), (12, 1), (18, 2)])
def test_heads_in_groups_of_any_size(h: int, g: int, p: int, device: str) -> None:
    check([70], h, g, p, device, parts=3)


@pytest.mark.parametrize("lengths", [[5, 0, 200], [64, 64], [1, 2, 3, 4, 500]])
def test_sequences_of_different_lengths(lengths: list[int], device: str) -> None:
    check(lengths, 4, 2, 64, device)


def test_one_part_a_sequence_and_one_to_spare(device: str) -> None:
    check([100, 30], 4, 2, 64, device, parts=3)


def test_scores_far_apart(device: str) -> None:
    check([200], 4, 2, 64, device, parts=2, scale=8.0)


def test_a_new_key_that_outweighs_all_others(device: str) -> None:
    cache = torch.zeros(1, 2, 33, 1, 64, dtype=torch.bfloat16, device=device)
    q, k, v = (torch.full((1, 1, 64), value, dtype=torch.bfloat16, device=device) for value in (4.0, 4.0, 7.0))
    assert torch.equal(run([cache], [32], (q, k, v), 0), v)


def test_the_bits_do_not_depend_on_the_others_in_the_batch_when_parts_are_the_same(device: str) -> None:
    caches = [normal(1, 2, 40, 2, 64, seed=i).to(device) for i in range(2)]
    q, k, v = (normal(2, heads, 64).to(device) for heads in (4, 2, 2))
    both = run(caches, [30, 39], (q, k, v), 0)
    alone = run(caches[1:], [39], (q[1:], k[1:], v[1:]), 0)
    assert torch.equal(both[1:], alone)


def test_only_whole_fragments_fit() -> None:
    assert fits(64) and fits(128) and not fits(96) and not fits(8)
