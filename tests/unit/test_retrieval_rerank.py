"""Rerankers: a cross-encoder on a tiny random checkpoint made here, and the one that ships."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from model.train import search_adapters
from retrieval.embedder import wheel_model_dir
from retrieval.rerank import ADAPTER, CrossEncoderReranker, MiniLMReranker, RerankerUnavailable

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "water", "drips", "pump", "law", "tenant", "notice"]


def make_checkpoint(folder: Path, outputs: int = 1) -> Path:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, num_labels=outputs, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_scores_are_those_of_the_model_whatever_stands_beside_them(tmp_path):
    reranker = CrossEncoderReranker(make_checkpoint(tmp_path), batch=2)
    passages = ["water drips", "tenant notice law", "pump"]
    scores = reranker.score("pump drips", passages)
    assert scores.shape == (3,) and scores.dtype == np.float32 and len(set(scores.tolist())) == 3
    alone = [reranker.score("pump drips", [passage])[0] for passage in passages]
    assert scores == pytest.approx(alone, abs=1e-5)
    assert reranker.score("law", passages) != pytest.approx(scores, abs=1e-7)


def test_what_is_beyond_the_window_is_not_read(tmp_path):
    reranker = CrossEncoderReranker(make_checkpoint(tmp_path), max_tokens=32)
    long, longer = "water " * 40, "water " * 40 + "law"
    assert reranker.score("pump", [long])[0] == reranker.score("pump", [longer])[0]
    assert reranker.score("pump", []).shape == (0,)


def test_what_is_no_reranker_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(RerankerUnavailable, match="directory of a cross-encoder"):
        CrossEncoderReranker(tmp_path)
    with pytest.raises(RerankerUnavailable, match="3 outputs"):
        CrossEncoderReranker(make_checkpoint(tmp_path, outputs=3)).score("a", ["b"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(RerankerUnavailable, match="holds BertModel"):
        CrossEncoderReranker(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(RerankerUnavailable, match=r"no object in config\.json"):
        CrossEncoderReranker(tmp_path)


def test_a_config_need_not_name_its_architecture(tmp_path):
    reranker, checkpoint = CrossEncoderReranker(make_checkpoint(tmp_path)), tmp_path / "config.json"
    config = json.loads(checkpoint.read_text())
    assert config.pop("architectures")
    checkpoint.write_text(json.dumps(config))
    scores = CrossEncoderReranker(tmp_path).score("law", ["the law"])
    assert scores == pytest.approx(reranker.score("law", ["the law"]), abs=1e-6)


def test_the_shipped_one_scores_as_it_was_trained():
    reranker, device = MiniLMReranker(dtype=torch.float32), torch.device("cpu")
    model = search_adapters.load_base(wheel_model_dir(), device, scores=True)
    search_adapters.add_low_rank(model, rank=64)
    trained = {name: parameter for name, parameter in model.named_parameters() if "original" not in name}
    for name, tensor in load_file(ADAPTER).items():
        place = name.replace("weight.A", "parametrizations.weight.0.A").replace(
            "weight.B", "parametrizations.weight.0.B"
        )
        trained[place if place in trained else f"bert.{place}"].data.copy_(tensor)
    query, passages = "How high is the tower?", ["The tower is 48 metres high. " * 40, "", "Bread is baked daily."]
    tokenizer = Tokenizer.from_file(str(wheel_model_dir() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(passages)]
    with torch.inference_mode():
        expected = search_adapters.score(model, [tokenizer.encode(query).ids] * 3, rows)
    assert reranker.score(query, passages) == pytest.approx(expected.numpy(), abs=1e-4)
    assert reranker.score(query, []).shape == (0,)
    alone = [float(reranker.score(query, [passage])[0]) for passage in passages]
    assert alone == pytest.approx(expected.tolist(), abs=1e-4) and alone[0] > alone[2] + 1


def test_the_shipped_one_loads_beside_an_embedder():
    """For the first time, each in a thread, while both are used; in a process of its own."""
    script = """
from threading import Thread
from retrieval.embedder import MiniLMEmbedder
from retrieval.rerank import MiniLMReranker
embedder, reranker = MiniLMEmbedder(), MiniLMReranker()
Thread(target=embedder.load).start(); Thread(target=reranker.load).start()
print(embedder.embed_query("x").shape, reranker.score("x", ["y", "half \\ud800"]).shape)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("(384,) (2,)\n", "")
