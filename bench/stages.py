"""Error analysis of the whole service: at which stage questions fail on the way to a right answer.

The hand-written questions (`model.train.testset`) are asked about the documents that they were written on, all in one
collection, in mode `rag`, at each evidence budget. An answerable question has one of five outcomes: *not retrieved* (no
returned hit has the gold words), *not packed* (a hit has them, the evidence does not), *refused* although the evidence
has them, *not read* (another answer was given, F1 under 0.5), *read*. Unanswerable ones are refused or answered.
With `--thresholds` nothing is refused, and one row per threshold says what the outcomes would be.
Run: `python -m bench.stages --held-out DIR/corpora/held_out --budgets 300 700 --picture stages.png`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from statistics import median
from typing import Any

from app.client import connect
from app.evidence import Query
from app.ingesting import expand_paths, ingest_files
from app.main import create_app
from app.service import RagService
from app.setting_groups import SHIPPED_CHECKPOINT
from app.settings import Settings, load_settings
from bench.runs import BenchRun
from model.train.scoring import normalize_answer, token_f1
from retrieval.types import Chunk, Passage

QUESTIONS = Path(__file__).parent.parent / "model" / "train" / "testsets" / "questions.jsonl"
STAGES = ("not retrieved", "not packed", "refused", "not read", "read")
READ_F1 = 0.5
REFUSES_NOTHING = 50.0  # nats, the maximum of the setting


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and where its answer stands: the document's id and characters of its stored text; None: nowhere.

    `around`: these characters and some on either side, by which another document that repeats them is known.
    """

    question: str
    answer: str | None
    document_id: str
    span: tuple[int, int] | None
    around: str = ""


def write_documents(held_out: Path, folder: Path, questions: Sequence[dict[str, Any]]) -> None:
    """Each document of a name that a question was written on, as text files named as `file_names` does."""
    wanted = {(row["source"], row["doc"]) for row in questions}
    for source in sorted({source for source, _ in wanted}):
        names: dict[str, Iterator[str]] = {}
        for document in map(json.loads, (held_out / f"{source}.jsonl").read_text().splitlines()):
            if (source, document["doc"]) in wanted:
                name = next(names.setdefault(document["doc"], file_names(document)))
                (folder / name).write_text(document["text"], encoding="utf-8")


def file_names(row: dict[str, Any]) -> Iterator[str]:
    """File names for the documents of this name, of which a package may have several."""
    name = re.sub(r"[^\w.-]+", "_", f"{row['source']}_{row['doc']}")
    yield f"{name}.txt"
    yield from (f"{name}-{number}.txt" for number in count(2))


def find_words(text: str, words: str, start: int = 0) -> re.Match[str] | None:
    """Find the words from `start` on, ignoring white space."""
    return re.compile(r"\s+".join(map(re.escape, words.split()))).search(text, start)


def place(service: RagService, questions: Sequence[dict[str, Any]]) -> list[Asked]:
    """Questions with their gold words located in the stored text, after the beginning of their passage."""
    documents = {document.filename: document.id for document in service.store.ready_documents(["default"])}
    asked = []
    for row in questions:
        found = []
        for document_id in map(documents.__getitem__, takewhile(documents.__contains__, file_names(row))):
            text = service.store.get_text(document_id)
            begins = find_words(text, row["begins"])
            gold = find_words(text, row["answer"], begins.start() if begins else 0) if row["answer"] else None
            around = text[max(0, gold.start() - 40) : gold.end() + 40] if gold else ""
            span = gold.span() if gold else None
            found.append((bool(begins), Asked(row["question"], row["answer"], document_id, span, around)))
        asked.append(max(found, key=lambda one: (one[0], one[1].span is not None))[1])
    return asked


def holds(read: Chunk | Passage, asked: Asked) -> bool:
    """Whether this piece of a document has the gold words, in the original place or in a document that repeats it."""
    is_there = read.char_start <= asked.span[0] and asked.span[1] <= read.char_end
    return (is_there and read.document_id == asked.document_id) or find_words(read.text, asked.around) is not None


async def ask(service: RagService, asked: Asked, budget: int) -> dict[str, Any]:
    """Ask one question; returns its outcome and costs."""
    query = Query(asked.question, ["default"], None, None, "rag", budget, 128)
    found = await asyncio.to_thread(service.finder.find, query)
    running = await service.start_answer(query)
    answer = await running.collect()
    said = answer.citations[0].cited_text if answer.citations else ""
    outcome = {"ttft_ms": answer.timings.ttft_ms, "tokens": answer.usage.input_tokens, "margin": running.none_margin}
    if asked.answer is not None:
        outcome["retrieved"] = any(holds(hit.chunk, asked) for hit in found.hits)
        outcome["packed"] = any(holds(passage, asked) for passage in found.evidence.passages)
    return outcome | judge(asked, outcome, said)


def judge(asked: Asked, outcome: dict[str, Any], said: str) -> dict[str, Any]:
    """The score of an answer, and the stage at which the question ended."""
    if asked.answer is None:
        return {"said": said, "stage": "answered" if said else "refused", "exact": 0.0, "f1": 0.0}
    f1 = token_f1(said, asked.answer) if said else 0.0
    exact = float(bool(said) and normalize_answer(said) == normalize_answer(asked.answer))
    if f1 >= READ_F1:
        stage = "read"
    elif outcome["packed"]:
        stage = "not read" if said else "refused"
    else:
        stage = "not packed" if outcome["retrieved"] else "not retrieved"
    return {"said": said, "stage": stage, "exact": exact, "f1": f1}


def refuse_from(
    outcomes: Sequence[tuple[Asked, dict[str, Any]]], threshold: float
) -> list[tuple[Asked, dict[str, Any]]]:
    """The outcomes if margins over `threshold` had been refused."""
    return [
        (asked, outcome | judge(asked, outcome, "") if outcome["margin"] > threshold else outcome)
        for asked, outcome in outcomes
    ]


def summarize(outcomes: Sequence[tuple[Asked, dict[str, Any]]], budget: int) -> dict[str, Any]:
    """One row: shares of the questions with an answer in %, and how many without one were refused."""
    known = [outcome for asked, outcome in outcomes if asked.answer is not None]
    unknown = [outcome for asked, outcome in outcomes if asked.answer is None]
    ends = Counter(outcome["stage"] for outcome in known)
    row: dict[str, Any] = {"budget_tokens": budget, "questions": len(known)}
    row |= {f"{stage} %": 100 * ends[stage] / len(known) for stage in STAGES}
    row |= {f"{name} %": 100 * sum(o[key] for o in known) / len(known) for name, key in (("EM", "exact"), ("F1", "f1"))}
    row |= {"unanswerable": len(unknown)}
    row |= {"of them refused %": 100 * sum(o["stage"] == "refused" for o in unknown) / max(1, len(unknown))}
    times, tokens = ([outcome[key] for _, outcome in outcomes] for key in ("ttft_ms", "tokens"))
    return row | {"prompt tokens": round(median(tokens)), "median first token ms": median(times)}


async def measure(
    settings: Settings, questions: Sequence[dict[str, Any]], args: argparse.Namespace, run: BenchRun
) -> None:
    """A row a budget and threshold; `args.answers` gets a JSON line a question, of the last budget."""
    app = create_app(settings)
    async with app.router.lifespan_context(app):
        service = app.state.service
        asked = place(service, questions)
        missing = [one for one in asked if one.answer is not None and one.span is None]
        print(f"{len(asked)} questions; gold words of {len(missing)} not in the stored text, left out", file=sys.stderr)
        asked = [one for one in asked if one not in missing]
        for budget in args.budgets:
            outcomes = []
            for number, one in enumerate(asked, start=1):
                outcomes.append((one, await ask(service, one, budget)))
                if number % 20 == 0:
                    print(f"{budget} tokens: {number} of {len(asked)} questions", file=sys.stderr)
            for threshold in args.thresholds or [service.advice.none_margin]:
                ended = refuse_from(outcomes, threshold) if args.thresholds else outcomes
                advice = service.advice
                asked_as = {
                    "none_margin": threshold,
                    "read_apart": advice.read_apart,
                    "ask_back": advice.ask_back,
                    "verdict": advice.verdict,
                }
                run.add(**summarize(ended, budget), **asked_as)
            if args.answers:
                lines = ({"question": one.question, "answer": one.answer} | outcome for one, outcome in outcomes)
                args.answers.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the five outcomes as bars, one per budget."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.7 * len(rows)), layout="constrained")
    names = [
        f"{row['budget_tokens']} tokens{', apart' if row['read_apart'] else ''}\nrefused from {row['none_margin']:g}"
        for row in rows
    ]
    left = [0.0] * len(rows)
    for stage, colour in zip(STAGES, ("#7f7f7f", "#c7a76c", "#8c6bb1", "#d6604d", "#4393c3"), strict=True):
        widths = [row[f"{stage} %"] for row in rows]
        bars = axis.barh(names, widths, left=left, color=colour, label=stage)
        axis.bar_label(bars, [f"{width:.0f}" if width >= 3 else "" for width in widths], label_type="center", color="w")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set(xlim=(0, 100), xlabel="% of the questions that have an answer", ylabel="evidence")
    axis.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=len(STAGES), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--held-out", type=Path, required=True, help="corpora/held_out of model.train.corpora")
    parser.add_argument("--data-dir", type=Path, help="keep the index here for later runs; default: temporary")
    parser.add_argument("--model", type=Path, default=SHIPPED_CHECKPOINT)
    parser.add_argument("--budgets", type=int, nargs="+", default=[300])
    parser.add_argument("--limit", type=int, help="number of questions, drawn at random")
    parser.add_argument("--read-apart", action=argparse.BooleanOptionalAction, help="overrides the checkpoint's advice")
    parser.add_argument("--ask-back", type=float, help="overrides the checkpoint's advice")
    parser.add_argument("--verdict", type=float, help="overrides the checkpoint's advice")
    parser.add_argument("--none-margin", type=float, help="overrides the checkpoint's advice")
    parser.add_argument("--thresholds", type=float, nargs="+", help="one row each, from a run that refuses nothing")
    parser.add_argument("--answers", type=Path, help="file for the answers, as JSON lines")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    run = BenchRun("stages", argv=sys.argv)
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        groups = {"model": {"path": args.model}, "redis": {"url": None}, "log": {"level": "warning"}}
        none_margin = REFUSES_NOTHING if args.thresholds else args.none_margin
        groups["answers"] = {
            "read_apart": args.read_apart,
            "ask_back": args.ask_back,
            "verdict": args.verdict,
            "none_margin": none_margin,
        }
        settings = load_settings(env_file=None, data_dir=args.data_dir or Path(scratch) / "data", **groups)
        folder = Path(scratch) / "documents"
        folder.mkdir()
        write_documents(args.held_out, folder, questions)
        if not (settings.data_dir / "rag.sqlite3").exists():
            with connect(settings) as service:
                ingest_files(service, expand_paths([str(folder)]), {"collection": "default"})
        if args.limit:
            questions = random.Random(0).sample(questions, args.limit)
        asyncio.run(measure(settings, questions, args, run))
    run.finish()
    if args.picture:
        draw(run.rows, args.picture)


if __name__ == "__main__":
    main()
