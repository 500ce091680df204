"""Prefill and decode on the CPU, compared with `transformers`' Jamba on the same random checkpoint.

Both load the same checkpoint from disk, and must agree on its logits before anything is timed; runs alternate.
`transformers` uses its PyTorch path, without mamba-ssm. Attention is also timed alone, compared with PyTorch's. Shapes:
`bench` (4 layers, d 256) and `shipped` (that of the shipped checkpoint: 30 layers, d 576).
    python -m bench.cpu_prefill [--shape bench] [--tokens 2048] [--threads 2] [--repeats 7]
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import JambaConfig, JambaForCausalLM

from bench.runs import BenchRun, time_interleaved
from model import Jamba, convert_checkpoint, load_model
from model.attention import attend_ref
from model.kernels import cpu

DECODE_STEPS = 16
ATTENTION = ((1, 8192), (4, 8192), (40, 8192), (512, 8192), (1200, 0))  # (tokens, past tokens)
MAX_LOGIT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.1}  # relative RMS
COMMON = {"mamba_d_state": 16, "mamba_d_conv": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "pad_token_id": 0}
QUANTIZED = (("int8", "int8", ""), ("w8a8", "w8a8", ""), ("w4a8", "w8a8", "int4"))  # name, loaded as, stored in
SHAPES = {
    "bench": {
        **{"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
        **{"num_experts": 4, "num_experts_per_tok": 2, "mamba_expand": 2},
    },
    "shipped": {
        **{"vocab_size": 16_384, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
        **{"num_attention_heads": 9, "num_key_value_heads": 3, "attn_layer_period": 8, "attn_layer_offset": 4},
        **{"num_experts": 2, "num_experts_per_tok": 1, "mamba_expand": 1, "tie_word_embeddings": True},
    },
}


class Candidate(NamedTuple):
    """One way to run the checkpoint; `rival`: the row that its speed is compared with."""

    name: str
    dtype: torch.dtype
    model: Jamba | JambaForCausalLM
    rival: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="bench")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        write_checkpoint(Path(directory), SHAPES[arguments.shape])
        candidates = load_candidates(Path(directory))
        token_ids = torch.randint(1, SHAPES[arguments.shape]["vocab_size"], (1, arguments.tokens))
        check_agreement(candidates, token_ids)
        run = BenchRun(f"cpu-prefill-{arguments.shape}", argv=sys.argv)
        bench_prefill(run, candidates, token_ids, arguments.repeats)
        bench_decode(run, candidates, token_ids, arguments.repeats)
        bench_attention(run, SHAPES[arguments.shape], arguments.repeats)
        bench_ceilings(run, arguments.repeats)
        run.finish()


def write_checkpoint(path: Path, shape: dict[str, int]) -> None:
    """Random weights. The embedding outweighs what the layers add, or rounding would grow from layer to layer until no
    two implementations agree."""
    model = JambaForCausalLM(JambaConfig(**COMMON, **shape))
    for name, weight in model.named_parameters():
        if "embed" in name:
            weight.data.normal_()
        elif weight.ndim > 1 and not name.endswith("A_log"):
            adds = any(part in name for part in ("o_proj", "out_proj", "down_proj"))
            weight.data.normal_(
                std=weight.shape[-1] ** -0.5 * ((2 * shape["num_hidden_layers"]) ** -0.5 if adds else 1)
            )
    model.save_pretrained(path)


def load_candidates(path: Path) -> list[Candidate]:
    convert_checkpoint(path, path / "int4", to="int4")
    candidates = []
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        rival = f"transformers {short}"
        theirs = JambaForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()
        candidates.append(Candidate(rival, dtype, theirs, rival))
        candidates.append(Candidate(f"ours {short}", dtype, load_model(path, dtype=dtype), rival))
        for name, quantize, stored in QUANTIZED if cpu.rounds_rows() else QUANTIZED[:1]:
            model = load_model(path / stored, dtype=dtype, quantize=quantize)
            candidates.append(Candidate(f"ours {name}, {short} activations", dtype, model, rival))
    return candidates


def check_agreement(candidates: list[Candidate], token_ids: Tensor) -> None:
    """Check that unquantized candidates agree with `transformers` in float32; others have their own tests."""
    expected = run_prefill(candidates[0].model, token_ids)[0].float()
    for candidate in candidates:
        logits = run_prefill(candidate.model, token_ids)[0].float()
        error = ((logits - expected).norm() / expected.norm()).item()
        print(f"{candidate.name}: relative RMS of the last logits {error:.1e}")
        if "activations" not in candidate.name and error > MAX_LOGIT_ERROR[candidate.dtype]:
            raise SystemExit(f"{candidate.name} is {error:.1e} off transformers in float32: nothing to compare")


def run_prefill(model: Jamba | JambaForCausalLM, token_ids: Tensor) -> tuple[Tensor, object]:
    """Logits (1, v) of the last token, and the state or cache to continue from."""
    if isinstance(model, Jamba):
        state = model.new_state()
        return model(token_ids, state, logits="last"), state
    out = model(token_ids, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1], out.past_key_values


def run_decode(model: Jamba | JambaForCausalLM, logits: Tensor, memory: object) -> None:
    for _ in range(DECODE_STEPS):
        token = logits.argmax(-1, keepdim=True)
        if isinstance(model, Jamba):
            logits = model(token, memory, logits="last")
        else:
            logits = model(token, past_key_values=memory, use_cache=True, logits_to_keep=1).logits[:, -1]


def bench_prefill(run: BenchRun, candidates: list[Candidate], token_ids: Tensor, repeats: int) -> None:
    cases = {c.name: lambda model=c.model: run_prefill(model, token_ids) for c in candidates}
    add_rows(run, "prefill", candidates, time_interleaved(cases, warmup=2, repeats=repeats), token_ids.shape[1])


def bench_decode(run: BenchRun, candidates: list[Candidate], token_ids: Tensor, repeats: int) -> None:
    """Time `DECODE_STEPS` greedy steps after the prompt."""
    started = {c.name: run_prefill(c.model, token_ids) for c in candidates}
    cases = {c.name: lambda c=c: run_decode(c.model, *started[c.name]) for c in candidates}
    add_rows(run, "decode", candidates, time_interleaved(cases, warmup=2, repeats=repeats), DECODE_STEPS)


def bench_attention(run: BenchRun, shape: dict[str, int], repeats: int) -> None:
    """Time the attention of one layer, for some tokens after a past."""
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim = shape["hidden_size"] // heads
    for dtype, (tokens, past) in itertools.product((torch.float32, torch.bfloat16), ATTENTION):
        q, keys, values = (
            torch.randn(length, count, head_dim).to(dtype)
            for length, count in ((tokens, heads), (past + tokens, kv_heads), (past + tokens, kv_heads))
        )
        cases = {
            "PyTorch": lambda given=(q, keys, values): attend_ref(*given),
            "ours": lambda given=(q, [keys], [values], [tokens]): cpu.attend(*given),
        }
        times_s = time_interleaved(cases, warmup=2, repeats=repeats)
        flop = 4 * heads * head_dim * (tokens * past + tokens * (tokens + 1) / 2)
        for name, own_s in times_s.items():
            run.add(
                what=f"attention of {tokens} behind {past}",
                candidate=f"{name} {str(dtype).removeprefix('torch.')}",
                tokens=tokens,
                median_s=median(own_s),
                worst_s=max(own_s),
                times_pytorch=median(times_s["PyTorch"]) / median(own_s),
                gflop_per_s=flop / median(own_s) / 1e9,
            )


def add_rows(
    run: BenchRun, what: str, candidates: list[Candidate], times_s: dict[str, list[float]], num_tokens: int
) -> None:
    for candidate in candidates:
        own_s, rival_s = times_s[candidate.name], times_s[candidate.rival]
        flop = 2 * count_active_weights(candidate.model) * num_tokens
        run.add(
            what=what,
            candidate=candidate.name,
            tokens=num_tokens,
            median_s=median(own_s),
            worst_s=max(own_s),
            tok_per_s=num_tokens / median(own_s),
            times_transformers=median(rival_s) / median(own_s),
            gflop_per_s=flop / median(own_s) / 1e9,
        )


def count_active_weights(model: Jamba | JambaForCausalLM) -> int:
    """Matrix weights that are active for one token, without the head."""
    config, total = model.config, 0
    sizes = [(name, weight.shape) for name, weight in model.named_parameters()]
    for name, module in model.named_modules():  # packed weights are not parameters
        sizes += [(f"{name}.weight", matrix.shape) for matrix in _packed(module)]
    for name, shape in sizes:
        matrix = len(shape) > 1 and not any(part in name for part in ("embed", "lm_head", "conv1d", "A_log", "scale"))
        share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1
        total += int(math.prod(shape) * share) if matrix else 0
    return total


def _packed(module: nn.Module) -> list[cpu.Packed]:
    held = [getattr(module, name, None) for name in ("weight", "gate_up_proj", "down_proj")]
    return [one for many in held for one in (many if isinstance(many, list) else [many]) if isinstance(one, cpu.Packed)]


def bench_ceilings(run: BenchRun, repeats: int) -> None:
    """Measure compute and memory limits with a large matrix product and a memory read."""
    for dtype in (torch.float32, torch.bfloat16):
        square = torch.randn(2048, 2048).to(dtype)
        times_s = time_interleaved({"": lambda square=square: square @ square}, warmup=2, repeats=repeats)[""]
        rate = 2 * 2048**3 / median(times_s) / 1e9
        name = f"{str(dtype).removeprefix('torch.')} product, 2048 x 2048"
        run.add(what="ceiling", candidate=name, median_s=median(times_s), worst_s=max(times_s), gflop_per_s=rate)
    memory = torch.ones(64 << 20)
    times_s = time_interleaved({"": lambda: memory.sum()}, warmup=2, repeats=repeats)[""]
    rate = memory.nbytes / median(times_s) / 1e9
    run.add(what="ceiling", candidate="reading 256 MiB", median_s=median(times_s), worst_s=max(times_s), gb_per_s=rate)


if __name__ == "__main__":
    main()
