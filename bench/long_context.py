"""Scores on LongBench and L-Eval, from local files; nothing is downloaded.

LongBench: each JSON line is a question {input, context, answers, dataset}. L-Eval: each JSON line is a text with
several questions {input, instructions, outputs}; the file name is the set. Texts longer than the context are truncated
in the middle, as in LongBench. Run: `python -m bench.long_context narrativeqa.jsonl longfqa.jsonl --model DIR`.
Sources: Bai et al., LongBench, 2308.14508, metrics.py; An et al., L-Eval, 2307.11088.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import string
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from app.setting_groups import SHIPPED_CHECKPOINT
from bench.asking import Asker, open_asker
from bench.runs import BenchRun
from model.train.scoring import normalize_answer, token_f1

_PROMPT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Item:
    """One question about one text; any of `answers` is right, `classes` are those to choose from."""

    set: str
    context: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()


def read_items(path: Path) -> Iterator[Item]:
    """The questions of a file of either kind. Raises ValueError, naming the line, for another kind."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if row.keys() >= {"input", "context", "answers"}:
                name = re.sub(r"_e$", "", row.get("dataset", path.stem))
                classes = tuple(row.get("all_classes") or ())
                yield Item(name, row["context"], row["input"], tuple(row["answers"]), classes)
            elif row.keys() >= {"input", "instructions", "outputs"}:
                for question, answer in zip(row["instructions"], row["outputs"], strict=True):
                    yield Item(path.stem.lower(), row["input"], question, (answer,))
            else:
                raise ValueError(f"{path}, line {number}: neither LongBench nor L-Eval, it has {', '.join(row)}")


def rouge_l(said: str, gold: str) -> float:
    """F1 of the longest common subsequence of words."""
    ours, theirs = said.lower().split(), gold.lower().split()
    row = [0] * (len(theirs) + 1)
    for word in ours:
        before = 0
        for i, other in enumerate(theirs, 1):
            before, row[i] = row[i], before + 1 if word == other else max(row[i], row[i - 1])
    return 2 * row[-1] / (len(ours) + len(theirs)) if row[-1] else 0.0


def word_f1(said: str, gold: str) -> float:
    """LongBench's qa_f1_score, which drops only ASCII punctuation."""
    return token_f1(said, gold, string.punctuation.__contains__)


def exact(said: str, gold: str) -> float:
    ours, theirs = (normalize_answer(text, string.punctuation.__contains__) for text in (said, gold))
    return float(ours == theirs)


def choice(said: str, gold: str) -> float:
    """For multiple choice: whether the letters are equal."""
    letters = lambda text: set(re.findall(r"\b[A-D]\b", text.upper()))
    return float(letters(said) == letters(gold) != set())


def number_share(said: str, gold: str) -> float:
    """Share of the numbers in the answer that equal the gold one: LongBench's score for counting and retrieval."""
    said_numbers, wanted = re.findall(r"\d+", said), re.findall(r"\d+", gold)
    return sum(number in wanted for number in said_numbers) / len(said_numbers) if said_numbers else 0.0


def code_similarity(said: str, gold: str) -> float:
    """Similarity of the first line that is code."""
    lines = [line for line in said.lstrip("\n").split("\n") if not re.search(r"[`#]|//", line)]
    return difflib.SequenceMatcher(None, lines[0] if lines else "", gold).ratio()


METRICS: dict[str, Callable[[str, str], float]] = {
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum", "vcsum", "dureader"), rouge_l),
    **dict.fromkeys(("passage_count", "passage_retrieval_en", "passage_retrieval_zh"), number_share),
    **dict.fromkeys(("lcc", "repobench-p"), code_similarity),
    **dict.fromkeys(("coursera", "quality", "tpo"), choice),
    **dict.fromkeys(("gsm100", "codeu", "sci_fi", "sfiction"), exact),
}  # all others are questions, scored by word F1


def judge(item: Item, said: str) -> float:
    """Score from 0 to 1 with the best-matching right answer."""
    if item.classes:
        named = [one for one in item.classes if one in said]
        named = [one for one in named if not any(one in other for other in item.answers if one != other)]
        return 1 / len(named) if any(answer in named for answer in item.answers) else 0.0
    metric = METRICS.get(item.set, word_f1)
    return max((metric(said, answer) for answer in item.answers), default=0.0)


def cut_middle(text: str, max_tokens: int, asker: Asker) -> str:
    """The text, truncated in the middle if it has more than `max_tokens`."""
    tokens = asker.count_tokens(text)
    while tokens > max_tokens:
        half = int(len(text) * max_tokens / tokens * 0.99) // 2
        text = text[:half] + "\n" + text[-half:]
        tokens = asker.count_tokens(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", type=Path, default=SHIPPED_CHECKPOINT)
    parser.add_argument("--quantize", choices=("auto", "none", "int8", "w8a8"), default="auto")
    parser.add_argument("--context", type=int, default=32_768, help="tokens of prompt and answer")
    parser.add_argument("--limit", type=int, help="maximum questions per set")
    args = parser.parse_args()
    run, scores = BenchRun("long-context", sys.argv), defaultdict[str, list[float]](list)
    with open_asker(args.model, args.context, args.quantize, max_quotes=4) as asker:
        for item in (item for path in args.files for item in read_items(path)):
            if args.limit is None or len(scores[item.set]) < args.limit:
                text = cut_middle(item.context, args.context - _PROMPT_TOKENS, asker)
                scores[item.set].append(judge(item, asker.ask(item.question, text, 256).text))
    add_rows(run, scores)
    run.finish()


def add_rows(run: BenchRun, scores: dict[str, Sequence[float]]) -> None:
    """A row for each set, and their mean."""
    means = {name: 100 * sum(values) / len(values) for name, values in scores.items()}
    for name, mean in means.items():
        run.add(set=name, metric=METRICS.get(name, word_f1).__name__, questions=len(scores[name]), score=mean)
    run.add(set="mean", questions=sum(map(len, scores.values())), score=sum(means.values()) / len(means))


if __name__ == "__main__":
    main()
