"""What training needs: router statistics, the balancing loss, checkpointed activations, positions that fade."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.models.jamba.modeling_jamba import load_balancing_loss_func
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from model import Jamba, JambaConfig, load_model
from model.attention import rotate, rotation
from tests.conftest import WriteJamba
from tests.numeric import assert_close


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 512, (2, 37), generator=torch.Generator().manual_seed(4))


@pytest.fixture
def rotating(tiny_jamba_dir: Path) -> Jamba:
    """The tiny model, with positions in its attention."""
    plain = load_model(tiny_jamba_dir)
    model = Jamba(dataclasses.replace(plain.config, rope_theta=10_000.0)).eval()
    model.load_state_dict(plain.state_dict())
    return model


def test_balancing_loss_is_that_of_transformers(write_jamba: WriteJamba, tmp_path: Path, tokens: Tensor) -> None:
    theirs = write_jamba(tmp_path, num_hidden_layers=2)  # one layer with experts
    ours = load_model(tmp_path)
    ours.collect_router_stats = True
    with torch.no_grad():
        ours(tokens)
        router_logits = theirs(tokens, use_cache=False, output_router_logits=True).router_logits
    expected = load_balancing_loss_func(router_logits, num_experts=4, top_k=2)
    # theirs counts each of the k choices of a token as a whole, ours as 1/k: balanced is 1 for any k
    assert_close("loss", ours.load_balancing_loss(alpha=0.5), expected / 2 * 0.5, ratio=1e-6)


def test_utilisation_tells_where_tokens_went(tiny_jamba_dir: Path, tokens: Tensor) -> None:
    model = load_model(tiny_jamba_dir)
    model.collect_router_stats = True
    for layer in (1, 3, 5):
        router = model.layers[layer].feed_forward.router.weight
        router.data.zero_()  # a tie everywhere: always the same two experts
    model(tokens)
    assert model.expert_utilisation().sort().values.tolist() == [[0.0, 0.0, 0.5, 0.5]] * 3
    assert model.load_balancing_loss().item() == pytest.approx(1.0)  # the probabilities are even


def test_utilisation_of_a_decode_step_is_its_own(tiny_jamba_dir: Path, tokens: Tensor) -> None:
    model = load_model(tiny_jamba_dir)
    model.collect_router_stats = True
    state = model.new_state()
    model(tokens[:1], state)
    model(tokens[1:, :1], state)
    assert model.expert_utilisation().sort().values.tolist() == [[0.0, 0.0, 0.5, 0.5]] * 3  # one token's two choices


def test_statistics_must_have_been_asked_for(tiny_jamba_dir: Path, tokens: Tensor) -> None:
    model = load_model(tiny_jamba_dir)
    model(tokens)
    assert not model.collect_router_stats
    with pytest.raises(RuntimeError, match="set collect_router_stats"):
        model.load_balancing_loss()


def test_a_new_model_starts_sane(tokens: Tensor, tiny_jamba_dir: Path) -> None:
    torch.manual_seed(0)
    model = Jamba(JambaConfig.from_json(tiny_jamba_dir / "config.json"))
    loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(torch.tensor(512.0).log().item(), rel=0.15)
    delta = torch.nn.functional.softplus(model.layers[0].mamba.dt_proj.bias)
    assert delta.min() > 0.9e-3 and delta.max() < 0.11


def test_rotation_is_that_of_llama() -> None:
    q, k = torch.randn(1, 3, 19, 16), torch.randn(1, 1, 19, 16)  # (b, h, t, p), (b, g, t, p)
    angles = torch.arange(19)[:, None] / 500.0 ** (torch.arange(0, 16, 2) / 16)
    cos, sin = rotation(torch.arange(19), theta=500.0, scale=1.0, head_dim=16)
    expected = apply_rotary_pos_emb(
        q, k, *(f(torch.cat([angles, angles], dim=-1))[None] for f in (torch.cos, torch.sin))
    )
    for ours, theirs in zip((q, k), expected, strict=True):
        assert_close("rotated", rotate(ours[0].transpose(0, 1), cos, sin), theirs[0].transpose(0, 1), ratio=1e-6)


def test_positions_are_kept_over_calls_and_can_fade(rotating: Jamba, tiny_jamba_dir: Path, tokens: Tensor) -> None:
    with torch.no_grad():
        whole, plain = rotating(tokens), load_model(tiny_jamba_dir)(tokens)
        states = [rotating.new_state(), rotating.new_state()]
        parts = torch.cat([rotating(part, states) for part in tokens.split([9, 1, 27], dim=1)], dim=1)
        assert_close("in parts", parts, whole, ratio=1e-5)
        assert (whole - plain).norm() > 0.01 * plain.norm()
        for layer in rotating.layers:
            if layer.is_attention:
                layer.self_attn.rope_scale = 0.0
        assert torch.equal(rotating(tokens), plain)
