"""The reader: its formats as the gguf package reads them, its tree of keys as one row of tokens each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from tokenizers import Tokenizer, models
from transformers import Qwen2Config, Qwen2ForCausalLM

from model.train.reader import SPECIAL, Reader, ReaderConfig, dequantize
from model.train.smollm2 import NAMES


@pytest.mark.parametrize(("kind", "size"), [("Q4_K", 144), ("Q6_K", 210)])
def test_formats_are_read_as_the_gguf_package_reads_them(kind: str, size: int) -> None:
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (3, 4 * size), dtype=np.uint8).reshape(3, 4, size)
    for at in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:
        raw[..., at : at + 2] = rng.normal(size=(3, 4, 1)).astype(np.float16).view(np.uint8)
    raw = raw.reshape(3, -1)
    expected = quants.dequantize(raw, GGMLQuantizationType[kind])
    torch.testing.assert_close(dequantize(torch.from_numpy(raw), kind), torch.from_numpy(expected), rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def original() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True, rope_theta=1e4,
                         rms_norm_eps=1e-6, attn_implementation="eager")  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4 if parameter.ndim > 1 else 1.0)
    return model


def reader_of(model: Qwen2ForCausalLM) -> Reader:
    given = dict(model.model.named_parameters())
    weights = {"output.weight": given["embed_tokens.weight"].data, "output_norm.weight": given["norm.weight"].data}
    for i in range(model.config.num_hidden_layers):
        for ours, theirs in NAMES.items():
            weights[f"blk.{i}.{ours}.weight"] = given[f"layers.{i}.{theirs}.weight"].data
        for x in "qkv":
            weights[f"blk.{i}.attn_{x}.bias"] = given[f"layers.{i}.self_attn.{x}_proj.bias"].data
    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(62)}, unk_token="0"))
    tokenizer.add_special_tokens(list(SPECIAL))
    theta = model.config.rope_parameters["rope_theta"]
    return Reader(weights, tokenizer, ReaderConfig(layers=3, heads=4, kv_heads=2, rope_theta=theta))


def test_each_task_goes_on_as_if_it_stood_alone_behind_its_passage(original: Qwen2ForCausalLM) -> None:
    reader, rng = reader_of(original), np.random.default_rng(5)
    prefix = rng.integers(0, 60, 7).tolist()
    passages = [rng.integers(0, 60, n).tolist() for n in (9, 4, 6)]
    tasks = [[rng.integers(0, 60, n).tolist() for n in row] for row in ((3, 1), (2, 5), (4, 4))]
    reader.start(prefix)
    reader.read(passages, padded=10)
    ended: list[bool] = []
    for _ in range(2):  # its tensors are used again
        said = reader.generate(tasks, padded=6, most=12)
        for passage, row, answers in zip(passages, tasks, said, strict=True):
            for task, (answer, log_p) in zip(row, answers, strict=True):
                ids = torch.tensor([prefix + passage + task])
                with torch.no_grad():
                    whole = original.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                                              do_sample=False, eos_token_id=reader.stop, pad_token_id=0)  # fmt: skip
                expected = whole[0, ids.shape[1] :].tolist()
                assert answer == (expected[: expected.index(reader.stop)] if reader.stop in expected else expected)
                with torch.no_grad():
                    logits = original(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
                likely = logits.gather(1, whole[0, ids.shape[1] :, None]).sum().item()
                assert log_p == pytest.approx(likely if reader.stop in expected else float("-inf"), abs=1e-4)
                ended.append(reader.stop in expected)
    assert set(ended) == {True, False}
