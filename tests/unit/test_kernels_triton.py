"""Triton kernels against the definitions: outputs, states, gradients; under the interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")
from model.kernels.causal_conv import causal_conv_ref, causal_conv_torch
from model.kernels.causal_conv_triton import causal_conv_triton
from model.kernels.selective_scan import selective_scan_ref
from model.kernels.selective_scan_triton import selective_scan_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def scan_inputs(b: int, t: int, e: int, n: int) -> dict[str, torch.Tensor]:
    wide = torch.randn(b, t, 2 * e, device=DEVICE)  # u and z are halves of one projection: strided
    u, z = wide.chunk(2, dim=-1)
    delta, A = torch.rand(b, t, e, device=DEVICE) * 0.5, -3 * torch.rand(e, n, device=DEVICE)
    B, C = torch.randn(b, t, 2 * n, device=DEVICE).chunk(2, dim=-1)
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": torch.randn(e, device=DEVICE), "z": z}


@pytest.fixture(params=[64, 256])
def segment(request, monkeypatch):
    """Rows in several segments without being long."""
    monkeypatch.setattr("model.kernels.selective_scan_triton.SEGMENT", request.param)


@pytest.mark.usefixtures("segment")
@pytest.mark.parametrize(("b", "t", "e", "n"), [(2, 37, 33, 16), (1, 64, 5, 4), (1, 1, 32, 17), (2, 193, 7, 3)])
def test_scan_from_a_state_equals_the_definition(b, t, e, n):
    torch.manual_seed(t)
    inputs, state = scan_inputs(b, t, e, n), torch.randn(b, e, n, device=DEVICE)
    expected_state = state.double()
    expected = selective_scan_ref(**{k: v.double() for k, v in inputs.items()}, state=expected_state)
    out = selective_scan_triton(**inputs, state=state)
    assert relative(out, expected) < 1e-6
    assert relative(state, expected_state) < 1e-6


@pytest.mark.usefixtures("segment")
@pytest.mark.parametrize(("b", "t", "e", "n"), [(2, 37, 33, 16), (1, 65, 7, 5), (2, 193, 34, 4), (1, 128, 5, 2)])
def test_gradients_of_the_scan_equal_those_of_the_definition(b, t, e, n):
    torch.manual_seed(t)
    inputs = {k: v.detach().requires_grad_() for k, v in scan_inputs(b, t, e, n).items()}
    exact = {k: v.detach().double().requires_grad_() for k, v in inputs.items()}
    grad = torch.randn(b, t, e, device=DEVICE)
    selective_scan_ref(**exact).backward(grad.double())
    selective_scan_triton(**inputs, state=None).backward(grad)
    for name in inputs:
        assert relative(inputs[name].grad, exact[name].grad) < 1e-5, name


@pytest.mark.parametrize(("b", "t", "e", "w", "bias"), [(2, 37, 33, 4, 1), (1, 64, 65, 3, 0), (3, 1, 5, 2, 1)])
def test_convolution_equals_the_definition(b, t, e, w, bias):
    torch.manual_seed(t)
    x = torch.randn(b, t, 2 * e, device=DEVICE)[:, :, :e]
    weight, added = torch.randn(e, w, device=DEVICE), torch.randn(e, device=DEVICE) if bias else None
    state = torch.randn(b, e, w - 1, device=DEVICE)
    expected_state = state.clone()
    expected = causal_conv_ref(x, expected_state, weight, added)
    assert relative(causal_conv_triton(x, state, weight, added), expected) < 1e-6
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize(("b", "t", "e", "w"), [(2, 37, 33, 4), (1, 65, 7, 2)])
def test_gradients_of_the_convolution_equal_autograds(b, t, e, w):
    torch.manual_seed(t)
    inputs = [torch.randn(b, t, e, device=DEVICE), torch.randn(e, w, device=DEVICE), torch.randn(e, device=DEVICE)]
    own, exact = ([x.detach().to(d).clone().requires_grad_() for x in inputs] for d in (torch.float32, torch.float64))
    grad = torch.randn(b, t, e, device=DEVICE)
    causal_conv_triton(own[0], None, *own[1:]).backward(grad)
    causal_conv_torch(exact[0], None, *exact[1:]).backward(grad.double())
    for mine, reference in zip(own, exact, strict=True):
        assert relative(mine.grad, reference.grad) < 1e-5


def test_a_tensor_that_is_not_contiguous_is_named():
    inputs = scan_inputs(1, 4, 8, 4)
    inputs["B"] = inputs["B"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="B must be contiguous"):
        selective_scan_triton(**inputs, state=None)
