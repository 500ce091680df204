"""Scores a model during training on held-out questions: greedy answers, and refusals.

Each forward pass runs whole rows without a cache, with the right answer as draft, so that one pass is enough if the
model gives it. The first token is forced to be a quote; the margin log P(none) − log P(quote) tells what would be
refused. `bench/answers.py` scores the service itself, and writes the questions read here. Start at `score`.
Run: `python -m model.train.evaluate --help`.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from model.chat_format import ChatFormat
from model.jamba import Jamba
from model.tokenizer import Tokenizer
from model.train.data import covering_tokens
from model.train.forward import forward_hidden, set_rope
from model.train.scoring import normalize_answer, token_f1
from model.train.surgery import STUDENT, TEACHER
from model.train.trainer import load_into

FALSE_REFUSALS = 0.08


@dataclass(slots=True)
class Item:
    """One question; `said` holds the tokens generated so far, and starts with the quote token."""

    set: str
    prompt: list[int]
    gold: list[int]  # tokens of the right answer; empty if there is none
    answer: str | None
    ordinal: int  # of the passage with the answer
    said: list[int] = field(default_factory=list)
    margin: float = 0.0
    done: bool = False


def load_items(path: Path, tokenizer: Tokenizer, per_set: int) -> list[Item]:
    """The first `per_set` of each set of {set, passages: [[title, text]], question, answer or null, gold or null}."""
    prompts, items, counts = ChatFormat(tokenizer), list[Item](), Counter[str]()
    for record in map(json.loads, path.read_text().splitlines()):
        counts[record["set"]] += 1
        if counts[record["set"]] > per_set:
            continue
        system, documents = prompts.system(), list[int]()
        for i, (title, text) in enumerate(record["passages"], start=1):
            documents += prompts.document(i, title, [tokenizer.encode(text)])
        ordinal = (record["gold"] or 0) + 1
        gold = [] if record["answer"] is None else prompts.quoted_answer(_gold_tokens(tokenizer, record), ordinal)
        prompt = [*system, *documents, *prompts.ask(record["question"])]
        items.append(Item(record["set"], prompt, gold, record["answer"], ordinal))
    return items


def _gold_tokens(tokenizer: Tokenizer, record: dict) -> list[int]:
    """The answer as tokenized in its passage, if token boundaries match; otherwise tokenized by itself."""
    text, answer = record["passages"][record["gold"]][1], record["answer"]
    at = text.find(answer)
    found = covering_tokens(tokenizer, text, at, at + len(answer)) if at >= 0 else None
    return found[0][found[1] : found[2]] if found else tokenizer.encode(answer)


@torch.no_grad()
def answer_all(
    model: Jamba, tokenizer: Tokenizer, items: Sequence[Item], max_new: int = 64, tokens: int = 65_536
) -> None:
    """Answer greedily, in place, with about `tokens` tokens per forward pass."""
    prompts = ChatFormat(tokenizer)
    for item in items:
        item.said, item.done = [prompts.quote], False
    active = list(items)
    for turn in range(max_new):
        active.sort(key=lambda item: -len(item.prompt) - len(item.said))
        first = 0
        while first < len(active):
            width = len(active[first].prompt) + max(len(active[first].gold), len(active[first].said)) + 64
            batch = active[first : first + max(1, tokens // width)]
            _advance(model, prompts, batch, drafted=turn == 0)
            first += len(batch)
        active = [item for item in active if not item.done and len(item.said) < max_new]


def _advance(model: Jamba, prompts: ChatFormat, batch: Sequence[Item], drafted: bool) -> None:
    """One forward pass: accept the part of the right answer that the model would give (`drafted`), plus one token."""
    drafts = [item.gold[1:] if drafted else [] for item in batch]
    rows = [item.prompt + item.said + draft for item, draft in zip(batch, drafts, strict=True)]
    width = -(-max(map(len, rows)) // 64) * 64
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row)] = torch.tensor(row)
    hidden, _ = forward_hidden(model, ids.to(model.embed_tokens.weight.device))
    hidden = hidden.unflatten(0, ids.shape)
    for i, (item, draft) in enumerate(zip(batch, drafts, strict=True)):
        start = len(item.prompt) - 1
        logits = model.lm_head(hidden[i, start : start + len(item.said) + len(draft) + 1]).float()
        if drafted:
            item.margin = (logits[0, prompts.none] - logits[0, prompts.quote]).item()
        best = logits[len(item.said) :].argmax(-1).tolist()
        kept = next((n for n, (own, given) in enumerate(zip(best, draft, strict=False)) if own != given), len(draft))
        item.said += best[: kept + 1]
        if prompts.im_end in item.said:
            item.said, item.done = item.said[: item.said.index(prompts.im_end) + 1], True


def score(model: Jamba, tokenizer: Tokenizer, items: Sequence[Item]) -> dict[str, float]:
    """Per set: EM, F1 and cited, in %, of the answerable questions with no refusals allowed; and `refusals`."""
    answer_all(model, tokenizer, items)
    marks: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for item in items:
        if item.answer is not None:
            marks[item.set].append(_mark(tokenizer, item))
    scores = {
        f"{name}/{metric}": round(100 * sum(row[i] for row in rows) / len(rows), 1)
        for name, rows in marks.items()
        for i, metric in enumerate(("EM", "F1", "cited"))
    }
    return scores | {f"{name}/refused": round(share, 1) for name, share in refusals(items).items()}


def refusals(items: Sequence[Item]) -> dict[str, float]:
    """Refused % of each set, at the margin that refuses 8% of the answerable questions of its family (dev, hand)."""
    sets: dict[str, list[Item]] = defaultdict(list)
    margins: dict[str, list[float]] = defaultdict(list)
    for item in items:
        sets[item.set].append(item)
        if item.answer is not None:
            margins[_family(item.set)].append(item.margin)
    shares = {}
    for name, members in sets.items():
        known = sorted(margins[_family(name)], reverse=True)
        threshold = known[int(FALSE_REFUSALS * len(known))] if known else 0.0
        shares[name] = 100 * sum(item.margin > threshold for item in members) / len(members)
    return shares


def _family(name: str) -> str:
    return name.rstrip("0123456789").removesuffix("none")


def _mark(tokenizer: Tokenizer, item: Item) -> tuple[float, float, float]:
    """Exact match, word F1, and whether the right passage is cited."""
    quote, cited = said_of(tokenizer, item)
    gold = item.answer or ""
    exact = float(normalize_answer(quote) == normalize_answer(gold))
    return exact, token_f1(quote, gold), float(cited == f"d{item.ordinal}")


def said_of(tokenizer: Tokenizer, item: Item) -> tuple[str, str]:
    """The quote and the citation of an answer."""
    end = tokenizer.special("<|/quote|>")
    cut = item.said.index(end) if end in item.said else len(item.said)
    return tokenizer.decode(item.said[:cut]).strip(), tokenizer.decode(item.said[cut + 1 :]).strip()


def table(scores: dict[str, float]) -> str:
    """One line per set."""
    names = sorted({name.split("/")[0] for name in scores})
    return "\n".join(
        f"{name:12}"
        + "".join(f"  {key.split('/')[1]} {value:5.1f}" for key, value in scores.items() if key.startswith(f"{name}/"))
        for name in names
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masters", type=Path, required=True, help="saved by distill or tune")
    parser.add_argument("--transformer", action="store_true", help="the masters are a tuned Transformer's")
    for name in ("tokenizer", "items", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--per-set", type=int, default=200)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Jamba(TEACHER if args.transformer else STUDENT)
    load_into(model, args.masters)
    model.to(device, torch.bfloat16)
    set_rope(model, float(args.transformer))
    tokenizer = Tokenizer.load(args.tokenizer)
    items = load_items(args.items, tokenizer, args.per_set)
    scores = score(model, tokenizer, items)
    args.out.write_text(json.dumps(scores, indent=1) + "\n")
    print(table(scores))


if __name__ == "__main__":
    main()
