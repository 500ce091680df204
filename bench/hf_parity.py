"""The shipped checkpoint in float32 with our Jamba and with `transformers`': equal tokens, difference of the logits.

Both load the output of `convert_checkpoint(…, to="fp32")`. Each continues every prompt greedily: one prefill, then one
token at a time with its own cache. Speed is measured in cpu_prefill.py.
    python -m bench.hf_parity [--prompts 50] [--new-tokens 12] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, JambaForCausalLM
from transformers.utils import logging

from bench.runs import BenchRun
from ingest.parse import parse_file
from ingest.sniff import SNIFF_BYTES, sniff_media_type
from model import Jamba, convert_checkpoint, load_model
from model.chat_format import ChatFormat
from model.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "model" / "checkpoints" / "jamba-small"
SAMPLES = ROOT / "samples"


class Continuation(NamedTuple):
    """Greedy tokens after a prompt of t tokens, and the logits (t + n - 1, v) of prompt and tokens."""

    token_ids: list[int]
    logits: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    prompts = sample_prompts(arguments.prompts)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "fp32"
        convert_checkpoint(SHIPPED, folder, to="fp32")
        ours, theirs = load_model(folder), load_transformers(folder)
        run = BenchRun("hf-parity", argv=sys.argv)
        errors, identical = [], 0
        for prompt in prompts:
            mine = continue_ours(ours, prompt, arguments.new_tokens)
            expected = continue_theirs(theirs, prompt, arguments.new_tokens)
            identical += mine.token_ids == expected.token_ids
            errors.append(relative_rms(mine, expected, len(prompt)))
    run.add(
        prompts=len(prompts),
        prompt_tokens=sum(map(len, prompts)),
        shortest=min(map(len, prompts)),
        longest=max(map(len, prompts)),
        new_tokens=len(prompts) * arguments.new_tokens,
        identical=identical,
        median_relative_rms=median(errors),
        worst_relative_rms=max(errors),
    )
    run.finish()


def sample_texts() -> dict[str, str]:
    """File name -> text of every sample document, as the service reads it."""
    texts = {}
    for path in sorted((SAMPLES / "documents").iterdir()):
        with path.open("rb") as file:
            media_type = sniff_media_type(file.read(SNIFF_BYTES), path.name)
        texts[path.name] = parse_file(path, media_type).text
    return texts


def sample_prompts(number: int) -> list[list[int]]:
    """Prompts of about 60 to 120 tokens over windows of the sample documents.

    Every second one asks a question of samples/questions.json; the others break off inside the document.
    """
    tokenizer = Tokenizer.load(SHIPPED)
    chat = ChatFormat(tokenizer)
    pages = {name: tokenizer.encode(text) for name, text in sample_texts().items()}
    raw = json.loads((SAMPLES / "questions.json").read_text(encoding="utf-8"))
    questions = cycle(item["question"] for item in raw["questions"] + raw["unanswerable"])
    prompts = []
    for i, (name, ids) in enumerate(islice(cycle(pages.items()), number)):
        length = 23 + 7 * i % 41
        start = 197 * i % (len(ids) - length)
        document = chat.document(i + 1, name, [ids[start : start + length]])
        tail = document[:-1] if (i // len(pages) + i) % 2 else document + chat.ask(next(questions))
        prompts.append(chat.system() + tail)
    return prompts


def load_transformers(folder: Path) -> JambaForCausalLM:
    """`transformers`' Jamba in float32, using its PyTorch path."""
    return JambaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()


@torch.inference_mode()
def continue_ours(model: Jamba, prompt: list[int], new_tokens: int) -> Continuation:
    state = model.new_state()
    logits = [model(torch.tensor([prompt]), state)[0]]
    token_ids = [int(logits[-1][-1].argmax())]
    while len(token_ids) < new_tokens:
        logits.append(model(torch.tensor([token_ids[-1:]]), state)[0])
        token_ids.append(int(logits[-1][-1].argmax()))
    return Continuation(token_ids, torch.cat(logits))


@torch.inference_mode()
def continue_theirs(model: JambaForCausalLM, prompt: list[int], new_tokens: int) -> Continuation:
    cache = DynamicCache(config=model.config)
    logits = [model(torch.tensor([prompt]), past_key_values=cache, use_cache=True).logits[0]]
    token_ids = [int(logits[-1][-1].argmax())]
    while len(token_ids) < new_tokens:
        logits.append(model(torch.tensor([token_ids[-1:]]), past_key_values=cache, use_cache=True).logits[0])
        token_ids.append(int(logits[-1][-1].argmax()))
    return Continuation(token_ids, torch.cat(logits))


def relative_rms(ours: Continuation, theirs: Continuation, prompt_tokens: int) -> float:
    """Relative RMS of the difference of logits: of all if the tokens are equal, else of the prompt's."""
    end = None if ours.token_ids == theirs.token_ids else prompt_tokens
    difference = ours.logits[:end].double() - theirs.logits[:end].double()
    return (difference.norm() / theirs.logits[:end].double().norm()).item()


if __name__ == "__main__":
    main()
