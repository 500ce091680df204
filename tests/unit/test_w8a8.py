"""A model whose prefills round activations to int8: which products do, that the GPU's kernels give what the definition
gives, and that a token is rounded alone, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from test_gpu_decode import make, reference, tokens  # noqa: F401

pytest.importorskip("triton")
from model import load_model
from model.w8a8 import SITES, W8A8MLP, W8A8Experts, W8A8Linear, round_activations
from tests.numeric import assert_close

RATIO = 2e-2  # bfloat16; what lies between two whole numbers may go either way


def rounded(model, sites=SITES):
    round_activations(model, sites)
    return model


@pytest.mark.parametrize("site", SITES)
def test_sites_are_where_their_names_say(make, site):  # noqa: F811
    names = {
        name.split(".", 1)[1] for name, module in rounded(make(), [site]).layers.named_modules()
        if isinstance(module, W8A8Linear | W8A8MLP | W8A8Experts)
    }  # fmt: skip
    expected = {
        **{"mamba_in": {"mamba.in_proj"}, "mamba_out": {"mamba.out_proj"}, "attention_out": {"self_attn.o_proj"}},
        **{"attention_in": {f"self_attn.{x}_proj" for x in "qkv"}},
        **{"mlp": {"feed_forward"}, "experts": {"feed_forward.experts"}},
    }
    assert names == expected[site]


def test_unknown_sites_and_models_that_are_not_int8_are_refused(make):  # noqa: F811
    with pytest.raises(ValueError, match="no site head"):
        round_activations(make(), ["head"])
    with pytest.raises(ValueError, match="quantize='int8'"):
        round_activations(make(quantize=None))


@torch.no_grad()
@pytest.mark.parametrize("experts", [4, 1])
def test_the_modules_give_what_the_definition_gives(make, experts):  # noqa: F811
    """By Triton in bfloat16, against the same weights in float32 on the CPU."""
    model = rounded(make(num_experts=experts, num_experts_per_tok=min(2, experts)))
    exact = reference(model)
    x = torch.randn(70, 256, generator=torch.Generator().manual_seed(experts)).bfloat16()
    for name in ("layers.0.mamba.in_proj", "layers.1.self_attn.o_proj", "layers.3.feed_forward"):
        ours = model.get_submodule(name)(x.to(model.lm_head.weight.device))
        assert_close(name, ours.cpu(), exact.get_submodule(name)(x.float()), RATIO)


@torch.no_grad()
def test_only_many_tokens_are_rounded_and_each_alone(tiny_jamba_dir):
    plain, model = load_model(tiny_jamba_dir, quantize="int8"), rounded(load_model(tiny_jamba_dir, quantize="int8"))
    ids = tokens(1, 150)
    assert torch.equal(plain(ids[:, :64]), model(ids[:, :64]))
    assert not torch.equal(plain(ids), model(ids))
    state = model.new_state()
    pieces = [model.forward_packed(ids[0, a:b], [b - a], [state], logits="all") for a, b in ((0, 70), (70, 150))]
    assert_close("logits", torch.cat(pieces), model(ids)[0], 1e-5)
