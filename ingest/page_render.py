"""The child process that renders a page of a PDF with PDFium, highlights a passage, and writes a PNG.

Started by page_image.py, because PDFium is not thread safe and its input is untrusted.
"""

import base64
import json
import math
import struct
import zlib
from collections.abc import Sequence
from itertools import chain
from typing import Any

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from ingest.page_image import Box, letters
from ingest.parse import ParseError
from ingest.parse.child import ParseLimits, answer_parent
from ingest.parse.pdf_text import char_ranges

_WIDTH = 1240  # pixels: A4 at 150 dpi
_MAX_HEIGHT = 2600
_MAX_BOXES = 64
_MARK = (255, 226, 110)
_TINTS = tuple(bytes(value * tint // 255 for value in range(256)) for tint in _MARK)  # paper is tinted, ink stays

Rows = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def main(path: str, number: str, key: str, before: str, raw_limits: str) -> None:
    """Render page `number` and highlight occurrence `before` (from 0) of `key` (by page_image.letters)."""
    limits = ParseLimits(*json.loads(raw_limits))
    answer_parent(limits, lambda: _draw(path, int(number), key, int(before)))


def _draw(path: str, number: int, key: str, before: int) -> dict[str, Any]:
    try:
        document = pdfium.PdfDocument(path)
        page = document[number - 1]
        width, height = page.get_size()
        scale = min(_WIDTH / width, _MAX_HEIGHT / height)
        if not 0 < scale < math.inf or min(width, height) * scale < 1:
            raise ParseError("broken_pdf", f"page {number} is {width:g} x {height:g} points, which can't be drawn")
        bitmap = page.render(scale=scale, rev_byteorder=True)
        areas = _find_areas(page, bitmap, key, before)
    except (pdfium.PdfiumError, IndexError) as error:
        raise ParseError("broken_pdf", f"page {number} can't be drawn ({error})", page=number) from error
    pixels = bytearray(bitmap.buffer)
    for area in areas:
        _tint(pixels, bitmap.stride, area)
    boxes = [_to_fractions(area, bitmap.width, bitmap.height) for area in areas]
    return {"png": base64.b64encode(_to_png(pixels, bitmap)).decode(), "boxes": boxes}


def _find_areas(page: pdfium.PdfPage, bitmap: pdfium.PdfBitmap, key: str, before: int) -> list[Rows]:
    """The passage's rectangles in the image, one per line; empty if it is not on the page."""
    text_page = page.get_textpage()
    convert = bitmap.get_posconv(page)
    areas = []
    for left, bottom, right, top in _find_rects(text_page, key, before) if key else ():
        (x0, y0), (x1, y1) = convert.to_bitmap(left, top), convert.to_bitmap(right, bottom)
        x0, x1 = sorted((x0, x1))
        y0, y1 = sorted((y0, y1))  # rotated pages swap corners
        area = (max(0, x0 - 2), max(0, y0 - 2), min(bitmap.width, x1 + 2), min(bitmap.height, y1 + 2))
        if area[0] < area[2] and area[1] < area[3]:
            areas.append(area)
    return _join_neighbours(areas)


def _find_rects(text_page: pdfium.PdfTextPage, key: str, before: int) -> list[tuple[float, float, float, float]]:
    """Left, bottom, right, top in points of the passage's lines, at most _MAX_BOXES."""
    ranges, whole = char_ranges(text_page), [range(text_page.count_chars())]
    found = _find_chars(text_page, ranges, key, before)
    if not found and ranges != whole:  # the text may have been stored by a version that read columns as rows
        found = _find_chars(text_page, whole, key, before)
    rects: list[tuple[float, float, float, float]] = []
    for chars in found:
        count = min(_MAX_BOXES - len(rects), text_page.count_rects(chars.start, len(chars)))
        rects += map(text_page.get_rect, range(count))
    return rects


def _join_neighbours(areas: list[Rows]) -> list[Rows]:
    """Join rectangles on the same line, so that none is tinted twice; PDFium returns one per font run."""
    joined: list[Rows] = []
    for left, top, right, bottom in areas:
        if joined:
            l0, t0, r0, b0 = joined[-1]
            shared = min(bottom, b0) - max(top, t0)
            if 2 * shared > min(bottom - top, b0 - t0) and left - r0 < bottom - top and left >= l0:
                joined[-1] = (l0, min(top, t0), max(right, r0), max(bottom, b0))
                continue
            if shared > 0:  # tight line spacing
                top = min(max(top, b0), bottom) if left < r0 and l0 < right else top
        joined.append((left, top, right, bottom))
    return joined


def _find_chars(text_page: pdfium.PdfTextPage, ranges: Sequence[range], key: str, before: int) -> list[range]:
    """PDFium character indices, within `ranges`, of the wanted occurrence or otherwise the last one."""
    folded, owners = [], []
    for index in chain.from_iterable(ranges):
        code = pdfium_c.FPDFText_GetUnicode(text_page, index)
        piece = letters(chr(code)) if 0 < code < 0x110000 else ""
        folded.append(piece)
        owners += [index] * len(piece)
    text = "".join(folded)
    found = -1
    for _ in range(before + 1):
        start = text.find(key, found + 1 if found < 0 else found + len(key))
        if start < 0:
            break
        found = start
    if found < 0:
        return []
    covered = set(owners[found : found + len(key)])
    inside = ([index for index in chars if index in covered] for chars in ranges)
    return [range(indices[0], indices[-1] + 1) for indices in inside if indices]


def _tint(pixels: bytearray, stride: int, area: Rows) -> None:
    """Multiply the area's colours by the mark's, in place."""
    left, top, right, bottom = area
    for row in range(top, bottom):
        for channel, tint in enumerate(_TINTS):
            place = slice(row * stride + 3 * left + channel, row * stride + 3 * right, 3)
            pixels[place] = pixels[place].translate(tint)


def _to_fractions(area: Rows, width: int, height: int) -> Box:
    left, top, right, bottom = area
    return (
        round(left / width, 4),
        round(top / height, 4),
        round((right - left) / width, 4),
        round((bottom - top) / height, 4),
    )


def _to_png(pixels: bytearray, bitmap: pdfium.PdfBitmap) -> bytes:
    """8-bit RGB, each row stored without a filter."""
    assert bitmap.n_channels == 3
    row_bytes = 3 * bitmap.width
    starts = range(0, bitmap.height * bitmap.stride, bitmap.stride)
    rows = b"".join(b"\0" + pixels[start : start + row_bytes] for start in starts)
    header = struct.pack(">IIBBBBB", bitmap.width, bitmap.height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, body) for kind, body in chunks)


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
