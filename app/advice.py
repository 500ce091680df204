"""The settings that a checkpoint advises for itself: `jamba_rag` in its generation_config.json.

They were measured for the checkpoint (see its MODEL_CARD.md) and are stored with it; explicit settings override them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from app.setting_groups import AnswerSettings


@dataclass(frozen=True)
class Advice:
    """`auto_evidence_tokens` None: whole documents up to the whole context. `recent_evidence_tokens` None: twice
    `rag_evidence_tokens`. `none_margin`: refuse above it, in nats. `quote_beginnings`: number of candidate quotes.
    `read_apart`: each passage of `rag` evidence has its own prompt, and the likeliest one gives the answer.
    `ask_back`: weight of log P(question | quote) beside log P(quote | question), for nearly equally likely quotes;
    `verdict`: weight of log P(the quote answers the question) there, and when it is subtracted from the margin.
    `missing_words_nats`: added to the margin in proportion to the question's words that are not in the evidence."""

    auto_evidence_tokens: int | None = None
    rag_evidence_tokens: int = 4096
    none_margin: float = 0.0
    recent_evidence_tokens: int | None = None
    quote_beginnings: int = 1
    read_apart: bool = False
    ask_back: float = 0.0
    verdict: float = 0.0
    missing_words_nats: float = 0.0


def take_advice(checkpoint: Path, settings: AnswerSettings) -> Advice:
    """The values for this deployment. Raises ValueError if the checkpoint advises an unknown setting."""
    path = checkpoint / "generation_config.json"
    advised = json.loads(path.read_text(encoding="utf-8")).get("jamba_rag", {}) if path.is_file() else {}
    names = Advice.__dataclass_fields__.keys()
    if unknown := sorted(advised.keys() - names):
        raise ValueError(f"{path}: jamba_rag holds {', '.join(unknown)}; known are {', '.join(names)}")
    given = {name: value for name in names if (value := getattr(settings, name)) is not None}
    return Advice(**{**advised, **given})
