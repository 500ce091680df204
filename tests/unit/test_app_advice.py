"""What a checkpoint advises holds until a setting says otherwise."""

import json
import shutil

import pytest
from app_kit import make_settings, running_service

from app.advice import Advice, take_advice
from app.setting_groups import AnswerSettings


def write(folder, **advice):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "jamba_rag": advice}))
    return folder


def test_a_checkpoint_without_advice_is_asked_with_the_defaults(tmp_path):
    assert take_advice(tmp_path, AnswerSettings()) == Advice()


def test_settings_come_before_the_checkpoint(tmp_path):
    checkpoint = write(tmp_path, rag_evidence_tokens=300, none_margin=-0.5)
    assert take_advice(checkpoint, AnswerSettings()) == Advice(None, 300, -0.5)
    assert take_advice(checkpoint, AnswerSettings(none_margin=2.0)) == Advice(None, 300, 2.0)
    assert take_advice(checkpoint, AnswerSettings(none_margin=0.0)).none_margin == 0.0


def test_unknown_advice_is_named(tmp_path):
    with pytest.raises(ValueError, match="evidence_words; known are"):
        take_advice(write(tmp_path, evidence_words=3), AnswerSettings())


@pytest.mark.anyio
async def test_what_is_in_effect_is_shown(tiny_checkpoint, tmp_path):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    write(checkpoint, rag_evidence_tokens=300, none_margin=-0.5)
    settings = make_settings(checkpoint, tmp_path / "data", answers={"none_margin": 2.0})
    async with running_service(settings) as client:
        config = (await client.get("/v1/config")).json()
    model, shown = config["model"], config["answers"]
    assert "auto" not in model.values() and model["dtype"] in ("float32", "bfloat16")
    assert (shown["rag_evidence_tokens"], shown["none_margin"], shown["quote_beginnings"]) == (300, 2.0, 1)
