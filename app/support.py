"""Which sentences of an answer have no quote in them, so that a reader can be told: nobody checked those.

Knows nothing of documents: what a quote is and where it stands was decided in quotes.py. The page has the same rule,
in web/support.js.
"""

import re
from collections.abc import Sequence

# A sentence ends at its mark and what closes behind it, or with its line; a line ending in a colon leads to the next.
_BOUNDARY = re.compile(r"""(?<=[.!?…])["'”’»)\]]*\s+|(?<=[。！？])|(?<![:：\s])\s*\n\s*""")
_WORD = re.compile(r"\w")


def unsupported_spans(text: str, quotes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) of the sentences of `text` that none of the spans in `quotes` reaches into.

    A boundary inside a quote is none. What holds no letter or digit is no sentence.
    """
    inside = [m for m in _BOUNDARY.finditer(text) if not any(a < m.end() and m.start() < b for a, b in quotes)]
    starts = [0, *(m.end() for m in inside)]
    ends = [*(m.start() + len(m[0].rstrip()) for m in inside), len(text)]
    return [
        (start, end)
        for start, end in zip(starts, ends, strict=True)
        if _WORD.search(text[start:end]) and not any(a < end and start < b for a, b in quotes)
    ]
