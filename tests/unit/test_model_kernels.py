"""Each operation against its `_ref`: outputs and final states, odd shapes, gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.causal_conv import causal_conv, causal_conv_ref, causal_conv_torch
from model.kernels.selective_scan import selective_scan, selective_scan_ref, selective_scan_torch
from tests.numeric import assert_close

RATIO = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}
SHAPES = [(1, 1, 5, 3), (3, 1, 16, 16), (2, 31, 7, 1), (1, 32, 33, 16), (2, 33, 5, 4), (1, 131, 17, 5)]  # b, t, e, n


def scan_inputs(b: int, t: int, e: int, n: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(b * t + e)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    u, dt, z, B, C = normal(b, t, e), normal(b, t, e), normal(b, t, e), normal(b, t, n), normal(b, t, n)
    wide = torch.promote_types(dtype, torch.float32)
    A, D = -normal(e, n).to(wide).exp(), normal(e).to(wide)
    return {"u": u, "delta": F.softplus(dt.to(wide)), "A": A, "B": B, "C": C, "D": D, "z": z}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scan", [selective_scan, selective_scan_torch])
def test_scan_equals_its_definition(scan: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, _, e, n = shape
    inputs = scan_inputs(*shape, dtype)
    state = torch.randn(b, e, n, generator=torch.Generator().manual_seed(0))
    expected_state = state.clone()
    with torch.no_grad():
        assert_close("from zeros", scan(**inputs), selective_scan_ref(**inputs), RATIO[dtype])
        expected = selective_scan_ref(**inputs, state=expected_state)
        assert_close("from a state", scan(**inputs, state=state), expected, RATIO[dtype])
    assert_close("final state", state, expected_state, RATIO[torch.float32])


def test_scan_survives_decays_that_vanish() -> None:
    inputs = scan_inputs(1, 70, 3, 4) | {"A": torch.full((3, 4), -80.0)}
    inputs["delta"][:, 10:20] = 50.0  # exp(-4000) is 0, and the product of the others below any float
    inputs["delta"][:, 40] = 0.0
    expected = selective_scan_ref(**inputs)
    assert expected.isfinite().all()
    for scan in (selective_scan, selective_scan_torch):
        assert_close(scan.__name__, scan(**inputs), expected, RATIO[torch.float32])


@pytest.mark.parametrize("t", [2, 32, 67])
def test_gradients_of_the_scan_are_those_of_its_definition(t: int) -> None:
    gradients = []
    for scan in (selective_scan_torch, selective_scan_ref):
        inputs = {name: x.requires_grad_() for name, x in scan_inputs(2, t, 3, 4, torch.float64).items()}
        y = scan(**inputs)
        y.square().sum().backward()
        gradients.append({name: x.grad for name, x in inputs.items()})
    for name, gradient in gradients[0].items():
        assert_close(name, gradient, gradients[1][name], RATIO[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (3, 37, 21, 5), (2, 130, 16, 16)])  # b, t, e, n
def test_gradients_in_single_precision_are_those_of_the_definition(
    shape: tuple[int, ...], biased: bool, dtype: torch.dtype
) -> None:
    inputs = scan_inputs(*shape, dtype)
    bias = torch.randn(shape[2], generator=torch.Generator().manual_seed(1)) if biased else None
    exact = {name: x.double().requires_grad_() for name, x in (inputs | ({"bias": bias} if biased else {})).items()}
    given = {name: x.clone().requires_grad_() for name, x in (inputs | ({"bias": bias} if biased else {})).items()}
    ours = selective_scan(**{k: x for k, x in given.items() if k != "bias"}, delta_bias=given.get("bias"))
    delta = F.softplus(exact["delta"] + exact["bias"]) if biased else exact["delta"]
    theirs = selective_scan_ref(**{k: x for k, x in exact.items() if k != "bias"} | {"delta": delta})
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours.float() * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert_close("y", ours, theirs, RATIO[dtype])
    for name, x in given.items():
        assert_close(name, x.grad, exact[name].grad, RATIO[dtype])  # in bfloat16 the gradient of y is rounded too


def test_gradients_of_the_scan_are_the_numerical_ones() -> None:
    inputs = scan_inputs(1, 35, 2, 2, torch.float64)
    assert torch.autograd.gradcheck(selective_scan_torch, tuple(x.requires_grad_() for x in inputs.values()))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 5, 4), (3, 2, 16, 4), (2, 3, 7, 2), (2, 37, 33, 3)])  # b, t, e, w
@pytest.mark.parametrize("conv", [causal_conv, causal_conv_torch])
def test_conv_equals_its_definition(
    conv: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    b, t, e, w = shape
    generator = torch.Generator().manual_seed(t)
    x, weight, offset = (torch.randn(s, generator=generator).to(dtype) for s in ((b, t, e), (e, w), (e,)))
    offset = offset if bias else None
    state = torch.randn(b, e, w - 1, generator=generator).to(dtype)
    expected_state = state.clone()
    with torch.no_grad():
        assert_close(
            "from zeros", conv(x, None, weight, offset), causal_conv_ref(x, None, weight, offset), RATIO[dtype]
        )
        expected = causal_conv_ref(x, expected_state, weight, offset)
        assert_close("from a state", conv(x, state, weight, offset), expected, RATIO[dtype])
    assert torch.equal(state, expected_state)
