"""OCR of scanned pages with Tesseract (Apache-2.0, a separate program), if it is installed.

Image and text are passed through pipes; nothing is written to disk.
"""

import os
import re
import shutil
import subprocess
from functools import cache

import pypdfium2 as pdfium

from ingest.parse import ParseError

_DOTS_PER_INCH = 300
_MAX_PIXELS = 40_000_000
_PAGE_S = 60.0
_TORN = re.compile(r"(?<=[\w,;])\n\n(?=[a-zà-öø-ÿ])")  # within a sentence


@cache
def find_program() -> str | None:
    """The path of Tesseract; None if not installed."""
    return shutil.which("tesseract", path=f"{os.defpath}:/usr/local/bin")


def read_page(page: pdfium.PdfPage, program: str) -> str:
    """The text of a rendered page, in reading order. Raises ParseError ocr_failed."""
    width, height = page.get_size()  # points, 1/72 inch
    scale = min(_DOTS_PER_INCH / 72, (_MAX_PIXELS / max(1.0, width * height)) ** 0.5)
    bitmap = page.render(scale=scale, grayscale=True)
    rows = bitmap.to_numpy()
    picture = b"P5 %d %d 255\n" % (rows.shape[1], rows.shape[0]) + rows.tobytes()
    bitmap.close()
    try:
        done = subprocess.run(
            [program, "stdin", "stdout", "--dpi", str(round(scale * 72))],
            input=picture,
            capture_output=True,
            timeout=_PAGE_S,
            check=True,
            env={"PATH": os.defpath, "OMP_THREAD_LIMIT": "1", "LANG": "C.UTF-8"},
        )
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error).encode()
        raise ParseError("ocr_failed", f"OCR failed: {detail.decode('utf-8', 'replace').strip()[:200]}") from error
    return join_lines(done.stdout.decode("utf-8", "replace").replace("\f", "").strip())


def join_lines(text: str) -> str:
    """Join lines of one sentence, which Tesseract separates into paragraphs if the line spacing is wide."""
    return _TORN.sub("\n", text)
