"""Scores a model on held-out questions by teacher forcing.

Greedy decoding gives an answer exactly when every one of its tokens is the most likely one, so exact match needs one
forward and no generation.

The service's own scores (free generation, constraints, F1) are `bench/answers.py`'s. Start at `score`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from model.jamba import Jamba
from model.tokenizer import Tokenizer
from model.train.contexts import Context
from model.train.data import ANSWER, ContextRenderer, PairContexts, templated_context


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt with its right answer: `answer` of the token ids come last."""

    name: str
    ids: tuple[int, ...]
    answer: int


def build_items(tokenizer: Tokenizer, contexts: PairContexts, per_set: int, seed: int = 7) -> list[Item]:
    """Answerable questions with 1, 3 and 8 passages, unanswerable ones with 3 and 8, and invented facts with 4."""
    rng, renderer = random.Random(seed), ContextRenderer(tokenizer)
    items = []
    draws = {f"pairs{k}": lambda k=k: contexts.draw(rng, 10_000, k, lost=0.0) for k in (1, 3, 8)}
    draws |= {f"none{k}": lambda k=k: contexts.draw(rng, 10_000, k + 3, lost=0.4) for k in (3, 8)}
    draws |= {"templated4": lambda: templated_context(rng, 2_000, 4)}
    for name, draw in draws.items():
        made = 0
        while made < per_set:
            context = draw()
            wanted = [q for q in context.questions if (q.answer is None) == name.startswith("none")]
            if not wanted:
                continue
            items += _render(name, renderer, replace(context, questions=(rng.choice(wanted),)), rng)
            made += 1
    return items


def _render(name: str, renderer: ContextRenderer, context: Context, rng: random.Random) -> list[Item]:
    ids, kinds = renderer.render(context, 8192, rng)
    count = kinds.count(ANSWER)
    return [Item(name, tuple(ids), count)] if count else []


@torch.no_grad()
def score(model: Jamba, tokenizer: Tokenizer, items: Sequence[Item], batch_tokens: int = 32_768) -> dict[str, float]:
    """Per set: `exact` (whole answer), `document` (the cited one, given the quote), `refused` (first token is none)."""
    none, quote_end = tokenizer.special("<|none|>"), tokenizer.special("<|/quote|>")
    tallies: dict[str, list[tuple[bool, bool, bool]]] = {}
    device = model.embed_tokens.weight.device
    ordered = sorted(items, key=lambda item: len(item.ids))
    while ordered:
        width = len(ordered[-1].ids)
        batch = [ordered.pop() for _ in range(min(len(ordered), max(1, batch_tokens // width)))]
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, item in zip(ids, batch, strict=True):
            row[: len(item.ids)] = torch.tensor(item.ids)
        best = _predictions(model, ids.to(device))
        for item, row in zip(batch, best, strict=True):
            gold, said = item.ids[-item.answer :], row[len(item.ids) - item.answer - 1 : len(item.ids) - 1].tolist()
            after = gold.index(quote_end) + 1 if quote_end in gold else 0
            document = said[after:] == list(gold[after:])
            tallies.setdefault(item.name, []).append((said == list(gold), document, said[0] == none))
    return {
        f"{name}/{metric}": sum(row[i] for row in rows) / len(rows)
        for name, rows in sorted(tallies.items())
        for i, metric in enumerate(("exact", "document", "refused"))
        if not (name.startswith("none") and metric != "refused")
    }


def _predictions(model: Jamba, token_ids: torch.Tensor) -> torch.Tensor:
    """Most likely next tokens, (b, t) -> (b, t), a few rows of logits at a time."""
    return torch.cat([model(rows).argmax(-1).cpu() for rows in token_ids.split(max(1, 16_384 // token_ids.shape[1]))])
