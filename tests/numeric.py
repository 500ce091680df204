"""How near two tensors must be: a relative RMS, one number a dtype, written where it is used and never loosened.

And the bits of a state, for what must be the same.
"""

from __future__ import annotations

from torch import Tensor

from model import HybridState, StateLayout
from model.state import Snapshot
from model.state_codec import decode_value, encode_value


def assert_close(name: str, ours: Tensor, expected: Tensor, ratio: float) -> None:
    """Fails when the RMS of the difference is over `ratio` times the RMS of what is expected."""
    assert ours.shape == expected.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(expected.shape)}"
    error, size = (ours.double() - expected.double()).norm().item(), expected.double().norm().item()
    assert error <= ratio * size, f"{name}: relative RMS {error / (size or 1):.2e} is over {ratio:.0e}"


def state_bytes(state: HybridState) -> bytes:
    """All of a state, as it is stored."""
    tensors = [*state.snapshot().tensors, state.read_kv(0, state.num_tokens)]
    return bytes(encode_value("state", state.layout.fingerprint().hex(), tensors))


def state_of(layout: StateLayout, data: bytes) -> HybridState:
    """The state whose `state_bytes` these are."""
    conv, ssm, kv = decode_value("state", layout.fingerprint().hex(), bytearray(data), 3)
    state = HybridState(layout)
    state.restore(Snapshot(kv.shape[2], conv, ssm), [kv])
    return state
