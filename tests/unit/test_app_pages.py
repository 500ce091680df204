"""Pages of a PDF as pictures over HTTP: what is marked, and what has no picture. Roles stand in test_app_auth.py."""

import asyncio
import struct
import zlib
from pathlib import Path

import pytest
from app_kit import GARDEN

from app import page_images
from ingest.page_image import letters, render_page
from ingest.parse import ParseError, parse_file

pytestmark = pytest.mark.anyio

HANDBOOK = Path(__file__).resolve().parents[2] / "samples" / "documents" / "fr12-handbook.pdf"
PAPER = bytes((255, 255, 255))


@pytest.fixture(scope="module")
async def handbook(client) -> dict:
    document = await client.upload("handbook.pdf", HANDBOOK.read_bytes())
    assert document["status"] == "ready"
    return document


def read_png(png: bytes) -> tuple[int, int, list[bytes]]:
    """Width, height and rows of an 8-bit RGB PNG whose rows have no filter."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", png[16:26])
    assert (depth, kind) == (8, 2)
    length = struct.unpack(">I", png[33:37])[0]
    data = zlib.decompress(png[41 : 41 + length])
    step = 1 + 3 * width
    assert len(data) == height * step and set(data[::step]) == {0}
    return width, height, [data[row * step + 1 : (row + 1) * step] for row in range(height)]


def read_boxes(reply) -> list[list[float]]:
    return [[float(value) for value in box.split()] for box in reply.headers["highlight-boxes"].split(", ") if box]


async def get_words(client, document_id: str, page: int, words: str) -> tuple[int, int]:
    """Offsets of words on a page, as a citation has them."""
    body = (await client.get(f"/v1/documents/{document_id}/text")).json()
    span = body["pages"][page - 1]
    start = body["text"].index(words, span["char_start"], span["char_end"])
    return start, start + len(words)


async def test_an_original_that_is_missing_is_410_until_it_is_sent_again(client, handbook):
    content = HANDBOOK.read_bytes()
    client.app.state.service.files.path(handbook["sha256"]).unlink()
    paths = [f"/v1/documents/{handbook['id']}/{part}" for part in ("file", "pages/3/image")]
    for path in paths:
        reply = await client.get(path)
        assert (reply.status_code, reply.json()["code"]) == (410, "file_missing")
    assert (await client.get(f"/v1/documents/{handbook['id']}/text")).status_code == 200
    assert (await client.post("/v1/documents", files={"file": ("handbook.pdf", content)})).status_code == 200
    assert [(await client.get(path)).status_code for path in paths] == [200, 200]


async def test_many_who_want_pictures_leave_threads_to_others(client, handbook):
    path = f"/v1/documents/{handbook['id']}/pages/1/image"
    with page_images._slot(), page_images._slot():
        wanted = [asyncio.create_task(client.get(path)) for _ in range(60)]
        while len(refused := [reply for reply in wanted if reply.done()]) < 52:
            await asyncio.sleep(0.01)
        assert {reply.result().status_code for reply in refused} == {429}
        assert (await client.get("/v1/documents")).status_code == 200
    assert [reply.status_code for reply in await asyncio.gather(*wanted)].count(200) == 8


async def test_a_page_is_a_picture_with_the_quote_marked(client, handbook):
    start, end = await get_words(client, handbook["id"], 3, "Raising the mast")
    path = f"/v1/documents/{handbook['id']}/pages/3/image"
    plain = await client.get(path)
    marked = await client.get(path, params={"start": start, "end": end})
    assert marked.headers["content-type"] == "image/png" and marked.headers["x-content-type-options"] == "nosniff"
    width, height, rows = read_png(marked.content)
    assert width * height < 4_000_000
    [(left, top, box_width, box_height)] = read_boxes(marked)
    place = slice(round((top + box_height / 2) * height), round((left + 0.001) * width))
    assert rows[place.start][3 * place.stop :][:3] != PAPER
    _, _, plain_rows = read_png(plain.content)
    first, last = round(top * height), round((top + box_height) * height)
    assert [row for row in range(height) if rows[row] != plain_rows[row]] == list(range(first, last))
    assert read_boxes(plain) == [] and 0.1 < left < 0.9 and box_width > 0.05


async def test_every_chunk_of_a_pdf_is_found_on_its_page(client, handbook):
    chunks = (await client.get(f"/v1/documents/{handbook['id']}/chunks")).json()["data"]
    for chunk in chunks[::8]:
        place = chunk["location"]
        span = {"start": place["char_start"], "end": place["char_end"]}
        reply = await client.get(f"/v1/documents/{handbook['id']}/pages/{place['page_start']}/image", params=span)
        assert read_boxes(reply), chunk["text"]


async def test_a_picture_that_the_client_has_is_not_drawn_again(client, handbook):
    path = f"/v1/documents/{handbook['id']}/pages/1/image"
    first = await client.get(path)
    again = await client.get(path, headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = await client.get(f"{path}?start=0&end=9", headers={"If-None-Match": first.headers["etag"]})
    assert other.status_code == 200
    assert "private" in first.headers["cache-control"]


@pytest.mark.parametrize(("page", "status"), [(10_000, 404), (2**63, 404), (0, 422), (-1, 422), ("x", 422)])
async def test_a_page_that_is_not_there(client, handbook, page, status):
    reply = await client.get(f"/v1/documents/{handbook['id']}/pages/{page}/image")
    assert (reply.status_code, reply.json()["code"]) == (
        status,
        "page_not_found" if status == 404 else "invalid_request",
    )


async def test_what_is_no_pdf_has_no_pages(client):
    document = await client.upload("garden.md", GARDEN)
    reply = await client.get(f"/v1/documents/{document['id']}/pages/1/image")
    assert (reply.status_code, reply.json()["code"]) == (404, "page_not_found")


async def test_a_damaged_pdf_says_so(client, tmp_path):
    failed = await client.upload("failed.pdf", b"%PDF-1.7\nno PDF at all\n" * 20)
    reply = await client.get(f"/v1/documents/{failed['id']}/pages/1/image")
    assert (reply.status_code, reply.json()["code"]) == (409, "document_not_ready")
    later = await client.upload("later.pdf", HANDBOOK.read_bytes() + b"\n% damaged later")
    client.app.state.service.files.path(later["sha256"]).write_bytes(b"%PDF-1.7\n" * 20)
    reply = await client.get(f"/v1/documents/{later['id']}/pages/1/image")
    assert (reply.status_code, reply.json()["code"]) == (422, "unreadable_document")
    await client.delete(f"/v1/documents/{later['id']}")


def test_of_equal_words_the_right_ones_are_marked():
    text = parse_file(HANDBOOK, "application/pdf")
    page = max(text.pages, key=lambda page: page.char_end - page.char_start)
    words = text.text[page.char_start : page.char_end]
    first = words.index("the ")
    second = words.index("the ", first + 60)
    tops = [render_page(HANDBOOK, page.page, words, start, start + 3).boxes[0][1] for start in (first, second)]
    assert tops[0] < tops[1]


def test_words_that_are_not_on_the_page_are_not_marked():
    assert render_page(HANDBOOK, 1, "words of another page", 0, 20).boxes == ()


def test_memory_is_limited():
    with pytest.raises(ParseError, match="memory"):
        render_page(HANDBOOK, 1, memory_bytes=8 << 20)


def test_letters_are_what_pages_and_stored_text_share():
    assert letters("Ef\ufb01-\nci\u00ad\u00e9nt | 10 %") == "efficient10"
