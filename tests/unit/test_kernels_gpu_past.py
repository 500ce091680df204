"""Attention over a long past by blocks of keys, on the GPU or emulated, against all keys at once in float32."""

from __future__ import annotations

import pytest
import torch
from test_kernels_gpu_linear import RATIO, device, normal, poisoned, tokens  # noqa: F401

from model.attention import _attend_past
from model.kernels import gpu_past
from tests.numeric import assert_close


@pytest.mark.parametrize(("t", "h", "p"), [(1, 1, 8), (37, 3, 64), (5, 4, 128)])
@pytest.mark.parametrize("rounds", [False, True])
def test_merging_equals_the_definition(device, t, h, p, rounds):  # noqa: F811
    total, out = normal(t, h, p).to(device), tokens(device, t, h, p, seed=1)
    total_lse, lse = (10 * normal(h, t, seed=i).to(device) for i in (2, 3))  # far apart too
    expected, expected_lse = gpu_past.merge_attention_ref(total, total_lse, out, lse)
    rounded = poisoned(device, t, h, p) if rounds else None
    merged, merged_lse = gpu_past.merge_attention(total, total_lse, out, lse, rounded)
    assert merged is (rounded if rounds else total)
    assert_close("merged", merged, expected, RATIO[merged.dtype])
    assert_close("log-sum-exp", merged_lse, expected_lse, RATIO[torch.float32])


@pytest.mark.parametrize(("past", "t"), [(0, 256), (200, 128), (256, 256), (640, 128), (900, 256)])
@pytest.mark.parametrize(("h", "g"), [(4, 2), (3, 3)])
@torch.no_grad()
def test_blocks_of_keys_equal_all_at_once(device, monkeypatch, past, t, h, g):  # noqa: F811
    monkeypatch.setattr(gpu_past, "METHOD", "blocks")
    monkeypatch.setattr(gpu_past, "BLOCK_KEYS", 256)
    monkeypatch.setattr(gpu_past, "SEGMENT_UNIT", 128)
    q, kv = tokens(device, t, h, 64), tokens(device, 2, past + t, g, 64)
    assert gpu_past.takes(q, *kv)
    assert not gpu_past.takes(q[:100], *kv)
    out = _attend_past(q, *kv)
    monkeypatch.setattr(gpu_past, "METHOD", None)
    expected = _attend_past(q.float(), *kv.float())
    assert out.shape == expected.shape
    assert_close("out", out, expected, 6e-3)


@pytest.mark.skipif(gpu_past.triton is None, reason="a PyTorch without Triton")
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize(
    ("past", "t", "h", "g", "p"), [(0, 70, 4, 2, 64), (200, 33, 2, 2, 64), (31, 1, 8, 2, 128), (64, 64, 3, 1, 64)]
)
def test_the_triton_kernel_equals_the_definition(device, monkeypatch, past, t, h, g, p, tma):  # noqa: F811
    """Results and log-sum-exps, also where NaN lies behind the keys, as in a state's reserved room."""
    monkeypatch.setattr(gpu_past, "TILE", gpu_past.Tile(32, 32, 4, 2, tma))
    dtype = torch.float32 if device == "cpu" else torch.bfloat16  # the interpreter multiplies no bfloat16
    room = poisoned(device, 2, past + t + 40, g, p, dtype=dtype)
    room[:, : past + t] = tokens(device, 2, past + t, g, p)
    q, (keys, values) = tokens(device, t, h, p).to(dtype), room[:, : past + t].unbind()
    out, lse = gpu_past.attend_triton(q, keys, values)
    expected, expected_lse = gpu_past.attend_triton_ref(q, keys, values)
    assert_close("out", out, expected, 6e-3 if dtype == torch.bfloat16 else 1e-5)
    assert_close("log-sum-exp", lse, expected_lse, 1e-5)


@pytest.mark.skipif(gpu_past.triton is None, reason="a PyTorch without Triton")
@torch.no_grad()
def test_the_triton_kernel_stands_in_for_flash_attention(device, monkeypatch):  # noqa: F811
    monkeypatch.setattr(gpu_past, "METHOD", "triton")
    q, kv = tokens(device, 256, 2, 64), tokens(device, 2, 300, 1, 64)
    assert gpu_past.takes(q, *kv) and not gpu_past.takes(q[:255], *kv)
    if device == "cpu":
        return  # see above
    out = _attend_past(q, *kv)
    monkeypatch.setattr(gpu_past, "METHOD", None)
    assert_close("out", out, _attend_past(q.float(), *kv.float()), 6e-3)
