"""Random models for benchmarks: sound numbers through all layers; and the benchmarks themselves on a small shape."""

import json

import pytest
import torch

from bench import compare_paper, gpu, runs
from bench.random_weights import random_model
from bench.shapes import SHAPES, prefill_flop, resident_bytes, state_bytes
from model.int8 import swap_linears
from model.jamba import Jamba
from model.state import StateLayout


@pytest.mark.parametrize("name", ["small-test", "small-attention", "jamba-small"])
def test_activations_stay_finite_and_every_expert_works(name):
    model = random_model(SHAPES[name])
    model.collect_router_stats = True
    tokens = torch.randint(0, SHAPES[name].vocab_size, (1, 128), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        states = []
        hooks = [layer.register_forward_hook(lambda *args: states.append(args[2].std())) for layer in model.layers]
        logits = model(tokens, model.new_state())
    for hook in hooks:
        hook.remove()
    assert logits.isfinite().all() and logits.std() > 0.01
    assert len(states) == len(model.layers) and all(0.03 < std < 4 for std in states)
    share = model.expert_utilisation() * SHAPES[name].num_experts
    assert share.min() > 0.5 and share.max() < 1.7


def test_the_same_seed_gives_the_same_weights():
    first, again, other = (random_model(SHAPES["small-test"], seed=seed) for seed in (4, 4, 5))
    for ours, theirs in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(first.layers[0].mamba.in_proj.weight, other.layers[0].mamba.in_proj.weight)


def test_the_published_sizes():
    """Of the paper: 52B weights, 12B active, 4 GB of KV at 256K against Mixtral's 32 GB."""
    layouts = {name: StateLayout.of(SHAPES[name], torch.bfloat16) for name in ("jamba-52b", "mixtral-8x7b")}
    kv = {name: state_bytes(layout, 262_144) - state_bytes(layout, 0) for name, layout in layouts.items()}
    assert kv == {"jamba-52b": 4 << 30, "mixtral-8x7b": 32 << 30}
    config = SHAPES["jamba-52b"]
    with torch.device("meta"):
        model = Jamba(config)
        assert sum(weight.numel() for weight in model.parameters()) == 51_570_323_328
    swap_linears(model)
    assert resident_bytes(model.bfloat16()) < 49 << 30
    assert 2 * 11.5e9 < prefill_flop(config, 0, 1024) / 1024 < 2 * 12e9


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_ROOT", tmp_path)
    monkeypatch.setattr(runs, "_RESULTS", tmp_path)
    return lambda name: json.loads(next(tmp_path.glob(f"{name}-*.json")).read_text())["rows"]


def test_the_gpu_benchmark_runs_every_section_on_a_small_shape(results, capsys):
    gpu.main(["--shape", "small-test", "--device", "cpu", "--limit-s", "60"])
    assert "error" not in capsys.readouterr().out
    sizes = gpu.SMALL_SIZES
    assert [row["tokens"] for row in results("gpu-prefill")] == list(sizes.prefill)
    assert [row["context"] for row in results("gpu-decode")] == list(sizes.decode)
    assert [(row["context"], row["batch"]) for row in results("gpu-batch")] == list(sizes.batches)
    assert [row["by"] for row in results("gpu-first-token")] == ["model", "engine"]
    assert {row["what"] for row in results("gpu-profile")} == {
        "prefill of 64",
        "16 tokens behind 48",
        "decode step",
    }
    assert results("gpu-sharing")[0]["prefill_s"] > 0
    assert len(results("gpu-copy")) == 2 and len(results("gpu-memory")) == 1


def test_a_section_that_fails_or_takes_too_long_leaves_the_others(results, monkeypatch):
    def fail(bench, run):
        run.add(first=1)
        raise torch.OutOfMemoryError("no more\nof it")

    def hang(bench, run):
        while True:
            pass

    monkeypatch.setitem(gpu.SECTIONS, "decode", fail)
    monkeypatch.setitem(gpu.SECTIONS, "batch", hang)
    gpu.main(["--shape", "small-test", "--device", "cpu", "--limit-s", "0.2", "--sections", "decode,batch,copy"])
    assert results("gpu-decode") == [{"first": 1}, {"error": "OutOfMemoryError: no more"}]
    assert results("gpu-batch") == [{"error": "Overtime: stopped after 0.2 s"}]
    assert len(results("gpu-copy")) == 2


def test_the_paper_s_comparison_runs_on_small_shapes(results):
    options = "--shapes small-test,small-attention --device cpu --loads 100x3,300x1 --out 4 --segment 64"
    compare_paper.main([*options.split(), "--state-max-bytes", "2000000"])
    ours, theirs, ratio = results("compare-paper")
    assert ours["tried_tokens"] == ours["fits_tokens"] > 4 * theirs["fits_tokens"]
    assert ratio["kv_at_256k_gib"] == 1 / 8
    assert all(row["100x3_tok_per_s"] > 0 and row["300x1_tok_per_s"] > 0 for row in (ours, theirs))


def test_the_comparison_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"shape": "ours", "kv_at_256k_gib": 4.0, "fits_tokens": 1_500_000, "8x1_tok_per_s": 100.0}
    compare_paper.draw([row, row | {"shape": "theirs", "8x1_tok_per_s": None}], tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").stat().st_size > 5000
