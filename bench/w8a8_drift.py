"""Drift of the shipped checkpoint caused by int8 activations, for each product and all of them, with the checkpoint as
it is and with its residual stream rotated (model/rotation.py).

Compared with the same int8 weights and float32 activations, on the sample documents as in a prompt: KL per token in
nats, agreement of the likeliest token, relative RMS of the hidden states before the head and of the final recurrent
states. `peak_over_rms`: a token's largest input to these products over its RMS (median and maximum over tokens), which
determines the error of absmax quantization. Computed by the reference on the CPU; "as on a CPU" uses the CPU kernel,
with one scale per 64 columns.
    python -m bench.w8a8_drift [--tokens 384] [--threads 2]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.hf_parity import SHIPPED, sample_texts
from bench.runs import BenchRun
from model import Jamba, convert_checkpoint, load_model
from model.chat_format import ChatFormat
from model.kernels import w8a8
from model.tokenizer import Tokenizer
from model.w8a8 import SITES, round_activations


class Outputs(NamedTuple):
    logprobs: Tensor  # (all tokens, v)
    hidden: Tensor  # (all tokens, d)
    ssm: Tensor  # (documents, n_mamba, e, n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=384, help="of each document")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    documents, run = sample_documents(arguments.tokens), BenchRun("w8a8-drift", argv=sys.argv)
    float32 = read(load_model(SHIPPED), documents)
    with tempfile.TemporaryDirectory() as folder:
        turned = Path(folder) / "turned"
        convert_checkpoint(SHIPPED, turned, to="fp32", rotate=True)
        for stream, checkpoint in (("as it is", SHIPPED), ("turned", turned)):
            for row in measure(checkpoint, documents, float32):
                run.add(stream=stream, positions=len(float32.hidden), **row)
                print(run.rows[-1], flush=True)
    run.finish()


def measure(checkpoint: Path, documents: list[list[int]], float32: Outputs) -> Iterator[dict[str, Any]]:
    expected = read(load_model(checkpoint, quantize="int8"), documents)
    yield {"rounded": "weights alone, against float32"} | drift(expected, float32, same_stream=False)
    choices: dict[str, Collection[str]] = {site: [site] for site in SITES} | {"all": SITES}
    for name, sites in choices.items():
        model = load_model(checkpoint, quantize="int8")
        round_activations(model, sites)
        with collected_peaks() as peaks:
            outputs = read(model, documents)
        every = torch.cat(peaks)
        shape = {"peak_over_rms": every.median().item(), "largest_peak": every.max().item()}
        yield {"rounded": name} | drift(outputs, expected) | shape
    yield {"rounded": "weights and all, against float32"} | drift(outputs, float32, same_stream=False)
    outputs = read(load_model(checkpoint, quantize="w8a8"), documents)
    yield {"rounded": "all as on a CPU"} | drift(outputs, expected)
    yield {"rounded": "weights and all as on a CPU, against float32"} | drift(outputs, float32, same_stream=False)


def sample_documents(num_tokens: int) -> list[list[int]]:
    """Prompts that end after their only document."""
    tokenizer = Tokenizer.load(SHIPPED)
    chat = ChatFormat(tokenizer)
    return [
        chat.system() + chat.document(i, name, [tokenizer.encode(text)[:num_tokens]])
        for i, (name, text) in enumerate(sample_texts().items(), start=1)
    ]


@torch.inference_mode()
def read(model: Jamba, documents: list[list[int]]) -> Outputs:
    """Run each document in one call."""
    logprobs, hidden, ssm = [], [], []
    model.final_layernorm.register_forward_hook(lambda module, inputs, out: hidden.append(out))
    for ids in documents:
        state = model.new_state()
        logprobs.append(model(torch.tensor([ids]), state)[0].log_softmax(-1))
        ssm.append(state.ssm)
    return Outputs(torch.cat(logprobs), torch.cat(hidden), torch.stack(ssm))


@contextmanager
def collected_peaks() -> Iterator[list[Tensor]]:
    """Collect the largest value over the RMS of every quantized token."""
    peaks: list[Tensor] = []
    quantize = w8a8.quantize_tokens_ref

    def quantize_and_note(x: Tensor, spans: bool = False) -> w8a8.Tokens:
        peaks.append((x.abs().amax(-1) / x.square().mean(-1).sqrt().clamp_min(1e-30)).flatten())
        return quantize(x, spans)

    w8a8.quantize_tokens_ref = quantize_and_note
    try:
        yield peaks
    finally:
        w8a8.quantize_tokens_ref = quantize


def drift(ours: Outputs, expected: Outputs, same_stream: bool = True) -> dict[str, float]:
    """same_stream: whether hidden states are comparable, because neither residual stream is rotated."""
    kl = (expected.logprobs.exp() * (expected.logprobs - ours.logprobs)).sum(-1)
    agreement = (expected.logprobs.argmax(-1) == ours.logprobs.argmax(-1)).float().mean()
    hidden = {"hidden_error": _relative_rms(ours.hidden, expected.hidden)} if same_stream else {}
    return {
        "kl": kl.mean().item(),
        "worst_kl": kl.max().item(),
        "percent_agree": 100 * agreement.item(),
        **hidden,
        "ssm_error": _relative_rms(ours.ssm, expected.ssm),
    }


def _relative_rms(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    main()
