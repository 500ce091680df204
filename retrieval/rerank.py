"""Reranking: a cross-encoder reads the question together with each of the best hits and reorders them.

The shipped one is MiniLM with the LoRA updates and the head beside this file, made by `model.train.search_adapters`; it
can be replaced by any sequence-classification checkpoint with one output in a local directory. Nothing is downloaded.
Start at `rerank`.
"""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

from .bert import Bert, load_bert
from .embedder import encodable, multiplies_bf16, text_to_embed, wheel_model_dir
from .once import once
from .solo_threads import solo_threads
from .types import Hit

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

ADAPTER = Path(__file__).parent / "minilm-reranker.safetensors"
_HEAD = ("pooler.", "classifier.")
_MAX_TOKENS = 64, 256  # of a question, of a passage, as it was trained
_CPU = torch.device("cpu")


class RerankerUnavailable(RuntimeError):
    """The checkpoint, or the package that reads it, is missing."""


class Reranker(Protocol):
    """Scores how well each passage answers a question. Thread safe."""

    @property
    def hits(self) -> int:
        """How many of the best hits it reads."""

    @property
    def prior(self) -> float:
        """Weight of the search score (scaled so that the best hit has 1), which is added to the reranker's."""

    def load(self) -> None:
        """Load everything that a question needs."""

    def score(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """(len(passages),) float32, higher is better; comparable for one query only."""


class MiniLMReranker:
    """The shipped reranker: all-MiniLM-L6-v2 turned into a cross-encoder. Loads at first use.

    The passages of a question are divided among its own threads, one per core.
    """

    hits = 8  # 12 or 24 do not put more answers into the evidence: docs/retrieval.md
    prior = 10.0

    def __init__(self, adapter: Path = ADAPTER, dtype: torch.dtype | None = None) -> None:
        """`dtype` None: bfloat16 where it is fast, else float32."""
        self._dir, self._adapter = wheel_model_dir(), adapter
        self._dtype = dtype or (torch.bfloat16 if multiplies_bf16(_CPU) else torch.float32)

    def score(self, query: str, passages: Sequence[str]) -> np.ndarray:
        if not passages:
            return np.empty(0, dtype=np.float32)
        questions, texts = self._tokenizers
        question = questions.encode(*encodable([query])).ids
        rows = [question + encoding.ids[1:] for encoding in texts.encode_batch(encodable(passages))]
        longest_first = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        pool, threads = self._pool
        parts = [longest_first[number::threads] for number in range(min(threads, len(rows)))]
        scores = np.empty(len(rows), dtype=np.float32)
        work = pool.map(lambda part: self._score([rows[row] for row in part], len(question)), parts)
        for part, found in zip(parts, work, strict=True):
            scores[part] = found
        return scores

    def load(self) -> None:
        self._model, self._tokenizers  # noqa: B018 - computed on access

    def _score(self, rows: Sequence[Sequence[int]], question_tokens: int) -> np.ndarray:
        """Scores of rows of token ids, longest first, that all begin with the question."""
        ids = torch.zeros(len(rows), len(rows[0]), dtype=torch.long)
        kinds, mask = torch.zeros_like(ids), torch.zeros_like(ids)  # kinds: 0 the question, 1 the passage
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            kinds[place, question_tokens : len(row)] = 1
            mask[place, : len(row)] = 1
        bert, head = self._model
        with torch.inference_mode():
            first = bert(ids, mask, kinds)[:, 0].float()
            pooled = F.linear(first, head["pooler.dense.weight"], head["pooler.dense.bias"]).tanh()
            return F.linear(pooled, head["classifier.weight"], head["classifier.bias"])[:, 0].numpy()

    @once
    def _model(self) -> tuple[Bert, dict[str, torch.Tensor]]:
        updates = load_file(self._adapter)
        head = {name: tensor.float() for name, tensor in updates.items() if name.startswith(_HEAD)}
        return load_bert(self._dir, updates, _CPU, self._dtype), head

    @once
    def _pool(self) -> tuple[Executor, int]:
        threads = torch.get_num_threads()
        return solo_threads(threads, "rerank"), threads

    @once
    def _tokenizers(self) -> list[Tokenizer]:
        """One tokenizer for questions and one for passages, because the truncation limit is state of a tokenizer."""
        tokenizers = [Tokenizer.from_file(str(self._dir / "tokenizer.json")) for _ in _MAX_TOKENS]
        for tokenizer, limit in zip(tokenizers, _MAX_TOKENS, strict=True):
            tokenizer.no_padding()
            tokenizer.enable_truncation(limit)
        return tokenizers


class CrossEncoderReranker:
    """A cross-encoder checkpoint through sentence-transformers. Loads at first use."""

    hits = 50
    prior = 0.0

    def __init__(self, model_dir: Path | str, device: str = "cpu", max_tokens: int = 512, batch: int = 16) -> None:
        """Question and passage are truncated to `max_tokens`. Raises RerankerUnavailable."""
        self._dir = Path(model_dir)
        if not (self._dir / "config.json").is_file():
            raise RerankerUnavailable(f"{self._dir} holds no config.json; set it to the directory of a cross-encoder")
        config = json.loads((self._dir / "config.json").read_text(encoding="utf-8"))
        kinds = config.get("architectures") if isinstance(config, dict) else ["no object in config.json"]
        if kinds and not str(kinds[0]).endswith("ForSequenceClassification"):  # its head would be randomly initialized
            raise RerankerUnavailable(f"{self._dir} holds {kinds[0]}; a cross-encoder is …ForSequenceClassification")
        self._device = device
        self._max_tokens = max_tokens
        self._batch = batch
        self._lock = threading.Lock()  # truncation is state of the tokenizer

    def load(self) -> None:
        self._model  # noqa: B018 - computed on access

    def score(self, query: str, passages: Sequence[str]) -> np.ndarray:
        if not passages:
            return np.empty(0, dtype=np.float32)
        pairs = [(query, passage) for passage in passages]
        with self._lock:
            scores = self._model.predict(pairs, batch_size=self._batch, show_progress_bar=False)
        return np.asarray(scores, dtype=np.float32)

    @once
    def _model(self) -> "CrossEncoder":
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise RerankerUnavailable(
                "reranking needs sentence-transformers; pip install sentence-transformers"
            ) from error
        model = CrossEncoder(
            str(self._dir),
            device=self._device,
            local_files_only=True,
            max_length=self._max_tokens,
            model_kwargs={"use_safetensors": True},
        )
        if model.num_labels != 1:
            raise RerankerUnavailable(f"{self._dir} has {model.num_labels} outputs; a reranker has one")
        return model


def rerank(reranker: Reranker, query: str, hits: Sequence[Hit]) -> list[Hit]:
    """The hits ordered by the reranker's score plus the weighted search score, best first.

    Hits after the best `reranker.hits`, which are not reranked, count as its worst and so stay last. Ties keep their
    order.
    """
    if not hits:
        return []
    read = hits[: reranker.hits]
    scores = reranker.score(query, [text_to_embed(hit.title, hit.chunk) for hit in read]).tolist()
    best = hits[0].score
    scored = []
    for place, hit in enumerate(hits):
        own = scores[place] if place < len(read) else min(scores)
        total = own + (reranker.prior * hit.score / best if best > 0 else 0.0)
        scored.append(
            replace(hit, score=total, scores={**hit.scores, "rerank": own} if place < len(read) else hit.scores)
        )
    return sorted(scored, key=lambda hit: -hit.score)
