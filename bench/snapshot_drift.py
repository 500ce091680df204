"""Drift of the shipped checkpoint caused by int8 snapshots, for the method in use and for other ways of rounding.

A prompt is read up to some length, where its SSM state is rounded (`once`), or it is rounded there and every --every
tokens before, as in a prompt with that many snapshots; then --tokens more are read. Compared with no rounding: KL of
these tokens in nats, agreement of the likeliest token, relative RMS of the state after the prompt. Prompts are the
documents of this repository in the service's format, from several starting points. `percent_saved`: reduction in size
of a snapshot, including its conv state in float32. For comparison, without rounding: the model in bfloat16, and with
int8 weights; otherwise the model is in float32.
    python -m bench.snapshot_drift [--lengths 512 2048 8192] [--prompts 4] [--tokens 128] [--every 2048]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.hf_parity import SHIPPED, sample_texts
from bench.runs import BenchRun
from model import HybridState, Jamba, load_model
from model.chat_format import ChatFormat
from model.ssm_rounding import dequantize_ssm, quantize_ssm
from model.tokenizer import Tokenizer

Rounding = Callable[[Tensor], tuple[Tensor, int]]  # ssm (n_mamba, e, n) -> (rounded ssm, bytes)
_SEGMENT = 512


def scaled(ssm: Tensor, dims: tuple[int, ...], steps: int = 127) -> tuple[Tensor, int]:
    """One scale per slice along `dims`."""
    scale = (ssm.abs().amax(dims, keepdim=True) / steps).clamp_min(torch.finfo(torch.float32).tiny)
    return (ssm / scale).round() * scale, ssm.numel() + 4 * scale.numel()


def grouped(ssm: Tensor, channels: int) -> tuple[Tensor, int]:
    """One scale per group of channels of one state index."""
    groups = ssm.unflatten(1, (-1, channels))
    rounded, nbytes = scaled(groups, (2,))
    return rounded.flatten(1, 2), nbytes


def levelled(ssm: Tensor) -> tuple[Tensor, int]:
    """A scale per state index, then one per channel of the result."""
    of_index = ssm.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rounded, nbytes = scaled(ssm / of_index, (2,))
    return rounded * of_index, nbytes + 4 * of_index.numel()


def as_kept(ssm: Tensor) -> tuple[Tensor, int]:
    (whole, scale), out = quantize_ssm(ssm), torch.empty_like(ssm)
    dequantize_ssm(whole, scale, out)
    return out, whole.nbytes + scale.nbytes


def rooted(ssm: Tensor) -> tuple[Tensor, int]:
    """A scale per channel, with finer steps near zero."""
    root = ssm.abs().sqrt() * ssm.sign()
    rounded, nbytes = scaled(root, (2,))
    return rounded.square() * rounded.sign(), nbytes


ROUNDINGS: dict[str, Rounding] = {
    "bfloat16": lambda ssm: (ssm.bfloat16().float(), 2 * ssm.numel()),
    "int8, a scale a layer": lambda ssm: scaled(ssm, (1, 2)),
    "int8, a scale a state index": lambda ssm: scaled(ssm, (1,)),
    "int8, a scale 64 channels of a state index": lambda ssm: grouped(ssm, 64),
    "int8, a scale a channel": lambda ssm: scaled(ssm, (2,)),
    "int8 of the root, a scale a channel": rooted,
    "int8, a scale a channel and one a state index": levelled,
    "int8 as kept, a bfloat16 scale a channel": as_kept,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--every", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run = BenchRun("snapshot-drift", argv=sys.argv)
    model = load_model(SHIPPED)
    others = {"bfloat16": load_model(SHIPPED, dtype=torch.bfloat16), "int8": load_model(SHIPPED, quantize="int8")}
    for length in arguments.lengths:
        prompts = list(read_prompts(length + arguments.tokens, arguments.prompts))
        exact = [State(model, prompt[:length]) for prompt in prompts]
        expected = [state.continued(prompt[length:]) for state, prompt in zip(exact, prompts, strict=True)]
        rows: dict[tuple[str, str], list[State]] = {}
        for name, rounding in ROUNDINGS.items():
            rows["rounded once", name] = [state.rounded(rounding) for state in exact]
            if length > arguments.every and rounding is as_kept:
                kinds = [State(model, prompt[:length], arguments.every, rounding) for prompt in prompts]
                rows[f"rounded every {arguments.every}", name] = [state.rounded(rounding) for state in kinds]
        for name, other in others.items():
            rows["nothing rounded", f"{name} model"] = [State(other, prompt[:length]) for prompt in prompts]
        for (when, name), states in rows.items():
            ours = [state.continued(prompt[length:]) for state, prompt in zip(states, prompts, strict=True)]
            run.add(prompt_tokens=length, when=when, what=name, **drift(ours, expected), **size(states, exact))
            print(run.rows[-1], flush=True)
    run.finish()


class State:
    """The state after these tokens, rounded at each multiple of `every` before their end."""

    @torch.inference_mode()
    def __init__(self, model: Jamba, token_ids: list[int], every: int = 0, rounding: Rounding | None = None) -> None:
        self.model, self.state, self.saved = model, model.new_state(), 0.0
        for start in range(0, len(token_ids), _SEGMENT):
            if every and rounding and start and start % every == 0:
                self.state.ssm.copy_(rounding(self.state.ssm)[0])
            model(torch.tensor([token_ids[start : start + _SEGMENT]]), self.state, logits="last")

    def copied(self) -> HybridState:
        state = self.model.new_state()
        state.restore(self.state.snapshot(), [self.state.read_kv(0, self.state.num_tokens)])
        return state

    @torch.inference_mode()
    def rounded(self, rounding: Rounding) -> State:
        other = object.__new__(State)
        other.model, other.state = self.model, self.copied()
        ssm, nbytes = rounding(other.state.ssm)
        other.state.ssm.copy_(ssm)
        snapshot = self.state.snapshot()
        other.saved = (snapshot.ssm.nbytes - nbytes) / snapshot.nbytes
        return other

    @torch.inference_mode()
    def continued(self, token_ids: list[int]) -> Tensor:
        """Log-probabilities (t, v) after each of these."""
        return self.model(torch.tensor([token_ids]), self.copied())[0].float().log_softmax(-1)


def read_prompts(num_tokens: int, count: int) -> Iterator[list[int]]:
    """Prompts of `num_tokens` tokens, each starting with a different document."""
    tokenizer = Tokenizer.load(SHIPPED)
    chat = ChatFormat(tokenizer)
    pages = {path.name: path.read_text() for path in sorted((Path(__file__).parent.parent / "docs").glob("*.md"))}
    texts = list((sample_texts() | pages).items())
    for first in range(count):
        prompt, shift = chat.system(), first * len(texts) // count
        for i, (name, text) in enumerate(texts[shift:] + texts[:shift], start=1):
            prompt = prompt + chat.document(i, name, [tokenizer.encode(text)])
        if len(prompt) < num_tokens:
            raise SystemExit(f"the documents have {len(prompt)} tokens, {num_tokens} were asked for")
        yield prompt[:num_tokens]


def drift(ours: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    got, wanted = torch.cat(ours), torch.cat(expected)
    kl = (wanted.exp() * (wanted - got)).sum(-1)
    agree = (wanted.argmax(-1) == got.argmax(-1)).float().mean()
    shape = {"median_kl": kl.median().item(), "kl": kl.mean().item()}
    return {**shape, "worst_kl": kl.max().item(), "percent_agree": 100 * agree.item()}


def size(states: list[State], exact: list[State]) -> dict[str, float]:
    errors = [(a.state.ssm - b.state.ssm).norm() / b.state.ssm.norm() for a, b in zip(states, exact, strict=True)]
    return {"ssm_error": torch.stack(errors).mean().item(), "percent_saved": 100 * states[0].saved}


if __name__ == "__main__":
    main()
