"""Made questions: which spans are asked for, what the reader is shown, and which of its answers become pairs."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from model.train import asking
from model.train.asking import Asked, ask, batches, beginning, is_prose
from model.train.made import asked_before, cut_document, document_random, restore, strip
from model.train.pair_contexts import PairContexts
from model.train.pairs import load_pairs
from model.train.spans import Span, choose_spans, spans

PASSAGE = (
    "The spooler writes its pages to /var/spool/pages.db every 40 seconds. Use --no-flush to keep them in memory. "
    "If the disk is full, the oldest pages are removed. It runs as root because ports below 1024 are reserved. "
    "A page is a block of rows that are read together."
)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("path", "/var/spool/pages.db"),
        ("number", "40 seconds"),
        ("option", "--no-flush"),
        ("consequence", "the oldest pages are removed"),
        ("reason", "because ports below 1024 are reserved"),
        ("definition", "a block of rows that are read together"),
    ],
)
def test_spans_of_each_kind_are_found(kind: str, text: str) -> None:
    assert (kind, text) in {(span.kind, PASSAGE[span.start : span.end]) for _, span in spans(PASSAGE)}


def test_chosen_spans_do_not_overlap_and_differ_in_kind() -> None:
    for seed in range(20):
        chosen = choose_spans(PASSAGE, 5, random.Random(seed))
        ordered = sorted(chosen, key=lambda span: span.start)
        assert all(a.end <= b.start for a, b in pairwise(ordered))
        assert len({span.kind for span in chosen}) >= 4


def test_the_beginning_shows_each_task_with_what_is_right() -> None:
    text = beginning()
    assert text.count("<|im_start|>") == text.count("<|im_end|>")
    assert text.count("Passage: ") == 3 and asking.NONE in text
    assert "asks why. Its answer: because most addresses" in text and text.endswith("Base<|im_end|>\n")


def test_prose_is_told_from_code() -> None:
    assert is_prose(PASSAGE)
    assert not is_prose("if (x == 0) { return foo[x]; }\nfor (i = 0; i < n; i++) { a[i] = b[i] * 2; }\n" * 3)


class Parrot:
    """A reader whose answers are given."""

    def __init__(self, said: list[list[tuple[str, float]]]) -> None:
        self.tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer.add_tokens([text for turn in said for text, _ in turn])
        self.said = iter(said)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def read(self, passages: list[list[int]], padded: int) -> None:
        pass

    def generate(self, tasks: list[list[list[int]]], padded: int, most: int) -> list[list[tuple[list[int], float]]]:
        return [[([self.tokenizer.token_to_id(text)], log_p) for text, log_p in next(self.said)]]


def test_only_answers_that_agree_or_are_sure_become_pairs() -> None:
    found = [Span("number", *_at("40 seconds")), Span("option", *_at("--no-flush")), Span("path", *_at("/var/spool")),
             Span("reason", *_at("because ports"))]  # fmt: skip
    asked = [("How often are pages written?", 0.0), ("What frees the disk?", 0.0), ("Who?", 0.0), ("Why root?", 0.0)]
    said = [("every 40 seconds", -3.0), ("the oldest pages are removed.", -0.1), (asking.NONE, -0.1), ("As root", -5.0)]
    made = list(ask(Parrot([asked, said]), [Asked("s", "d", "t", PASSAGE, found, [1, 2])], 4))
    assert [(m["question"], m["answer"], m["kind"]) for m in made] == [
        ("How often are pages written?", "40 seconds", "number"),
        ("What frees the disk?", "the oldest pages are removed", "drifted"),
    ]
    assert all(PASSAGE[m["start"] :].startswith(m["answer"]) for m in made)


def test_a_task_that_is_too_long_is_not_put() -> None:
    said = asking._say(Parrot([[("An owl.", -0.5), ("A fox.", -0.5)]]), [["who", "who " * (asking.TASK_TOKENS + 1)]])
    assert said == [[("An owl.", pytest.approx(0.6065, abs=1e-4)), ("A fox.", 0.0)]]


def _at(text: str) -> tuple[int, int]:
    start = PASSAGE.index(text)
    return start, start + len(text)


def test_a_batch_holds_passages_of_about_one_length() -> None:
    rng = random.Random(0)
    asked = [Asked("s", "d", "t", "p", [], [0] * rng.randrange(20, 353)) for _ in range(200)]
    made = list(batches(asked, 16, rng))
    assert sum(len(group) for _, group in made) == 200
    for padded, group in made:
        assert all(padded - 160 < len(a.ids) <= padded for a in group) and len(group) <= 16


def test_a_passage_asks_all_its_questions_and_lies_near_none_that_answers(tmp_path: Path) -> None:
    row = {"source": "s", "doc": "d", "title": "t", "passage": PASSAGE, "kind": "k", "read": "40 seconds"}
    rows = [row | {"question": "How often does the spooler write its pages?", "answer": "40 seconds",
                   "start": PASSAGE.index("40")},
            row | {"question": "How large may the spooler make its pages?", "answer": None, "start": -1}]  # fmt: skip
    (tmp_path / "made.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    kept, _ = load_pairs(tmp_path / "made.jsonl")
    context = PairContexts([pair | {"negatives": []} for pair in kept], {}).draw(random.Random(1), 900, lost=0.0)
    assert {(q.text, q.answer) for q in context.questions} == {(r["question"], r["answer"]) for r in rows}


def test_made_pairs_get_their_passages_back_from_the_corpora(tmp_path: Path) -> None:
    texts = ["\n\n".join([f"Part {i}. {PASSAGE}"] * 6) for i in range(4)]
    documents = [{"source": "s", "doc": f"d{i // 2}", "title": "T", "text": text} for i, text in enumerate(texts)]
    corpora, made = tmp_path / "corpora", []
    corpora.mkdir()
    (corpora / "corpus-00.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    for document in documents:
        for title, text in cut_document(document, document_random(document)):
            made.append({"source": "s", "doc": document["doc"], "title": title, "passage": text, "question": "Why?",
                         "answer": "40 seconds", "start": text.index("40"), "kind": "number"})  # fmt: skip
    rows = strip(made)
    assert not any("passage" in row for row in rows)
    back = list(restore(rows, corpora))
    assert sorted(map(str, (sorted(r.items()) for r in back))) == sorted(map(str, (sorted(r.items()) for r in made)))
    (corpora / "corpus-00.jsonl").write_text(json.dumps(documents[0]) + "\n")
    assert 0 < len(list(restore(rows, corpora))) < len(made)


def test_a_passage_that_pairs_were_made_of_is_not_asked_about_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = {"source": "s", "doc": "d", "title": "T", "text": "\n\n".join(f"{PASSAGE} Part {i}." for i in range(6))}
    (tmp_path / "corpus-00.jsonl").write_text(json.dumps(document) + "\n")
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    job = (tmp_path, tmp_path, 0, 1, 100, 100)
    every = asking.passages_of(job)
    pair = {"source": "s", "doc": "d", "title": "T", "passage": every[0].passage, "question": "?"}
    shipped = tmp_path / "made_pairs.jsonl"
    shipped.write_text("".join(json.dumps(row) + "\n" for row in strip([pair])))
    monkeypatch.setattr(asking, "asked_before", lambda: asked_before([shipped]))
    assert {a.passage for a in every} - {a.passage for a in asking.passages_of(job)} == {every[0].passage}
