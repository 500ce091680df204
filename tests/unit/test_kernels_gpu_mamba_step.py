"""The recurrent step of decoding on the GPU against its definition, on the emulator and, where there is one, a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.kernels.gpu_mamba import StepWeights, fits, ssm_step, ssm_step_ref
from tests.numeric import assert_close

OUT_RATIO = 4e-3  # the rounding of bfloat16
STATE_RATIO = 2e-6
LAYERS, LAYER = 3, 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def step_weights(e: int, n: int, r: int, device: str) -> StepWeights:
    norms = [1 + 0.2 * normal(size, seed=i) for i, size in enumerate((r, n, n))]
    tensors = [*norms, normal(e, r) * r**-0.5, normal(e) - 2]
    tensors = [x.bfloat16() for x in tensors] + [0.5 * normal(e, n) + 1, normal(e, seed=1)]
    return StepWeights(*(x.to(device) for x in tensors), eps=1e-6)


@pytest.mark.parametrize("b", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("e", "n", "r"), [(64, 8, 4), (100, 16, 36), (576, 16, 36), (33, 16, 256), (70, 4, 8)])
def test_step_equals_its_definition(b: int, e: int, n: int, r: int, device: str) -> None:
    weights = step_weights(e, n, r, device)
    states = [normal(LAYERS, e, n, seed=i).to(device) for i in range(b)]
    expected_states = [state.double() for state in states]
    x = 3 * normal(b, r + 2 * n).to(device)
    u, z = (normal(b, e, seed=i).bfloat16().to(device) for i in (1, 2))
    addresses = torch.tensor([state.data_ptr() for state in states], device=device)
    out = torch.full((b, e), torch.nan, dtype=torch.bfloat16, device=device)
    for _ in range(3):
        ssm_step(x, u, z, weights, addresses, LAYER * e * n, out, overlap=False)
        expected = ssm_step_ref(x.double(), u, z, weights, [state[LAYER] for state in expected_states])
        assert_close("y", out, expected, OUT_RATIO)
    for state, expected in zip(states, expected_states, strict=True):
        assert_close("state", state[LAYER], expected[LAYER], STATE_RATIO)
        assert torch.equal(state[::2].double(), expected[::2])


def test_step_with_large_delta_forgets_the_state(device: str) -> None:
    weights = step_weights(64, 16, 8, device)
    weights.dt_bias.fill_(100.0)
    state = normal(64, 16).to(device)
    x, u = normal(1, 40).to(device), torch.zeros(1, 64, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(u)
    ssm_step(x, u, u, weights, torch.tensor([state.data_ptr()], device=device), 0, out)
    assert out.count_nonzero() == 0
    assert state.abs().max() < 1e-9


def test_only_sizes_of_whole_loads_fit() -> None:
    assert fits(256, 16) and fits(36, 16) and fits(4, 8)
    assert not fits(2, 8) and not fits(36, 2)
