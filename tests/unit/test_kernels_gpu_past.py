"""Attention over a long past by Triton, interpreted or on a card, against the definition."""

from __future__ import annotations

import pytest
import torch
from test_kernels_gpu_linear import device, poisoned, tokens  # noqa: F401

pytest.importorskip("triton")
from model.attention import attend_past
from model.kernels import gpu_past
from model.state import LayerKv
from tests.numeric import assert_close


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(
    ("past", "t", "h", "g", "p"), [(0, 70, 4, 2, 64), (200, 33, 2, 2, 64), (31, 2, 8, 2, 128), (64, 64, 3, 1, 64)]
)
def test_the_triton_kernel_equals_the_definition(device, monkeypatch, past, t, h, g, p, tma):  # noqa: F811
    """Also where NaN lies behind the keys, as in a state's reserved room."""
    check(device, monkeypatch, past, t, h, g, p, tma)


@pytest.mark.parametrize("lent", [0, 64, 320])
@pytest.mark.parametrize(("past", "t", "parts"), [(320, 40, 2), (330, 33, 5), (351, 2, 12), (401, 65, 32)])
def test_keys_in_parts_and_in_two_pieces(device, monkeypatch, past, t, parts, lent):  # noqa: F811
    """A part may end before the last keys, within what is lent, or where only some queries see it."""
    monkeypatch.setattr(gpu_past.gpu, "sm_count", lambda device: parts * 2 * -(-t // 32))
    check(device, monkeypatch, past, t, 2, 1, 64, True, lent)


def check(device, monkeypatch, past, t, h, g, p, tma, lent=0):  # noqa: F811
    for name in ("TILE", "FEW"):
        monkeypatch.setattr(gpu_past, name, gpu_past.Tile(32, 32, 4, 2, tma))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # the interpreter multiplies no bfloat16
    room = poisoned(device, 2, past + t + 40, g, p, dtype=dtype)
    room[:, : past + t] = tokens(device, 2, past + t, g, p)
    q, (keys, values) = tokens(device, t, h, p).to(dtype), room[:, : past + t].unbind()
    expected = gpu_past.attend_ref(q, keys, values)
    whole = gpu_past.attend(q, keys, values)
    assert_close("out", whole, expected, 6e-3 if dtype == torch.bfloat16 else 1e-5)
    if lent:
        first, rest = room[:, :lent].clone(), room[:, lent:].clone()[:, : past + t - lent]
        assert torch.equal(gpu_past.attend(q, *rest.unbind(), *first.unbind()), whole)


def test_queries_of_bfloat16_are_taken(device):  # noqa: F811
    q, kv = tokens(device, 256, 2, 64), tokens(device, 2, 300, 1, 64)
    assert gpu_past.takes(q, *kv) and gpu_past.takes(q[:1], *kv, *kv)
    assert not gpu_past.takes(q.float(), *kv)


@torch.no_grad()
def test_it_stands_in_for_flash_attention(device):  # noqa: F811
    if device == "cpu":
        pytest.skip("the interpreter multiplies no bfloat16")
    for t in (2, 17, 100, 300):
        q, kv = tokens(device, t, 4, 128), tokens(device, 2, 900, 2, 128)
        assert_close("out", attend_past(q, LayerKv(*kv)), gpu_past.attend_ref(q, *kv), 6e-3)
