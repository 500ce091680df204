"""The shipped checkpoint on a GPU (int8 weights, bfloat16 activations) against the CPU (the same weights, float32).

Logits over the prompts of hf_parity.py; greedy texts, and how close to a tie the first different token was; 64K tokens
in segments against one piece; batches against single sequences; states after serialization. `w8a8` also quantizes the
activations of prefills.
    python -m bench.gpu_parity --save-prompts prompts.json     # on a machine with the sample documents
    python -m bench.gpu_parity --prompts prompts.json          # on the GPU
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from bench.runs import BenchRun
from model import Jamba, load_model
from model.layered_prefill import LayeredPrefill
from model.state import Snapshot
from model.state_codec import decode_value, encode_value

SHIPPED = Path(__file__).parent.parent / "model" / "checkpoints" / "jamba-small"
LONG_TOKENS, SEGMENT = 65_536, 10_007  # not a multiple of any tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save-prompts", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--long-tokens", type=int, default=LONG_TOKENS)
    arguments = parser.parse_args()
    if arguments.save_prompts:
        from bench.hf_parity import sample_prompts

        arguments.save_prompts.write_text(json.dumps(sample_prompts(50)))
        return
    prompts = json.loads(arguments.prompts.read_text())
    run, exact = BenchRun("gpu-parity", argv=sys.argv), load_model(arguments.model, quantize="int8")
    expected = [forward(exact, prompt) for prompt in prompts]
    texts = [decode(exact, [prompt], arguments.new_tokens)[0] for prompt in prompts]
    print(f"{len(prompts)} prompts on the CPU", flush=True)
    for quantize in ("int8", "w8a8") if arguments.device.startswith("cuda") else ("int8",):
        model = load_model(arguments.model, arguments.device, torch.bfloat16, quantize)
        add_logits(run, quantize, [forward(model, prompt) for prompt in prompts], expected)
        add_texts(run, quantize, [decode(model, [prompt], arguments.new_tokens)[0] for prompt in prompts], texts)
        add_cuts(run, quantize, model, list(islice(cycle(chain.from_iterable(prompts)), arguments.long_tokens)))
        add_batch(run, quantize, model, prompts[:8], arguments.new_tokens)
        add_bytes(run, quantize, model, prompts)
    run.finish()


@torch.inference_mode()
def forward(model: Jamba, prompt: list[int]) -> Tensor:
    """(t, v) log-probabilities, on the CPU."""
    ids = torch.tensor([prompt], device=model.lm_head.weight.device)
    return model(ids, model.new_state())[0].float().log_softmax(-1).cpu()


@torch.inference_mode()
def decode(model: Jamba, prompts: list[list[int]], new_tokens: int) -> list[list[tuple[int, float]]]:
    """Greedy tokens of each sequence, decoded as a batch, and the margin of each over the runner-up, in nats."""
    states, logits = [model.new_state() for _ in prompts], []
    for prompt, state in zip(prompts, states, strict=True):
        logits.append(model.forward_packed(torch.tensor(prompt), [len(prompt)], [state])[0])
    steps, latest = [], torch.stack(logits)
    for _ in range(new_tokens):
        top = latest.float().topk(2, dim=-1)
        steps.append((top.indices[:, 0].tolist(), (top.values[:, 0] - top.values[:, 1]).tolist()))
        latest = model.forward_packed(top.indices[:, 0].contiguous(), [1] * len(states), states)
    return [[(ids[i], margins[i]) for ids, margins in steps] for i in range(len(prompts))]


def add_logits(run: BenchRun, quantize: str, ours: list[Tensor], expected: list[Tensor]) -> None:
    kl = torch.cat([(e.exp() * (e - o)).sum(-1) for o, e in zip(ours, expected, strict=True)])
    agree = torch.cat([o.argmax(-1) == e.argmax(-1) for o, e in zip(ours, expected, strict=True)])
    errors = [((o - e).norm() / e.norm()).item() for o, e in zip(ours, expected, strict=True)]
    row = {"positions": len(kl), "kl": kl.mean().item(), "median_kl": kl.median().item(), "worst_kl": kl.max().item()}
    row |= {"percent_agree": 100 * agree.float().mean().item()}
    run.add(quantize=quantize, what="log-probabilities", **row, relative_rms=median(errors), worst=max(errors))


def add_texts(
    run: BenchRun, quantize: str, ours: list[list[tuple[int, float]]], expected: list[list[tuple[int, float]]]
) -> None:
    """`worst`: largest margin, in nats, of the reference for its own token where the texts diverge; 0: a tie."""
    margins = []
    for own, other in zip(ours, expected, strict=True):
        pairs = zip(own, other, strict=True)
        margins += [margin for (token, _), (exact, margin) in pairs if token != exact][:1]
    row = {"texts": len(ours), "identical": len(ours) - len(margins)}
    run.add(quantize=quantize, what="greedy texts", **row, median=median(margins or [0.0]), worst=max(margins or [0.0]))


@torch.inference_mode()
def add_cuts(run: BenchRun, quantize: str, model: Jamba, ids: list[int]) -> None:
    tokens = torch.tensor(ids, device=model.lm_head.weight.device)
    whole, cut, pieces = (model.new_state() for _ in range(3))
    expected = model.forward_packed(tokens, [len(ids)], [whole])
    for piece in tokens.split(SEGMENT):
        logits = model.forward_packed(piece, [len(piece)], [cut])
    layered = LayeredPrefill(model, tokens, pieces).run()
    for name, own, state in (("in segments", logits, cut), ("layer by layer", layered, pieces)):
        errors = {"relative_rms": relative_rms(own, expected), "ssm_rms": relative_rms(state.ssm, whole.ssm)}
        run.add(quantize=quantize, what=f"{len(ids)} tokens {name}", **errors, kl=divergence(own, expected))


def add_batch(run: BenchRun, quantize: str, model: Jamba, prompts: list[list[int]], new_tokens: int) -> None:
    together = decode(model, prompts, new_tokens)
    alone = [decode(model, [prompt], new_tokens)[0] for prompt in prompts]
    add_texts(run, f"{quantize}, batch of {len(prompts)} against alone", together, alone)


@torch.inference_mode()
def add_bytes(run: BenchRun, quantize: str, model: Jamba, prompts: list[list[int]]) -> None:
    """Compare a question after a state with one after the serialized and restored state: same bits."""
    same, question = 0, torch.tensor(prompts[0][-40:])
    for prompt in prompts[:10]:
        state = model.new_state()
        model.forward_packed(torch.tensor(prompt), [len(prompt)], [state])
        snapshot = state.snapshot()
        value = encode_value("state", "parity", [*snapshot.tensors, state.read_kv(0, state.num_tokens)])
        conv, ssm, kv = (tensor.to(state.conv.device) for tensor in decode_value("state", "parity", value, 3))
        again = model.new_state()
        again.restore(Snapshot(state.num_tokens, conv, ssm), [kv])
        pair = [model.forward_packed(question, [len(question)], [one]) for one in (state, again)]
        same += torch.equal(*pair)
    run.add(quantize=quantize, what="states through bytes", texts=len(prompts[:10]), identical=same)


def divergence(ours: Tensor, expected: Tensor) -> float:
    ours, expected = (x.float().log_softmax(-1) for x in (ours, expected))
    return (expected.exp() * (expected - ours)).sum(-1).mean().item()


def relative_rms(ours: Tensor, expected: Tensor) -> float:
    return ((ours.float() - expected.float()).norm() / expected.float().norm()).item()


if __name__ == "__main__":
    main()
