"""How near two tensors must be: a relative RMS, one number a dtype, written where it is used and never loosened."""

from __future__ import annotations

from torch import Tensor


def assert_close(name: str, ours: Tensor, expected: Tensor, ratio: float) -> None:
    """Fails when the RMS of the difference is over `ratio` times the RMS of what is expected."""
    assert ours.shape == expected.shape, f"{name}: {tuple(ours.shape)} instead of {tuple(expected.shape)}"
    error, size = (ours.double() - expected.double()).norm().item(), expected.double().norm().item()
    assert error <= ratio * size, f"{name}: relative RMS {error / (size or 1):.2e} is over {ratio:.0e}"
