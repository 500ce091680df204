"""Words, for lexical similarity."""

from __future__ import annotations

import re

MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"  # regex alternatives
_WORD = re.compile(r"[A-Za-z0-9_]{2,}")


def words(text: str) -> list[str]:
    """Lower-case words without plural s."""
    return [w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in
            (m.lower() for m in _WORD.findall(text))]  # fmt: skip
