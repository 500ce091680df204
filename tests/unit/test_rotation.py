"""A checkpoint with its residual stream turned: the same function, and activations that round well."""

import pytest
import torch

from model import convert_checkpoint, load_model
from model.rotation import Rotation
from tests.numeric import assert_close


@pytest.mark.parametrize(
    ("d", "sizes"), [(1, [1]), (8, [8]), (48, [3, 16]), (576, [9, 64]), (97, [97]), (512, [16, 32]), (4096, [64, 64])]
)
def test_rotation_keeps_lengths_and_spreads_one_place_over_all(d, sizes):
    turn = Rotation(d)
    assert turn.sizes == sizes
    rows = torch.eye(d)[:600]
    turned = turn(rows)
    products = turned.double() @ turned.double().T
    assert_close("products", products, torch.eye(len(rows)), 1e-6)
    assert torch.equal(turned, Rotation(d)(rows))
    assert turned.abs().max() <= 4 * d**-0.5


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "mamba_proj_bias": True},
        {"num_experts": 1, "hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5},
    ],
)
def test_turned_checkpoint_computes_the_same(write_jamba, tmp_path, changes):
    source, target = tmp_path / "source", tmp_path / "target"
    write_jamba(source, **changes)
    convert_checkpoint(source, target, to="fp32", rotate=True)
    ids = torch.randint(1, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    plain, turned = load_model(source), load_model(target)
    assert_close("logits", turned(ids), plain(ids), 1e-5)
    embeddings = [model.embed_tokens.weight for model in (plain, turned)]
    assert (embeddings[0] - embeddings[1]).abs().max() > 1e-3
    assert not turned.config.tie_word_embeddings and torch.all(turned.final_layernorm.weight == 1)
