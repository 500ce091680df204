"""The shipped samples say what their questions expect, where they expect it."""

import json
from pathlib import Path

import pytest

from ingest.parse import parse_file
from ingest.sniff import SNIFF_BYTES, sniff_media_type
from retrieval.types import ParsedDocument

SAMPLES = Path(__file__).parents[2] / "samples"
QUESTIONS = json.loads((SAMPLES / "questions.json").read_text())
FILES = sorted(path.name for path in (SAMPLES / "documents").iterdir())


@pytest.fixture(scope="module")
def documents() -> dict[str, ParsedDocument]:
    parsed = {}
    for name in FILES:
        path = SAMPLES / "documents" / name
        parsed[name] = parse_file(path, sniff_media_type(path.read_bytes()[:SNIFF_BYTES], name))
    return parsed


def test_every_kind_of_document_is_there_and_named_with_its_licence():
    assert {Path(name).suffix for name in FILES} == {".pdf", ".docx", ".html", ".md"}
    readme = (SAMPLES / "README.md").read_text()
    assert all(name in readme for name in FILES)


def test_the_handbook_has_roman_front_matter():
    parsed = parse_file(SAMPLES / "documents" / "fr12-handbook.pdf", "application/pdf")
    assert [page.label for page in parsed.pages] == ["i", "ii", "iii", *map(str, range(1, 11))]
    assert "9.1 Error codes" in [heading.title for heading in parsed.headings]


@pytest.mark.parametrize("entry", QUESTIONS["questions"], ids=lambda entry: entry["id"])
def test_the_answer_is_a_span_of_the_named_page(documents, entry):
    parsed = documents[entry["file"]]
    where = parsed.text
    if "page" in entry:
        page = parsed.pages[entry["page"] - 1]
        assert page.label == entry["page_label"]
        where = parsed.text[page.char_start : page.char_end]
    assert entry["answer"] in where
    others = [document.text for name, document in documents.items() if name != entry["file"]]
    assert not any(entry["answer"] in text for text in others)


def test_there_are_questions_without_an_answer():
    assert len(QUESTIONS["questions"]) >= 20
    assert len(QUESTIONS["unanswerable"]) >= 5
