"""int8 products of a few tokens on the GPU, or on its emulator, against float32: odd sizes, every tiling, states."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.int8 import quantize_rows
from model.kernels import gpu, gpu_linear
from model.kernels.cpu import int8_linear_ref
from tests.numeric import assert_close

STAGED = (
    gpu_linear.Tiling(2, 4, 2, 2, 1, 1, stages=3),
    gpu_linear.Tiling(2, 2, 1, 1, 1, 1, stages=2),
    gpu_linear.Tiling(4, 2, 2, 1, 1, 1, stages=4),
)
RATIO = {torch.float32: 1e-5, torch.bfloat16: 3e-3}


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """A card where there is one; otherwise the kernels are emulated."""
    if torch.cuda.is_available():
        return "cuda"
    request.getfixturevalue("cuda_on_cpu")
    return "cpu"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def int8_weight(device: str, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    weight, scale = quantize_rows(normal(*shape, seed=seed) * shape[-1] ** -0.5)
    weight.view(-1)[:2] = torch.tensor([-128, 127])  # rounding gives no -128, a checkpoint may hold it
    return weight.to(device), scale.to(device)


def tokens(device: str, *shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).to(device, torch.bfloat16)


def poisoned(device: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        *((1, 288, 1536), (1, 37, 48), (1, 2200, 256), (3, 5, 16), (8, 100, 576), (9, 33, 576)),
        *((16, 130, 1536), (17, 97, 528), (33, 65, 576), (64, 144, 1040)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_equal_the_definition(device, m, n, k, dtype):
    x, (weight, scale), bias = tokens(device, m, k), int8_weight(device, n, k), tokens(device, n)
    for added in (bias, None):
        out = poisoned(device, m, n, dtype=dtype)
        gpu_linear.int8_rows(x, weight, scale, out, added)
        expected = int8_linear_ref(x.float(), weight, scale, None if added is None else added.float())
        assert_close("out", out, expected, RATIO[dtype])


@pytest.mark.parametrize(
    ("m", "n", "k", "tiling"),
    [  # each tiling with few and many tokens, n and k that fill its tiles and that don't; a build each
        *((9, 130, 576, STAGED[0]), (64, 130, 4096, STAGED[0])),
        *((17, 300, 2320, STAGED[1]), (32, 70, 256, STAGED[1])),
        *((33, 260, 896, STAGED[2]), (9, 130, 576, STAGED[2]), (64, 130, 4096, STAGED[2])),
    ],
)
def test_tokens_staged_in_shared_memory(device, monkeypatch, m, n, k, tiling):
    x, (weight, scale), bias = tokens(device, m, k), int8_weight(device, n, k), tokens(device, n)
    up, up_scale = int8_weight(device, n, k, seed=1)
    monkeypatch.setattr(gpu_linear, "SINGLE", dict.fromkeys((2, 4, 8), tiling))
    monkeypatch.setattr(gpu_linear, "PAIRED", dict.fromkeys((2, 4, 8), tiling))
    out, gated = poisoned(device, m, n), poisoned(device, m, n)
    gate = int8_linear_ref(x.float(), weight, scale)
    for sms in (132, 2):  # columns split among blocks; several items a block
        monkeypatch.setattr(gpu, "sm_count", lambda device, sms=sms: sms)
        gpu_linear.int8_rows(x, weight, scale, out, bias)
        assert_close("out", out, gate + bias.float(), RATIO[torch.bfloat16])
        gpu_linear.swiglu_rows(x, weight, scale, up, up_scale, gated)
        assert_close("gated", gated, F.silu(gate) * int8_linear_ref(x.float(), up, up_scale), RATIO[torch.bfloat16])


def test_columns_split_among_blocks_give_the_same_bits_every_time(device):
    m, n, k = 20, 96, 4608
    x, (weight, scale) = tokens(device, m, k), int8_weight(device, n, k)
    launch = gpu_linear._launch(gpu_linear.SINGLE, m, n, k, x.device, can_split=True)
    assert launch.constants["SPLIT"] > 2
    outs = [poisoned(device, m, n, dtype=torch.float32) for _ in range(2)]
    for out in outs:
        gpu_linear.int8_rows(x, weight, scale, out)
    assert_close("out", outs[0], int8_linear_ref(x.float(), weight, scale), RATIO[torch.float32])
    assert torch.equal(*outs)


@pytest.mark.parametrize("m", [1, 3, 12, 40, 64])
@pytest.mark.parametrize("tiling", sorted({*gpu_linear.SINGLE.values(), *gpu_linear.FEW_ROWS.values()}))
def test_every_tiling_computes_the_same(device, monkeypatch, m, tiling):
    n, k = 160, 704
    x, (weight, scale) = tokens(device, m, k), int8_weight(device, n, k)
    monkeypatch.setattr(gpu_linear, "SINGLE", dict.fromkeys((1, 2, 4, 8), tiling))
    monkeypatch.setattr(gpu_linear, "FEW_ROWS", {1: tiling})
    monkeypatch.setattr(gpu, "sm_count", lambda device: 2)  # several items a block
    out = poisoned(device, m, n)
    gpu_linear.int8_rows(x, weight, scale, out)
    assert_close("out", out, int8_linear_ref(x.float(), weight, scale), RATIO[torch.bfloat16])


@pytest.mark.parametrize(("m", "f", "k"), [(1, 100, 576), (7, 33, 48), (11, 96, 704), (30, 50, 256), (64, 70, 576)])
def test_swiglu_equals_the_definition(device, m, f, k):
    x = tokens(device, m, k)
    (gate, gate_scale), (up, up_scale) = int8_weight(device, f, k), int8_weight(device, f, k, seed=1)
    out = poisoned(device, m, f)
    gpu_linear.swiglu_rows(x, gate, gate_scale, up, up_scale, out)
    expected = F.silu(int8_linear_ref(x.float(), gate, gate_scale)) * int8_linear_ref(x.float(), up, up_scale)
    assert_close("out", out, expected, RATIO[torch.bfloat16])


@pytest.mark.parametrize(("b", "e", "d", "w"), [(1, 40, 576, 4), (3, 33, 48, 4), (10, 72, 256, 3), (33, 24, 64, 2)])
@pytest.mark.parametrize("biased", [True, False])
def test_projection_and_convolution_advance_states_where_they_are(device, b, e, d, w, biased):
    x, (weight, scale) = tokens(device, b, d), int8_weight(device, 2 * e, d)
    taps, bias = tokens(device, e, w), tokens(device, e)
    memories = [tokens(device, 3, e, w - 1, seed=i) for i in range(b)]  # of three layers; ours is the second
    states = [memory[1].clone() for memory in memories]
    others = [memory[[0, 2]].clone() for memory in memories]
    pointers = torch.tensor([memory.data_ptr() for memory in memories], device=device)
    u, z = poisoned(device, b, e), poisoned(device, b, e)
    offset, added = e * (w - 1), bias if biased else torch.zeros_like(bias)
    optional = bias if biased else None
    gpu_linear.in_proj_conv(x, weight, scale, None, taps, optional, pointers, u, z, e, offset)
    expected_u, expected_z = gpu_linear.in_proj_conv_ref(x, weight, scale, taps, added, states)
    assert_close("u", u, expected_u, RATIO[torch.bfloat16])
    assert_close("z", z, expected_z, RATIO[torch.bfloat16])
    for memory, state, other in zip(memories, states, others, strict=True):
        assert_close("state", memory[1], state, RATIO[torch.bfloat16])
        assert torch.equal(memory[[0, 2]], other)


@pytest.mark.parametrize(
    ("chosen", "num_experts"),
    [
        ([[2, 0]], 4),
        ([[3], [3], [1]], 4),  # one twice, two never
        ([[i % 5, 5 + i % 3] for i in range(11)], 9),
        ([[0, 15 - i % 15] for i in range(64)], 16),  # all meet in the first
    ],
)
@pytest.mark.parametrize("expert_tiles", [1, 2])
def test_only_the_chosen_experts_are_read_and_every_token_gets_its_own(
    device, monkeypatch, chosen, num_experts, expert_tiles
):
    monkeypatch.setattr(gpu_linear, "expert_tiles", lambda *_: expert_tiles)
    d, f = 144, 48
    chosen = torch.tensor(chosen, dtype=torch.int32, device=device)
    x = tokens(device, len(chosen), d)
    up, up_scale = int8_weight(device, num_experts, 2 * f, d)
    down, down_scale = int8_weight(device, num_experts, d, f)
    expected_h, expected = gpu_linear.experts_ref(x, chosen, up, up_scale, down, down_scale)
    unread = [i for i in range(num_experts) if i not in chosen]
    up_scale[unread], down_scale[unread] = torch.nan, torch.nan
    h = poisoned(device, *chosen.shape, f)
    out = poisoned(device, *chosen.shape, d, dtype=torch.float32)
    gpu_linear.experts_gate_up(x, chosen, up, up_scale, h)
    assert_close("h", h, expected_h, RATIO[torch.bfloat16])
    gpu_linear.experts_down(h, chosen, down, down_scale, out)
    assert_close("out", out, expected, RATIO[torch.bfloat16])


@pytest.mark.parametrize(("m", "tiles"), [(1, 1), (8, 1), (17, 1), (32, 1), (33, 2), (64, 2)])
def test_an_expert_takes_two_tiles_when_many_have_more_than_eight_tokens(m, tiles):
    assert gpu_linear.expert_tiles(m, 2, 16) == tiles
    assert gpu_linear.expert_tiles(m, 1, 2) == (1 if m <= 8 else 2)


def test_what_the_kernels_do_not_take_is_refused(device):
    (weight, scale), chosen = int8_weight(device, 20, 32), torch.zeros(65, 2, dtype=torch.int32, device=device)
    assert not gpu_linear.fits(weight[:, :24])
    with pytest.raises(ValueError, match="65 tokens"):
        gpu_linear.int8_rows(tokens(device, 65, 32), weight, scale, poisoned(device, 65, 20))
    with pytest.raises(ValueError, match="contiguous"):
        gpu_linear.int8_rows(tokens(device, 2, 64)[:, :32], weight, scale, poisoned(device, 2, 20))
    with pytest.raises(ValueError, match="at most 128"):
        gpu_linear.experts_gate_up(
            tokens(device, 65, 32), chosen, weight[None], scale[None], poisoned(device, 65, 2, 10)
        )
