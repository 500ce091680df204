"""Checkpoints in every layout and number format, whole and damaged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import JambaForCausalLM

from model import Jamba, UnsupportedWeights, convert_checkpoint, load_model
from model.int4 import pack_int4, unpack_int4
from model.int8 import Int8Experts, Int8Linear, int8_linear, quantize_rows
from tests.conftest import WriteJamba
from tests.numeric import assert_close

WIDE = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 300}  # wide enough for groups of 64


@pytest.fixture(scope="module")
def wide_jamba_dir(write_jamba: WriteJamba, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide-jamba")
    write_jamba(path, **WIDE)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def copied_dir(tiny_jamba_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(tiny_jamba_dir, tmp_path / "copied"))


def logits_of(model: Jamba | Path, **options: object) -> Tensor:
    model = load_model(model, **options) if isinstance(model, Path) else model
    with torch.no_grad():
        return model(torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(5)))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("fused", [False, True])
def test_sharded_checkpoints_equal_single_files(write_jamba: WriteJamba, tmp_path: Path, fused: bool) -> None:
    write_jamba(tmp_path / "one")
    write_jamba(tmp_path / "many", save={"max_shard_size": "20KB", "save_original_format": not fused})
    weight_map = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 5
    assert any(name.endswith("experts.gate_up_proj") for name in weight_map) == fused
    assert torch.equal(logits_of(tmp_path / "many"), logits_of(tmp_path / "one"))


def test_every_misfit_is_named_at_once(copied_dir: Path) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.3.feed_forward.experts.2.up_proj.weight"]
        del tensors["model.layers.0.mamba.A_log"]
        tensors["model.layers.9.mamba.D"] = torch.ones(64)
        tensors["model.layers.0.mamba.D"] = torch.ones(63)

    with pytest.raises(UnsupportedWeights) as error:
        load_model(change_tensors(copied_dir, damage))
    for part in (
        "missing model.layers.3.feed_forward.experts.2.up_proj.weight;",
        "missing model.layers.0.mamba.A_log;",
        "unknown model.layers.9.mamba.D;",
        "model.layers.0.mamba.D is (63,), config.json says (64,)",
    ):
        assert part in str(error.value)


def test_a_damaged_file_is_named(copied_dir: Path) -> None:
    file = copied_dir / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UnsupportedWeights, match=r"model\.safetensors cannot be read"):
        load_model(copied_dir)
    file.unlink()
    with pytest.raises(UnsupportedWeights, match=r"holds neither model\.safetensors nor"):
        load_model(copied_dir)
    (copied_dir / "config.json").write_text("{")
    with pytest.raises(UnsupportedWeights, match=r"config\.json cannot be read"):
        load_model(copied_dir)
    (copied_dir / "config.json").write_text("null")
    with pytest.raises(UnsupportedWeights, match=r"config\.json holds no JSON object"):
        load_model(copied_dir)
    (copied_dir / "config.json").unlink()
    with pytest.raises(UnsupportedWeights) as error:
        load_model(copied_dir)
    assert str(error.value) == f"{copied_dir} holds no config.json: not a checkpoint of Hugging Face"


def test_a_missing_shard_is_named(write_jamba: WriteJamba, tmp_path: Path) -> None:
    write_jamba(tmp_path, save={"max_shard_size": "20KB"})
    shard = sorted(tmp_path.glob("model-*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(UnsupportedWeights, match=shard.name):
        load_model(tmp_path)


def test_an_index_stays_in_its_directory(copied_dir: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../other/model.safetensors"}}
    (copied_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedWeights, match="points out of its directory"):
        load_model(copied_dir)


def test_unknown_number_formats_are_refused(copied_dir: Path) -> None:
    change_tensors(
        copied_dir, lambda tensors: tensors.update({"lm_head.weight": torch.ones(512, 32, dtype=torch.int64)})
    )
    with pytest.raises(UnsupportedWeights, match=r"lm_head\.weight is I64"):
        load_model(copied_dir)
    change_tensors(
        copied_dir, lambda tensors: tensors.update({"lm_head.weight": torch.ones(512, 32, dtype=torch.int8)})
    )
    with pytest.raises(UnsupportedWeights, match=r"lm_head\.weight is quantized but lm_head\.weight\.scale is missing"):
        load_model(copied_dir)
    config = json.loads((copied_dir / "config.json").read_text())
    (copied_dir / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedWeights, match="quantized by 'gptq'"):
        load_model(copied_dir)
    with pytest.raises(ValueError, match="quantize is 'int3'"):
        load_model(copied_dir, quantize="int3")


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(write_jamba: WriteJamba, tmp_path: Path) -> None:
    write_jamba(tmp_path, tie_word_embeddings=True)
    expected = logits_of(tmp_path)
    change_tensors(tmp_path, lambda ts: ts.update({"lm_head.weight": ts["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits_of(tmp_path), expected)
    change_tensors(tmp_path, lambda ts: ts.update({"lm_head.weight": ts["lm_head.weight"] + 1}))
    with pytest.raises(UnsupportedWeights, match=r"lm_head\.weight is tied"):
        load_model(tmp_path)


@pytest.mark.parametrize("quantize", [None, "int8", "w8a8"])
@pytest.mark.usefixtures("w8a8_anywhere")
def test_a_loaded_model_needs_no_files(write_jamba: WriteJamba, tmp_path: Path, quantize: str | None) -> None:
    write_jamba(tmp_path / "float", tie_word_embeddings=True, **WIDE)
    convert_checkpoint(tmp_path / "float", tmp_path / "int4", to="int4")
    model = load_model(tmp_path / "int4", quantize=quantize)
    expected = logits_of(model)
    for file in (tmp_path / "int4").glob("*.safetensors"):
        with file.open("r+b") as stored:  # the same file, not a new one
            stored.write(bytes(file.stat().st_size))
    assert torch.equal(logits_of(model), expected)


def test_the_recurrence_stays_float32(tiny_jamba_dir: Path) -> None:
    for quantize in (None, "int8"):
        model = load_model(tiny_jamba_dir, dtype=torch.bfloat16, quantize=quantize)
        narrow = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
        assert not narrow & {"A_log", "D", "scale", "gate_up_scale", "down_scale"}


def test_int8_holds_what_it_should(tiny_jamba_dir: Path) -> None:
    model = load_model(tiny_jamba_dir, quantize="int8")
    float32 = {
        re.sub(r"layers\.\d+\.", "", name)
        for name, parameter in model.named_parameters()
        if parameter.dtype == torch.float32 and parameter.ndim > 1
    }
    assert float32 == {
        "embed_tokens.weight",
        "mamba.A_log",
        "mamba.conv1d.weight",
        "mamba.dt_proj.weight",
        "feed_forward.router.weight",
        "feed_forward.experts.gate_up_scale",
        "feed_forward.experts.down_scale",
    }
    kinds = {type(module) for module in model.modules()}
    assert {Int8Linear, Int8Experts} <= kinds
    assert_close("logits", logits_of(model), logits_of(load_model(tiny_jamba_dir)), ratio=0.1)


@pytest.mark.parametrize("rows", [1, 3, 70])
def test_int8_linear_is_the_product_with_what_was_rounded(rows: int) -> None:
    weight, x, bias = torch.randn(33, 70), torch.randn(rows, 70), torch.randn(33)
    q, scale = quantize_rows(weight)
    rounded = q * scale[:, None]
    assert (rounded - weight).abs().max() <= (weight.abs().amax(1) / 254).max() * 1.001
    for own_bias in (None, bias):
        expected = torch.nn.functional.linear(x, rounded, own_bias)
        assert_close("float32", int8_linear(x, q, scale, own_bias), expected, ratio=2e-6)
        low = int8_linear(x.bfloat16(), q, scale, None if own_bias is None else own_bias.bfloat16())
        assert low.dtype == torch.bfloat16
        assert_close("bfloat16", low, expected, ratio=2e-2)


def test_rows_of_zeros_can_be_quantized() -> None:
    for pack, unpack in ((quantize_rows, lambda q, scale: q * scale[:, None]), (pack_int4, unpack_int4)):
        assert not unpack(*pack(torch.zeros(3, 64))).any()


def test_int4_layout_is_as_documented() -> None:
    weight = torch.randn(5, 192)
    packed, scales = pack_int4(weight)
    assert (packed.dtype, packed.shape, scales.dtype, scales.shape) == (torch.uint8, (5, 96), torch.float16, (5, 3))
    low, high = (packed & 15).int() - 8, (packed >> 4).int() - 8
    unpacked = unpack_int4(packed, scales)
    assert unpacked[2, 130] == low[2, 65] * scales[2, 2].float()
    assert unpacked[2, 131] == high[2, 65] * scales[2, 2].float()
    steps = weight / scales.float().repeat_interleave(64, dim=1)
    held = (unpacked / scales.float().repeat_interleave(64, dim=1)).round()
    assert ((held - steps.clamp(max=7)).abs() <= 0.51).all()
    assert (steps.unflatten(1, (-1, 64)).amin(-1).round() == -8).all()


@pytest.mark.parametrize("to", ["fp32", "bf16"])
def test_float_conversions_load_in_transformers(wide_jamba_dir: Path, tmp_path: Path, to: str) -> None:
    convert_checkpoint(wide_jamba_dir, tmp_path / "out", to=to, max_shard_bytes=200_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    theirs = JambaForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager", dtype=torch.float32)
    tokens = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = theirs.eval()(tokens, use_cache=False).logits
    assert_close("logits", logits_of(tmp_path / "out"), expected, ratio=1e-5)


def test_int8_storage_is_int8_loading(wide_jamba_dir: Path, tmp_path: Path) -> None:
    convert_checkpoint(wide_jamba_dir, tmp_path / "out", to="int8")
    expected = logits_of(wide_jamba_dir, quantize="int8")
    assert torch.equal(logits_of(tmp_path / "out", quantize="int8"), expected)
    assert_close("expanded", logits_of(tmp_path / "out"), expected, ratio=1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization_config"] == {
        "quant_method": "jamba_rag_int8"
    }


def test_int4_storage_is_small_and_near(wide_jamba_dir: Path, tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    convert_checkpoint(wide_jamba_dir, tmp_path / "out", "int4", lambda *now: done.append(now), max_shard_bytes=100_000)
    assert [at for at, _ in done] == list(range(1, len(done) + 1)) and done[-1][0] == done[-1][1]
    sizes = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert sum(sizes) < 0.25 * (wide_jamba_dir / "model.safetensors").stat().st_size
    assert max(sizes) < 100_000 + 10_000  # the header comes on top
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    model = load_model(tmp_path / "out")
    original = load_model(wide_jamba_dir)
    for (name, rounded), weight in zip(model.named_parameters(), original.parameters(), strict=True):
        assert_close(name, rounded, weight, ratio=0.15)
    assert_close("int8 from int4", logits_of(tmp_path / "out", quantize="int8"), logits_of(model), ratio=0.1)


def test_conversion_refuses_bad_arguments(wide_jamba_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="already there"):
        convert_checkpoint(wide_jamba_dir, tmp_path)
    with pytest.raises(ValueError, match="to is 'int3'"):
        convert_checkpoint(wide_jamba_dir, tmp_path / "out", to="int3")
