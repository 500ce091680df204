"""Generates question-answer pairs from corpus passages: rules choose a span, the reader model writes a question for it.

As a round-trip check the reader then answers its own question. The pair is kept if that answer matches the span (F1 of
at least 0.6); if it is another text of the passage given with confidence, the question drifted and that text becomes
its answer. `python -m model.train.asking --corpora DIR --reader DIR --out made.jsonl` appends lines of source, doc,
title, passage, question, answer, start, kind, read, f1, sure (probability of the reader's answer), the input of
`model.train.pairs`. Start at `main`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import re
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from model.train.lexical import words
from model.train.made import asked_before, cut_document, document_random
from model.train.reader import Reader, load_tokenizer
from model.train.sources import is_dev_document
from model.train.spans import Span, choose_spans
from model.train.tokens import read_records

INSTRUCTIONS = (
    "You make and answer questions about passages. Questions are short, name what they are about, and are asked by "
    "somebody who needs to know and has not seen the passage: in other words than its own where possible, never about "
    "“the passage”. Answers are the exact words of the passage, as few as answer the question."
)
NONE = "Not in the passage."
HOW_TO_ASK = {
    "number": "how many, how much or how long", "date": "when", "path": "which file or directory",
    "option": "which option", "ident": "which one", "key": "which key", "quoted": "what is shown or said",
    "reason": "why", "why": "why", "manner": "how", "how": "how", "condition": "when or in which case",
    "consequence": "what happens then", "what happens": "what happens then", "purpose": "what it is for",
    "definition": "what it is", "list": "which ones there are", "must": "what has to be done or is not allowed",
    "order": "how to do it", "how to": "how to do it", "name": "who, what or where", "where": "where",
    "contrast": "what it is compared with", "row": "what it means", "row key": "which one",
}  # fmt: skip
SPANS = 5  # a passage
TASK_TOKENS, ANSWER_TOKENS = 48, 40
PASSAGE_TOKENS = (160, 224, 288, 352)
LEAST_F1, SURE = 0.6, 0.2


class Asked(NamedTuple):
    """A passage to ask about, and the tokens of its chat turn."""

    source: str
    doc: str
    title: str
    passage: str
    spans: list[Span]  # of JSON: kind, start, end
    ids: list[int]


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def task(text: str) -> str:
    """A task that follows a passage, up to the start of the reply."""
    return turn("user", text) + "<|im_start|>assistant\n"


def ask_for(kind: str, answer: str) -> str:
    """The task of writing a question for an answer, with a hint at the kind of question."""
    return task(f"Write a question that asks {HOW_TO_ASK.get(kind, 'what, which or who')}. Its answer: {answer}")


def read_for(question: str) -> str:
    return task(f"Quote the words of the passage that answer: {question}")


def passage_turn(title: str, text: str) -> str:
    return turn("user", f"Passage: {title}\n{text}") + turn("assistant", "Read.")


def beginning() -> str:
    """Instructions and examples: the prefix that all passages share."""
    said = turn("system", INSTRUCTIONS)
    lines = (Path(__file__).parent / "asking_examples.txt").read_text().splitlines()
    title, body, pending = "", list[str](), ""
    for line in lines:
        mark, _, rest = line.partition(" ")
        if mark == "=":
            title, body = rest, []
        elif mark in (">", "?"):
            if body:
                said, body = said + passage_turn(title, " ".join(body)), []
            pending = ask_for(*rest.split(": ", 1)) if mark == ">" else read_for(rest)
        elif pending:
            said, pending = f"{said}{pending}{line}<|im_end|>\n", ""
        elif not line.startswith("#"):
            body.append(line)
    return said


def overlap(a: str, b: str) -> float:
    """Word F1 of two answers; if either has no words, 1 if they are equal and otherwise 0."""
    mine, other = Counter(words(a)), Counter(words(b))
    if not mine or not other:
        return float(a.strip() == b.strip())
    shared = sum((mine & other).values())
    return 2 * shared / (sum(mine.values()) + sum(other.values()))


def ask(reader: Reader, asked: Sequence[Asked], padded: int) -> Iterator[dict[str, Any]]:
    """The pairs that pass the checks; all passages must fit into `padded` tokens."""
    reader.read([a.ids for a in asked], padded)
    questions = _say(reader, [[ask_for(kind, a.passage[start:end]) for kind, start, end in a.spans] for a in asked])
    answers = _say(reader, [[read_for(question) for question, _ in row] for row in questions])
    for a, row, said in zip(asked, questions, answers, strict=True):
        for span, (question, _), (read, sure) in zip(map(Span._make, a.spans), row, said, strict=True):
            if sure == 0:  # task too long, or reply cut off
                continue
            answer, start = a.passage[span.start : span.end], span.start
            f1 = overlap(read, answer) if read != NONE else 0.0
            if f1 < LEAST_F1:
                start, answer = a.passage.find(read.rstrip(".")), read.rstrip(".")
                if start < 0 or sure < SURE or len(answer) < 2:
                    continue
            yield {"source": a.source, "doc": a.doc, "title": a.title, "passage": a.passage, "question": question,
                   "answer": answer, "start": start, "kind": span.kind if f1 >= LEAST_F1 else "drifted",
                   "read": read, "f1": round(f1, 3), "sure": round(sure, 3)}  # fmt: skip


def _say(reader: Reader, tasks: list[list[str]]) -> list[list[tuple[str, float]]]:
    """The reader's reply to each task and its probability; 0 for tasks that are too long."""
    tokens = [[reader.encode(text) for text in row] for row in tasks]
    fit = [[ids if len(ids) <= TASK_TOKENS else ids[-1:] for ids in row] for row in tokens]
    said = reader.generate(fit, TASK_TOKENS, ANSWER_TOKENS)
    texts = iter(reader.tokenizer.decode_batch([ids for row in said for ids, _ in row]))
    return [
        [(next(texts).strip(), math.exp(log_p) if len(ids) <= TASK_TOKENS else 0.0)
         for ids, (_, log_p) in zip(*rows, strict=True)]
        for rows in zip(tokens, said, strict=True)
    ]  # fmt: skip


def is_prose(text: str) -> bool:
    """Whether a passage is sentences rather than code, tables or menus."""
    sentences = len(re.findall(r"[a-z)]{2}[.!?:;](?=\s|$)", text))
    signs = len(re.findall(r"[{}=<>;|\\@#*_\[\]$%^~]|[(]", text))
    return sentences >= max(2, len(text) / 350) and signs <= 0.02 * len(text)


def passages_of(job: tuple[Path, Path, int, int, int, int]) -> list[Asked]:
    """The passages that one process prepares: at most `per_document` per document and `per_source` per package,
    without those that were asked about before."""
    corpora, folder, part, parts, per_source, per_document = job
    tokenizer = load_tokenizer(folder)
    taken, found, before = Counter[str](), [], asked_before()
    for document in read_records(corpora, part, parts):
        source, doc = document["source"], document["doc"]
        if taken[source] * parts >= per_source or is_dev_document(source, doc):
            continue
        rng = document_random(document)
        pieces = cut_document(document, rng)
        for title, text in rng.sample(pieces, min(per_document, len(pieces))):
            if (source, doc, zlib.crc32(text.encode())) in before:
                continue
            spans = choose_spans(text, SPANS, rng)
            ids = tokenizer.encode(passage_turn(title, text), add_special_tokens=False).ids
            if len(spans) == SPANS and len(ids) <= PASSAGE_TOKENS[-1] and is_prose(text):
                taken[source] += 1
                found.append(Asked(source, doc, title, text, spans, ids))
    return found


def batches(asked: Sequence[Asked], size: int, rng: random.Random) -> Iterator[tuple[int, list[Asked]]]:
    """(padded length, passages): batches of passages of similar length, in random order."""
    bins: dict[int, list[Asked]] = defaultdict(list)
    order = list(asked)
    rng.shuffle(order)
    for a in order:
        padded = next(n for n in PASSAGE_TOKENS if len(a.ids) <= n)
        bins[padded].append(a)
        if len(bins[padded]) == size:
            yield padded, bins.pop(padded)
    yield from bins.items()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", type=Path, required=True, help="output folder of model.train.corpora")
    parser.add_argument("--reader", type=Path, required=True, help="output folder of model.train.reader")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--asked", type=Path, required=True, help="passages to ask about; created if missing")
    parser.add_argument("--seconds", type=float, default=300, help="time for asking; 0: only prepare the passages")
    parser.add_argument("--batch", type=int, default=224, help="passages")
    parser.add_argument("--per-source", type=int, default=1200, help="maximum passages per package")
    parser.add_argument("--per-document", type=int, default=40)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", type=int, default=0, help="which of `--parts` shares of the passages to ask about")
    parser.add_argument("--parts", type=int, default=1, help="number of shares, one per process and device")
    args = parser.parse_args()
    if not args.asked.exists():
        jobs = [(args.corpora, args.reader, i, args.workers, args.per_source, args.per_document)
                for i in range(args.workers)]  # fmt: skip
        with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
            made = [a for part in pool.imap(passages_of, jobs) for a in part]
        args.asked.with_suffix(".part").write_text("".join(json.dumps(a) + "\n" for a in made))
        args.asked.with_suffix(".part").rename(args.asked)
    asked = [Asked(*json.loads(line)) for line in args.asked.read_text().splitlines()[args.part :: args.parts]]
    print(f"{len(asked)} passages of {len({a.source for a in asked})} packages", flush=True)
    if args.seconds <= 0:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reader = Reader.load(args.reader, device, torch.bfloat16 if device == "cuda" else torch.float32)
    prefix = reader.encode(beginning())
    reader.start(prefix)
    start, kept, tried = time.monotonic(), Counter[str](), 0
    with args.out.open("a") as out:
        for padded, group in batches(asked, args.batch, random.Random(args.seed)):
            for pair in ask(reader, group, padded):
                out.write(json.dumps(pair, ensure_ascii=False) + "\n")
                kept["drifted" if pair["kind"] == "drifted" else "span"] += 1
            out.flush()
            tried += len(group)
            spent = time.monotonic() - start
            print(f"{spent:.0f} s: {tried} passages, {dict(kept)}, {tried * SPANS / spent:.0f} spans/s", flush=True)
            if spent > args.seconds:
                break


if __name__ == "__main__":
    main()
