"""Builds the hand-written test set: held-out passages, questions on them, and distractors for each.

`python -m model.train.corpora --out scratch/corpora --held-out` first, then
`python -m model.train.testset --corpora scratch/corpora --out scratch/test_handwritten.jsonl`. The questions are in
testsets/questions.jsonl and identify their passage by package, file and first characters; those without answer are near
misses. The passages are under the licences of their packages and not part of the repository.
"""

import argparse
import json
import random
import re
from itertools import chain
from pathlib import Path
from typing import Any

from model.train import sources
from model.train.lexical import words
from model.train.pairs import question_content
from model.train.passages import NegativeFinder, cut_passages

_QUESTIONS = Path(__file__).parent / "testsets" / "questions.jsonl"
_SEED = 42  # must stay: the questions were written on the passages that it gives
_OTHER_LANGUAGE = re.compile(r"project-history\.(?!en)|^(?:constitution|social-contract|debian-manifesto)")
_ALREADY_CUT = ("debian-history", "gnucash-docs", "mutt", "zsh-doc", "nut-doc", "borgbackup-doc", "freedombox-doc-en")


def main(argv: list[str] | None = None) -> None:
    """Write one JSON line per question: passage, question, answer or null, start, kind, distractors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=Path, required=True, help="output folder of model.train.corpora")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--distractors", type=int, default=11)
    args = parser.parse_args(argv)
    passages = held_out_passages(args.corpora / "held_out")
    rows = build(passages, [json.loads(line) for line in _QUESTIONS.read_text().splitlines()], args.distractors)
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    answered = sum(row["answer"] is not None for row in rows)
    print(json.dumps({"questions": len(rows), "answerable": answered, "passages": len(passages)}))


def held_out_passages(parts: Path) -> list[dict[str, str]]:
    """All passages of the held-out packages, split exactly as when the questions were written."""
    rng, found = random.Random(_SEED), list[dict[str, str]]()
    for source in [*_ALREADY_CUT, *(s for s in sources.HELD_OUT if s not in _ALREADY_CUT)]:
        for line in (parts / f"{source}.jsonl").read_text().splitlines():
            document = json.loads(line)
            for heading, text in cut_passages(document["text"], rng):
                title = heading or document["title"]
                found.append({"source": source, "doc": document["doc"], "title": title, "text": text})
    return found


def build(passages: list[dict[str, str]], questions: list[dict[str, Any]], distractors: int) -> list[dict[str, Any]]:
    """Rows with the gold passage and similar passages that neither repeat it nor contain its answer.

    Raises ValueError for a question whose passage or answer is missing (another version of the package).
    """
    place: dict[tuple[str, str, str], list[int]] = {}
    for i, passage in enumerate(passages):
        place.setdefault((passage["source"], passage["doc"], passage["text"][:60]), []).append(i)
    golds = []
    for question in questions:
        alike = place.get((question["source"], question["doc"], question["begins"]), [])
        fitting = [i for i in alike if (question["answer"] or "") in passages[i]["text"]]
        if not fitting:
            raise ValueError(f"no passage for {question['question']!r}: another version of {question['source']}?")
        golds.append(fitting[0])
    shown = [p | {"text": re.sub(r"\s*%%%%\s*", "\n", p["text"])} for p in passages]
    usable = [i for i, p in enumerate(shown) if not _OTHER_LANGUAGE.match(p["doc"])]
    pool = [shown[i] for i in usable]
    finder = NegativeFinder([f"{p['title']} {p['text']}" for p in pool])
    by_question = finder.nearest([q["question"] for q in questions], 160)
    by_passage = finder.nearest([shown[i]["text"] for i in golds], 80)
    rows: list[dict[str, Any]] = []
    for question, at, first, second in zip(questions, golds, by_question, by_passage, strict=True):
        near = dict.fromkeys([*chain.from_iterable(zip(first, second, strict=False)), *first])
        rows.append(_row(len(rows), question, shown[at], [pool[i] for i in near], distractors))
    return rows


def _row(
    number: int, question: dict[str, Any], gold: dict[str, str], near: list[dict[str, str]], distractors: int
) -> dict[str, Any]:
    answer = question["answer"]
    start = None if answer is None else gold["text"].find(answer)
    chosen: list[dict[str, str]] = []
    for passage in near:
        if len(chosen) == distractors:
            break
        if answer is not None and _holds(passage["text"], question["question"], answer):
            continue
        if not any(_same(passage, other) for other in [gold, *chosen]):
            chosen.append(passage)
    head = {"id": f"hand-{number:03d}", "source": gold["source"], "doc": gold["doc"], "title": gold["title"]}
    asked = {"question": question["question"], "answer": answer, "start": start, "kind": question["kind"]}
    return head | {"passage": gold["text"]} | asked | {"distractors": chosen}


def _same(one: dict[str, str], other: dict[str, str]) -> bool:
    left, right = set(words(one["text"])), set(words(other["text"]))
    return len(left & right) > 0.5 * min(len(left), len(right))


def _holds(text: str, question: str, answer: str) -> bool:
    content = question_content(question)
    return answer.lower() in text.lower() and (
        len(answer) >= 4 or len(content & set(words(text))) >= 0.5 * len(content)
    )


if __name__ == "__main__":
    main()
