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
    monkeypatch.setattr(gpu_past, "ENABLED", True)
    monkeypatch.setattr(gpu_past, "BLOCK_KEYS", 256)
    monkeypatch.setattr(gpu_past, "SEGMENT_UNIT", 128)
    q, kv = tokens(device, t, h, 64), tokens(device, 2, past + t, g, 64)
    assert gpu_past.takes(q, *kv)
    assert not gpu_past.takes(q[:100], *kv)
    out = _attend_past(q, *kv)
    monkeypatch.setattr(gpu_past, "ENABLED", False)
    expected = _attend_past(q.float(), *kv.float())
    assert out.shape == expected.shape
    assert_close("out", out, expected, 6e-3)
