"""Text of scanned pages, where Tesseract (Apache-2.0, a program of its own) is installed on the service.

It gets the picture through a pipe and gives the text through another; nothing is written to disk.
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
    """Where Tesseract is; None without it."""
    return shutil.which("tesseract", path=f"{os.defpath}:/usr/local/bin")


def read_page(page: pdfium.PdfPage, program: str) -> str:
    """The text that stands on the page's picture, in reading order. Raises ParseError ocr_failed."""
    width, height = page.get_size()  # points, 72 an inch
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
    """With the lines of a sentence together: where they stand far apart, Tesseract makes paragraphs of them."""
    return _TORN.sub("\n", text)
