"""A BERT encoder for embedder and reranker: PyTorch's own layers, filled from a checkpoint. Start at `load_bert`.

On a CPU the forward pass is traced into a single operation. As about a hundred operations it would acquire the GIL a
hundred times, and each time could wait 5 ms for a thread that computes in Python: beside two such threads, embedding a
question took 267 ms instead of 7, and takes 40 now.

Without pooler, heads and training. Does not use `transformers`, whose import takes 3 s of CPU time.
Source: Devlin, Chang, Lee, Toutanova 2019; for the stored names transformers, models/bert/modeling_bert.py.
"""

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

_ROWS = ("vocab_size", "max_position_embeddings")
_NEEDED = (*_ROWS, "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_PAPER = {"type_vocab_size": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-12}  # defaults for early config files
_TANH = partial(F.gelu, approximate="tanh")
_ACTIVATIONS = {"gelu": F.gelu, "gelu_new": _TANH, "gelu_pytorch_tanh": _TANH, "relu": F.relu, "silu": F.silu}
_TRACING = threading.Lock()  # tracing is not thread safe
_UNUSED = ("pooler.", "embeddings.position_ids")  # stored tensors that are ignored: a head, and 0, 1, 2 …
_NAMES = {  # replacements in stored names, in order
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "places",
    "embeddings.token_type_embeddings": "kinds",
    "embeddings.LayerNorm": "norm",
    "encoder.layer.": "encoder.layers.",
    "attention.self.query.": "self_attn.in_proj_",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "linear1",
    "output.dense": "linear2",
    "output.LayerNorm": "norm2",
}


class UnsupportedBert(RuntimeError):
    """The config.json is not that of a supported BERT."""


def read_config(path: Path) -> dict[str, Any]:
    """config.json, with the paper's values for fields missing in early files. Raises UnsupportedBert."""
    config = _PAPER | json.loads(path.read_bytes())
    if missing := [name for name in _NEEDED if name not in config]:
        raise UnsupportedBert(f"{path} lacks {', '.join(missing)}: not the config.json of a BERT")
    if config["hidden_act"] not in _ACTIVATIONS:
        raise UnsupportedBert(f"{path}: hidden_act is {config['hidden_act']!r}, not one of {', '.join(_ACTIVATIONS)}")
    if config.get("is_decoder"):
        raise UnsupportedBert(f"{path}: a decoder; what can be used is an encoder, which reads in both directions")
    if (d := config["hidden_size"]) % (heads := config["num_attention_heads"]):
        raise UnsupportedBert(f"{path}: hidden_size {d} cannot be shared out among {heads} num_attention_heads")
    return config


class _Layers(nn.Module):
    """Built on the meta device, without weights; `load_state_dict` with `assign` fills it."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        d, eps, activate = config["hidden_size"], config["layer_norm_eps"], _ACTIVATIONS[config["hidden_act"]]
        rows = [config[name] for name in (*_ROWS, "type_vocab_size")]
        with torch.device("meta"):  # random initialization would take time and advance the global generator
            # and initializing an embedding on this device would import torch._dynamo, which takes a second
            self.words, self.places, self.kinds = (nn.Embedding.from_pretrained(torch.empty(n, d)) for n in rows)
            self.norm = nn.LayerNorm(d, eps)
            heads, inner = config["num_attention_heads"], config["intermediate_size"]
            layer = nn.TransformerEncoderLayer(d, heads, inner, activation=activate, layer_norm_eps=eps)
            self.encoder = nn.TransformerEncoder(layer, config["num_hidden_layers"], enable_nested_tensor=False)

    def forward(self, ids: Tensor, kinds: Tensor, padding: Tensor | None = None) -> Tensor:
        """The sequence dimension comes first: with batch_first PyTorch uses its fused layer, which takes 1.2 times the
        CPU time.

        No shape may become a Python number here: tracing would freeze it.
        """
        ids, kinds = ids.t(), kinds.t()
        places = torch.arange(ids.shape[0], device=ids.device)[:, None]
        x = self.norm(self.words(ids) + self.kinds(kinds) + self.places(places))  # (t, b, d)
        return self.encoder(x, src_key_padding_mask=padding).transpose(0, 1)


class Bert:
    """Thread safe, in inference mode."""

    def __init__(self, layers: _Layers) -> None:
        weight = layers.norm.weight
        self.layers, self.dtype = layers, weight.dtype
        self._whole = self._padded = layers
        if weight.device.type == "cpu":
            self._whole, self._padded = _trace(layers), _trace(layers, padded=True)

    def __call__(self, ids: Tensor, mask: Tensor, kinds: Tensor | None = None) -> Tensor:
        """ids (b, t), mask (b, t) with 0 for padding, kinds (token types; b, t; None: all 0) -> (b, t, d)."""
        kinds = torch.zeros_like(ids) if kinds is None else kinds
        return self._whole(ids, kinds) if mask.all() else self._padded(ids, kinds, mask == 0)


def _trace(layers: _Layers, padded: bool = False) -> Callable[..., Tensor]:
    """Trace the layers into one operation, with the same bits for any batch size and length; warmed up."""
    ids = torch.zeros(2, 2, dtype=torch.long)  # a single row with one head would take a special path
    inputs = (ids, ids, ids == 1) if padded else (ids, ids)
    # `torch.jit` is deprecated, but its successors compile C++ at every start or remain a hundred operations
    with _TRACING, torch.inference_mode():
        traced = torch.jit.trace(layers, inputs, check_trace=False)
        for _ in range(3):
            traced(*inputs)
    return traced


def load_bert(model_dir: Path, updates: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> Bert:
    """Load the BERT of config.json and model.safetensors. Raises UnsupportedBert.

    `updates`: LoRA updates NAME.A (rank, in) and NAME.B (out, rank), whose product B·A is added to the weight NAME.
    """
    layers = _Layers(read_config(model_dir / "config.json"))
    weights = {k: v for k, v in load_file(model_dir / "model.safetensors").items() if not k.startswith(_UNUSED)}
    for name in [key.removesuffix(".A") for key in updates if key.endswith(".A")]:
        weights[name] = weights[name] + updates[f"{name}.B"].float() @ updates[f"{name}.A"].float()
    for name in [key for key in weights if ".query." in key]:  # PyTorch concatenates query, key and value
        parts = [name.replace("query", part) for part in ("query", "key", "value")]
        weights[name] = torch.cat([weights.pop(part) for part in parts if part in weights])
    for stored, ours in _NAMES.items():
        weights = {name.replace(stored, ours): tensor for name, tensor in weights.items()}
    layers.load_state_dict(weights, strict=True, assign=True)
    return Bert(layers.eval().requires_grad_(False).to(device, dtype))
