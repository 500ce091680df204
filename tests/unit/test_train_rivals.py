"""Wrong quotes come from the passage, whole words of it, likeliest first, and training finds them again."""

import json
import random

import pytest
import torch

from app.setting_groups import SHIPPED_CHECKPOINT
from model.chat_format import ChatFormat
from model.tokenizer import Tokenizer
from model.train import rivals
from model.train.pair_contexts import PairContexts, load_pairs
from model.train.rivals import likeliest_quotes, lone_of
from model.train.scoring import normalize_answer
from model.weights import load_model

TEXT = "The P-7 pump was built in 1996 by Smith & Sons. It weighs 31 kg and lifts 40 litres a minute."
PAIRS = [
    {"question": question, "answer": answer, "start": TEXT.index(answer), "passage": TEXT, "passage_id": 0,
     "title": "Pumps", "doc": "pumps.txt", "source": "manual", "negatives": [1]}
    for question, answer in (("When was the P-7 pump built?", "1996"), ("How heavy is it?", "31 kg"))
]  # fmt: skip
NEAR = [{"id": 1, "title": "Owls", "doc": "owls.txt", "text": "An owl sees at night. It weighs 2 kg."}]


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SHIPPED_CHECKPOINT)


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "pairs_train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (tmp_path / "passages_train.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in NEAR))
    return tmp_path / "pairs_train.jsonl"


def test_rivals_are_likely_quotes_besides_the_right_one(tokenizer):
    contexts = PairContexts(PAIRS, {1: ("Owls", NEAR[0]["text"])}).each_lone(random.Random(0), 1400)
    prompts = ChatFormat(tokenizer)
    lones = [lone_of(context, prompts) for context in contexts]
    assert sorted(len(lone.asked) for lone in lones) == [2, 2]  # both passages, the owls in vain
    model = load_model(SHIPPED_CHECKPOINT, dtype=torch.float32)
    likeliest_quotes(model, prompts, lones, random.Random(0))
    for lone in lones:
        for one in lone.asked:
            assert 1 <= len(one.found) <= rivals.KEPT
            assert [nats for nats, *_ in one.found] == sorted((nats for nats, *_ in one.found), reverse=True)
            assert all(lone.text[start : start + len(words)] == words for _, words, start in one.found)
            assert normalize_answer(one.gold) not in {normalize_answer(words) for _, words, _ in one.found}
    told = {one.gold for lone in lones for one in lone.asked}
    assert told == {"1996", "31 kg", ""}


def test_ends_and_beginnings_are_those_of_words(tokenizer):
    context = next(PairContexts(PAIRS, {}).each_lone(random.Random(0), 1400))
    lone = lone_of(context, ChatFormat(tokenizer))
    starts = {lone.words(at, at)[1] for places in lone.begins.values() for at in places}
    assert TEXT.index("pump") in starts and TEXT.index("&") in starts
    assert not any(start and TEXT[start - 1 : start + 1].isalnum() for start in starts)
    whole = [TEXT[:end] for (_, end), ends in zip(lone.offsets, lone.ends, strict=True) if ends]
    assert TEXT in whole and not any(text.endswith("Smit") for text in whole)


def test_what_the_stage_writes_is_what_training_reads(pairs, tmp_path, monkeypatch):
    out = tmp_path / "rivals"
    words = ["--checkpoint", SHIPPED_CHECKPOINT, "--tokenizer", SHIPPED_CHECKPOINT, "--pairs", pairs, "--out", out]
    monkeypatch.setattr("sys.argv", ["rivals", *map(str, words), "--workers", "1"])
    monkeypatch.setattr(rivals, "accelerate", lambda model: None)
    rivals.main()
    read = load_pairs([pairs], out)
    drawn = [read.draw_lone(random.Random(seed), 1400) for seed in range(12)]
    told = {(question.text, passages[0][1], rival) for passages, questions in
            ((context.passages, context.questions) for context in drawn)
            for question in questions for rival in question.rivals}  # fmt: skip
    assert {question for question, *_ in told} == {pair["question"] for pair in PAIRS}
    assert {passage for _, passage, _ in told} == {TEXT, NEAR[0]["text"]}
    assert all(passage[start : start + len(words)] == words for _, passage, (words, start) in told)


def test_ids_of_two_files_do_not_meet(tmp_path):
    for name, text in (("old", "Pumps leak."), ("new", "Valves stick.")):
        (tmp_path / name).mkdir()
        pair = PAIRS[0] | {"passage": f"{text} {TEXT}", "start": PAIRS[0]["start"] + len(text) + 1, "passage_id": 0}
        (tmp_path / name / "pairs_train.jsonl").write_text(json.dumps(pair) + "\n")
        (tmp_path / name / "passages_train.jsonl").write_text(json.dumps(NEAR[0] | {"text": f"Near {name}."}) + "\n")
    read = load_pairs([tmp_path / name / "pairs_train.jsonl" for name in ("old", "new")])
    assert sorted(text for _, text in read.near.values()) == ["Near new.", "Near old."]
    negatives = [[read.near[i][1] for i in pair["negatives"]] for (pair,) in read.asked]
    assert negatives == [["Near old."], ["Near new."]]
    numbers = {pair["passage_id"] for (pair,) in read.asked}
    assert len(numbers) == 2 and not numbers & read.near.keys()
