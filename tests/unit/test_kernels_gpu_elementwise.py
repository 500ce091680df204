"""Norms, router, gates and unpacked weights on the GPU, or on its emulator, against float32; the modules too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_kernels_gpu_linear import RATIO, device, int8_weight, normal, poisoned, tokens  # noqa: F401
from torch import Tensor

from model.int8 import Int8Experts, Int8Linear
from model.kernels import gpu_linear, gpu_prefill
from model.kernels.cpu import int8_linear_ref
from model.kernels.rms_norm import RMSNorm, rms_norm_ref
from model.kernels.silu_mul import silu_mul, silu_mul_ref
from model.moe import MoE
from tests.numeric import assert_close

EPS = 1e-6
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def added(residual: Tensor, y: Tensor | None, route_weights: Tensor | None) -> Tensor:
    if y is None:
        return residual.clone()
    return residual + (y.float() if route_weights is None else (route_weights[..., None] * y.float()).sum(1))


@pytest.mark.parametrize("d", [4, 96, 576, 2052, 4096])
@pytest.mark.parametrize(("routes", "dtype"), [(None, BF16), (0, BF16), (0, F32), (1, F32), (3, F32)])
def test_add_norm_equals_the_definition(device, d, routes, dtype):  # noqa: F811
    residual, weight = normal(5, d).to(device), tokens(device, d)
    route_weights = torch.rand(5, routes, device=device) if routes else None
    y = None if routes is None else normal(5, *([routes] if routes else []), d, seed=1).to(device, dtype)
    expected = added(residual, y, route_weights)
    normed = poisoned(device, 5, d)
    gpu_linear.add_norm(residual, y, route_weights, weight, EPS, normed)
    assert_close("residual", residual, expected, RATIO[F32])
    assert_close("normed", normed, rms_norm_ref(expected, weight, EPS), RATIO[BF16])


@pytest.mark.parametrize(("m", "d", "num_experts", "top_k"), [(1, 576, 2, 1), (7, 96, 16, 2), (3, 4096, 16, 2)])
@pytest.mark.parametrize("more", [0, 1])
def test_router_chooses_as_the_definition(device, m, d, num_experts, top_k, more):  # noqa: F811
    num_experts += more  # 3 and 17 are no powers of two
    residual, weight, router = normal(m, d).to(device), tokens(device, d), tokens(device, num_experts, d, seed=3)
    normed, weights = poisoned(device, m, d), poisoned(device, m, top_k, dtype=F32)
    chosen = torch.full((m, top_k), -1, dtype=torch.int32, device=device)
    gpu_linear.add_norm(residual, None, None, weight, EPS, normed, router, weights, chosen)
    expected_weights, expected = gpu_linear.route_ref(normed, router, top_k)
    assert torch.equal(chosen, expected)
    assert_close("weights", weights, expected_weights, 1e-4)


def test_router_prefers_the_lower_index_among_equals(device):  # noqa: F811
    residual, weight, router = normal(2, 64).to(device), tokens(device, 64), tokens(device, 1, 64).repeat(6, 1)
    router[0] = -router[0]
    residual[0] = router[1].float()  # towards the five that are equal; the other row away from them
    residual[1] = -residual[0]
    weight.fill_(1)
    normed, weights = poisoned(device, 2, 64), poisoned(device, 2, 3, dtype=F32)
    chosen = torch.full((2, 3), -1, dtype=torch.int32, device=device)
    gpu_linear.add_norm(residual, None, None, weight, EPS, normed, router, weights, chosen)
    assert chosen.tolist() == [[1, 2, 3], [0, 1, 2]]
    assert_close("weights", weights[0], torch.full_like(weights[0], 0.2), RATIO[F32])


@pytest.mark.parametrize(("n", "k"), [(1, 16), (37, 48), (300, 576)])
def test_dequantize_rounds_once(device, n, k):  # noqa: F811
    weight, scale = int8_weight(device, n, k)
    out = gpu_prefill.dequantize(weight, scale, poisoned(device, n, k))
    assert torch.equal(out, (weight.float() * scale[:, None]).bfloat16())


@pytest.mark.parametrize(("rows", "f"), [(1, 8), (5, 48), (67, 1536)])
def test_silu_mul_of_halves(device, rows, f):  # noqa: F811
    gate, up = tokens(device, rows, 2 * f).chunk(2, dim=-1)
    assert_close("out", silu_mul(gate, up), silu_mul_ref(gate.float(), up.float()), RATIO[BF16])


@pytest.mark.parametrize(("rows", "wide", "cut"), [(1, 8, (0, 8)), (9, 288, (256, 272)), (9, 288, (0, 256))])
def test_norm_of_a_slice(device, rows, wide, cut):  # noqa: F811
    x, norm = tokens(device, rows, wide)[:, slice(*cut)], RMSNorm(cut[1] - cut[0], eps=EPS, dtype=BF16, device=device)
    norm.weight.copy_(tokens(device, cut[1] - cut[0]))
    assert gpu_prefill.norm_fits(x, norm.weight)
    assert_close("out", norm(x), rms_norm_ref(x.float(), norm.weight, EPS), RATIO[BF16])


def test_norm_of_long_rows_and_of_rows_it_does_not_take(device):  # noqa: F811
    for d in (4096, 36):  # 36 is no multiple of 8
        x, weight = tokens(device, 3, d), tokens(device, d)
        norm = RMSNorm(d, eps=EPS, dtype=BF16, device=device)
        norm.weight.copy_(weight)
        assert gpu_prefill.norm_fits(x, weight) == (d == 4096)
        assert_close("out", norm(x), rms_norm_ref(x.float(), weight, EPS), RATIO[BF16])


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 130])
def test_linear_of_any_number_of_tokens(device, monkeypatch, num_tokens):  # noqa: F811
    layer = Int8Linear(torch.nn.Linear(48, 37, device=device, dtype=BF16))
    weight, scale = int8_weight(device, 37, 48)
    layer.weight.copy_(weight), layer.scale.copy_(scale)
    x = tokens(device, 2, num_tokens, 48)[:, ::2] if num_tokens > 1 else tokens(device, 1, 48)
    expected = int8_linear_ref(x.float(), weight, scale, layer.bias.float())
    assert_close("out", layer(x), expected, 4e-3)
    monkeypatch.setattr(gpu_prefill, "_MAX_SCRATCH", 480)  # ten rows at a time
    assert_close("out in parts", layer(x), expected, 4e-3)


@pytest.mark.parametrize("num_tokens", [3, 64, 70, 130, 200])  # over 64 an expert its weights are unpacked
def test_experts_of_any_number_of_tokens(device, monkeypatch, make_moe, num_tokens):  # noqa: F811
    moe, experts = make_moe
    x = tokens(device, num_tokens, 96)
    monkeypatch.setattr(gpu_prefill, "MAX_ROWS", 50)
    assert experts.can_mix(x)
    weights, chosen = moe.router(x).softmax(dim=-1, dtype=F32).topk(2, dim=-1)
    tensors = (experts.gate_up_proj, experts.gate_up_scale, experts.down_proj, experts.down_scale)
    _, rows = gpu_linear.experts_ref(x, chosen, *tensors)
    assert_close("out", moe(x), (weights[..., None] * rows).sum(1), 6e-3)


@pytest.fixture
def make_moe(device: str) -> tuple[MoE, Int8Experts]:  # noqa: F811
    """A MoE of 4 experts with random int8 weights, and these."""

    class Config:
        num_experts, num_experts_per_tok, hidden_size, intermediate_size = 4, 2, 96, 64

    moe = MoE(Config()).to(device, BF16)
    moe.experts = experts = Int8Experts(moe.experts)
    moe.router.weight.copy_(tokens(device, 4, 96) * 96**-0.5)
    for name, shape in (("gate_up", (4, 128, 96)), ("down", (4, 96, 64))):
        weight, scale = int8_weight(device, *shape)
        getattr(experts, f"{name}_proj").copy_(weight)
        getattr(experts, f"{name}_scale").copy_(scale)
    return moe, experts


def test_what_needs_a_gradient_is_left_to_pytorch(device):  # noqa: F811
    gate = tokens(device, 3, 16).requires_grad_()
    with torch.enable_grad():
        silu_mul(gate, gate.detach()).float().sum().backward()
    expected = torch.autograd.functional.jacobian(lambda x: (F.silu(x) * gate.detach().float()).sum(), gate.float())
    assert_close("gradient", gate.grad, expected, 1e-2)
