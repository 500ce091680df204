"""What a parser owes for any bytes: a document that keeps the promises of its type, or a ParseError. Nothing else."""

import json
from pathlib import Path

from ingest.chunk import ChunkLimits, chunk_document
from ingest.parse import ParseError, parse_bytes
from ingest.parse.decode import normalize_text
from ingest.parse.wire import from_json, to_json
from ingest.sniff import (
    DOCX,
    EML,
    EPUB,
    HTML,
    MAN,
    MARKDOWN,
    MBOX,
    NOTEBOOK,
    ODT,
    PDF,
    PPTX,
    RST,
    RTF,
    SOURCE,
    TAR,
    TEXT,
    XLSX,
    ZIP,
)
from retrieval.types import ParsedDocument

CORPUS = Path(__file__).parent / "corpus"
FORMATS = {
    **{"pdf": PDF, "docx": DOCX, "xlsx": XLSX, "pptx": PPTX, "odt": ODT, "epub": EPUB, "rtf": RTF},
    **{"html": HTML, "markdown": MARKDOWN, "rst": RST, "source": SOURCE, "text": TEXT, "mail": EML, "mbox": MBOX},
    **{"json": "application/json", "csv": "text/csv", "tsv": "text/tab-separated-values", "xml": "application/xml"},
    **{"zip": ZIP, "tar": TAR, "notebook": NOTEBOOK, "man": MAN},
}
_MAX_PAGES = 50
_LIMITS = ChunkLimits(target_tokens=32, min_tokens=8)


def check_parser(media_type: str, data: bytes) -> ParsedDocument | None:
    """Parse and cut `data`; None when it was refused. Raises AssertionError, or what the parser let out."""
    try:
        parsed = parse_bytes(data, media_type, max_pages=_MAX_PAGES)
    except ParseError as error:
        assert error.code and str(error)
        return None
    check_document(parsed)
    return parsed


def check_document(parsed: ParsedDocument) -> None:
    text = parsed.text
    assert text.strip() and text == normalize_text(text)
    assert from_json(json.loads(json.dumps(to_json(parsed), ensure_ascii=False).encode())) == parsed
    assert [page.page for page in parsed.pages] == list(range(1, len(parsed.pages) + 1))
    edges = [edge for page in parsed.pages for edge in (page.char_start, page.char_end)]
    assert edges == sorted(edges) and all(0 <= edge <= len(text) for edge in edges)
    starts = [heading.char_start for heading in parsed.headings]
    assert starts == sorted(starts) and all(0 <= start <= len(text) for start in starts)
    assert all(heading.level >= 1 and heading.title for heading in parsed.headings)
    chunks = chunk_document(parsed, "d", _LIMITS, lambda part: len(part.split()))
    assert all(text[chunk.char_start : chunk.char_end] == chunk.text for chunk in chunks)
    assert "".join("".join(chunk.text for chunk in chunks).split()) == "".join(text.split())
