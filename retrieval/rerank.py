"""A second look at the best hits: a model that reads question and passage together, and puts them in a new order.

Optional: nothing here runs unless a `Reranker` is given to the `Retriever`. The one that ships reads any
sequence-classification checkpoint with one output (a cross-encoder) from a local directory; no network is asked.
"""

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .types import Hit

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder


class RerankerUnavailable(RuntimeError):
    """The checkpoint or the package that reads it is missing."""


class Reranker(Protocol):
    """Says how well each passage answers a question. Thread safe."""

    def score(self, query: str, passages: Sequence[str]) -> np.ndarray:
        """(len(passages),) float32, higher is better; comparable for one query only."""


class CrossEncoderReranker:
    """A cross-encoder checkpoint through sentence-transformers. Loads at first use."""

    def __init__(self, model_dir: Path | str, device: str = "cpu", max_tokens: int = 512, batch: int = 16) -> None:
        """What of question and passage is beyond `max_tokens` is not read. Raises RerankerUnavailable."""
        self._dir = Path(model_dir)
        if not (self._dir / "config.json").is_file():
            raise RerankerUnavailable(f"{self._dir} holds no config.json; set it to the directory of a cross-encoder")
        self._device = device
        self._max_tokens = max_tokens
        self._batch = batch
        self._lock = threading.Lock()  # tokenizers keep truncation as state

    def score(self, query: str, passages: Sequence[str]) -> np.ndarray:
        if not passages:
            return np.empty(0, dtype=np.float32)
        pairs = [(query, passage) for passage in passages]
        with self._lock:
            scores = self._model.predict(pairs, batch_size=self._batch, show_progress_bar=False)
        return np.asarray(scores, dtype=np.float32)

    @cached_property
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
    """The hits in the order of the reranker, which also becomes their score; equal ones keep their order."""
    passages = ["\n".join((*hit.chunk.heading_path, hit.chunk.text)) for hit in hits]
    scores = reranker.score(query, passages).tolist()
    scored = [
        replace(hit, score=score, scores={**hit.scores, "rerank": score})
        for hit, score in zip(hits, scores, strict=True)
    ]
    return sorted(scored, key=lambda hit: -hit.score)
