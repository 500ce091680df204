"""scan.cu against the definition: outputs and states, cut anywhere, strided and bf16 inputs; on a GPU or emulated."""

import pytest
import torch
import torch.nn.functional as F

from model.kernels import gpu
from model.kernels.selective_scan import selective_scan, selective_scan_cuda, selective_scan_ref
from tests.numeric import assert_close

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3e-3}  # bf16: the rounding of the output


def inputs(b: int, t: int, e: int, n: int, device: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """u and z are halves of one projection and B, C parts of one: strided. A reaches from slow to fast decay."""
    torch.manual_seed(t)
    u, z = torch.randn(b, t, 2 * e).to(device, dtype).chunk(2, dim=-1)
    B, C = torch.randn(b, t, 2 * n + 3).to(device, dtype)[:, :, 3:].chunk(2, dim=-1)
    delta, bias = torch.randn(b, t, e).to(device, dtype), (torch.randn(e) * 3 - 3).to(device)
    A, D = (-4 * torch.rand(e, n)).to(device), torch.randn(e).to(device)
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": bias}


def exact(given: dict[str, torch.Tensor], state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and the state after, by the definition in float64."""
    arguments = {name: x.double() for name, x in given.items()}
    bias = arguments.pop("delta_bias")
    arguments["delta"] = F.softplus(arguments["delta"] + bias)
    b, _, e = given["u"].shape
    after = torch.zeros(b, e, given["A"].shape[1], dtype=torch.float64, device=bias.device)
    after += 0 if state is None else state.double()
    return selective_scan_ref(**arguments, state=after), after


@pytest.mark.parametrize(
    ("b", "t", "e", "n"), [(2, 37, 40, 16), (1, 65, 8, 4), (1, 1, 32, 8), (3, 32, 72, 16), (1, 95, 16, 32)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scan_from_a_state_equals_the_definition(device, b, t, e, n, dtype):
    given, state = inputs(b, t, e, n, device, dtype), torch.randn(b, e, n).to(device)
    expected, expected_state = exact(given, state)
    out = selective_scan(**given, state=state)
    assert out.dtype == dtype
    assert_close("output", out, expected, TOLERANCE[dtype])
    assert_close("state", state, expected_state, 1e-6)


def test_scan_without_a_state_or_softplus(device):
    given = inputs(2, 45, 40, 16, device)
    expected, _ = exact(given, None)
    assert_close("output", selective_scan(**given), expected, 1e-6)
    given["delta"] = F.softplus(given["delta"] + given.pop("delta_bias"))
    assert_close("output", selective_scan(**given), expected, 1e-6)


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 70])
def test_cut_anywhere_is_the_whole(device, cut):
    given, state = inputs(1, 71, 40, 16, device), torch.randn(1, 40, 16).to(device)
    expected, expected_state = exact(given, state)
    along = {"u", "delta", "z", "B", "C"}
    parts = [
        selective_scan(**{k: x[:, part] if k in along else x for k, x in given.items()}, state=state)
        for part in (slice(cut), slice(cut, None))
    ]
    assert_close("output", torch.cat(parts, dim=1), expected, 1e-6)
    assert_close("state", state, expected_state, 1e-6)


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
@pytest.mark.parametrize("with_state", [False, True])
def test_chunks_at_once_are_the_whole(device, chunks, with_state):
    given, state = inputs(2, 213, 40, 16, device), torch.randn(2, 40, 16).to(device) if with_state else None
    expected, expected_state = exact(given, state)
    out = selective_scan_cuda(**given, state=state, chunks=chunks)
    assert_close("output", out, expected, 1e-6)
    if state is not None:
        assert_close("state", state, expected_state, 1e-6)


def test_softplus_keeps_its_precision_where_delta_is_small_and_where_it_is_large(device):
    given = inputs(1, 8, 8, 4, device)
    given["delta"] = torch.linspace(-16, 60, 64).view(1, 8, 8).to(device)
    given["delta_bias"].zero_()
    given["u"], given["A"] = torch.ones_like(given["delta"]), torch.zeros_like(given["A"])
    given["B"], given["C"] = (torch.ones_like(given[name]) for name in "BC")
    given["D"].zero_()
    expected, _ = exact(given, None)
    torch.testing.assert_close(selective_scan(**given).double(), expected, rtol=2e-6, atol=0)


def test_nan_stays_in_its_sequence_and_channel(device):
    given = inputs(2, 40, 40, 16, device)
    given["delta"][0, 33, 5] = torch.nan
    out = selective_scan(**given)
    assert out[0, 33:, 5].isnan().all()
    out[0, 33:, 5] = 0
    assert not out.isnan().any()


def test_what_the_kernel_does_not_take_goes_elsewhere(cuda_on_cpu, monkeypatch):
    launched = []
    monkeypatch.setattr(gpu, "emulator", lambda *arguments: launched.append(arguments))
    given, state = inputs(1, 9, 7, 5, "cpu"), torch.randn(1, 7, 5)
    expected, expected_state = exact(given, state)
    assert_close("output", selective_scan(**given, state=state), expected, 1e-6)
    assert_close("state", state, expected_state, 1e-6)
    assert not launched
