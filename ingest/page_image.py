"""Renders a page of a PDF with one passage highlighted, in a sandboxed child process (parse/cage.py).

This is the service's half, without a PDF library; page_render.py is the child's. The passage is matched on the page by
letters and digits only, because white space, hyphens and ligatures differ between the stored text and the page.
"""

import base64
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from ingest.parse.cage import run_in_child
from ingest.parse.child import ParseLimits

_LIMITS = ParseLimits(wall_s=30.0, cpu_s=20, output_bytes=24 * 1024**2)
_MAX_KEY_CHARS = 8000  # passed as an argument, which Linux limits to 128 KiB

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class PageImage:
    """`boxes`: the highlighted rectangles (left, top, width, height), in fractions of the image."""

    png: bytes
    boxes: tuple[Box, ...]


def render_page(
    path: Path, page: int, page_text: str = "", start: int = 0, end: int = 0, memory_bytes: int = _LIMITS.memory_bytes
) -> PageImage:
    """Page `page`, counted from 1, with `page_text[start:end]` highlighted if found. Raises ParseError."""
    key = letters(page_text[start:end])[:_MAX_KEY_CHARS]
    before = letters(page_text[:start]).count(key) if key else 0
    arguments = [str(path.resolve()), str(page), key, str(before)]
    limits = _LIMITS._replace(memory_bytes=memory_bytes)
    result = run_in_child("ingest.page_render", arguments, limits)
    return PageImage(base64.b64decode(result["png"]), tuple((x, y, w, h) for x, y, w, h in result["boxes"]))


def letters(text: str) -> str:
    """The letters and digits of the text, case-folded, ligatures and accents decomposed."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKD", text).casefold()))
