"""Mines hard negatives: wrong quotes that a model finds likely, for the asked-back turns of `ContextRenderer`.

For each lone passage and its questions, answerable or not, finds the likeliest quotes besides the right one in the same
way as the service: from the likeliest first tokens to the likeliest end of each. Takes one forward pass for the
beginnings of all questions of a passage and one for the ends. CPU work dominates: run several processes per GPU, each
with its `--part`. Run `python -m model.train.rivals --help`; start at `likeliest_quotes`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from model.chat_format import ChatFormat
from model.jamba import Jamba
from model.tokenizer import Tokenizer
from model.train.contexts import Context
from model.train.data import covering_tokens
from model.train.forward import accelerate, forward_hidden
from model.train.pair_contexts import asked_of, load_pairs
from model.train.scoring import normalize_answer
from model.weights import load_model

MAX_CHARS = 1400  # a passage with its questions, about
BEGINNINGS, LONGEST, KEPT = 4, 20, 3  # beginnings tried, tokens of a quote, quotes kept per question
TOKENS = 65_536  # maximum per forward pass


@dataclass(slots=True)
class Asked:
    """A question up to `<|quote|>`, and the rest of its answer, if it has one."""

    name: str
    ids: list[int]
    said: list[int]
    gold: str
    begun: list[int] = field(default_factory=list)  # indices of passage tokens at which a quote may begin
    found: list[tuple[float, str, int]] = field(default_factory=list)  # log P, text, character offset


@dataclass(slots=True)
class Lone:
    """A lone passage: the tokens of its prompt, where the passage begins at `first`, and its questions."""

    text: str
    prompt: list[int]
    first: int
    offsets: list[tuple[int, int]]
    asked: list[Asked]
    begins: dict[int, list[int]] = field(default_factory=dict)  # token id -> indices where it begins a word
    ends: list[bool] = field(default_factory=list)  # whether each token ends a word

    def __post_init__(self) -> None:
        ids = self.prompt[self.first : self.first + len(self.offsets)]
        for at, (token, (start, end)) in enumerate(zip(ids, self.offsets, strict=True)):
            if self.text[start:end].strip() and not self._within_word(self._begin(at)):
                self.begins.setdefault(token, []).append(at)
            self.ends.append(not self._within_word(end))

    def words(self, first: int, last: int) -> tuple[str, int]:
        """The text of tokens first to last, stripped, and its character offset."""
        start = self._begin(first)
        return self.text[start : self.offsets[last][1]].rstrip(), start

    def _begin(self, at: int) -> int:
        start, end = self.offsets[at]
        return end - len(self.text[start:end].lstrip())

    def _within_word(self, at: int) -> bool:
        return 0 < at < len(self.text) and self.text[at - 1].isalnum() and self.text[at].isalnum()


def lone_of(context: Context, prompts: ChatFormat) -> Lone:
    """The passage of a context and its questions, answerable ones first, because each is followed by its answer."""
    ((title, text),) = context.passages
    ids, offsets = prompts.tokenizer.encode_with_offsets(text)
    prompt = [*prompts.system(), *prompts.document(1, title, [ids])]
    asked = []
    for question in sorted(context.questions, key=lambda q: q.answer is None):
        said, gold = [], question.answer or ""
        if question.answer is not None:
            found = covering_tokens(prompts.tokenizer, text, question.start, question.start + len(gold))
            if found is None:
                continue
            said = prompts.quoted_answer(found[0][found[1] : found[2]], 1)[1:]
        asked.append(Asked(asked_of(text, question.text), [*prompts.ask(question.text), prompts.quote], said, gold))
    return Lone(text, prompt, len(prompt) - 1 - len(ids), offsets, asked)


class Lones(IterableDataset):
    """Lists of `Lone`: the share of all passages of this process and worker."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def __iter__(self) -> Iterator[list[Lone]]:
        worker, args = get_worker_info(), self.args
        part, parts = args.part * worker.num_workers + worker.id, args.parts * worker.num_workers
        contexts = load_pairs(args.pairs).each_lone(random.Random(args.seed), MAX_CHARS)  # same order in all processes
        prompts = ChatFormat(Tokenizer.load(args.tokenizer))
        mine = (lone_of(context, prompts) for context in islice(contexts, part, None, parts) if context.questions)
        while batch := list(islice(mine, 128)):
            yield batch


@torch.no_grad()
def likeliest_quotes(model: Jamba, prompts: ChatFormat, lones: Sequence[Lone], rng: random.Random) -> None:
    """Fill `found` of every question, likeliest first."""
    for batch in _batches(lones, lambda lone: sum(len(one.ids) + len(one.said) for one in lone.asked)):
        _begin(model, batch, rng)
    for batch in _batches(lones, lambda lone: sum(len(one.begun) * (len(one.ids) + LONGEST) for one in lone.asked)):
        _end(model, prompts.quote_end, batch)


def _begin(model: Jamba, lones: Sequence[Lone], rng: random.Random) -> None:
    """Choose the likeliest first tokens of quotes, with one occurrence in the passage each."""
    rows, places, wanted = [], [], []
    for n, lone in enumerate(lones):
        row = list(lone.prompt)
        for one in lone.asked:
            row += one.ids
            places.append((n, len(row) - 1))
            wanted.append(torch.tensor(list(lone.begins)))
            row += one.said
        rows.append(row)
    ids, hidden = _forward(model, rows)
    at, device = torch.tensor(places).mul_(torch.tensor([ids.shape[1], 1])).sum(1), hidden.device
    told = model.lm_head(hidden[at.to(device)]).float()
    columns = pad_sequence(wanted, batch_first=True, padding_value=-1).to(device)
    told = told.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, float("-inf"))
    best = told.topk(min(BEGINNINGS, told.shape[1])).indices.tolist()
    asked = ((lone, one) for lone in lones for one in lone.asked)
    for (lone, one), chosen in zip(asked, best, strict=True):
        begins = list(lone.begins.values())
        one.begun = [rng.choice(begins[i]) for i in chosen if i < len(begins)]


def _end(model: Jamba, quote_end: int, lones: Sequence[Lone]) -> None:
    """Find the likeliest end for each beginning."""
    rows, begun, firsts, ends = [], [], [], []
    for n, lone in enumerate(lones):
        row = list(lone.prompt)
        for one in lone.asked:
            for at in one.begun:
                row += one.ids
                firsts.append((n, len(row) - 1))
                length = min(LONGEST, len(lone.offsets) - at)
                row += lone.prompt[lone.first + at : lone.first + at + length]
                begun.append((lone, one, at))
                ends.append(torch.tensor(lone.ends[at : at + length]))
        rows.append([*row, *[0] * LONGEST])
    if not begun:
        return
    ids, hidden = _forward(model, rows)
    at = torch.tensor(firsts).mul_(torch.tensor([ids.shape[1], 1])).sum(1)[:, None] + torch.arange(LONGEST + 1)
    said = ids.flatten()[at[:, 1:]].to(hidden.device)  # (quotes, LONGEST)
    copied, ended = [], []
    for places, tokens in zip(at.split(400), said.split(400), strict=True):
        told = model.lm_head(hidden[places.to(hidden.device)]).float().log_softmax(-1)
        copied.append(told[:, :-1].gather(2, tokens[..., None]).squeeze(2))
        ended.append(told[:, 1:, quote_end])
    may_end = pad_sequence([*ends, torch.ones(LONGEST, dtype=torch.bool)], batch_first=True)[:-1].to(hidden.device)
    nats = (torch.cat(copied).cumsum(1) + torch.cat(ended)).masked_fill(~may_end, float("-inf"))
    best, last = (x.tolist() for x in nats.max(1))
    for (lone, one, at), logprob, length in zip(begun, best, last, strict=True):
        words, start = lone.words(at, at + length)
        known = {normalize_answer(one.gold), *(normalize_answer(other) for _, other, _ in one.found)}
        if logprob > float("-inf") and normalize_answer(words) not in known:
            one.found.append((logprob, words, start))
    for lone in lones:
        for one in lone.asked:
            one.found = sorted(one.found, reverse=True)[:KEPT]


def _forward(model: Jamba, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Padded rows -> ids (b, t) on the CPU, final hidden states (b·t, d)."""
    ids = torch.zeros(len(rows), -(-max(map(len, rows)) // 64) * 64, dtype=torch.int64)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    return ids, forward_hidden(model, ids.to(model.embed_tokens.weight.device))[0]


def _batches(lones: Sequence[Lone], asks: Callable[[Lone], int]) -> Iterator[list[Lone]]:
    """Batches of rows of similar length with at most `TOKENS` tokens, questions included."""
    lengths = {id(lone): len(lone.prompt) + asks(lone) for lone in lones}
    batch: list[Lone] = []
    for lone in sorted(lones, key=lambda lone: -lengths[id(lone)]):
        if batch and (len(batch) + 1) * (lengths[id(batch[0])] + 64) > TOKENS:
            yield batch
            batch = []
        batch.append(lone)
    if batch:
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("checkpoint", "tokenizer", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help="files of `model.train.pairs`")
    parser.add_argument("--seconds", type=float, default=60, help="wall-clock time, without startup")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--part", type=int, default=0, help="which of `--parts` shares of the passages to read")
    parser.add_argument("--parts", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.checkpoint, dtype=torch.bfloat16, device=device)
    accelerate(model)
    prompts, rng = ChatFormat(Tokenizer.load(args.tokenizer)), random.Random(args.seed)
    began, passages, asked, found = 0.0, 0, 0, 0
    written = args.out / f"rivals-{args.part}.part"
    with written.open("w") as file:
        for lones in DataLoader(Lones(args), batch_size=None, num_workers=args.workers):
            began = began or time.monotonic()
            likeliest_quotes(model, prompts, lones, rng)
            for one in (one for lone in lones for one in lone.asked if one.found):
                rivals = [[words, start, round(nats, 2)] for nats, words, start in one.found]
                file.write(json.dumps({"asked": one.name, "rivals": rivals}) + "\n")
                found += len(rivals)
            passages, asked = passages + len(lones), asked + sum(len(lone.asked) for lone in lones)
            if passages % 2048 < len(lones):
                print(f"{passages} passages, {asked} questions, {found} wrong quotes", flush=True)
            if time.monotonic() - began > args.seconds:
                break
    written.rename(written.with_suffix(".jsonl"))
    print(f"{passages} passages, {asked} questions, {found} wrong quotes -> {args.out}")


if __name__ == "__main__":
    main()
