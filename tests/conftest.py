"""Shared fixtures: random Jamba checkpoints, written by `transformers` as a user's would be."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

# Triton decides at its import; transformers imports it
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

from transformers import JambaConfig, JambaForCausalLM
from transformers.utils import logging

from model.kernels import gpu
from tests import cuda_on_cpu as emulation

WriteJamba = Callable[..., JambaForCausalLM]

# every kind of layer: attention and Mamba, each with and without experts
TINY = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "mamba_d_state": 8,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _single_threaded() -> None:
    """Sums in one order in every test, whatever number of threads an earlier one in this process left behind."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    torch.set_num_threads(1)  # checkpoints of a session are made before a test's own fixtures
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def w8a8_anywhere() -> Iterator[None]:
    """Lets a CPU round what it multiplies also where that is no gain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.weights.check_device", lambda device: None)
        yield


@pytest.fixture
def cuda_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CUDA kernels work on CPU tensors."""
    monkeypatch.setattr(gpu, "emulator", emulation.kernel)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the CUDA kernels run: on a card, and emulated on the CPU of a machine without one, where Triton's
    kernels are interpreted."""
    if request.param == "emulated":
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device, for which Triton compiles its kernels")
        request.getfixturevalue("cuda_on_cpu")
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture(scope="session")
def write_jamba() -> WriteJamba:
    """write_jamba(path, seed=0, save={}, **config fields) writes a random checkpoint and returns its HF model."""
    return _write_jamba


@pytest.fixture(scope="session")
def tiny_jamba_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 6-layer checkpoint in float32 with all kinds of layers; do not write into it."""
    path = tmp_path_factory.mktemp("tiny-jamba")
    _write_jamba(path)
    return path


def _write_jamba(path: Path, seed: int = 0, save: dict | None = None, **overrides: object) -> JambaForCausalLM:
    model = JambaForCausalLM(JambaConfig(**TINY | overrides, attn_implementation="eager")).eval()
    # Its own, because threads share the global one: a model that loads beside it would change the weights. From 2 on,
    # because what 0 draws is so steep that HF's own float32 gradients are 1.3e-4 away from those in float64.
    own = torch.Generator().manual_seed(seed + 2)
    for name, parameter in model.named_parameters():
        _randomize(name, parameter.data, own)
    model.save_pretrained(path, **save or {})
    return model


def _randomize(name: str, weight: torch.Tensor, own: torch.Generator) -> None:
    """Every weight counts, and no activation vanishes: with the usual 0.02 a broken layer could hide in rounding."""
    if name.endswith("dt_proj.bias"):
        weight.uniform_(-4, 0, generator=own)
    elif name.endswith("embed_tokens.weight"):
        weight.normal_(generator=own)
    elif name.endswith("A_log"):
        usual = torch.arange(1, weight.shape[-1] + 1).log().expand_as(weight)
        weight.normal_(std=0.3, generator=own).add_(usual)
    elif weight.ndim == 1:  # other biases, norms and D
        weight.normal_(mean=0 if name.endswith("bias") else 1, std=0.2, generator=own)
    else:
        weight.normal_(std=weight.shape[-1] ** -0.5, generator=own)
