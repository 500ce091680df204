"""int8 SSM states: how far off they may be, and that a state and what was kept of it go on as the same bits."""

import pytest
import torch
from torch import Tensor

from model import HybridState, Jamba, Snapshot, load_model
from model.ssm_rounding import dequantize_ssm, quantize_ssm
from model.state_codec import decode_value, encode_value

TOKENS = torch.randint(0, 512, (1, 120), generator=torch.Generator().manual_seed(1))


def read(model: Jamba, tokens: Tensor) -> HybridState:
    state = model.new_state()
    model(tokens, state)
    return state


def rounded(ssm: Tensor) -> Tensor:
    out = torch.full_like(ssm, torch.nan)
    dequantize_ssm(*quantize_ssm(ssm), out=out)
    return out


def test_no_value_is_further_off_than_half_a_step_of_its_channel():
    torch.manual_seed(0)
    ssm = torch.randn(3, 500, 16) * torch.logspace(-6, 3, 500)[:, None]
    ssm[1, 7, 3] = 1e4  # an outlier spoils its own channel only
    step = ssm.abs().amax(2, keepdim=True) / 127
    assert ((rounded(ssm) - ssm).abs() <= 0.505 * step).all()


def test_the_largest_values_fit_whatever_their_scale_is_rounded_to():
    ssm = torch.linspace(1, 2, 100_000)[None, :, None] * torch.tensor([1.0, -1.0])
    assert {127, -127} == set(quantize_ssm(ssm)[0].flatten().tolist())


def test_shapes_and_sizes():
    whole, scale = quantize_ssm(torch.randn(28, 64, 16))
    assert (tuple(whole.shape), whole.dtype) == ((28, 64, 16), torch.int8)
    assert (tuple(scale.shape), scale.dtype) == ((28, 64, 1), torch.bfloat16)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, -3.0, 3e38])
def test_extreme_states_stay_finite(value):
    ssm = torch.full((2, 5, 4), value)
    ssm[0, 0] = 0
    out = rounded(ssm)
    assert out.isfinite().all() and (out[0, 0] == 0).all()
    assert abs(value) < 1e-37 or torch.allclose(out, ssm, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_goes_on_as_what_was_kept_of_it(tiny_jamba_dir, dtype):
    model = load_model(tiny_jamba_dir, dtype=dtype)
    state = read(model, TOKENS[:, :70])
    before = state.ssm.clone()
    snapshot = state.snapshot(int8=True)
    assert not torch.equal(state.ssm, before)
    assert snapshot.nbytes < 0.55 * state.snapshot().nbytes
    tensors = decode_value("k", "l", encode_value("k", "l", snapshot.tensors), 3)
    again = restored(model, snapshot, tensors, state.read_kv(0, 70))
    assert torch.equal(again.ssm, state.ssm)
    assert torch.equal(model(TOKENS[:, 70:], again), model(TOKENS[:, 70:], state))


def restored(model: Jamba, snapshot: Snapshot, tensors: list[Tensor], kv: Tensor) -> HybridState:
    state = model.new_state()
    state.restore(Snapshot(snapshot.num_tokens, *tensors), [kv])
    return state


def test_an_int8_snapshot_without_its_scale_is_refused(tiny_jamba_dir):
    model = load_model(tiny_jamba_dir)
    state = read(model, TOKENS[:, :70])
    snapshot = state.snapshot(int8=True)
    with pytest.raises(ValueError, match="ssm is"):
        restored(model, snapshot, [snapshot.conv, snapshot.ssm], state.read_kv(0, 70))
