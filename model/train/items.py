"""Builds the questions that checkpoints are scored on: generated ones on held-out documents, and hand-written ones.

Sets are named by family and number of passages: `dev3` has the gold passage and two distractors, `devnone3` three
distractors only; `hand3` and `handnone3` likewise, except that hand-written near misses keep their passage.
Read by `model.train.evaluate` and `bench/answers.py`. Run: `python -m model.train.items --help`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SIZES = (1, 3, 8)
Passage = tuple[str, str]  # title and text


def made_items(pairs: Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` questions per set from `pairs_dev.jsonl` and the `passages_dev.jsonl` beside it."""
    rng = random.Random(seed)
    passages = {row["id"]: row for row in _read(pairs.with_name(pairs.name.replace("pairs_", "passages_")))}
    usable = [pair for pair in _read(pairs) if len(pair["negatives"]) >= max(SIZES)]
    chosen = rng.sample(usable, min(count, len(usable)))
    for size in SIZES:
        for pair in chosen:
            near = [(_title(passages[i]), passages[i]["text"]) for i in pair["negatives"][:size]]
            gold = (_title(pair), pair["passage"])
            yield _item(f"dev{size}", pair["question"], pair["answer"], gold, near[: size - 1], rng)
            if size > 1:
                yield _item(f"devnone{size}", pair["question"], None, near[0], near[1:], rng)


def hand_items(rows: Path, seed: int) -> Iterator[dict[str, Any]]:
    """All questions from the output of `model.train.testset`, in each set."""
    rng = random.Random(seed)
    asked = list(_read(rows))
    rng.shuffle(asked)  # so that the first questions of a set come from all packages
    for size in SIZES:
        for row in asked:
            near = [(other["title"] or other["doc"], other["text"]) for other in row["distractors"][: size - 1]]
            name = "hand" if row["answer"] is not None else "handnone"
            yield _item(f"{name}{size}", row["question"], row["answer"], (_title(row), row["passage"]), near, rng)


def _item(
    name: str, question: str, answer: str | None, first: Passage, others: Sequence[Passage], rng: random.Random
) -> dict[str, Any]:
    """`gold` is the index of `first` after shuffling, or None if there is no answer."""
    passages = [first, *others]
    rng.shuffle(passages)
    gold = None if answer is None else passages.index(first)
    return {"set": name, "passages": passages, "question": question, "answer": answer, "gold": gold}


def _title(row: dict[str, Any]) -> str:
    return (row["title"] or row["doc"].rsplit("/", 1)[-1])[:80]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=Path, required=True, help="pairs_dev.jsonl of model.train.pairs")
    parser.add_argument("--hand", type=Path, help="output of model.train.testset")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=200, help="generated questions per set")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    write_items(args.pairs, args.hand, args.out, args.count, args.seed)


def write_items(pairs: Path, hand: Path | None, out: Path, count: int = 200, seed: int = 5) -> None:
    items = [*made_items(pairs, count, seed), *(hand_items(hand, seed) if hand else [])]
    out.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items), encoding="utf-8")
    print(f"{len(items)} questions -> {out}", flush=True)


if __name__ == "__main__":
    main()
