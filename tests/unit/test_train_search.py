"""Tuning the search's models, at toy size: what is learned, what is written, and what must stay out."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_retrieval_embedder import write_bert

from model.train import search_adapters
from model.train.search_adapters import add_low_rank, embed, in_groups, load_base, ndcg, run_groups, shrink
from model.train.search_data import SearchData, passage_text
from retrieval.embedder import BertEmbedder, MiniLMEmbedder, text_to_embed
from retrieval.types import Chunk

TOPICS = ("pump", "tenant", "horse", "violin", "harbour", "glacier", "printer", "bakery")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A tiny BERT of random weights."""
    torch.set_num_threads(1)
    return write_bert(tmp_path_factory.mktemp("base") / "tiny", MiniLMEmbedder(), first_token=False)


def write_pairs(folder: Path, split: str, source: str = "a-doc") -> Path:
    """A question a topic, its passage, and near ones that say nothing about what is asked."""
    folder.mkdir(exist_ok=True)
    texts = [f"The {topic} is looked after every week." for topic in TOPICS]
    texts += [f"The {topic} has a price and a place." for topic in TOPICS]
    passages = [{"id": 10 + n, "title": "Notes", "text": text, "source": source} for n, text in enumerate(texts)]
    pairs = [
        {"question": f"How often is the {topic} looked after?", "answer": "every week", "kind": "", "source": source}
        | {"passage_id": 10 + n, "negatives": [18 + n, 18 + (n + 1) % 8]}
        for n, topic in enumerate(TOPICS)
    ]
    pairs.append(pairs[0] | {"answer": None})
    for name, rows in (("passages", passages), ("pairs", pairs)):
        (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_both_adapters_learn_and_say_so(base, tmp_path, capsys):
    for split in ("train", "dev"):
        write_pairs(tmp_path / "data", split)
    folders = ["--base", str(base), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    times = ["--seconds", "600", "600", "--steps", "60", "--rates", "0.02", "--reranker-rate", "0.01"]
    search_adapters.main([*folders, *times, "--ranks", "4", "4", "--batches", "8", "8", "--negatives", "2", "3"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    before, after = (line["dev"]["ndcg"] for line in lines if "embedder" in line)
    assert after > before
    (reranked,) = (line["dev"]["first"] for line in lines if "reranker" in line)
    assert reranked > 0.5
    learned = load_file(tmp_path / "out" / "embedder-0.02.safetensors")
    assert learned["encoder.layer.1.output.dense.weight.A"].shape == (4, 48)
    assert {tensor.dtype for tensor in learned.values()} == {torch.bfloat16} and len(learned) == 2 * 2 * 6
    head = {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert {name for name in load_file(tmp_path / "out" / "reranker.safetensors") if "encoder" not in name} == head


def test_the_base_gives_the_vectors_of_the_service(base):
    """Also in groups, and whatever stands beside a text."""
    texts = ["short", "a longer one of many more words", "two words"]
    embedder = BertEmbedder(base, dtype=torch.float32)
    rows = [encoding.ids for encoding in embedder._counter.encode_batch(texts)]
    with torch.inference_mode():
        vectors = embed(load_base(base, torch.device("cpu")), rows)
    torch.testing.assert_close(vectors, torch.from_numpy(embedder.embed_passages(texts)), atol=1e-5, rtol=0)


def test_groups_hold_every_row_once_and_keep_the_order():
    rows = [[1] * n for n in (3, 9, 1, 4, 4, 9, 2)]
    groups = list(in_groups(rows, 18))
    assert sorted(place for group in groups for place in group) == list(range(7))
    assert all(len(group) * max(len(rows[place]) for place in group) <= 18 for group in groups)
    lengths = run_groups(rows, lambda places, ids: (ids != 0).sum(1), torch.device("cpu"))
    assert lengths.tolist() == [3, 9, 1, 4, 4, 9, 2]


def test_pairs_of_tested_packages_are_refused(base, tmp_path):
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    folder = write_pairs(tmp_path / "data", "train", source="mutt")
    with pytest.raises(ValueError, match="mutt must stay out"):
        SearchData(folder, "train", MiniLMEmbedder()._counter)


def test_questions_lose_words_that_their_passage_has(tmp_path):
    data = SearchData(write_pairs(tmp_path / "data", "train"), "train", MiniLMEmbedder()._counter)
    assert len(data.questions) == 8  # the one without an answer is none
    rng = random.Random(0)
    asked = [data._reword(0, rng).lower() for _ in range(200)]
    assert 10 < sum("pump" not in question for question in asked) < 60


@pytest.mark.parametrize(("title", "text"), [("Guide", "a b"), ("Guide", "A Guide to b"), ("", "a"), ("x" * 90, "a")])
def test_passages_stand_under_their_titles_as_those_of_the_service(title, text):
    chunk = Chunk("c", "d", 0, 0, len(text), text)
    assert passage_text(title, text) == text_to_embed(title or None, chunk)


def test_some_passages_lose_their_title(tmp_path):
    counter = MiniLMEmbedder()._counter
    data = SearchData(write_pairs(tmp_path / "data", "train"), "train", counter)
    rng = random.Random(0)
    read = {counter.decode(data.passage(3, rng)) for _ in range(60)}
    assert read == {"notes the violin is looked after every week.", "the violin is looked after every week."}


def test_a_share_of_what_was_learned_is_kept(base):
    model = load_base(base, torch.device("cpu"))
    layer = model.encoder.layer[0].intermediate.dense
    before = layer.weight.clone()
    add_low_rank(model, 4)
    torch.nn.init.ones_(layer.parametrizations.weight[0].B)
    learned = layer.weight - before
    shrink(model, 0.5)
    torch.testing.assert_close(layer.weight - before, learned / 2)


def test_ndcg():
    assert ndcg([5, 3, 9], [5]) == 1 and ndcg([4, 3], [5]) == 0
    assert ndcg([4, 5], [5]) == pytest.approx(1 / 1.585, abs=1e-3)
