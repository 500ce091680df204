"""Each CUDA kernel at the shapes of the 52B Jamba: checked against float32, then timed relative to copy bandwidth.

Launches are captured in a CUDA graph, over several copies of the weights or different experts, so that nothing comes
from the L2 cache. `us`: time per launch with overlap as in decode (programmatic dependent launch); `us_alone`: without.
    python -m bench.gpu_kernels [--shape jamba-52b] [--only decode prefill mixers] [--tokens 1 2 4 8 16 32 64]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_kit import measure_ceilings, time_calls
from bench.runs import BenchRun
from bench.shapes import SHAPES
from model.config import JambaConfig
from model.kernels import gpu_attention, gpu_linear, gpu_mamba, gpu_prefill
from model.kernels.causal_conv import causal_conv, causal_conv_ref
from model.kernels.selective_scan import selective_scan, selective_scan_ref

L2_BYTES = 50 << 20
MAX_ERROR = 2e-2  # relative to the largest value; outputs are bfloat16
PREFILL_ROWS = (512, 1024, 2048, 4096)  # per expert
SECTIONS = ("decode", "prefill", "mixers")
BF16, F32 = torch.bfloat16, torch.float32


class Case(NamedTuple):
    """A kernel at one shape; successive launches read different memory."""

    name: str
    num_bytes: int  # minimum traffic of one launch
    launch: Callable[[int, bool], None]
    copies: int
    out: Tensor  # of the last launch
    expected: Callable[[], Tensor]  # result of launch 0 after `reset`
    reset: Callable[[], object] = lambda: None  # resets states that launches advance


class Weight(NamedTuple):
    values: Tensor  # (copies, n, k) int8
    scale: Tensor

    @classmethod
    def random(cls, copies: int, n: int, k: int, device: torch.device) -> Weight:
        values = torch.randint(-127, 128, (copies, n, k), dtype=torch.int8, device=device)
        return cls(values, torch.rand(copies, n, device=device) * k**-0.5 / 64)

    def __call__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.values[i], self.scale[i]

    def linear(self, x: Tensor, i: int = 0) -> Tensor:
        return F.linear(x.float(), self.values[i].float() * self.scale[i][:, None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="jamba-52b")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--prefill-rows", type=int, nargs="+", default=PREFILL_ROWS)
    arguments = parser.parse_args()
    config, device = SHAPES[arguments.shape], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode():
        ceilings = measure_ceilings(device)
        copy = ceilings.copy_bytes_per_s
        run = BenchRun(f"gpu-kernels-{arguments.shape}", argv=sys.argv)
        run.add(kernel="copy", gb_per_s=copy / 1e9, tflop_per_s=ceilings.matmul_flop_per_s / 1e12)
        if "decode" in arguments.only:
            for m in arguments.tokens:
                for case in decode_cases(config, m, device):
                    add_row(run, case, m, copy)
        if "mixers" in arguments.only:
            bench_mixers(run, config, device, copy)
        if "prefill" in arguments.only:
            bench_prefill(run, config, device, copy, arguments.prefill_rows)
        run.finish()


def decode_cases(config: JambaConfig, m: int, device: torch.device) -> Iterator[Case]:
    """The matrix products of one decode step of m sequences, created one at a time."""
    d, f, e = config.hidden_size, config.intermediate_size, config.mamba_d_inner
    rank = config.mamba_dt_rank + 2 * config.mamba_d_state
    yield conv_case(m, e, d, config.mamba_d_conv, device)
    yield rows_case("x_proj", m, rank, e, F32, device)
    yield rows_case("out_proj", m, d, e, BF16, device)
    yield rows_case("k_proj", m, config.num_key_value_heads * config.head_dim, d, BF16, device)
    yield rows_case("down", m, d, f, BF16, device)
    yield rows_case("head", m, config.vocab_size, d, F32, device)
    yield swiglu_case(m, f, d, device)
    if m * config.num_experts_per_tok <= gpu_linear.MAX_ASSIGNMENTS:
        yield experts_up_case(config, m, device)
        yield experts_down_case(config, m, device)
    yield norm_case("add_norm", m, d, 0, 0, device)
    yield norm_case("add_norm + router", m, d, config.num_experts, config.num_experts_per_tok, device)


def rows_case(name: str, m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Case:
    weight, x = Weight.random(copies_of(n * k), n, k, device), random(m, k, device)
    out = torch.empty(m, n, dtype=dtype, device=device)

    def launch(i: int, overlap: bool) -> None:
        gpu_linear.int8_rows(x, *weight(i), out, overlap=overlap)

    return Case(name, n * k, launch, len(weight.values), out, lambda: weight.linear(x))


def conv_case(m: int, e: int, d: int, w: int, device: torch.device) -> Case:
    weight, x = Weight.random(copies_of(2 * e * d), 2 * e, d, device), random(m, d, device)
    taps, bias = random(e, w, device), random(1, e, device)[0]
    states, u, z = torch.zeros(m, e, w - 1, dtype=BF16, device=device), *torch.empty(2, m, e, dtype=BF16, device=device)
    pointers = states.data_ptr() + torch.arange(m, device=device) * e * (w - 1) * 2

    def launch(i: int, overlap: bool) -> None:
        gpu_linear.in_proj_conv(x, *weight(i), None, taps, bias, pointers, u, z, e, overlap=overlap)

    def expected() -> Tensor:
        return gpu_linear.in_proj_conv_ref(x, *weight(0), taps, bias, torch.zeros_like(states))[0]

    return Case("in_proj + conv", 2 * e * d, launch, len(weight.values), u, expected, states.zero_)


def swiglu_case(m: int, f: int, d: int, device: torch.device) -> Case:
    copies, x, out = copies_of(2 * f * d), random(m, d, device), torch.empty(m, f, dtype=BF16, device=device)
    gate, up = (Weight.random(copies, f, d, device) for _ in range(2))

    def launch(i: int, overlap: bool) -> None:
        gpu_linear.swiglu_rows(x, *gate(i), *up(i), out, overlap=overlap)

    return Case("gate_up", 2 * f * d, launch, copies, out, lambda: F.silu(gate.linear(x)) * up.linear(x))


class Choice(NamedTuple):
    """Random experts for m tokens, different in each copy."""

    chosen: list[Tensor]  # per copy: (m, k) int32
    rows: list[tuple[int, int]]  # of copy 0: (token, expert)
    distinct: int

    @classmethod
    def random(cls, config: JambaConfig, m: int, device: torch.device) -> Choice:
        experts, k = config.num_experts, config.num_experts_per_tok
        first = torch.rand(m, experts).argsort(dim=-1)[:, :k]
        chosen = [((first + i * k) % experts).int().to(device) for i in range(experts // k)]
        rows = [(token, expert) for token, own in enumerate(first.tolist()) for expert in own]
        return cls(chosen, rows, len(first.unique()))


def experts_up_case(config: JambaConfig, m: int, device: torch.device) -> Case:
    d, f, k = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    choice, x = Choice.random(config, m, device), random(m, d, device)
    weight, out = Weight.random(config.num_experts, 2 * f, d, device), torch.empty(m, k, f, dtype=BF16, device=device)

    def launch(i: int, overlap: bool) -> None:
        gpu_linear.experts_gate_up(x, choice.chosen[i], *weight, out, overlap=overlap)

    def expected() -> Tensor:
        both = [weight.linear(x[token], expert).chunk(2) for token, expert in choice.rows]
        return torch.stack([F.silu(gate) * up for gate, up in both]).view(m, k, f)

    name = f"experts gate_up, {choice.distinct} read"
    return Case(name, choice.distinct * 2 * f * d, launch, len(choice.chosen), out, expected)


def experts_down_case(config: JambaConfig, m: int, device: torch.device) -> Case:
    d, f, k = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    choice, h = Choice.random(config, m, device), random(m * k, f, device)
    weight, out = Weight.random(config.num_experts, d, f, device), torch.empty(m, k, d, device=device)

    def launch(i: int, overlap: bool) -> None:
        gpu_linear.experts_down(h.view(m, k, f), choice.chosen[i], *weight, out, overlap=overlap)

    def expected() -> Tensor:
        rows = [weight.linear(row, expert) for row, (_, expert) in zip(h, choice.rows, strict=True)]
        return torch.stack(rows).view(m, k, d)

    name = f"experts down, {choice.distinct} read"
    return Case(name, choice.distinct * d * f, launch, len(choice.chosen), out, expected)


def norm_case(name: str, m: int, d: int, experts: int, k: int, device: torch.device) -> Case:
    residual, y, weight = (
        torch.randn(m, d, device=device),
        torch.zeros(m, d, device=device, dtype=BF16),
        random(1, d, device)[0],
    )
    normed = torch.empty(m, d, dtype=BF16, device=device)
    routing = (None, None, None)
    if experts:
        chosen = torch.empty(m, k, dtype=torch.int32, device=device)
        routing = (random(experts, d, device), torch.empty(m, k, device=device), chosen)

    def launch(_: int, overlap: bool) -> None:
        gpu_linear.add_norm(residual, y, None, weight, 1e-6, normed, *routing, overlap=overlap)

    num_bytes = 2 * (m * d * 6 + d * (1 + experts))
    return Case(name, num_bytes, launch, 1, normed, lambda: F.rms_norm(residual, (d,), weight.float(), 1e-6))


def bench_mixers(run: BenchRun, config: JambaConfig, device: torch.device, copy: float) -> None:
    """Scan and convolution of a prefill segment; step and attention of one new token."""
    e, n, w, t = config.mamba_d_inner, config.mamba_d_state, config.mamba_d_conv, 8192 if device.type == "cuda" else 64
    u, z = random(t, 2 * e, device)[None].chunk(2, dim=-1)
    delta, B, C = (random(t, size, device)[None] for size in (e, n, n))
    A, D, bias = -torch.rand(e, n, device=device), torch.ones(e, device=device), torch.zeros(e, device=device)
    state, conv_state = torch.zeros(1, e, n, device=device), torch.zeros(1, e, w - 1, dtype=BF16, device=device)
    taps, added = random(e, w, device), random(1, e, device)[0]
    few = slice(0, 64)
    parts = (u[:, few], delta[:, few], A, B[:, few], C[:, few], D, z[:, few])
    scanned = selective_scan_ref(*(x.float() for x in (parts[0], F.softplus(parts[1].float()), *parts[2:])))
    error = largest_error(selective_scan(*parts, state.clone(), bias), scanned)
    times_s = time_calls(device, lambda: selective_scan(u, delta, A, B, C, D, z, state, bias))
    _add(run, "selective_scan", t, error, times_s, 8 * t * e, copy)
    error = largest_error(
        causal_conv(u[:, few], conv_state.clone(), taps, added), causal_conv_ref(u[:, few], None, taps, added)
    )
    times_s = time_calls(device, lambda: causal_conv(u, conv_state, taps, added))
    _add(run, "causal_conv", t, error, times_s, 4 * t * e, copy)
    for case in (step_case(config, 1, device), step_case(config, 8, device)):
        add_row(run, case, len(case.out), copy)
    for keys in (8192, 65_536, 262_144) if device.type == "cuda" else (100,):
        add_row(run, attention_case(config, keys, device), 1, copy)
    for b in (4, 16, 64) if device.type == "cuda" else (3,):
        add_row(run, attention_case(config, 262_144 if device.type == "cuda" else 128, device, b), b, copy)


def step_case(config: JambaConfig, b: int, device: torch.device) -> Case:
    e, n, r, copies = config.mamba_d_inner, config.mamba_d_state, config.mamba_dt_rank, 8
    vectors = (random(1, size, device)[0] for size in (r, n, n))
    A_log = torch.arange(1.0, n + 1, device=device).log().repeat(e, 1)
    projection, bias = random(e, r, device) * r**-0.5, random(1, e, device)[0] - 4
    weights = gpu_mamba.StepWeights(*vectors, projection, bias, A_log, torch.ones(e, device=device), 1e-6)
    x, (u, z), out = (
        torch.randn(b, r + 2 * n, device=device),
        random(2 * b, e, device).view(2, b, e),
        random(b, e, device),
    )
    states = torch.zeros(b, copies, e, n, device=device)
    pointers = states.data_ptr() + torch.arange(b, device=device) * states.stride(0) * 4

    def launch(i: int, overlap: bool) -> None:
        gpu_mamba.ssm_step(x, u, z, weights, pointers, i * e * n, out, overlap=overlap)

    def expected() -> Tensor:
        float_inputs = (tensor.float() for tensor in (u, z))
        return gpu_mamba.ssm_step_ref(x, *float_inputs, weights, list(torch.zeros_like(states[:, 0])))

    return Case("ssm_step", e * (2 * r + 4 * n) + b * e * n * 8, launch, copies, out, expected, states.zero_)


def attention_case(config: JambaConfig, keys: int, device: torch.device, b: int = 1) -> Case:
    """One step of b sequences that share all earlier keys, a multiple of 64 if b > 1; the first lends them."""
    h, g, p = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    copies, members = copies_of(4 * keys * g * p), gpu_attention.max_members(h // g)
    cache = torch.randn(copies, 2, keys + 1, g, p, dtype=BF16, device=device)
    own = torch.empty(b, copies, 2, 1, g, p, dtype=BF16, device=device)
    places = [(cache.data_ptr(), keys + 1, keys, 0, 0, 0)]
    places += [(own[i].data_ptr(), 1, keys, cache.data_ptr(), keys + 1, keys) for i in range(1, b)]
    numbers = torch.tensor(places, device=device).T.contiguous()
    caches, loans = gpu_attention.Caches(*numbers[:3]), gpu_attention.Loans(*numbers[3:])
    groups = torch.tensor([(i // members * members, keys) for i in range(b)], device=device).T.contiguous()
    sharing = gpu_attention.Sharing(*groups) if b > 1 else None
    q, k, v, out = (random(b * n, p, device).view(b, n, p) for n in (h, g, g, h))
    partials = gpu_attention.Partials.empty(q, g, b > 1)

    def launch(i: int, overlap: bool) -> None:
        gpu_attention.attend(q, k, v, caches, loans, i, partials, out, sharing, overlap=overlap)

    def expected() -> Tensor:
        seen = cache[0, :, :keys].float()  # (2, s, g, p)
        whole = [torch.cat([seen, torch.stack([k[i], v[i]])[:, None].float()], 1).transpose(1, 2) for i in range(b)]
        asked = q.float()[:, :, None]
        answers = [F.scaled_dot_product_attention(asked[i], *whole[i], enable_gqa=True) for i in range(b)]
        return torch.stack(answers)[:, :, 0]

    name = f"attend, {keys} keys" + (f" shared by {b}" if b > 1 else "")
    return Case(name, 4 * keys * g * p * -(-b // members), launch, copies, out, expected, reset=own.zero_)


def bench_prefill(run: BenchRun, config: JambaConfig, device: torch.device, copy: float, all_rows: list[int]) -> None:
    """Unpacking by itself; then four experts of one MoE, including or excluding the time for unpacking."""
    d, f, experts, k = config.hidden_size, config.intermediate_size, 4, 2
    up, down = Weight.random(experts, 2 * f, d, device), Weight.random(experts, d, f, device)
    room = torch.empty(2 * f, d, dtype=BF16, device=device)
    unpacked = [gpu_prefill.dequantize(*up(i), torch.empty_like(room)) for i in range(experts)]
    unpacked_down = [
        gpu_prefill.dequantize(*down(i), torch.empty(d, f, dtype=BF16, device=device)) for i in range(experts)
    ]
    error = largest_error(unpacked[0], up.values[0].float() * up.scale[0][:, None])
    times_s = time_calls(device, lambda: [gpu_prefill.dequantize(*up(i), room) for i in range(experts)])
    _add(run, "dequantize", 0, error, [s / experts for s in times_s], 3 * room.numel(), copy)
    for rows in all_rows:
        x, each, h = random(experts * rows // k, d, device), random(rows, d, device), random(rows, f, device)
        first = torch.arange(len(x), device=device)
        chosen, weights = torch.stack([first, first + 1], -1) % experts, torch.rand(len(x), k, device=device)
        cases = {
            "experts, products alone": lambda each=each, h=h: [
                (F.linear(each, a), F.linear(h, b)) for a, b in zip(unpacked, unpacked_down, strict=True)
            ],
            "experts, bf16 weights": lambda each=each: [
                F.linear(gpu_prefill.silu_mul(*F.linear(each, a).chunk(2, -1)), b)
                for a, b in zip(unpacked, unpacked_down, strict=True)
            ],
            "experts, int8 weights": lambda x=x, w=weights, c=chosen: gpu_prefill.mix_experts(x, w, c, *up, *down),
        }
        for name, case in cases.items():
            error = largest_error(case()[:8], mixed(x[:8], weights, chosen, up, down)) if "int8" in name else None
            _add(run, name, rows, error, time_calls(device, case), None, copy, 6 * experts * rows * d * f)


def mixed(x: Tensor, weights: Tensor, chosen: Tensor, up: Weight, down: Weight) -> Tensor:
    _, rows = gpu_linear.experts_ref(x, chosen[: len(x)], *up, *down)
    return (weights[: len(x), :, None] * rows).sum(1)


def add_row(run: BenchRun, case: Case, m: int, copy: float) -> None:
    case.reset()
    case.launch(0, False)
    error = largest_error(case.out, case.expected())
    times_s, alone_s = time_launches(case, overlap=True), time_launches(case, overlap=False)
    _add(run, case.name, m, error, times_s, case.num_bytes, copy, us_alone=median(alone_s) * 1e6)


def _add(
    run: BenchRun,
    kernel: str,
    tokens: int,
    error: float | None,
    times_s: list[float],
    num_bytes: int | None,
    copy: float,
    flop: float | None = None,
    **columns: object,
) -> None:
    if error is not None and not error < MAX_ERROR:
        raise SystemExit(f"{kernel} for {tokens} tokens is wrong by {error:.1e} of its largest value")
    own_s = median(times_s)
    row = {"kernel": kernel, "tokens": tokens, "us": own_s * 1e6, "worst_us": max(times_s) * 1e6}
    if num_bytes is not None:
        row |= {"gb_per_s": num_bytes / own_s / 1e9, "percent_of_copy": 100 * num_bytes / own_s / copy}
    if flop is not None:
        row |= {"tflop_per_s": flop / own_s / 1e12}
    run.add(**row, max_error=error, **columns)
    print(run.rows[-1], flush=True)


def largest_error(ours: Tensor, expected: Tensor) -> float:
    """Maximum absolute difference over the maximum absolute value."""
    return ((ours.float() - expected.float()).abs().max() / expected.float().abs().max()).item()


def time_launches(case: Case, overlap: bool, repeats: int = 9) -> list[float]:
    """Seconds per launch, for each of `repeats` replays of a graph over all copies."""
    launches = max(case.copies, 16)

    def run() -> None:
        for i in range(launches):
            case.launch(i % case.copies, overlap)

    device = case.out.device
    if device.type == "cpu":
        return [s / launches for s in time_calls(device, run, warmup=0, repeats=1)]
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times_s = []
    for i in range(2 + repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times_s.append(start.elapsed_time(end) * 1e-3 / launches)
    return times_s


def copies_of(num_bytes: int) -> int:
    """Number of copies such that a pass over all of them evicts the first from the L2 cache."""
    return max(2, -(-4 * L2_BYTES // num_bytes)) if torch.cuda.is_available() else 2


def random(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, dtype=BF16, device=device)


if __name__ == "__main__":
    main()
