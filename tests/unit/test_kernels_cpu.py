"""The C kernels against their definitions: odd shapes, cut anywhere, alone and in a batch, into memory full of NaN."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import load_model
from model.attention import attend_ref
from model.cpu_decode import MAX_TOKENS
from model.int4 import pack_int4, unpack_int4
from model.kernels import cpu
from model.kernels.causal_conv import causal_conv_ref
from model.kernels.rms_norm import RMSNorm, rms_norm_ref
from model.kernels.selective_scan import selective_scan_ref
from model.kernels.silu_mul import silu_mul, silu_mul_ref
from tests.numeric import assert_close

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
RATIO = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
DTYPES = [torch.float32, torch.bfloat16]
SCAN_SHAPES = [(1, 1, 1, 1), (2, 2, 17, 4), (1, 3, 96, 16), (3, 63, 130, 17), (1, 64, 96, 4), (2, 65, 17, 16)]
SCAN_SHAPES += [(1, 257, 130, 16), (1, 5, 16, 300)]
WIDTHS = [2, 3, 4, 20]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.empty` gives NaN: an element that a kernel leaves out shows."""
    real = torch.empty

    def empty(*shape: object, **options: object) -> Tensor:
        out = real(*shape, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", empty)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def scan_inputs(b: int, t: int, e: int, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """u, z, B and C as the mixer has them: slices of wider rows."""
    u, z = normal(b, t, 2 * e).to(dtype).chunk(2, dim=-1)
    B, C = normal(b, t, 2 * n + 3).to(dtype)[..., 3:].chunk(2, dim=-1)
    delta = F.softplus(normal(b, t, e, seed=1))
    return {"u": u, "delta": delta, "A": -normal(e, n).exp(), "B": B, "C": C, "D": normal(e), "z": z}


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() for name, x in inputs.items()}


@pytest.mark.parametrize(
    ("which", "function", "low", "high"),
    [(0, torch.exp2, -125.9, 127.9), (1, F.silu, -80.0, 200.0), (2, F.softplus, -80.0, 200.0)],
)
def test_elementwise_functions_equal_float64(which: int, function: Callable, low: float, high: float) -> None:
    x = torch.cat([torch.linspace(low, high, 100_001), torch.linspace(-1, 1, 10_001), torch.tensor([0.0])])
    out, expected = apply(which, x), function(x.double())
    relative = ((out.double() - expected) / expected).abs()[expected.abs() > 1e-37]
    units = 2 if which == 0 else 4 + 0.5 * 80  # exp(-x) by 2^(-x log2 e) loses |x| / 2 units for a large |x|
    assert relative.max() <= units * 2**-23
    near = relative[(x.abs() < 4)[expected.abs() > 1e-37]]
    assert near.max() <= 8 * 2**-23


def test_elementwise_functions_at_the_edges() -> None:
    inf = torch.inf
    assert apply(0, torch.tensor([0.0, -1000.0, 128.0, 1000.0])).tolist() == [1.0, 0.0, inf, inf]
    assert apply(1, torch.tensor([-1e30, 0.0, 1e30, inf])).tolist() == [0.0, 0.0, torch.tensor(1e30).item(), inf]
    low, lower, high = apply(2, torch.tensor([-1e30, -inf, inf])).tolist()
    assert max(low, lower) < 1e-38 and high == inf
    for which in range(3):
        assert apply(which, torch.tensor([torch.nan, 1.0])).isnan().tolist() == [True, False]


def apply(which: int, x: Tensor) -> Tensor:
    out = torch.full_like(x, torch.nan)
    pointers = (ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    cpu.call("apply_elementwise", *pointers, ctypes.c_int64(len(x)), ctypes.c_int64(which))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SCAN_SHAPES)
@pytest.mark.usefixtures("poisoned")
def test_scan_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, _, e, n = shape
    inputs, state = scan_inputs(*shape, dtype), normal(b, e, n)
    expected_state = state.double()
    expected = selective_scan_ref(**doubled(inputs), state=expected_state)
    assert_close("y", cpu.selective_scan(**inputs, state=state), expected, RATIO[dtype])
    assert_close("state", state, expected_state, RATIO[torch.float32])
    from_zeros = selective_scan_ref(**doubled(inputs))
    assert_close("from zeros", cpu.selective_scan(**inputs), from_zeros, RATIO[dtype])


def test_scan_adds_the_bias_before_softplus() -> None:
    inputs = scan_inputs(2, 37, 17, 4, torch.float32)
    raw, bias = 10 * normal(2, 37, 17), normal(17)
    expected = selective_scan_ref(**doubled(inputs) | {"delta": F.softplus((raw + bias).double())})
    ours = cpu.selective_scan(**inputs | {"delta": raw}, delta_bias=bias)
    assert_close("y", ours, expected, RATIO[torch.float32])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("split", [1, 2, 63, 64, 256])
def test_scan_cut_in_two_gives_the_same_bits(split: int, threads: int) -> None:
    inputs = scan_inputs(2, 257, 130, 16, torch.float32)
    whole_state, state = normal(2, 130, 16), normal(2, 130, 16)
    whole = cpu.selective_scan(**inputs, state=whole_state)
    torch.set_num_threads(threads)
    timed = ("u", "delta", "B", "C", "z")
    heads = inputs | {name: inputs[name][:, :split] for name in timed}
    tails = inputs | {name: inputs[name][:, split:] for name in timed}
    parts = [cpu.selective_scan(**part, state=state) for part in (heads, tails)]
    torch.set_num_threads(1)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert torch.equal(state, whole_state)


def test_scan_says_nan_where_its_input_is_nan() -> None:
    inputs = scan_inputs(1, 9, 18, 16, torch.float32)
    inputs["u"][0, 4, 17] = torch.nan
    y = cpu.selective_scan(**inputs)
    expected = torch.zeros(1, 9, 18, dtype=torch.bool)
    expected[0, 4:, 17] = True
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("w", WIDTHS)
@pytest.mark.parametrize(("b", "t", "e"), [(1, 1, 1), (3, 1, 96), (2, 2, 17), (1, 3, 130), (2, 64, 16), (1, 65, 33)])
@pytest.mark.usefixtures("poisoned")
def test_conv_equals_its_definition(b: int, t: int, e: int, w: int, dtype: torch.dtype) -> None:
    x, weight, bias = normal(b, t, 2 * e).to(dtype)[..., e:], normal(e, w).to(dtype), normal(e).to(dtype)
    state = normal(b, e, w - 1).to(dtype)
    expected_state = state.double()
    expected = causal_conv_ref(x.double(), expected_state, weight.double(), bias.double())
    assert_close("y", cpu.causal_conv(x, state, weight, bias), expected, RATIO[dtype])
    assert torch.equal(state.double(), expected_state)
    expected = causal_conv_ref(x.double(), None, weight.double(), None)
    assert_close("without bias, from zeros", cpu.causal_conv(x, None, weight, None), expected, RATIO[dtype])


@pytest.mark.parametrize("split", [1, 2, 3, 4, 64])
def test_conv_cut_in_two_gives_the_same_bits(split: int) -> None:
    x, weight, bias = normal(2, 65, 33), normal(33, 4), normal(33)
    whole_state, state = normal(2, 33, 3), normal(2, 33, 3)
    whole = cpu.causal_conv(x, whole_state, weight, bias)
    parts = [cpu.causal_conv(part, state, weight, bias) for part in (x[:, :split], x[:, split:])]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert torch.equal(state, whole_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "in_"), [(1, 1), (7, 33), (131, 97), (64, 576)])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 15, 65])
@pytest.mark.usefixtures("poisoned")
def test_int8_linear_equals_its_definition(rows: int, out: int, in_: int, dtype: torch.dtype) -> None:
    x, scale, bias = normal(rows, 1, in_).to(dtype), normal(out).exp(), normal(out).to(dtype)
    weight = torch.randint(-127, 128, (out, in_), dtype=torch.int8, generator=torch.Generator().manual_seed(out))
    # many rows go through weights rounded to bfloat16
    assert_close(
        "y", cpu.int8_linear(x, weight, scale, bias), cpu.int8_linear_ref(x, weight, scale, bias), RATIO[dtype]
    )
    assert_close("no bias", cpu.int8_linear(x, weight, scale), cpu.int8_linear_ref(x, weight, scale), RATIO[dtype])


def int8_weight(out: int, in_: int) -> Tensor:
    return torch.randint(-128, 128, (out, in_), dtype=torch.int8, generator=torch.Generator().manual_seed(out))


def packed_weight(bits: int, out: int, in_: int) -> tuple[cpu.Packed, Tensor]:
    """And the float32 weight that it stands for."""
    if bits == 4:
        stored = pack_int4(normal(out, in_))
        return cpu.Packed.of_int4(*stored), unpack_int4(*stored)
    weight, scale = int8_weight(out, in_), normal(out).exp()
    return cpu.Packed.of_int8(weight, scale), weight * scale[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "out", "in_"),
    [(8, 1, 1), (8, 7, 33), (8, 131, 97), (8, 64, 576), (8, 33, 130), (4, 1, 64), (4, 131, 128), (4, 64, 576)],
)
@pytest.mark.parametrize("rows", [0, 1, 5, 13, 65])
@pytest.mark.usefixtures("poisoned")
def test_rounded_rows_equal_their_definition(rows: int, bits: int, out: int, in_: int, dtype: torch.dtype) -> None:
    wide = normal(rows, 1, in_ + 3) * normal(rows, 1, 1, seed=1).exp()
    x, bias = wide.to(dtype)[..., 3:], normal(out).to(dtype)
    packed, weight = packed_weight(bits, out, in_)
    ratio = max(RATIO[dtype], 2e-3)  # what lies halfway may go either way
    for added in (bias, None):
        assert_close("y", cpu.rounded_linear(x, packed, added), cpu.rounded_linear_ref(x, weight, added), ratio)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_rows_are_exact_where_nothing_has_to_be_rounded(bits: int) -> None:
    x = torch.randint(-127, 128, (40, 192)).float()
    x[:, ::64] = 127  # the largest of each group
    weight = int8_weight(70, 192)
    packed = cpu.Packed.of_int8(weight, torch.ones(70))
    if bits == 4:
        weight = weight >> 4
        weight[:, ::64] = -8  # scales of 1
        packed = cpu.Packed.of_int4(*pack_int4(weight.float()))
    assert torch.equal(cpu.rounded_linear(x, packed).double(), x.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_rows_have_the_same_bits_in_any_company(bits: int, dtype: torch.dtype) -> None:
    x, weight = normal(95, 128).to(dtype), packed_weight(bits, 131, 128)[0]
    together = cpu.rounded_linear(x, weight)
    apart = torch.cat([cpu.rounded_linear(part, weight) for part in x.split([31, 1, 25, 38])])
    torch.set_num_threads(3)
    shared = cpu.rounded_linear(x, weight)
    few = cpu.linear_few(x[:7], weight)  # as within a step
    torch.set_num_threads(1)
    assert torch.equal(apart, together) and torch.equal(shared, together) and torch.equal(few, together[:7])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("parts", [2, 3])
def test_rows_of_a_packed_matrix_are_columns_of_the_result(parts: int, bits: int) -> None:
    x, weight = normal(9, 64), packed_weight(bits, 66, 64)[0]
    apart = torch.cat([cpu.rounded_linear(x, part) for part in weight.chunk(parts)], dim=1)
    assert torch.equal(apart, cpu.rounded_linear(x, weight))


def test_an_outlier_costs_only_its_own_columns_their_precision() -> None:
    x, weight, scale = normal(30, 256), int8_weight(64, 256), torch.ones(64)
    x[:, 5] = 1000
    weight[:, :64] = 0
    exact = cpu.int8_linear_ref(x, weight, scale)
    assert_close("y", cpu.rounded_linear(x, cpu.Packed.of_int8(weight, scale)), exact, 1e-2)


@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_rounded_rows_say_so_where_their_input_is_no_number(strange: float) -> None:
    x = normal(30, 130)
    x[3, 100] = strange
    y = cpu.rounded_linear(x, cpu.Packed.of_int8(torch.ones(5, 130, dtype=torch.int8), torch.ones(5)))
    assert not y[3].isfinite().any() and y[:3].isfinite().all() and y[4:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_few_rows_give_the_same_bits_alone(dtype: torch.dtype) -> None:
    x = normal(15, 97)
    weight = torch.randint(-127, 128, (131, 97), dtype=torch.int8).to(dtype)
    together = cpu.linear_few(x, weight)
    assert_close("y", together, x.double() @ weight.double().T, RATIO[torch.float32])
    alone = torch.cat([cpu.linear_few(row[None], weight) for row in x])
    torch.set_num_threads(2)
    shared = cpu.linear_few(x, weight)
    torch.set_num_threads(1)
    assert torch.equal(alone, together) and torch.equal(shared, together)


# alone, without a past, over the border of a block, of a part, of a tile, and of all three
LENGTHS, PASTS = [1, 5, 3, 7, 70, 190], [0, 0, 254, 1020, 600, 2001]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("h", "g", "p"), [(1, 1, 1), (6, 2, 20), (9, 3, 64), (5, 1, 33), (4, 4, 130)])
@pytest.mark.usefixtures("poisoned")
def test_attention_equals_its_definition(h: int, g: int, p: int, dtype: torch.dtype) -> None:
    q = normal(sum(LENGTHS), h, p).to(dtype)
    keys, values = (
        [normal(s + t, g, p, seed=k).to(dtype) for s, t in zip(PASTS, LENGTHS, strict=True)] for k in (1, 2)
    )
    keys[1] *= 30  # one weight of nearly 1, however low the others
    ours = cpu.attend(q, keys, values, LENGTHS)
    pieces = list(zip(q.split(LENGTHS), keys, values, strict=True))
    expected = torch.cat([attend_ref(q.double(), k.double(), v.double()) for q, k, v in pieces])
    assert_close("out", ours, expected, RATIO[dtype])
    alone = [cpu.attend(q, [k], [v], [len(q)]) for q, k, v in pieces]
    assert torch.equal(torch.cat(alone), ours), "in company"
    for threads in (2, 40):
        torch.set_num_threads(threads)
        assert torch.equal(cpu.attend(q, keys, values, LENGTHS), ours), threads
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [[1] * 4 + [396], [150, 250], [64, 300, 36]])
def test_attention_has_the_same_bits_however_a_prompt_is_cut(cuts: list[int], dtype: torch.dtype) -> None:
    q, keys, values = (normal(400, heads, 64, seed=heads).to(dtype) for heads in (9, 3, 3))
    pieces = zip(q.split(cuts), accumulate(cuts), strict=True)
    cut = [cpu.attend(own, [keys[:end]], [values[:end]], [len(own)]) for own, end in pieces]
    assert torch.equal(torch.cat(cut), cpu.attend(q, [keys], [values], [400]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 1, 130, 301])  # in both halves of a pair, and of a later block
def test_what_a_later_token_holds_reaches_no_earlier_one(place: int, strange: float, dtype: torch.dtype) -> None:
    for h, g, p in ((9, 3, 64), (1, 1, 33), (4, 1, 20)):
        q, keys, values = (normal(330, heads, p, seed=heads).to(dtype) for heads in (h, g, g))
        whole = cpu.attend(q, [keys], [values], [330])
        for changed in ("key", "value"):
            own = {"key": keys.clone(), "value": values.clone()}
            own[changed][place] = strange
            ours = cpu.attend(q, [own["key"]], [own["value"]], [330])
            assert torch.equal(ours[:place], whole[:place]), changed
            assert not ours[place].isfinite().any(), changed
            cut = [
                cpu.attend(q[a:b], [own["key"][:b]], [own["value"][:b]], [b - a])
                for a, b in ((0, 1), (1, 131), (131, 330))
            ]
            assert torch.equal(torch.cat(cut).view(torch.uint8), ours.view(torch.uint8)), changed


@pytest.mark.parametrize("size", [1e3, 1e6, 1e15])
def test_attention_takes_scores_of_any_size(size: float) -> None:
    q, keys, values = normal(3, 4, 32), normal(2100, 2, 32, seed=1), normal(2100, 2, 32, seed=2)
    expected = attend_ref(size * q.double(), size * keys.double(), values.double())
    assert_close("out", cpu.attend(size * q, [size * keys], [values], [3]), expected, RATIO[torch.float32])


def test_attention_refuses_what_does_not_fit() -> None:
    q, kv = normal(2, 4, 8), normal(5, 2, 8)
    with pytest.raises(ValueError, match=r"q \(2, 4, 8\)"):
        cpu.attend(q, [kv], [kv], [3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 36, 130])
@pytest.mark.usefixtures("poisoned")
def test_rms_norm_and_gate_equal_their_definitions(width: int, dtype: torch.dtype) -> None:
    left, right = (1e3 * normal(3, 5, 2 * width)).to(dtype).chunk(2, dim=-1)
    norm = RMSNorm(width, eps=1e-6).to(dtype)
    norm.weight.copy_(normal(width))
    assert_close("norm", norm(right), rms_norm_ref(right.double(), norm.weight, 1e-6), RATIO[dtype])
    assert_close("gate", silu_mul(left, right), silu_mul_ref(left.double(), right.double()), RATIO[dtype])


@pytest.mark.parametrize(("quantize", "ratio"), [(None, 1e-5), ("int8", 1e-5), ("w8a8", 1e-2)])
@pytest.mark.parametrize("num_tokens", [1, 2, MAX_TOKENS // 2])
@pytest.mark.usefixtures("w8a8_anywhere")
def test_a_few_tokens_at_once_equal_the_modules(
    tiny_jamba_dir: Path, num_tokens: int, quantize: str | None, ratio: float
) -> None:
    model = load_model(tiny_jamba_dir, quantize=quantize)
    generator = torch.Generator().manual_seed(num_tokens)
    prompt, rest = (torch.randint(512, (2, t), generator=generator) for t in (40, num_tokens))
    fast, slow = ([model.new_state() for _ in range(2)] for _ in range(2))
    for states in (fast, slow):
        model(prompt, states)
    ours = model(rest, fast)
    model.few_tokens = 0
    expected = model(rest, slow)
    assert_close("logits", ours, expected, ratio)
    for one, other in zip(fast, slow, strict=True):
        assert_close("ssm", one.ssm, other.ssm, ratio)
        assert_close("conv", one.conv, other.conv, ratio)
