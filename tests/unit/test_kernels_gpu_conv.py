"""conv.cu against the definition: outputs and states, cut anywhere, strided and bf16 inputs; on a GPU or emulated."""

import pytest
import torch

from model.kernels import gpu
from model.kernels.causal_conv import causal_conv, causal_conv_cuda, causal_conv_ref
from tests.numeric import assert_close

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3}  # bf16: the rounding of the output


def exact(x: torch.Tensor, state: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return causal_conv_ref(x.double(), state, weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize(
    ("b", "t", "e", "w", "bias"),
    [(2, 37, 40, 4, True), (1, 64, 8, 3, False), (3, 1, 16, 4, True), (1, 2, 1032, 4, True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolution_from_a_state_equals_the_definition(device, b, t, e, w, bias, dtype, state_dtype):
    torch.manual_seed(t)
    x = torch.randn(b, t, 2 * e).to(device, dtype)[:, :, :e]
    weight = torch.randn(e, w).to(device, dtype)
    added = torch.randn(e).to(device, dtype) if bias else None
    state = torch.randn(b, e, w - 1).to(device, state_dtype)
    expected_state = state.double()
    expected = exact(x, expected_state, weight, added)
    out = causal_conv(x, state, weight, added)
    assert out.dtype == dtype
    assert_close("output", out, expected, TOLERANCE[dtype])
    assert torch.equal(state, expected_state.to(state_dtype))


def test_convolution_without_a_state(device):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 45, 40).to(device), torch.randn(40, 4).to(device)
    assert_close("output", causal_conv_cuda(x, None, weight, None), exact(x, None, weight, None), 1e-6)


@pytest.mark.parametrize("cut", [1, 2, 3, 31, 32, 33, 70])
def test_cut_anywhere_is_the_whole(device, cut):
    torch.manual_seed(cut)
    x, weight, bias = torch.randn(2, 71, 40).to(device), torch.randn(40, 4).to(device), torch.randn(40).to(device)
    state = torch.randn(2, 40, 3).to(device)
    expected_state = state.double()
    expected = exact(x, expected_state, weight, bias)
    parts = [causal_conv(x[:, part], state, weight, bias) for part in (slice(cut), slice(cut, None))]
    assert_close("output", torch.cat(parts, dim=1), expected, 1e-6)
    assert torch.equal(state.double(), expected_state)


def test_what_the_kernel_does_not_take_goes_elsewhere(cuda_on_cpu, monkeypatch):
    launched = []
    monkeypatch.setattr(gpu, "emulator", lambda *arguments: launched.append(arguments))
    x, weight, state = torch.randn(1, 9, 7), torch.randn(7, 4), torch.randn(1, 7, 3)
    expected_state = state.double()
    expected = exact(x, expected_state, weight, None)
    assert_close("output", causal_conv(x, state, weight, None), expected, 1e-6)
    assert torch.equal(state.double(), expected_state)
    assert not launched
