"""Attention over a long past by Triton, interpreted or on a card, against the definition."""

from __future__ import annotations

import pytest
import torch
from test_kernels_gpu_linear import device, poisoned, tokens  # noqa: F401

pytest.importorskip("triton")
from model.attention import attend_past
from model.kernels import gpu_past
from tests.numeric import assert_close


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(
    ("past", "t", "h", "g", "p"), [(0, 70, 4, 2, 64), (200, 33, 2, 2, 64), (31, 1, 8, 2, 128), (64, 64, 3, 1, 64)]
)
def test_the_triton_kernel_equals_the_definition(device, monkeypatch, past, t, h, g, p, tma):  # noqa: F811
    """Also where NaN lies behind the keys, as in a state's reserved room."""
    monkeypatch.setattr(gpu_past, "TILE", gpu_past.Tile(32, 32, 4, 2, tma))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # the interpreter multiplies no bfloat16
    room = poisoned(device, 2, past + t + 40, g, p, dtype=dtype)
    room[:, : past + t] = tokens(device, 2, past + t, g, p)
    q, (keys, values) = tokens(device, t, h, p).to(dtype), room[:, : past + t].unbind()
    out, expected = gpu_past.attend(q, keys, values), gpu_past.attend_ref(q, keys, values)
    assert_close("out", out, expected, 6e-3 if dtype == torch.bfloat16 else 1e-5)


def test_only_enough_queries_of_bfloat16_are_taken(device):  # noqa: F811
    q, kv = tokens(device, 256, 2, 64), tokens(device, 2, 300, 1, 64)
    assert gpu_past.takes(q, *kv)
    assert not gpu_past.takes(q[:255], *kv)
    assert not gpu_past.takes(q.float(), *kv)


@torch.no_grad()
def test_it_stands_in_for_flash_attention(device):  # noqa: F811
    if device == "cpu":
        pytest.skip("the interpreter multiplies no bfloat16")
    q, kv = tokens(device, 300, 4, 128), tokens(device, 2, 900, 2, 128)
    assert_close("out", attend_past(q, *kv), gpu_past.attend_ref(q, *kv), 6e-3)
