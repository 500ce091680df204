"""Images of PDF pages over HTTP, with ETags, and a limit on how many are rendered at once."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Response

from app.errors import Overloaded, PageNotFound
from app.service import RagService
from ingest.page_image import PageImage, render_page

_DRAWING = 1  # part of the ETag; increment when rendering changes
_AT_ONCE = 2
_WAIT_S = 10.0
_MOST_WAITING = 8  # each occupies a thread
_slots = threading.BoundedSemaphore(_AT_ONCE)
_places = threading.BoundedSemaphore(_AT_ONCE + _MOST_WAITING)


def respond(
    service: RagService,
    document_id: str,
    number: int,
    span: tuple[int, int],
    if_none_match: str | None,
    memory_bytes: int,
) -> Response:
    """The image of page `number` with the characters `span` of the text highlighted, or a 304. Blocks.

    Shows the current ready version, as `/text` does. Raises PageNotFound, DocumentNotReady, ParseError, Overloaded,
    OriginalMissing.
    """
    content = service.store.get_content(document_id)
    shown = service.store.answering_version(document_id)
    if shown.media_type != "application/pdf":
        raise PageNotFound(f"{shown.filename!r} is no PDF and has no pages to show; read its text instead")
    if number > len(content.pages):
        raise PageNotFound(
            f"page {number} is after the last page of {shown.filename!r}, which has {len(content.pages)}"
        )
    page = content.pages[number - 1]
    text = content.text[page.char_start : page.char_end]
    start, end = (min(max(0, offset - page.char_start), len(text)) for offset in span)
    name = f"{_DRAWING} {shown.sha256} {number} {start} {max(start, end)}"
    headers = {"ETag": f'"{hashlib.sha256(name.encode()).hexdigest()[:32]}"', "Cache-Control": "private, no-cache"}
    if is_known(headers["ETag"], if_none_match):
        return Response(status_code=304, headers=headers)
    with _slot():
        image = render_page(service.files.find(shown.sha256), number, text, start, end, memory_bytes)
    return Response(image.png, media_type="image/png", headers={**headers, "Highlight-Boxes": _format_boxes(image)})


def is_known(etag: str, if_none_match: str | None) -> bool:
    """Whether the header If-None-Match matches this ETag."""
    return if_none_match is not None and (if_none_match.strip() == "*" or etag in if_none_match)


@contextmanager
def _slot() -> Iterator[None]:
    """A rendering slot. Raises Overloaded if too many requests wait for one, or this one has waited too long."""
    busy = Overloaded(f"{_AT_ONCE} pages are being drawn, which is the limit; try again shortly")
    if not _places.acquire(blocking=False):
        raise busy
    try:
        if not _slots.acquire(timeout=_WAIT_S):
            raise busy
        try:
            yield
        finally:
            _slots.release()
    finally:
        _places.release()


def _format_boxes(image: PageImage) -> str:
    return ", ".join(" ".join(f"{value:g}" for value in box) for box in image.boxes)
