"""Products of rounded tokens with int8 weights by Triton, interpreted or on a card, against the definition."""

from __future__ import annotations

import pytest
import torch
from test_kernels_gpu_linear import device, int8_weight, tokens  # noqa: F401

pytest.importorskip("triton")
from model.kernels import w8a8
from tests.numeric import assert_close

RATIO = 5e-3  # bfloat16 results; the interpreter cuts where a card rounds
TILES = [w8a8.Tile(32, 64, 64, 4, 2, 2, tma) for tma in (False, True)]


@pytest.fixture(params=TILES, ids=["pointers", "descriptors"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> w8a8.Tile:
    """Small tiles, so that small matrices have whole ones and rests of them."""
    for name in ("SINGLE", "SPANNED", "PAIRED"):
        monkeypatch.setattr(w8a8, name, request.param)
    monkeypatch.setattr(w8a8, "SPAN", request.param.columns)
    return request.param


def assert_rounded(ours: w8a8.Tokens, x: torch.Tensor, spans: bool) -> None:
    expected = w8a8.quantize_tokens_ref(x, spans)
    assert torch.equal(ours.values, expected.values)
    assert_close("scale", ours.scale, expected.scale, 1e-6)


@pytest.mark.parametrize("spans", [False, True])
@pytest.mark.parametrize(("t", "k"), [(1, 16), (7, 4096), (5, 1040)])
def test_tokens_are_rounded_by_their_largest_value(device, t, k, spans):  # noqa: F811
    wide = tokens(device, t, 2 * k)
    wide[t // 2] *= 4e6  # what a residual of a large model reaches
    wide[-1] = 0
    assert_rounded(w8a8.quantize_tokens(wide[:, k:], spans=spans), wide[:, k:], spans)
    index = torch.tensor([t - 1, 0, 0], device=device)
    assert_rounded(w8a8.quantize_tokens(wide[:, :k], index, spans), wide[index, :k], spans)


@pytest.mark.parametrize(("t", "n", "k"), [(1, 8, 16), (70, 100, 80), (32, 64, 64)])
def test_a_product_equals_the_definition(device, tile, t, n, k):  # noqa: F811
    x, weight, bias = tokens(device, t, k), int8_weight(device, n, k), tokens(device, n)
    for added in (bias, None):
        assert_close("out", w8a8.linear(x, *weight, added), w8a8.linear_ref(x.float(), *weight, added), RATIO)


@pytest.mark.parametrize(("t", "d", "f"), [(1, 16, 16), (70, 80, 208), (32, 64, 64), (5, 64, 128)])
def test_a_swiglu_equals_the_definition(device, tile, t, d, f):  # noqa: F811
    x, gate, up = tokens(device, t, d), int8_weight(device, f, d), int8_weight(device, f, d, seed=1)
    down = int8_weight(device, d, f, seed=2)
    up[1][f // 3] *= 100  # an outlier that only its span should pay for
    out = w8a8.swiglu(x, *gate, *up, *down)
    assert_close("out", out, w8a8.swiglu(x.float(), *gate, *up, *down), 1e-2)  # what lies halfway may go either way


@pytest.mark.parametrize(("t", "n", "k"), [(1, 8, 16), (70, 100, 336), (32, 64, 256)])
def test_a_product_of_several_scales_a_token_equals_the_definition(device, tile, t, n, k):  # noqa: F811
    x, weight = tokens(device, t, k), int8_weight(device, n, k)
    x[:, k // 2] *= 100
    out, expected = w8a8.linear(x, *weight, spans=True), w8a8.linear_ref(x.float(), *weight, spans=True)
    assert_close("out", out, expected, RATIO)
    exact = x.float() @ (weight[0].float() * weight[1][:, None]).T
    errors = [(w8a8.linear_ref(x.float(), *weight, spans=spans) - exact).norm() for spans in (True, False)]
    assert errors[0] < errors[1] or k <= w8a8.SPAN


@pytest.mark.parametrize(
    ("t", "m", "k", "only"), [(70, 4, 2, None), (1, 3, 2, None), (40, 16, 2, [2, 9]), (33, 1, 1, None)]
)
def test_experts_equal_the_definition(device, tile, t, m, k, only):  # noqa: F811
    """Experts with no rows, with one, and with more than a tile."""
    d, f = 48, 208
    x, up, down = tokens(device, t, d), int8_weight(device, m, 2 * f, d), int8_weight(device, m, d, f)
    allowed = torch.tensor(only or range(m))
    drawn = torch.rand(t, len(allowed), generator=torch.Generator().manual_seed(t)).argsort(-1)[:, :k]
    chosen, weights = allowed[drawn].to(device), torch.rand(t, k).to(device)
    out = w8a8.mix_experts(x, weights, chosen, *up, *down)
    expected = w8a8.mix_experts_ref(x.float(), weights, chosen, *up, *down)
    assert_close("out", out, expected, 2e-2)  # the gated rows are bfloat16 before they are rounded to int8


def test_the_tiles_that_ship_give_the_same(device):  # noqa: F811
    x, weight = tokens(device, 150, 272), int8_weight(device, 300, 272)
    assert_close("out", w8a8.linear(x, *weight), w8a8.linear_ref(x.float(), *weight), RATIO)


def test_matrices_behind_two_gigabytes_are_found(device, tile):  # noqa: F811
    """Expert 1 begins at byte 2**31; the memory before it is never touched."""
    (own, scale), x = int8_weight(device, 40, 16), tokens(device, 3, 16)
    weight = torch.empty((1 << 27) + 64, 16, dtype=torch.int8, device=device)
    weight[1 << 27 :] = 0
    weight[1 << 27 :][:40] = own
    scales = torch.empty(len(weight), device=device)
    scales[1 << 27 :][:40] = scale
    places = w8a8.Places.of(torch.ones(3, 1, dtype=torch.int64, device=device), 2, tile.rows)
    out, shares = x.new_full((3, 40), torch.nan), torch.ones(3, device=device)
    rounded = w8a8.quantize_tokens(x, places.order)
    w8a8._multiply(rounded, weight, scales, out, places=places, shares=shares, expert_rows=1 << 27)
    assert_close("out", out, w8a8.linear_ref(x.float(), own, scale), RATIO)
