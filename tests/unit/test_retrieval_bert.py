"""BERT out of PyTorch's layers computes what that of `transformers` does from the same checkpoint, but for rounding."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from retrieval.bert import Bert, UnsupportedBert, load_bert
from retrieval.embedder import TUNED, BertEmbedder, EmbedderUnavailable, wheel_model_dir
from retrieval.rerank import ADAPTER

CPU = torch.device("cpu")
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 80}


def write_bert(path: Path, **fields: object) -> transformers.BertModel:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=97, max_position_embeddings=50, **SIZES | fields)
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(path)
    return model


def make_batch(tokens: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and kinds of five texts; all but the first are padded, the last to one token."""
    draw = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, vocab_size, (5, tokens), generator=draw)
    lengths = torch.tensor([tokens, tokens - 1, tokens // 2, tokens // 3, 1]).clamp(min=1)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return ids, mask, torch.randint(0, 2, (5, tokens), generator=draw)


def unit_vectors(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of each row the mean over its tokens, of length 1, as an embedder has it: (b, d) float32."""
    weights = mask[:, :, None].float()
    return F.normalize((states.float() * weights).sum(1) / weights.sum(1), dim=-1)


def assert_same_vectors(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Unit vectors, the expected ones in float32."""
    assert got.shape == expected.shape
    if dtype == torch.float32:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    else:
        assert float((got * expected).sum(-1).min()) >= 0.9995


def assert_agrees(ours: Bert, theirs: transformers.BertModel, tokens: int, vocab_size: int = 97) -> None:
    """`theirs` is in float32. Of float32 each token's state is compared, too."""
    ids, mask, kinds = make_batch(tokens, vocab_size)
    dtype = ours.dtype
    with torch.inference_mode():
        for rows, named in ((slice(None), {}), (slice(None), {"token_type_ids": kinds}), (slice(1), {})):
            expected = theirs(input_ids=ids[rows], attention_mask=mask[rows], **named).last_hidden_state
            got = ours(ids[rows], mask[rows], named.get("token_type_ids"))
            assert got.dtype == dtype
            assert_same_vectors(unit_vectors(got, mask[rows]), unit_vectors(expected, mask[rows]), dtype)
            if dtype == torch.float32:
                there = mask[rows].bool()
                assert_same_vectors(F.normalize(got[there], dim=-1), F.normalize(expected[there], dim=-1), dtype)


@pytest.mark.parametrize("tokens", [1, 7, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_as_the_library(tmp_path, dtype, tokens):
    theirs = write_bert(tmp_path)
    assert_agrees(load_bert(tmp_path, {}, CPU, dtype), theirs, tokens)


@pytest.mark.parametrize(
    "fields", [{"hidden_act": "relu"}, {"hidden_act": "silu"}, {"hidden_act": "gelu_new"}, {"layer_norm_eps": 0.1}]
)
def test_what_config_json_says_is_done(tmp_path, fields):
    theirs = write_bert(tmp_path, **fields)
    assert_agrees(load_bert(tmp_path, {}, CPU, torch.float32), theirs, 19)


@pytest.mark.parametrize("adapter", [None, TUNED, ADAPTER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_shipped_weights_give_the_same(adapter, dtype):
    updates = load_file(adapter) if adapter else {}
    theirs = transformers.BertModel.from_pretrained(wheel_model_dir(), add_pooling_layer=False).eval()
    for name, weight in theirs.named_parameters():
        if f"{name}.A" in updates:
            weight.data += updates[f"{name}.B"].float() @ updates[f"{name}.A"].float()
    assert_agrees(load_bert(wheel_model_dir(), updates, CPU, dtype), theirs, 61, vocab_size=30_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_no_other_and_on_no_padding(dtype):
    """But for rounding: products of other shapes are summed in another order. On what is in the padding, not at all."""
    model = load_bert(wheel_model_dir(), load_file(TUNED), CPU, dtype)
    ids, mask, kinds = make_batch(61, 30_000)
    with torch.inference_mode():
        together = model(ids, mask, kinds)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = (tensor[row : row + 1, :length] for tensor in (ids, mask, kinds))
            got = unit_vectors(model(*alone), mask[row : row + 1, :length])
            assert_same_vectors(got, unit_vectors(together, mask)[row : row + 1], dtype)
        there = mask.bool()
        other = torch.where(there, ids, 30_000 - ids)
        assert torch.equal(model(other, mask, kinds)[there], together[there])


def test_the_first_files_of_bert_lack_two_fields(tmp_path):
    theirs = write_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("hidden_act", "layer_norm_eps"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_agrees(load_bert(tmp_path, {}, CPU, torch.float32), theirs, 19)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "swish7"}, "hidden_act is 'swish7', not one of gelu"),
        ({"is_decoder": True}, "a decoder"),
        ({"num_attention_heads": 5}, "hidden_size 48 cannot be shared out among 5"),
        ({"num_attention_heads": None, "vocab_size": None}, "lacks vocab_size, num_attention_heads"),
    ],
)
def test_what_cannot_be_computed_is_refused(tmp_path, change, message):
    write_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(UnsupportedBert, match=message):
        load_bert(tmp_path, {}, CPU, torch.float32)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Pooling"}]')
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    with pytest.raises(EmbedderUnavailable, match=message):
        BertEmbedder(tmp_path)


def test_a_service_that_searches_imports_no_other_framework():
    """Seconds of CPU that a first question waited for; in a process of its own."""
    script = """
import sys
import app.main
from retrieval.embedder import MiniLMEmbedder
from retrieval.rerank import MiniLMReranker
print(MiniLMEmbedder().embed_query("x").shape, MiniLMReranker().score("x", ["y", "z"]).shape)
print([name for name in ("transformers", "sentence_transformers", "torch._dynamo", "sympy") if name in sys.modules])
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.stdout, ended.stderr) == ("(384,) (2,)\n[]\n", "")


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_one_operation_gives_the_bits_of_the_layers_for_any_sizes(tmp_path, heads):
    """What is traced for two rows of two tokens must hold for all others."""
    write_bert(tmp_path, num_attention_heads=heads)
    model = load_bert(tmp_path, {}, CPU, torch.float32)
    for rows, tokens in ((1, 1), (1, 9), (3, 2), (5, 50)):
        ids, mask, kinds = (tensor[:rows] for tensor in make_batch(tokens, 97))
        with torch.inference_mode():
            whole, padded = torch.ones_like(mask), mask == 0
            assert torch.equal(model(ids, whole, kinds), model.layers(ids, kinds))
            if padded.any():
                assert torch.equal(model(ids, mask, kinds), model.layers(ids, kinds, padded))


def test_several_threads_at_once_get_what_one_gets():
    model = load_bert(wheel_model_dir(), {}, CPU, torch.float32)
    batches = [make_batch(tokens, 30_000) for tokens in (3, 9, 17, 31)]

    def compute(batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            return model(*batch)

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(compute, 3 * batches))
    for batch, got in zip(3 * batches, together, strict=True):
        assert torch.equal(got, compute(batch))


def test_many_can_be_loaded_at_once(tmp_path):
    """As embedder and reranker are when the service starts: nothing PyTorch has once for all threads gets mixed up."""
    theirs = write_bert(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load_bert(tmp_path, {}, CPU, torch.float32), range(24)))
    assert torch.jit._trace._trace_module_map is None, "of a trace that another one began in"
    for bert in loaded:
        assert_agrees(bert, theirs, 7)
