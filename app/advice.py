"""What a checkpoint says about how it is best asked: `jamba_rag` in its generation_config.json.

Measured for the checkpoint (its MODEL_CARD.md says how) and so kept with it; a setting that is given comes first.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from app.setting_groups import AnswerSettings


@dataclass(frozen=True)
class Advice:
    """`auto_evidence_tokens` None: whole documents as far as the context reaches. `recent_evidence_tokens` None: twice
    `rag_evidence_tokens`. `none_margin` in nats. `quote_beginnings`: of so many the likeliest quote is taken.
    `read_apart`: each passage of `rag` evidence is read alone, and the likeliest one is answered from.
    `ask_back`: weight of log P(question | quote) beside log P(quote | question), for quotes that are nearly as likely;
    `verdict`: weight of log P(the quote answers the question), there and, taken from it, in none's margin.
    `missing_words_nats`: added to none's margin when no word of the question was read, a share of it for a share."""

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
    """What holds for this deployment. Raises ValueError when the checkpoint advises on something unknown."""
    path = checkpoint / "generation_config.json"
    advised = json.loads(path.read_text(encoding="utf-8")).get("jamba_rag", {}) if path.is_file() else {}
    names = Advice.__dataclass_fields__.keys()
    if unknown := sorted(advised.keys() - names):
        raise ValueError(f"{path}: jamba_rag holds {', '.join(unknown)}; known are {', '.join(names)}")
    given = {name: value for name in names if (value := getattr(settings, name)) is not None}
    return Advice(**{**advised, **given})
