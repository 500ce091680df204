"""The loops of tuning and of distilling run from their command lines to what they save, a small model and few rows."""

import json
import multiprocessing

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import IterableDataset

from app.setting_groups import SHIPPED_CHECKPOINT
from model.config import JambaConfig
from model.jamba import Jamba
from model.train import distill, surgery, tune
from model.train.data import ANSWER, QUESTION, RUNNING

SMALL = {"vocab_size": 64, "hidden_size": 72, "intermediate_size": 64, "num_hidden_layers": 4, "mamba_dt_rank": 4}
SMALL |= {"num_attention_heads": 9, "num_key_value_heads": 3, "attn_layer_offset": 0}


class FewRows(IterableDataset):
    """Steps of two rows of questions and, where text is asked for, one of running text."""

    def __init__(self, args, cluster) -> None:
        self.text, self.progress = bool(args.text_tokens), multiprocessing.Value("d", 0.0)

    def __iter__(self):
        while True:
            rows, kinds = torch.randint(64, (2 + self.text, 17)), torch.zeros(2 + self.text, 17)
            kinds[:2, 5:9], kinds[:2, 9:12], kinds[2:] = QUESTION, ANSWER, RUNNING
            query = torch.tensor([[8.0, 1, 4, 1]]).repeat(2, 1, 1)
            yield rows, kinds, query, query


def small(period: int, experts: int) -> Jamba:
    torch.manual_seed(0)
    shape = SMALL | {"attn_layer_period": period, "num_experts": experts, "num_experts_per_tok": 1}
    return Jamba(JambaConfig(**(surgery.BASE | shape)))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Calls a stage's main with options; returns the folder it writes to."""
    for module in (tune, distill):
        monkeypatch.setattr(module, "build_teacher", lambda gguf: small(1, 1))
        monkeypatch.setattr(module, "Steps", FewRows)
    monkeypatch.setattr(distill, "build_student", lambda teacher: small(2, 2))
    monkeypatch.setattr(distill, "TAPS", (1, 3))
    monkeypatch.setattr(distill, "FINDING", 2)
    monkeypatch.setattr(distill, "COPYING", 2)
    monkeypatch.setattr("model.train.evaluate.load_items", lambda *_: [])
    out = tmp_path / "run"
    given = {"tokenizer": SHIPPED_CHECKPOINT, "out": out}
    given |= dict.fromkeys(("gguf", "corpora", "pairs", "items"), tmp_path)

    def call(main, **options):
        options = given | {"seconds": 1, "workers": 1} | options
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        monkeypatch.setattr("sys.argv", ["stage", *words])
        main()
        return out

    return call


def test_what_is_tuned_is_saved_and_taken_up_as_teacher(run, tmp_path, monkeypatch):
    out = run(tune.main)
    begun = json.loads((out / "tune.jsonl").read_text().splitlines()[0])
    assert begun["stage"] == "tune" and begun["answer"] > 0
    assert set(load_file(out / "tuned.safetensors")) == {name for name, _ in small(1, 1).named_parameters()}
    options = {"tokens": tmp_path, "tuned": out / "tuned.safetensors", "rope_until": 0, "quant_from": 2}
    taken_up, load_into = [], distill.load_into
    monkeypatch.setattr(distill, "load_into", lambda model, path: (taken_up.append(path), load_into(model, path)))
    run(distill.main, **options)
    assert taken_up == [out / "tuned.safetensors"]
    lines = [json.loads(line) for line in (out / "distill.jsonl").read_text().splitlines()]
    assert lines[0]["stage"] == "distill"
    assert all(lines[0][name] > 0 for name in ("kl", "ce", "hidden", "answer", "kl_qa", "find", "copy"))
    assert set(load_file(out / "distill.safetensors")) == {name for name, _ in small(2, 2).named_parameters()}
