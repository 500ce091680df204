"""Attention of decoding on the GPU against its definition, on the emulator and, where there is one, a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.gpu_attention import Caches, Loans, Partials, Sharing, attend, attend_ref, fits, max_members
from tests.numeric import assert_close

RATIO = 6e-3  # bfloat16 of the weights before they meet the values, and of the result
LAYERS = 2


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).bfloat16()


def run(
    caches: list[Tensor],
    lengths: list[int],
    qkv: tuple[Tensor, ...],
    layer: int,
    parts: int | None = None,
    sharing: list[tuple[int, int]] | None = None,
    lent: list[tuple[Tensor | None, int]] | None = None,
) -> Tensor:
    q, k, _ = qkv
    device = q.device
    addresses = torch.tensor([cache.data_ptr() for cache in caches], device=device)
    capacities = torch.tensor([cache.shape[2] for cache in caches], device=device)
    described = Caches(addresses, capacities, torch.tensor(lengths, device=device))
    partials = Partials.empty(q, k.shape[1], sharing is not None)
    partials = Partials(*(room[:parts].fill_(torch.nan) for room in partials))
    shared = sharing and Sharing(*torch.tensor(sharing, device=device).T.contiguous())
    places = lent or [(None, 0)] * len(caches)
    where = [(0, 0, 0) if kv is None else (kv.data_ptr(), kv.shape[2], tokens) for kv, tokens in places]
    loans = Loans(*torch.tensor(where, device=device).T.contiguous())
    out = torch.full_like(q, torch.nan)
    attend(*qkv, described, loans, layer, partials, out, shared, overlap=False)
    return out


def check(
    lengths: list[int],
    h: int,
    g: int,
    p: int,
    device: str,
    parts: int | None = None,
    scale: float = 1.0,
    sharing: list[tuple[int, int]] | None = None,
) -> None:
    b = len(lengths)
    caches = [normal(LAYERS, 2, length + 1 + i, g, p, seed=i).to(device) for i, length in enumerate(lengths)]
    qkv = tuple((scale * normal(b, heads, p, seed=i)).to(device) for i, heads in enumerate((h, g, g)))
    for cache, length in zip(caches, lengths, strict=True):
        cache[:, :, length:] = torch.nan  # room for tokens to come: anything
    for i, (owner, until) in enumerate(sharing or []):
        if owner != i:
            caches[i][:, :, :until] = torch.nan  # must not be read
    expected_caches = [cache.double() for cache in caches]
    for layer in range(LAYERS):
        out = run(caches, lengths, qkv, layer, parts, sharing)
        expected = attend_ref(*(x.double() for x in qkv), expected_caches, lengths, layer, sharing)
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


@pytest.mark.parametrize("until", [64, 128, 320])
@pytest.mark.parametrize(
    ("h", "g", "members"), [(6, 2, 5), (3, 1, 1), (8, 2, 4), (4, 1, 3), (8, 1, 2), (9, 1, 2), (2, 2, 7), (5, 1, 3)]
)
def test_sequences_that_share_their_first_keys(h: int, g: int, members: int, until: int, device: str) -> None:
    """Behind them each has keys of its own, or none but the new one."""
    lengths = [until + extra for extra in (0, 63, 1, 200, 64, 30, 5)[:members]]
    check(lengths, h, g, 64, device, parts=18, sharing=[(0, until)] * members)


@pytest.mark.parametrize("p", [64, 128])
@pytest.mark.parametrize("parts", [13, None])
def test_several_groups_and_sequences_that_share_nothing(parts: int | None, p: int, device: str) -> None:
    lengths = [70, 300, 129, 5, 256, 400, 350]
    sharing = [(2, 64), (1, 256), (2, 64), (3, 0), (1, 256), (6, 320), (6, 320)]  # an owner anywhere in its group
    check(lengths, 8, 2, p, device, parts=parts, sharing=sharing)


def test_one_part_for_what_is_shared_and_for_each_and_one_to_spare(device: str) -> None:
    check([257] * 4, 4, 1, 64, device, parts=7, sharing=[(1, 256), (1, 256), (2, 256), (2, 256)])


def test_a_step_that_could_share_and_does_not(device: str) -> None:
    check([5, 0, 200], 4, 2, 64, device, sharing=[(i, 0) for i in range(3)])


def test_shared_scores_far_apart(device: str) -> None:
    check([200, 130], 4, 2, 64, device, parts=6, scale=8.0, sharing=[(1, 128), (1, 128)])


@pytest.mark.parametrize("sharing", [[(0, 128), (1, 0), (0, 128)], [(0, 0), (1, 0), (2, 0)], None])
def test_first_keys_in_memory_that_another_has_lent(sharing: list[tuple[int, int]] | None, device: str) -> None:
    """Of the third all of them but the new one, of the second none; the same bits as in one piece."""
    lengths, lent = [300, 70, 256], [192, 0, 256]
    caches = [normal(LAYERS, 2, length + 3 + i, 2, 64, seed=i).to(device) for i, length in enumerate(lengths)]
    caches[2][:, :, :128] = caches[0][:, :, :128]
    qkv = tuple(normal(3, heads, 64, seed=i).to(device) for i, heads in enumerate((8, 2, 2)))
    lenders = [(torch.cat([cache, cache], dim=2), tokens) for cache, tokens in zip(caches, lent, strict=True)]
    own = [cache[:, :, tokens:].clone() for cache, tokens in zip(caches, lent, strict=True)]
    for layer in range(LAYERS):
        whole = run(caches, lengths, qkv, layer, None, sharing)
        assert torch.equal(run(own, lengths, qkv, layer, None, sharing, lenders), whole)
    for cache, rest, tokens in zip(caches, own, lent, strict=True):
        assert torch.equal(cache[:, :, tokens:], rest)


@pytest.mark.parametrize(("h", "g", "members"), [(4, 1, 9), (4, 1, 16), (6, 2, 21), (12, 1, 7)])
def test_more_members_than_one_warp_has_rows_for(h: int, g: int, members: int, device: str) -> None:
    """With nine of four heads three warps have rows, and the fourth none."""
    lengths = [192 + 7 * i % 100 for i in range(members)]
    check(lengths, h, g, 64, device, parts=2 * members + 6, sharing=[(members - 1, 192)] * members)


@pytest.mark.parametrize(("group", "members"), [(1, 64), (3, 21), (4, 16), (8, 8), (12, 8)])
def test_as_many_share_as_a_block_has_rows(group: int, members: int) -> None:
    assert max_members(group) == members


def test_only_whole_fragments_fit() -> None:
    assert fits(64) and fits(128) and not fits(96) and not fits(8)
