"""The cross-encoder that ships, on a tiny random checkpoint made here."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from retrieval.rerank import CrossEncoderReranker, RerankerUnavailable

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
