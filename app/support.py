"""Finds the sentences of an answer that contain no quote, which are shown as unchecked.

Quotes are located by quotes.py. web/support.js implements the same rule.
"""

import re
from collections.abc import Sequence

# A sentence ends at its mark plus closing quotes or brackets, or with its line; a line ending in a colon continues.
_BOUNDARY = re.compile(r"""(?<=[.!?…])["'”’»)\]]*\s+|(?<=[。！？])|(?<![:：\s])\s*\n\s*""")
_WORD = re.compile(r"\w")


def unsupported_spans(text: str, quotes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) of the sentences of `text` that no span in `quotes` overlaps.

    Sentences do not end inside a quote. Text without any letter or digit is no sentence.
    """
    inside = [m for m in _BOUNDARY.finditer(text) if not any(a < m.end() and m.start() < b for a, b in quotes)]
    starts = [0, *(m.end() for m in inside)]
    ends = [*(m.start() + len(m[0].rstrip()) for m in inside), len(text)]
    return [
        (start, end)
        for start, end in zip(starts, ends, strict=True)
        if _WORD.search(text[start:end]) and not any(a < end and start < b for a, b in quotes)
    ]
