"""Cleans the generated question-answer pairs, splits them by document, and finds hard negatives for each passage.

`python -m model.train.pairs pairs.jsonl.xz --corpora scratch/corpora --out scratch` writes pairs_train.jsonl and
pairs_dev.jsonl (source, doc, title, passage, question, answer (null: unanswerable), start, kind, passage_id, negatives)
and passages_train.jsonl and passages_dev.jsonl (id, source, doc, title, text), to which passage_id and negatives refer.
The dev and train splits share no document, nor do their negatives. Start at `main`.
"""

import argparse
import json
import lzma
import multiprocessing
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from model.train.extents import settle
from model.train.lexical import words
from model.train.passages import NegativeFinder, cut_passages
from model.train.sources import EXCLUDED, HELD_OUT, is_dev_document, read_word_lists

Pair = dict[str, Any]
AT_ONCE = 500  # passages per job of the negative search
FEW, ELSEWHERE = 60, 10_000  # packages with fewer passages search a sample of all packages; its size

_WORDS = read_word_lists(Path(__file__).parent / "words.txt")
_FUNCTION_WORDS = frozenset(_WORDS["function_words"])
_QUESTION_WORDS = _FUNCTION_WORDS | frozenset(_WORDS["question_words"])
_LEANING = re.compile(
    r"\b(?:this|these|those|above|below|following|previous|the (?:text|passage|section|example|document|article|author|"
    r"sentence|paragraph|given|code snippet|snippet|table|list|figure|image|chapter|page)|according to|described here|"
    r"mentioned|in the (?:example|text|code))\b",
    re.IGNORECASE,
)
_TICKET = re.compile(
    r"\b(?:bug|issue|ticket|patch|pull request|bpo|gh)\b.*\b(?:number|id|identifier)\b|number.*\b(?:bug|issue)\b", re.I
)


def main(argv: list[str] | None = None) -> None:
    """Clean, split, add negatives; prints what was dropped and why."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path, nargs="+", help="JSONL(.xz) files, such as those of model.train.asking")
    parser.add_argument("--corpora", type=Path, required=True, help="output folder of model.train.corpora")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--negatives", type=int, default=12)
    parser.add_argument("--splits", nargs="+", choices=("dev", "train"), default=("dev", "train"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    kept, dropped = load_pairs(*args.pairs)
    print(f"{len(kept)} pairs kept; dropped {dict(dropped)}", flush=True)
    for split in args.splits:
        chosen = [p for p in kept if is_dev_document(p["source"], p["doc"]) == (split == "dev")]
        passages = _passages(chosen, args.corpora, split, random.Random(args.seed))
        _add_negatives(chosen, passages, args.negatives, args.workers)
        if split == "train":  # dev questions are left unchanged, so that scores stay comparable
            _settle(chosen)  # after the negatives: a shortened answer occurs in more passages, which would be excluded
        wanted = {i for pair in chosen for i in (pair["passage_id"], *pair["negatives"])}
        passages = [passage for passage in passages if passage["id"] in wanted]
        _write(args.out / f"passages_{split}.jsonl", passages)
        _write(args.out / f"pairs_{split}.jsonl", chosen)
        documents = len({(p["source"], p["doc"]) for p in chosen})
        print(f"{split}: {len(chosen)} pairs of {documents} documents, {len(passages)} passages", flush=True)


def load_pairs(*paths: Path) -> tuple[list[Pair], Counter[str]]:
    """Cleaned pairs of JSONL(.xz) files, and counts of dropped ones by reason; every answer is a span of its passage,
    or None if the passage does not answer."""
    kept, dropped, asked = [], Counter[str](), set[tuple[str, str]]()
    for path in paths:
        for pair in _read(path):
            if pair["source"] in EXCLUDED or pair["source"] in HELD_OUT:
                raise ValueError(f"{path} has a pair of {pair['source']}, which must stay out of training")
            reason = _reason_to_drop(pair) or (pair["answer"] is not None and _mend_answer(pair))
            key = (pair["question"].lower(), pair["passage"])
            if not reason and key in asked:
                reason = "asked twice"
            if reason:
                dropped[reason] += 1
                continue
            asked.add(key)
            kept.append(
                {k: pair[k] for k in ("source", "doc", "title", "passage", "question", "answer", "start", "kind")}
            )
    return kept, dropped


def _read(path: Path) -> Iterator[Pair]:
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as lines:
        yield from map(json.loads, lines)


def question_content(question: str) -> set[str]:
    """The content words of a question."""
    return {w for w in words(question) if w not in _QUESTION_WORDS}


def _reason_to_drop(pair: Pair) -> str:
    question = pair["question"].strip()
    content = question_content(question)
    if not question.endswith("?") or len(question) < 15:
        return "not a question"
    if _LEANING.search(question):
        return "leans on its section"
    if _TICKET.search(question):
        return "ticket number"
    named = re.search(r"[A-Za-z]\w*[_./:<>-]\w|\w\(\)|[a-z][A-Z]|[\"'`“]|\b[A-Z]{2,}", question)
    if len(content) < (1 if named else 2):
        return "too general"
    if pair["source"] == "dict-gcide" and pair["kind"] in ("year", "number") and pair["answer"] in ("1913", "1996"):
        return "edition year of the dictionary"
    shared = content & set(words(pair["passage"]))
    if len(shared) < 0.34 * len(content):
        return "words not in the passage"
    if pair["answer"] is not None and _is_said(pair):
        return "answer in the question"
    return ""


def _is_said(pair: Pair) -> bool:
    answer = set(words(pair["answer"]))
    return bool(answer) and answer <= set(words(pair["question"]))


def _mend_answer(pair: Pair) -> str:
    """Set answer and start to the cleaner of the original span and the reader's; returns why there is none, or ""."""
    candidates = []
    for text, weight in ((pair["read"], 1.0), (pair["answer"], 0.6)):
        found = _locate(pair["passage"], text, pair["start"])
        if found is None:
            continue
        start, end = _trim(pair["passage"], *found)
        if end > start and (fault := _fault(pair["passage"], start, end)) < 1:
            candidates.append((weight - fault, start, end))
    if not candidates:
        return "no clean span"
    _, start, end = max(candidates)
    pair["answer"], pair["start"] = pair["passage"][start:end], start
    return "answer in the question" if _is_said(pair) else ""


def _locate(passage: str, text: str, near: int) -> tuple[int, int] | None:
    """The occurrence of `text` (case and end punctuation aside) nearest to `near` that starts and ends at words."""
    wanted = text.strip().strip("\"'`“”‘’").rstrip(".,;:!? ")
    if not wanted:
        return None
    pattern = re.compile(r"(?<![A-Za-z0-9])" + re.escape(wanted) + r"(?![A-Za-z0-9_])", re.IGNORECASE)
    if not wanted[0].isalnum():
        pattern = re.compile(re.escape(wanted) + r"(?![A-Za-z0-9_])", re.IGNORECASE)
    spans = [m.span() for m in pattern.finditer(passage)]
    return min(spans, key=lambda s: abs(s[0] - near), default=None)


def _trim(passage: str, start: int, end: int) -> tuple[int, int]:
    """The span without trailing function words, extended by a closing bracket or percent sign that belongs to it."""
    while match := re.search(r"[\s,;:(]+([A-Za-z']+)$|[\s,;:(]+$", passage[start:end]):
        if match[1] and match[1].lower() not in _FUNCTION_WORDS:
            break
        end = start + match.start()
    span = passage[start:end]
    if span.count("(") > span.count(")") and passage[end : end + 1] == ")":
        end += 1
    if re.search(r"\d$", span) and passage[end : end + 1] == "%":
        end += 1
    if re.fullmatch(r"[\w.]+", span) and passage[start - 2 : start] == "--":
        start -= 2
    return start, end


def _fault(passage: str, start: int, end: int) -> float:
    """0 for a clean span, 1 or more for a useless one: single function word, cut in a name, unbalanced, too long."""
    span = passage[start:end]
    tokens = words(span)
    if not re.search(r"\w", span) or len(span) > 400 or (len(tokens) == 1 and tokens[0] in _FUNCTION_WORDS):
        return 1.0
    if span.count("(") != span.count(")") or span.count("[") != span.count("]"):
        return 1.0
    after, before = passage[end : end + 2], passage[max(0, start - 1) : start]
    fault = 0.5 * bool(re.match(r"[_/\\=]|[.:-]\w|::", after)) + 0.4 * bool(re.match(r"[\w.$@/\\-]", before))
    if len(tokens) >= 5 and re.match(r" [a-z]", after) and not re.search(r"[.,;]$", span):
        fault += 0.2  # may stop in the middle of a clause
    return fault


def _settle(pairs: list[Pair]) -> None:
    """Normalise the extent of all answers."""
    for pair in pairs:
        if pair["answer"] is not None:
            start, end = settle(pair["passage"], pair["start"], pair["start"] + len(pair["answer"]), pair["question"])
            pair["answer"], pair["start"] = pair["passage"][start:end], start


def _passages(pairs: list[Pair], corpora: Path, split: str, rng: random.Random) -> list[dict[str, Any]]:
    """The passages of the pairs (setting `passage_id`), and further passages of the same packages as distractors."""
    passages: list[dict[str, Any]] = []
    ids: dict[str, int] = {}
    for pair in pairs:
        if pair["passage"] not in ids:
            ids[pair["passage"]] = len(passages)
            passages.append(
                {"id": len(passages), "text": pair["passage"]} | {k: pair[k] for k in ("source", "doc", "title")}
            )
        pair["passage_id"] = ids[pair["passage"]]
    per_source = Counter[str]()
    for document in _corpus(corpora, split):
        for heading, text in cut_passages(document["text"], rng):
            if per_source[document["source"]] < (1500 if split == "train" else 600) and rng.random() < 0.7:
                per_source[document["source"]] += 1
                passages.append(
                    {"id": len(passages), "text": text, "source": document["source"], "doc": document["doc"]}
                    | {"title": heading or document["title"]}
                )
    return passages


def _corpus(corpora: Path, split: str) -> Iterator[dict[str, str]]:
    for shard in sorted(corpora.glob("dev*.jsonl.xz" if split == "dev" else "corpus-*.jsonl.xz")):
        with lzma.open(shard, "rt") as lines:
            yield from map(json.loads, lines)


def _add_negatives(pairs: list[Pair], passages: list[dict[str, Any]], count: int, workers: int) -> None:
    """Set pair["negatives"]: ids of similar passages of the same package (of any, if it has few) that answer none of
    the questions about the pair's passage; one list per passage."""
    members: dict[str, list[int]] = defaultdict(list)
    for passage in passages:
        members[passage["source"]].append(passage["id"])
    everywhere = random.Random(len(passages)).sample(range(len(passages)), min(len(passages), ELSEWHERE))
    by_source: dict[str, dict[int, list[Pair]]] = defaultdict(lambda: defaultdict(list))
    for pair in pairs:
        by_source[pair["source"]][pair["passage_id"]].append(pair)
    jobs = []
    for source, asked in by_source.items():
        pool = members[source] if len(members[source]) >= FEW else everywhere
        texts = [f"{passages[i]['title']} {passages[i]['text']}" for i in pool]
        groups = list(asked.values())
        jobs += [(pool, texts, groups[i : i + AT_ONCE], count) for i in range(0, len(groups), AT_ONCE)]
    done = 0
    with multiprocessing.get_context("spawn").Pool(workers) as processes:
        for (_, _, groups, _), found in zip(jobs, processes.imap(_find_negatives, jobs), strict=True):
            for near, asked_here in zip(found, groups, strict=True):
                for pair in asked_here:
                    pair["negatives"] = near
            done += len(groups)
            print(f"negatives: {done} passages", flush=True)


def _find_negatives(job: tuple[list[int], list[str], list[list[Pair]], int]) -> list[list[int]]:
    pool, texts, asked, count = job
    finder, found = NegativeFinder(texts), []
    by_question = iter(finder.nearest([p["question"] for pairs in asked for p in pairs], 3 * count))
    by_passage = finder.nearest([pairs[0]["passage"] for pairs in asked], 3 * count)
    bags: dict[int, frozenset[str]] = {}  # passage -> its words
    for pairs, of_passage in zip(asked, by_passage, strict=True):
        lists = [*islice(by_question, len(pairs)), of_passage]
        near = dict.fromkeys(i for ranked in zip(*lists, strict=True) for i in ranked)
        gold = frozenset(words(pairs[0]["passage"]))
        chosen = list[int]()
        for i in near:
            if i not in bags:
                bags[i] = frozenset(words(texts[i]))
            other = bags[i]
            if len(gold & other) <= 0.6 * min(len(gold), len(other)) and not any(
                _may_answer(pair, texts[i], other) for pair in pairs
            ):
                chosen.append(pool[i])
                if len(chosen) == count:
                    break
        found.append(chosen)
    return found


def _may_answer(pair: Pair, text: str, bag: frozenset[str]) -> bool:
    """Whether the text, with words `bag`, may answer the pair; a short answer needs words of the question beside it."""
    if pair["answer"] is None:
        return False
    answer, asked = pair["answer"].lower(), question_content(pair["question"])
    return answer in text.lower() and (len(answer) >= 4 or len(asked & bag) >= 0.5 * len(asked))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w") as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
