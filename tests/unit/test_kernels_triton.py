"""Triton kernels against the definitions: outputs, states, gradients; under the interpreter where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton")
from model.attention import rotate, rotation
from model.kernels.causal_conv import causal_conv_ref, causal_conv_torch
from model.kernels.causal_conv_triton import causal_conv_triton
from model.kernels.rms_norm import rms_norm_ref
from model.kernels.selective_scan import selective_scan_ref
from model.kernels.selective_scan_triton import selective_scan_triton
from model.kernels.silu_mul import silu_mul_ref
from model.train import fused, losses

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def scan_inputs(b: int, t: int, e: int, n: int) -> dict[str, torch.Tensor]:
    wide = torch.randn(b, t, 2 * e, device=DEVICE)  # u and z are halves of one projection: strided
    u, z = wide.chunk(2, dim=-1)
    delta, A = torch.rand(b, t, e, device=DEVICE) * 0.5, -3 * torch.rand(e, n, device=DEVICE)
    B, C = torch.randn(b, t, 2 * n, device=DEVICE).chunk(2, dim=-1)
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": torch.randn(e, device=DEVICE), "z": z}


@pytest.fixture
def cut(monkeypatch):
    """cut(steps): segments of that length, so that rows have several without being long."""
    return lambda steps: monkeypatch.setattr("model.kernels.selective_scan_triton.SEGMENT", steps)


@pytest.mark.parametrize("segment", [32, 256])
@pytest.mark.parametrize(("b", "t", "e", "n"), [(2, 37, 33, 16), (1, 64, 5, 4), (1, 1, 32, 17), (2, 97, 7, 3)])
def test_scan_from_a_state_equals_the_definition(cut, segment, b, t, e, n):
    cut(segment)
    torch.manual_seed(t)
    inputs, state = scan_inputs(b, t, e, n), torch.randn(b, e, n, device=DEVICE)
    expected_state = state.double()
    expected = selective_scan_ref(**{k: v.double() for k, v in inputs.items()}, state=expected_state)
    out = selective_scan_triton(**inputs, state=state)
    assert relative(out, expected) < 1e-6
    assert relative(state, expected_state) < 1e-6


@pytest.mark.parametrize(
    ("segment", "b", "t", "e", "n"),
    [
        (256, 2, 37, 33, 16),
        (256, 1, 65, 7, 5),
        (32, 2, 37, 33, 16),
        (32, 1, 65, 7, 5),
        (32, 2, 97, 7, 4),
        (32, 1, 128, 5, 2),
    ],
)
def test_gradients_of_the_scan_equal_those_of_the_definition(cut, segment, b, t, e, n):
    cut(segment)
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


def test_a_sequence_beyond_what_an_offset_reaches_is_refused():
    u, B = (torch.empty(1, 1 << 16, width, device="meta") for width in (1 << 15, 16))
    A = torch.empty(1 << 15, 16, device="meta")
    with pytest.raises(ValueError, match="u has 65536 steps 32768 apart"):
        selective_scan_triton(u, u, A, B, B, A[:, 0], u, None)


@pytest.mark.parametrize(("rows", "d"), [(37, 33), (5, 16), (2100, 36), (1, 576)])
def test_fused_norm_and_its_gradients_equal_the_definition(monkeypatch, rows, d):
    monkeypatch.setattr(fused, "PROGRAMS", 3)
    torch.manual_seed(rows)
    wide = torch.randn(rows, 2 * d, device=DEVICE, requires_grad=True)
    weight = torch.randn(d, device=DEVICE, requires_grad=True)
    grad = torch.randn(rows, 2 * d, device=DEVICE)[:, :d]  # rows apart, as a slice's gradient may be
    x = wide[:, d:]
    out = fused.rms_norm(x, weight, 1e-5)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = rms_norm_ref(*exact, 1e-5)
    expected.backward(grad.double())
    out.backward(grad)
    assert relative(out, expected) < 1e-6
    assert relative(wide.grad[:, d:], exact[0].grad) < 1e-5
    assert relative(weight.grad, exact[1].grad) < 1e-5


@pytest.mark.parametrize(("rows", "f"), [(7, 33), (3, 600), (1, 1)])
def test_fused_gate_and_its_gradient_equal_the_definition(rows, f):
    torch.manual_seed(f)
    gate_up, grad = torch.randn(rows, 2 * f, device=DEVICE, requires_grad=True), torch.randn(rows, f, device=DEVICE)
    exact = gate_up.detach().double().requires_grad_()
    expected = silu_mul_ref(*exact.chunk(2, dim=-1))
    expected.backward(grad.double())
    out = fused.gated(gate_up)
    out.backward(grad)
    assert relative(out, expected) < 1e-6
    assert relative(gate_up.grad, exact.grad) < 1e-5


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize(("n", "v"), [(11, 37), (3, 5000), (1, 64)])
def test_fused_loss_over_the_vocabulary_equals_the_definition(taught, n, v):
    torch.manual_seed(n)
    hidden, head, other, other_head = (torch.randn(*s, device=DEVICE) for s in ((n, 8), (v, 8), (n, 8), (v, 8)))
    targets = torch.randint(v, (n,), device=DEVICE)
    weights = [torch.rand(n, device=DEVICE), torch.rand(n, device=DEVICE)]
    given, results = (hidden, head), []
    for dtype, loss in ((torch.float32, fused.vocabulary_loss), (torch.float64, losses.vocabulary_loss_ref)):
        own = [t.detach().to(dtype).requires_grad_() for t in given]
        taught_by = [t.to(dtype) for t in (other, other_head)] if taught else [None, None]
        total, kl, ce = loss(*own, *taught_by, targets, *(w.to(dtype) for w in weights))
        (3 * total).backward()
        results.append([total.detach(), *([kl] if taught else []), ce, *(t.grad for t in own)])
    for ours, expected in zip(*results, strict=True):
        assert relative(ours, expected) < 1e-5


@pytest.mark.parametrize(("b", "t", "e"), [(2, 7, 33), (1, 300, 5), (1, 1, 1100)])
def test_fused_softplus_and_its_gradients_equal_the_definition(monkeypatch, b, t, e):
    monkeypatch.setattr(fused, "PROGRAMS", 3)
    torch.manual_seed(e)
    x = (6 * torch.randn(b, t, e, device=DEVICE) - 4).requires_grad_()  # most steps are small, as those of a scan
    bias, grad = torch.randn(e, device=DEVICE, requires_grad=True), torch.randn(b, t, e, device=DEVICE)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, bias)]
    expected = torch.nn.functional.softplus(sum(exact), threshold=100)
    expected.backward(grad.double())
    out = fused.softplus(x, bias)
    out.backward(grad)
    assert ((out.double() - expected) / expected).abs().max() < 3e-6
    for ours, theirs in zip((x, bias), exact, strict=True):
        assert relative(ours.grad, theirs.grad) < 1e-5


@pytest.mark.parametrize(("b", "t", "heads", "p"), [(2, 7, 9, 64), (1, 3, 1, 12)])
def test_fused_rotation_and_its_gradient_equal_the_definition(b, t, heads, p):
    torch.manual_seed(p)
    x, grad = (
        torch.randn(b * t, heads, p, device=DEVICE, requires_grad=True),
        torch.randn(b * t, heads, p, device=DEVICE),
    )
    cos, sin = rotation(torch.arange(t, device=DEVICE).repeat(b), 1e4, 0.5, p)
    exact = x.detach().double().requires_grad_()
    expected = rotate(exact, cos.double(), sin.double())
    expected.backward(grad.double())
    out = fused.rotate(x, *(angle[:t, 0, : p // 2].contiguous() for angle in (cos, sin)))
    out.backward(grad)
    assert relative(out, expected) < 1e-6
    assert relative(x.grad, exact.grad) < 1e-6
